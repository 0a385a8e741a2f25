"""What could not be read in each epoch of a run: unreadable.csv lists it, and too much of it ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from keyhole.loading.unreadable import Ledger
from keyhole.patches.sources import PatchSource
from keyhole.runs.run import read_rows, write_rows
from keyhole.util.progress import say

LISTED_AGAIN = "Delete it: the next epochs list again what they cannot read."


class Damage:
    """The ledgers of all epochs; of the `total` patches of each epoch, counted from 0, a share may be unreadable.

    A resumed run counts its epoch again from the start, since the files may have been repaired.
    """

    def __init__(self, path: Path, total: int, share: float, epoch: int) -> None:
        self.path, self.total, self.share = path, total, share
        self._earlier = read_rows(path, LISTED_AGAIN)
        self.epoch, self.ledger = epoch, Ledger(total, share)
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
        """Add the unreadable patches of an image, with the reason by the index of the patch."""
        index = list(reasons)
        self.ledger.add(name, source.boxes(index), index, list(reasons.values()))
        self._write()

    def warn(self, what: str) -> None:
        """Warn of the first unreadable patches, unless they end the run; further ones are only listed."""
        if not self._told and not self.ledger.is_too_much():
            self._told = True
            say(f"warning: {what.rstrip('.')}. What cannot be read is left out and listed in {self.path.name}")

    def summary(self) -> str | None:
        """Say how many images had unreadable patches in any epoch; None without any."""
        images = {row["image"] for row in (*self._earlier, *self._rows())}
        if not images:
            return None
        what = "1 image" if len(images) == 1 else f"{len(images):,} images"
        return f"patches of {what} could not be read; they are listed in {self.path.name}"

    def check(self) -> None:
        """Raise TooMuchUnreadable if more of this epoch's patches are lost than `share` allows."""
        self.ledger.check(self.path)

    def _rows(self) -> list[dict[str, str]]:
        return [{"epoch": str(self.epoch + 1), **row} for row in self.ledger.rows()]

    def _write(self) -> None:
        now = self._rows()
        write_rows(self.path, [*(row for row in self._earlier if row not in now), *now])
