"""The ledger of what could not be read: which patches of which images, why, and when it is too much."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from keyhole.errors import KeyholeError, RunError
from keyhole.util.files import write_atomic

COLUMNS = ("image", "index", "patches", "x", "y", "width", "height", "reason")
"""Columns of the list. A whole image has no index and no box, and `patches` says how many it has; else that is 1."""

Box = tuple[int, int, int, int]


class TooMuchUnreadable(KeyholeError):  # noqa: N818 - names the event
    """More patches could not be read than `--unreadable` allows."""


class Ledger:
    """Patches and whole images that could not be read, each counted once.

    Args:
        total: patches of all images together.
        share: of them that may be unreadable, 0 ... 1; with 0 the first is too much.

    Attributes:
        count: unreadable patches, those of whole images included.
    """

    def __init__(self, total: int, share: float) -> None:
        self.total, self.share = total, share
        self.count = 0
        self._patches: dict[str, dict[int, tuple[Box | None, str]]] = {}
        self._lost: dict[str, tuple[int, str]] = {}

    def add(self, name: str, boxes: ArrayLike | None, index: ArrayLike, reasons: Sequence[str]) -> None:
        """Note patches of one image; those noted before, and those of a lost image, are not counted again.

        Args:
            name: the image, as the manifest writes it.
            boxes: (k, 4) x, y, width, height in level-0 pixels; None for features, which have no place.
            index: (k,) in the image's grid.
            reasons: (k) one line each.
        """
        if name in self._lost:
            return
        known = self._patches.setdefault(name, {})
        numbers = np.asarray(index, np.int64).tolist()
        places = [None] * len(numbers) if boxes is None else np.asarray(boxes, np.int64).reshape(-1, 4).tolist()
        for number, place, reason in zip(numbers, places, reasons, strict=True):
            if number not in known:
                known[number] = None if place is None else (place[0], place[1], place[2], place[3]), reason
                self.count += 1

    def lose(self, name: str, count: int, reason: str) -> None:
        """Note a whole image of `count` patches, in the place of what was noted of it before."""
        if name not in self._lost:
            self.count += count - len(self._patches.pop(name, {}))
            self._lost[name] = count, reason

    def is_too_much(self) -> bool:
        """Return whether more is unreadable than the share allows."""
        return self.count > math.floor(self.share * self.total * (1 + 1e-12))

    def check(self, listing: str | Path | None = None) -> None:
        """Go on while it is little enough.

        Args:
            listing: where the list is written, for the message.

        Raises:
            TooMuchUnreadable: more than the share allows.
        """
        if not self.is_too_much():
            return
        places = [
            (f"{name} at {box[0]},{box[1]}" if box is not None else f"{name} patch {number}", reason)
            for name, patches in self._patches.items()
            for number, (box, reason) in patches.items()
        ]
        found = [*((f"{name} (whole)", reason) for name, (_, reason) in self._lost.items()), *places]
        first, more = [place for place, _ in found[:3]], ", ..." if len(found) > 3 else ""
        where = "" if listing is None else f" All are listed in {listing}."
        raise TooMuchUnreadable(
            f"{self.count:,} of {self.total:,} patches cannot be read ({_percent(self.count / max(1, self.total))}), "
            f"but --unreadable allows {_percent(self.share)}: {', '.join(first)}{more}. "
            f"The first: {found[0][1].partition('. ')[0].rstrip('.')}.{where} "
            "Copy these files again, or raise --unreadable"
        )

    def rows(self) -> list[dict[str, str]]:
        """One row of `COLUMNS` for each lost image and each unreadable patch."""
        empty = dict.fromkeys(COLUMNS, "")
        rows = [
            empty | {"image": name, "patches": str(count), "reason": reason}
            for name, (count, reason) in self._lost.items()
        ]
        for name, patches in self._patches.items():
            for number, (box, reason) in patches.items():
                place = {} if box is None else dict(zip(COLUMNS[3:7], map(str, box), strict=True))
                rows.append(empty | {"image": name, "index": str(number), "patches": "1", "reason": reason} | place)
        return rows

    def write(self, path: str | Path) -> Path:
        """The rows as CSV, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return write_atomic(path, text.getvalue())

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, str]], total: int, share: float) -> Self:
        """The ledger that `rows` came from.

        Raises:
            ValueError: not such rows.
        """
        ledger = cls(total, share)
        for row in rows:
            try:
                if row["index"] == "":
                    ledger.lose(row["image"], int(row["patches"]), row["reason"])
                else:
                    box = None if row["x"] == "" else [[int(row[key]) for key in COLUMNS[3:7]]]
                    ledger.add(row["image"], box, [int(row["index"])], [row["reason"]])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"not a row of {', '.join(COLUMNS)}: {dict(row)}") from error
        return ledger

    @classmethod
    def read(cls, path: str | Path, total: int, share: float) -> Self:
        """The ledger that was written to `path`; an empty one where there is no such file.

        Raises:
            RunError: the file is not such a list.
        """
        path = Path(path)
        if not path.exists():
            return cls(total, share)
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return cls.from_rows(csv.DictReader(file), total, share)
        except (ValueError, OSError, csv.Error) as error:
            raise RunError(
                f"{path}: not a list of unreadable patches ({error}). Delete it to begin a new one"
            ) from error


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
