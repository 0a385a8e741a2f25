"""A list of the patches and images that could not be read, and the limit on their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from keyhole.errors import KeyholeError

COLUMNS = ("image", "index", "patches", "x", "y", "width", "height", "reason")
"""Columns of `Ledger.rows`. A whole image has no index and no box; `patches` is the number of its patches, else 1."""


class TooMuchUnreadable(KeyholeError):  # noqa: N818 - names the event
    """More patches could not be read than `--unreadable` allows."""


class Ledger:
    """Patches and whole images that could not be read, each counted once in `count`.

    `share` of the `total` patches may be unreadable, 0 ... 1; with 0 the first is too much.
    """

    def __init__(self, total: int, share: float) -> None:
        self.total, self.share = total, share
        self.count = 0
        self._patches: dict[str, dict[int, tuple[list[int], str]]] = {}
        self._lost: dict[str, tuple[int, str]] = {}

    def add(self, name: str, boxes: ArrayLike, index: ArrayLike, reasons: Sequence[str]) -> None:
        """Add patches `index` (k,) of one image, their boxes (k, 4) in level-0 pixels, and a line each why.

        Those that were added before, and those of a lost image, are not counted again.
        """
        if name in self._lost:
            return
        known = self._patches.setdefault(name, {})
        patches, places = np.asarray(index, np.int64).tolist(), np.asarray(boxes, np.int64).reshape(-1, 4).tolist()
        for patch, place, reason in zip(patches, places, reasons, strict=True):
            if patch not in known:
                known[patch] = place, reason
                self.count += 1

    def lose(self, name: str, count: int, reason: str) -> None:
        """Add a whole image of `count` patches, instead of what was added of it before."""
        if name not in self._lost:
            self.count += count - len(self._patches.pop(name, {}))
            self._lost[name] = count, reason

    def is_too_much(self) -> bool:
        """Return whether more is unreadable than the share allows."""
        return self.count > math.floor(self.share * self.total * (1 + 1e-12))

    def check(self, listing: str | Path | None = None) -> None:
        """Raise `TooMuchUnreadable` if more is unreadable than the share allows; `listing` is the file of the list."""
        if not self.is_too_much():
            return
        found = [(f"{name} (whole)", reason) for name, (_, reason) in self._lost.items()]
        found += [
            (f"{name} at {box[0]},{box[1]}", reason)
            for name, patches in self._patches.items()
            for box, reason in patches.values()
        ]
        first, more = [place for place, _ in found[:3]], ", ..." if len(found) > 3 else ""
        where = "" if listing is None else f" All are listed in {listing}."
        raise TooMuchUnreadable(
            f"{self.count:,} of {self.total:,} patches cannot be read ({100 * self.count / max(1, self.total):.3g} %), "
            f"but --unreadable allows {100 * self.share:.3g} %: {', '.join(first)}{more}. "
            f"The first: {found[0][1].partition('. ')[0].rstrip('.')}.{where} "
            "Copy these files again, or raise --unreadable"
        )

    def rows(self) -> list[dict[str, str]]:
        """Return a row of `COLUMNS` for each lost image and each unreadable patch."""
        rows: list[tuple[object, ...]] = [
            (name, "", count, *[""] * 4, reason) for name, (count, reason) in self._lost.items()
        ]
        for name, patches in self._patches.items():
            rows += [(name, patch, 1, *box, reason) for patch, (box, reason) in patches.items()]
        return [dict(zip(COLUMNS, map(str, row), strict=True)) for row in rows]
