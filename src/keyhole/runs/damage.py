"""What could not be read in each epoch of a run: listed in unreadable.csv, and too much of it ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from keyhole.loading.unreadable import Ledger
from keyhole.patches.sources import PatchSource
from keyhole.runs.run import read_rows, write_rows
from keyhole.util.progress import say

LISTED_AGAIN = "Delete it: the next epochs list again what they cannot read."
"""What to do about an unreadable.csv that is damaged."""


class Damage:
    """The ledgers of all epochs. The limit holds for each epoch, since the next one tries again what failed.

    Args:
        path: unreadable.csv of the run.
        total: Patches of an epoch.
        share: of them that may be unreadable.
        epoch: under way, counted from 0. A resumed run counts anew: files may have been put right meanwhile.
    """

    def __init__(self, path: Path, total: int, share: float, epoch: int) -> None:
        self.path, self.total, self.share = path, total, share
        self._earlier = read_rows(path, LISTED_AGAIN)
        self.epoch, self.ledger = epoch, Ledger(total, self.share)
        self._told = False

    def begin(self, epoch: int) -> None:
        """Start the count of another epoch."""
        if epoch != self.epoch:
            self._earlier += self._rows()
            self.epoch, self.ledger = epoch, Ledger(self.total, self.share)

    def lose(self, name: str, patches: int, reason: str) -> None:
        """Add an image of which nothing can be read."""
        self.ledger.lose(name, patches, reason)
        self._write()

    def add(self, name: str, source: PatchSource, reasons: Mapping[int, str]) -> None:
        """Add patches of an image, with their places."""
        index = list(reasons)
        self.ledger.add(name, source.boxes(index), index, list(reasons.values()))
        self._write()

    def warn(self, what: str) -> None:
        """Say what is unreadable first, unless it ends the run anyway. Anything further is only listed."""
        if self._told or self.ledger.is_too_much():
            return
        self._told = True
        what = what.rstrip(".")
        say(f"warning: {what}. What cannot be read is left out and listed in {self.path.name}")

    def summary(self) -> str | None:
        """Return how many images were not wholly readable, in any epoch; None if all were."""
        images = {row["image"] for row in (*self._earlier, *self._rows())}
        if not images:
            return None
        what = "1 image" if len(images) == 1 else f"{len(images):,} images"
        return f"patches of {what} could not be read; they are listed in {self.path.name}"

    def check(self) -> None:
        """Raise TooMuchUnreadable where more of this epoch's patches are lost than is allowed."""
        self.ledger.check(self.path)

    def _rows(self) -> list[dict[str, str]]:
        return [{"epoch": str(self.epoch + 1), **row} for row in self.ledger.rows()]

    def _write(self) -> None:
        now = self._rows()
        write_rows(self.path, [*(row for row in self._earlier if row not in now), *now])
