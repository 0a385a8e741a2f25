"""A CSV -> rows: one image per row with its labels, and optionally its split, group, resolution and companion files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from keyhole.data.item import SPLITS, DataTable, Item, LeftOut, Row, absolute
from keyhole.data.read_folder import split_named
from keyhole.errors import ConfigError, DataError
from keyhole.images.scale import given_scale
from keyhole.util.wording import listed, nearest

FILES = ("mask", "annotation", "features")
"""Columns with the path of a companion file; relative paths start where those of images do."""
RESERVED = ("image", "name", "split", "group", "mpp", *FILES, "sha256", "bytes")
"""Columns with a fixed meaning, in upper or lower case; every other column is a task."""
CLAM_COLUMNS = {"slide_id": "image", "case_id": "group"}
"""Columns of CLAM's lists of labels, and what they are read as: they name the features of a slide, not its file."""
DELIMITERS = ",;\t"
EXCEL_DELIMITER = re.compile(r"\Asep=.\r?\n(?=\s*\S)")
"""A first line that tells Excel the delimiter, if others follow."""
ZIP = b"PK\x03\x04"
"""How archives begin, and spreadsheets among them."""
MAX_CSV_BYTES = 1 << 30  # a million rows take a tenth of this


def read_csv(path: Path, root: Path | None = None, slides: bool = False) -> DataTable:
    """Read a CSV in UTF-8 with a header line; comma, semicolon or tab between the fields.

    Relative paths start from `root`, by default the CSV's folder. With `slides`, CLAM's columns are read.
    """
    header, records = _parse(path, _text(path))
    header, notes = _of_slides(path, header) if slides else (header, [])
    place = _columns(path, header)
    tasks = {index: name for index, name in enumerate(header) if name and name.lower() not in RESERVED}
    base = absolute(path.parent if root is None else root)
    written = {"image", "sha256", "bytes", "split"} <= place.keys()
    table = DataTable(tuple(tasks.values()), [], notes=notes, written=written, has_group="group" in place)
    if unnamed := [str(index + 1) for index, name in enumerate(header) if not name]:
        table.notes.append(f"{path}: column {', '.join(unnamed)} has no name and was not read")

    other_splits: dict[str, str] = {}
    for line, fields in records:
        where = f"line {line}"
        if not any(fields):
            table.left_out.append(LeftOut(where, "empty row"))
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{path}, {where}: {len(fields)} fields where the header has {len(header)}. "
                "Put quotes around text that holds the delimiter, and fill the row up."
            )
        cell = {name: fields[index] for name, index in place.items()}
        if not cell["image"]:
            raise DataError(f"{path}, {where}: the image column is empty. Name a file or delete the row.")
        text = cell.get("split", "")
        split = split_named(text)
        if text and not split:
            raise DataError(f"{path}, {where}: unknown split {text!r}{nearest(text, SPLITS)}. Use train, val or test.")
        if text.lower() != split:
            other_splits[text] = split
        try:
            mpp = given_scale(cell["mpp"]) if cell.get("mpp") else None
        except ConfigError as error:
            raise DataError(f"{path}, {where}: {error}") from error
        item = Item(
            name=cell.get("name") or cell["image"],
            image=absolute(base / cell["image"]),
            labels={name: fields[index] for index, name in tasks.items()},
            split=split,
            group=cell.get("group") or None,
            mpp=mpp,
        )
        files = {name: absolute(base / cell[name]) for name in FILES if cell.get(name)}
        table.rows.append(Row(item, where).but(**files))
    if other_splits:
        said = ", ".join(f"{text!r} as {split}" for text, split in sorted(other_splits.items()))
        table.notes.append(f"{path}: the column `split` is read with {said}")
    if not table.rows:
        raise DataError(f"{path}: no rows below the header. Expected one row per image.")
    return table


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise DataError(
                f"{path}: {path.stat().st_size / 1e9:.1f} GB is too large for a list of images. Give the CSV of labels."
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if data.startswith(ZIP):
        raise DataError(f"{path}: a spreadsheet or another archive. Expected a CSV: save it as `CSV UTF-8`.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start} is {data[error.start]:#04x}). "
            "Expected a folder of images, or a CSV; if it is a CSV, save it again as `CSV UTF-8`."
        ) from error
    if "\0" in text:
        raise DataError(
            f"{path}: not text (it has zero bytes). "
            "Expected a folder of images, or a CSV; if it is a CSV, save it as `CSV UTF-8`."
        )
    if not text.strip():
        raise DataError(f"{path}: the file is empty. Expected a CSV with a header line and one row per image.")
    return text


def _parse(path: Path, text: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header, and (line number, stripped fields) of every row that is not blank."""
    text = EXCEL_DELIMITER.sub("\n", text, count=1)  # lines keep their numbers
    first = next(line for line in text.splitlines() if line.strip())
    # Take the delimiter that separates a column `image`, else that with most fields: names may hold the others.
    headers = {mark: [name.strip().strip('"').strip().lower() for name in first.split(mark)] for mark in DELIMITERS}
    delimiter = max(
        DELIMITERS, key=lambda mark: (not {"image", "slide_id"}.isdisjoint(headers[mark]), len(headers[mark]))
    )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        line = 1
        try:
            for fields in reader:
                if fields:
                    yield line, [field.strip() for field in fields]
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not valid CSV ({error}). Mind the quotes.") from error

    rows = records()
    _, header = next(rows)
    return [" ".join(name.split()) for name in header], rows  # spreadsheets break long names into lines


def _of_slides(path: Path, header: list[str]) -> tuple[list[str], list[str]]:
    lower = [name.lower() for name in header]
    if "image" in lower or "slide_id" not in lower:
        return header, []
    ours = {theirs: name for theirs, name in CLAM_COLUMNS.items() if theirs in lower and name not in lower}
    said = " and ".join(f"`{theirs}` as {name}" for theirs, name in ours.items())
    return [ours.get(low, name) for name, low in zip(header, lower, strict=True)], [f"{path}: {said}"]


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    lower = [name.lower() for name in header]
    keys = [low if low in RESERVED else name for name, low in zip(header, lower, strict=True) if name]
    twice = [name for name in dict.fromkeys(keys) if keys.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the header names {listed(twice)} more than once. Rename or delete one of each.")
    if "image" not in lower:
        if "slide_id" in lower:
            raise DataError(
                f"{path}: no column `image`, only `slide_id`. For stored features of these slides name their folder: "
                "--data.features DIR; else name the column with the image paths `image`."
            )
        raise DataError(
            f"{path}: no column `image`{nearest('image', header)}; the columns are {listed(header, 8)}. "
            "Name the column with the image paths `image`."
        )
    return {name: lower.index(name) for name in RESERVED if name in lower}
