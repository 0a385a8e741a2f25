"""The CSV files of a run: rows with the names of their columns, written whole and read with a check that they are."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keyhole.errors import RunError
from keyhole.util.files import write_atomic


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(path, rows_text(rows))


def rows_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a CSV whose columns are the keys of all rows, in order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: Path, remedy: str = "Restore it from a copy.", columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a CSV of the run, which must have `columns`; no rows if there is no such file."""
    if not path.is_file():
        return []
    try:
        text = path.read_bytes().decode()
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: damaged ({error}). {remedy}") from error
    whole = not text or text.endswith("\n")
    if not whole or any(None in row or None in row.values() or not set(columns) <= set(row) for row in rows):
        raise RunError(f"{path}: damaged, {'a row is' if whole else 'its last row is'} not whole. {remedy}")
    return rows
