"""What the columns of a CSV mean where nobody says it: which describe an image, and which only identify it.

A column that identifies (`patient`, `slide_id`, `Unnamed: 0`, one value a row) is never learned unless it is asked for.
One that names patients, or what else several images show, keeps their images in one split.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from keyhole.data.item import Doubt, Row, Table
from keyhole.data.layout import split_named
from keyhole.errors import ConfigError, DataError
from keyhole.tasks.kinds import MOST_NUMBERED_CLASSES, SEPARATOR, looks_like_number
from keyhole.util.wording import listed, nearest

GROUPS = (
    "patient",
    "person",
    "subject",
    "participant",
    "individual",
    "donor",
    "mouse",
    "case",
    "specimen",
    "block",
    "slide",
    "wsi",
)
"""What several images may show, the widest first: its images belong in one split."""
_SUFFIX = r"_?(ids?|no|nr|num|number|names?|code|key|uid|uuid|identifier|barcode)"
_GROUP = re.compile(rf"({'|'.join(GROUPS)})s?({_SUFFIX})?|(\w+_)?({'|'.join(GROUPS)}){_SUFFIX}")
_IDENTIFIER = re.compile(
    r"ids?|index|idx|unnamed(_\d+)?|level_0|row(_?(id|no|nr|number|index))?|u?uid|guid|key|pk|url|uri|"
    r"(file|image|img|picture|photo|tile|patch|roi|record|series|study|scan|sample)_?(id|ids|name|no|nr|number|uid)|"
    r"file|filename|filepath|path|(image|img|file)_?path|md5|sha\d*|hash|checksum|accession(_?(no|number))?|barcode|"
    r"mrn|\w+_(uuid|guid|barcode|instance_uid)"
)
_ENDS_IN_ID = re.compile(r"\w+_id")
_YES_OR_NO = {"0", "1", "yes", "no", "true", "false", "y", "n", "case", "control", "healthy", "patient"}
_FEWEST = 5
"""Rows from which on numbers that rise by one count as numbers of the rows."""


def with_columns_read(path: Path, table: Table, group: str, asked: Collection[str]) -> Table:
    """The table with the groups and splits that its columns give, and with the columns that only identify.

    Args:
        path: of the CSV, for messages.
        table: as read, words for unknown labels already taken out.
        group: `auto`, `none`, or the column whose images stay in one split.
        asked: columns that the user named as tasks, or that a model predicts; they mean nothing else.

    Raises:
        DataError: no column of the name `group`.
    """
    columns = [name for name in table.columns if name not in asked]
    texts = {name: [row.item.labels[name] for row in table.rows] for name in columns}
    table = _with_split(path, table, texts)
    columns = [name for name in columns if name not in table.identifying]
    named = [name for name in columns if _names_group(name, texts[name])]
    named.sort(key=lambda name: next(rank for rank, stem in enumerate(GROUPS) if stem in name.lower()))
    identifying = dict(table.identifying)
    for name in columns:
        if reason := "names what images belong together" if name in named else _identifies(name, texts[name]):
            identifying[name] = reason
    chosen = _chosen(path, table, group, named)
    rows, doubts = table.rows, list(table.doubts)
    if group == "none":
        rows = [replace(row, item=replace(row.item, group=None)) for row in rows]
    elif chosen:
        identifying[chosen] = "names what images belong together"
        rows = [replace(row, item=replace(row.item, group=row.item.labels[chosen] or None)) for row in rows]
    elif named:
        doubts += _split_patients(named[0], texts[named[0]], rows)
    return replace(table, rows=rows, identifying=identifying, grouped_by=chosen, doubts=doubts)


def _chosen(path: Path, table: Table, group: str, named: Sequence[str]) -> str:
    """The column that becomes `group`; empty where there is none, or where it is `group` itself."""
    if group == "none":
        return ""
    if group == "auto" or (table.written and group not in table.columns):  # a run's manifest has it under `group`
        return "" if table.has_group or not named else named[0]
    if group.lower() == "group" and table.has_group:
        return ""
    if group not in table.columns:
        raise DataError(
            f"{path}: no column {group!r} for --data.group{nearest(group, table.columns)}; the columns are "
            f"{listed(table.columns, 8)}. Name one of them, or `none`."
        )
    return group


def column_notes(table: Table, names: Collection[str]) -> list[str]:
    """At most one sentence: what groups the images, and which columns are not learned though nobody named the tasks."""
    said = []
    if table.grouped_by:
        groups = len({row.item.group for row in table.rows if row.item.group})
        said.append(f"`{table.grouped_by}` is the group: the images of each of its {groups} values stay in one split")
    left = [f"`{name}` ({why})" for name, why in table.identifying.items() if name not in (*names, table.grouped_by)]
    if left:
        said.append(f"not learned: {', '.join(left)}")
    ways = ["--data.group COLUMN or none"] * bool(table.grouped_by) + ["--data.tasks names what to learn"] * bool(left)
    return [f"{'; '.join(said)} ({'; '.join(ways)})"] if said else []


def tasks_among(path: Path, table: Table) -> list[str]:
    """The columns to learn where nobody named them.

    Raises:
        DataError: all columns identify.
    """
    tasks = [name for name in table.columns if name not in table.identifying]
    if table.columns and not tasks:
        found = "; ".join(f"{name} {why}" for name, why in table.identifying.items())
        raise DataError(
            f"{path}: no column to learn: {found}. Add a column with labels, or name what to learn: "
            f"--data.tasks {table.columns[0]!r}."
        )
    return tasks


def refuse_column_for_folder(path: Path, group: str) -> None:
    """A folder has no columns.

    Raises:
        ConfigError: a column is named.
    """
    if group not in ("auto", "none"):
        raise ConfigError(
            f"data.group (={group}) names a column, but {path} is a folder. Give a CSV with the columns image, label "
            f"and {group}."
        )


def _with_split(path: Path, table: Table, texts: Mapping[str, Sequence[str]]) -> Table:
    """The table with splits from a column of another name, where it has no `split` but one that says nothing else."""
    if any(row.item.split for row in table.rows):
        return table
    for name, cells in texts.items():
        roles = {split_named(text) for text in cells if text}
        if "train" in roles and len(roles) > 1 and "" not in roles:
            rows = [
                replace(row, item=replace(row.item, split=split_named(row.item.labels[name]))) for row in table.rows
            ]
            note = f"{path}: `{name}` is read as the split ({listed(sorted({text for text in cells if text}), 8)})"
            return replace(table, rows=rows, notes=[*table.notes, note], identifying={name: "names the split"})
    return table


def _plain(name: str) -> str:
    """`PatientID`, `patient id` and `Patient-ID` as `patient_id`."""
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")


def _names_group(name: str, texts: Sequence[str]) -> bool:
    plain = _plain(name)
    values = {text.lower() for text in texts if text}
    # `case` and `patient` may also say who is ill.
    return _GROUP.fullmatch(plain) is not None and not (values <= _YES_OR_NO and plain in GROUPS)


def _identifies(name: str, texts: Sequence[str]) -> str:
    """Why a column says which image it is, not what it shows; empty where it may be learned."""
    known = [text for text in texts if text]
    values, plain = set(known), _plain(name)
    if len(known) > 2 and len(values) == len(known) and not _quantity(known):
        return "differs in every row"
    if len(known) >= _FEWEST and _counts_rows(known):
        return "numbers the rows"
    if _IDENTIFIER.fullmatch(plain):
        return "identifies the row"
    many = max(MOST_NUMBERED_CLASSES, len(known) / 2)
    if len(values) > many and (_ENDS_IN_ID.fullmatch(plain) or not _quantity(known)):
        return f"has {len(values)} values in {len(known)} rows"
    return ""


def _quantity(texts: Sequence[str]) -> bool:
    """Whether the texts may be numbers to predict, or sets of labels; `0012` is a name."""
    if any(SEPARATOR in text for text in texts):
        return True
    return all(looks_like_number(text) and not re.match(r"0\d", text) for text in texts)


def _counts_rows(texts: Sequence[str]) -> bool:
    if not all(looks_like_number(text) and "," not in text for text in texts):
        return False
    numbers = [float(text) for text in texts]
    return all(after - before == 1 for before, after in pairwise(numbers))


def _split_patients(name: str, texts: Sequence[str], rows: Sequence[Row]) -> list[Doubt]:
    """Patients whose images are in several groups, where the CSV has a column `group` of its own."""
    groups = defaultdict(set)
    for text, row in zip(texts, rows, strict=True):
        if text:
            groups[text].add(row.item.group or row.where)
    apart = [text for text, found in groups.items() if len(found) > 1]
    if not apart:
        return []
    problem = f"{len(apart)} values have images in more than one `group`, so perhaps in more than one split"
    return [Doubt(name, f"{problem}: {listed(apart)}", f"If they are patients or the like: --data.group {name!r}.")]
