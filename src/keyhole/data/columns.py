"""The columns of a CSV: which describe an image, which only identify it, and which cells mean an unknown label.

A column that identifies images (`patient`, `slide_id`, another value in each row) is learned only if the user names it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import pairwise, zip_longest
from pathlib import Path

from keyhole.data.item import DataTable, Finding, Item, Row, warning
from keyhole.data.read_folder import split_named
from keyhole.errors import DataError
from keyhole.tasks.kinds import MAX_NUMBERED_CLASSES, Task
from keyhole.tasks.label_text import SEPARATOR, looks_like_number
from keyhole.util.wording import counted, listed, nearest

GROUPS = (
    *("patient", "person", "subject", "participant", "individual", "donor", "mouse"),
    *("case", "specimen", "block", "slide", "wsi"),
)
"""Words for what several images may show, widest first; all images of one belong in one split."""
GROUP_REASON = "names what images belong together"
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
MIN_COUNTING_ROWS = 5  # rows from which on numbers that rise by one count as row numbers
MAX_MISTYPED, MIN_USUAL_RATIO = 2, 10
"""Most images with a mistyped label, and how many times as many have the label that was meant, at least."""
MIN_WORD = 6  # letters of the longer of two words that may be one, mistyped: 'iii' and 'ii' are two grades
_LETTERS, _DIGITS = re.compile(r"[^\W\d_]+"), re.compile(r"\d+")
SPREADSHEET_ERRORS = frozenset({"#ref!", "#value!", "#div/0!", "#name?", "#num!", "#null!", "#na"})
UNKNOWN_AMONG_NUMBERS = frozenset({"none", "?", "-", ".", "missing", "unknown"})
"""Words, in lower case, that mean an unknown label if every other cell of the column is a number."""


def with_columns_read(path: Path, table: DataTable, group: str, asked: Collection[str]) -> DataTable:
    """Add the groups and splits that the columns give, and find the columns that only identify.

    `asked` are the columns that the user named as tasks, or that a model predicts: they are labels.
    """
    texts = {name: [row.item.labels[name] for row in table.rows] for name in table.columns if name not in asked}
    table = _with_split(path, table, texts)
    identifying = dict(table.identifying)
    columns = [name for name in texts if name not in identifying]
    named = [name for name in columns if _names_group(name, texts[name])]
    named.sort(key=lambda name: next(rank for rank, stem in enumerate(GROUPS) if stem in name.lower()))
    for name in columns:
        if reason := GROUP_REASON if name in named else _identifies(name, texts[name]):
            identifying[name] = reason
    chosen = _group_column(path, table, group, named)
    rows, doubts = table.rows, list(table.doubts)
    if group == "none":
        rows = [row.but(group=None) for row in rows]
    elif chosen:
        identifying[chosen] = GROUP_REASON
        rows = [row.but(group=row.item.labels[chosen] or None) for row in rows]
    elif named:
        doubts += _divided_patients(named[0], texts[named[0]], rows)
    return replace(table, rows=rows, identifying=identifying, grouped_by=chosen, doubts=doubts)


def without_missing_words(table: DataTable, words: Collection[str], classes: Collection[str] = ()) -> DataTable:
    """Empty the cells whose words mean an unknown label; `DataTable.missing` counts them.

    Words count in any case, but a word in mixed case (`None`) only as written. `classes` of a trained model are labels
    even if `words` has them.
    """
    if not words:
        return table
    exact = frozenset(word for word in words if word not in (word.lower(), word.upper()))
    any_case = frozenset(word.lower() for word in words if word not in exact) | SPREADSHEET_ERRORS
    unknown: dict[str, Counter[str]] = {}
    for name in table.columns:
        counts = Counter(row.item.labels[name] for row in table.rows)
        rest = {text for text in counts if text in classes or not (text in exact or text.lower() in any_case)} - {""}
        others = {text for text in rest if not looks_like_number(text)}
        if others < rest and all(text.lower() in UNKNOWN_AMONG_NUMBERS and text not in classes for text in others):
            rest -= others
        unknown[name] = Counter({text: counts[text] for text in counts if text and text not in rest})
    if not any(unknown.values()):
        return table
    rows = []
    for row in table.rows:
        labels = {name: "" if text in unknown[name] else text for name, text in row.item.labels.items()}
        rows.append(row.but(labels=labels))
    return replace(table, rows=rows, missing=unknown)


def tasks_among(path: Path, table: DataTable) -> list[str]:
    """Return the columns to learn if the user named none."""
    tasks = [name for name in table.columns if name not in table.identifying]
    if table.columns and not tasks:
        found = "; ".join(f"{name} {why}" for name, why in table.identifying.items())
        raise DataError(
            f"{path}: no column to learn: {found}. Add a column with labels, or name what to learn: "
            f"--data.tasks {table.columns[0]!r}."
        )
    return tasks


def column_notes(table: DataTable, tasks: Iterable[str], named: Collection[str], learns: bool = True) -> list[str]:
    """Return sentences about words read as unknown labels, the column of groups, and columns that are not learned.

    The columns `tasks` are learned, unless a trained model is evaluated; columns in `named`, which the user named, are
    not mentioned.
    """
    notes = []
    for name in tasks:
        if found := table.missing.get(name):
            cells = " and ".join(f"{count} cells {text!r}" for text, count in sorted(found.items()))
            remedy = " (--data.missing names such words)" if learns else ""
            notes.append(f"{name}: {cells} mean that the label is unknown{remedy}")
    parts, options = [], []
    if table.grouped_by:
        groups = len({row.item.group for row in table.rows if row.item.group})
        drawn = learns and not any(row.item.split for row in table.rows)
        kept = f"the images of each of its {groups} values stay in one split" if drawn else f"it has {groups} values"
        parts.append(f"`{table.grouped_by}` is the group: {kept}")
        options.append("--data.group COLUMN or none")
    left = [f"`{name}` ({why})" for name, why in table.identifying.items() if name not in (*named, table.grouped_by)]
    if left and learns:
        parts.append(f"not learned: {', '.join(left)}")
        options.append("--data.tasks names what to learn")
    told = f" ({'; '.join(options)})" if learns else ""
    return [*notes, f"{'; '.join(parts)}{told}"] if parts else notes


def alike_classes(tasks: Sequence[Task]) -> list[Finding]:
    """Return a warning about classes of a task that differ only in case or in the kind of blank."""
    same: dict[tuple[str, str], list[str]] = defaultdict(list)
    for task in tasks:
        for name in task.classes:
            plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
            same[task.name, plain].append(repr(name))
    problem = "differ in upper and lower case alone, and are learned as classes"
    return [
        warning(task, f"{' and '.join(names)} {problem}", "Write them alike if they are one class.")
        for (task, _), names in same.items()
        if len(names) > 1
    ]


def mistyped_classes(tasks: Sequence[Task], items: Iterable[Item]) -> list[Finding]:
    """Return a warning about each class of one or two images whose name differs by one letter from a frequent class."""
    found, items = [], list(items)
    for task in tasks:
        counts = Counter(name for item in items for name in task.classes_of(item.labels[task.name]))
        frequent = [name for name, count in counts.items() if count >= MIN_USUAL_RATIO]
        for rare in (name for name, count in counts.items() if count <= MAX_MISTYPED):
            for usual in frequent:
                if counts[usual] >= MIN_USUAL_RATIO * counts[rare] and _is_slip(rare, usual):
                    problem = f"{rare!r} ({counted(counts[rare])}) is almost {usual!r} ({counted(counts[usual])})"
                    found.append(warning(task.name, problem, "Write them alike if it is mistyped."))
    return found


def _is_slip(one: str, other: str) -> bool:
    """Return whether texts differ by a letter of a long word, but not as names of grades, types and opposites do.

    >>> _is_slip("big defctive", "big defective"), _is_slip("luminal A", "luminal B"), _is_slip("typical", "atypical")
    (True, False, False)
    """
    if abs(len(one) - len(other)) > 1 or _DIGITS.findall(one) != _DIGITS.findall(other):
        return False
    words = _LETTERS.findall(one.casefold()), _LETTERS.findall(other.casefold())
    different = [pair for pair in zip_longest(*words, fillvalue="") if pair[0] != pair[1]]
    if len(different) != 1:
        return False
    short, long = sorted(different[0], key=len)
    if len(long) < MIN_WORD or short == long[1:] or (short[:-1] == long[:-1] and len(short) == len(long)):
        return False
    return sum(block.size for block in SequenceMatcher(None, short, long).get_matching_blocks()) >= len(long) - 1


def _group_column(path: Path, table: DataTable, group: str, named: Sequence[str]) -> str:
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


def _with_split(path: Path, table: DataTable, texts: Mapping[str, Sequence[str]]) -> DataTable:
    if any(row.item.split for row in table.rows):
        return table
    for name, cells in texts.items():
        roles = {split_named(text) for text in set(cells) if text}
        if "train" in roles and len(roles) > 1 and "" not in roles:
            rows = [row.but(split=split_named(row.item.labels[name])) for row in table.rows]
            note = f"{path}: `{name}` is read as the split ({listed(sorted({text for text in cells if text}), 8)})"
            return replace(table, rows=rows, notes=[*table.notes, note], identifying={name: "names the split"})
    return table


def _plain(name: str) -> str:
    """Return `patient_id` for `PatientID`, `patient id` and `Patient-ID`."""
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")


def _names_group(name: str, texts: Sequence[str]) -> bool:
    plain, values = _plain(name), {text.lower() for text in texts if text}
    # `case` and `patient` may also be labels that say who is ill.
    return _GROUP.fullmatch(plain) is not None and not (values <= _YES_OR_NO and plain in GROUPS)


def _identifies(name: str, texts: Sequence[str]) -> str:
    """Return why a column identifies the image instead of describing it; an empty text if it may be learned."""
    known = [text for text in texts if text]
    values, plain = set(known), _plain(name)
    # Numbers to predict or sets of labels; `0012` is a name.
    quantity = any(SEPARATOR in text for text in known) or all(
        looks_like_number(text) and not re.match(r"0\d", text) for text in known
    )
    if len(known) > 2 and len(values) == len(known) and not quantity:
        return "differs in every row"
    numbers = all(looks_like_number(text) and "," not in text for text in known)
    if (
        numbers
        and len(known) >= MIN_COUNTING_ROWS
        and all(after - before == 1 for before, after in pairwise(map(float, known)))
    ):
        return "numbers the rows"
    if _IDENTIFIER.fullmatch(plain):
        return "identifies the row"
    many = max(MAX_NUMBERED_CLASSES, len(known) / 2)
    if len(values) > many and (_ENDS_IN_ID.fullmatch(plain) or not quantity):
        return f"has {len(values)} values in {len(known)} rows"
    return ""


def _divided_patients(name: str, texts: Sequence[str], rows: Sequence[Row]) -> list[Finding]:
    """Return a warning if the column `group` of a CSV divides the images of one patient."""
    groups = defaultdict(set)
    for text, row in zip(texts, rows, strict=True):
        if text:
            groups[text].add(row.item.group or row.where)
    apart = [text for text, found in groups.items() if len(found) > 1]
    if not apart:
        return []
    problem = f"{len(apart)} values have images in more than one `group`, so perhaps in more than one split"
    return [warning(name, f"{problem}: {listed(apart)}", f"If they are patients or the like: --data.group {name!r}.")]
