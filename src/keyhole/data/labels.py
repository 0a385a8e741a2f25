"""Label cells as people and programs write them: words for "unknown", and classes that differ in case alone."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from keyhole.data.item import Doubt, Table
from keyhole.tasks.kinds import Task, looks_like_number

SPREADSHEET_ERRORS = frozenset({"#ref!", "#value!", "#div/0!", "#name?", "#num!", "#null!", "#na"})
"""What a spreadsheet writes where a formula failed."""
AMONG_NUMBERS = frozenset({"none", "?", "-", ".", "missing", "unknown"})
"""Words that mean "unknown" where every other cell of the column is a number, in lower case."""


def without_missing_words(table: Table, words: Collection[str], classes: Collection[str] = ()) -> Table:
    """The table with empty cells in place of words that mean an unknown label; `Table.missing` counts them.

    Args:
        table: as read from a CSV.
        words: these count in any case, one in mixed case (`None`) only as written; none: every word is a label.
        classes: of a trained model, which are labels whatever the words say.
    """
    if not words:
        return table
    exact = frozenset(word for word in words if word not in (word.lower(), word.upper()))
    anyhow = frozenset(word.lower() for word in words if word not in exact) | SPREADSHEET_ERRORS
    known = frozenset(classes)

    def means_unknown(text: str) -> bool:
        return text not in known and (text in exact or text.lower() in anyhow)

    unknown: dict[str, Counter[str]] = {}
    for name in table.columns:
        counts = Counter(row.item.labels[name] for row in table.rows)
        rest = [text for text in counts if text and not means_unknown(text)]
        others = [text for text in rest if not looks_like_number(text)]
        if len(others) < len(rest) and all(text.lower() in AMONG_NUMBERS and text not in known for text in others):
            rest = [text for text in rest if text not in others]
        unknown[name] = Counter({text: counts[text] for text in counts if text and text not in rest})
    if not any(unknown.values()):
        return table
    rows = []
    for row in table.rows:
        labels = {name: "" if text in unknown[name] else text for name, text in row.item.labels.items()}
        rows.append(replace(row, item=replace(row.item, labels=labels)))
    return replace(table, rows=rows, missing=unknown)


def missing_notes(table: Table, names: Iterable[str]) -> list[str]:
    """A sentence for each of the columns named in which words were read as unknown labels."""
    notes = []
    for name in names:
        if found := table.missing.get(name):
            cells = " and ".join(f"{count} cells {text!r}" for text, count in sorted(found.items()))
            notes.append(f"{name}: {cells} mean that the label is unknown (--data.missing names such words)")
    return notes


def alike_classes(tasks: Sequence[Task]) -> list[Doubt]:
    """Classes of a task that differ in case or in the kind of blank alone, which are often one class."""
    doubts = []
    for task in tasks:
        same = defaultdict(list)
        for name in task.classes:
            same[" ".join(unicodedata.normalize("NFKC", name).casefold().split())].append(repr(name))
        for names in same.values():
            if len(names) > 1:
                problem = f"{' and '.join(names)} differ in upper and lower case alone, and are learned as classes"
                doubts.append(Doubt(task.name, problem, "Write them alike if they are one class."))
    return doubts
