"""Files that a run writes between two saved states: kept patches, validated batches and unreadable patches.

With them, a run that is killed within a batch of large slides repeats the pass over one image only. A journal of
another step than that of the saved state is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from keyhole.errors import OutputError, RunError
from keyhole.loading.unreadable import Ledger
from keyhole.nn import Kept
from keyhole.patches.sources import PatchSource
from keyhole.runs.checkpoint import read_tensors, write_tensors
from keyhole.util.progress import say
from keyhole.util.tables import read_rows, write_rows

MIN_JOURNAL_PATCHES = 100_000
"""A batch with at least this many patches has a journal."""
WRITE_SECONDS = 10.0
"""Minimum number of seconds between two writes, so that small images cost nothing."""
LISTED_AGAIN = "Delete it: the next epochs list again what they cannot read."


class SelectionJournal:
    """Stores the kept patches of the current batch, image by image, in a file of the run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = time.monotonic()
        self._kept: dict[int, Kept] = {}

    def begin(self, step: int, names: Sequence[str]) -> dict[int, Kept]:
        """Start a batch; return the kept patches that a killed process stored, by the image's index in the batch."""
        self.step, self.names, self._kept = step, list(names), {}
        self._written = time.monotonic()
        if self.path.is_file():
            tensors, info = read_tensors(self.path, "Delete it: the images of one batch are then scored again.")
            if info.get("step") == step and info.get("names") == self.names:
                try:
                    self._kept = {
                        row: Kept(tensors[f"{row}.index"], tensors[f"{row}.score"], None, tensors.get(f"{row}.arrived"))
                        for row in info["rows"]
                    }
                except KeyError as error:
                    raise RunError(
                        f"{self.path}: damaged ({error} is missing). Delete it: the batch is then read again."
                    ) from error
        return dict(self._kept)

    def add(self, row: int, kept: Kept) -> None:
        """Add the kept patches of an image; the file is written from time to time."""
        self._kept[row] = kept
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if not self._kept:
            return
        tensors: dict[str, torch.Tensor] = {}
        for row, kept in self._kept.items():
            tensors |= {f"{row}.index": kept.index, f"{row}.score": kept.score}
            if kept.arrived is not None:
                tensors[f"{row}.arrived"] = kept.arrived
        write_tensors(self.path, tensors, {"step": self.step, "names": self.names, "rows": sorted(self._kept)})
        self._written = time.monotonic()

    def end(self) -> None:
        """Delete the journal after the model has learned from the batch."""
        self._kept = {}
        self.path.unlink(missing_ok=True)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


class RowJournal:
    """Appends rows of JSON to a file; each is on the disk when `add` returns. Ignores rows of another `about`."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)

    def read(self) -> list[dict[str, Any]]:
        """Return the rows written before; remove an incomplete last row, which a kill or a full disk leaves."""
        if not self.path.is_file():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        rows = [row for row in map(self._parse, whole.splitlines()) if row["about"] == self.about]
        if not rows:
            self.path.unlink()
        elif len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return rows

    def _parse(self, line: bytes) -> dict[str, Any]:
        digest, _, text = line.partition(b" ")
        if digest != _digest(text):
            raise RunError(f"{self.path}: damaged. Delete it: what it holds is then computed again.")
        row: dict[str, Any] = json.loads(text)
        return row

    def add(self, row: Mapping[str, Any]) -> None:
        text = json.dumps({"about": self.about, **row}).encode()
        try:
            with self.path.open("ab") as file:
                file.write(_digest(text) + b" " + text + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}). Free space, then resume.") from error

    def end(self) -> None:
        """Delete the file after its results were written elsewhere."""
        self.path.unlink(missing_ok=True)


class Damage:
    """Lists the unreadable patches of all epochs, and ends the run if they exceed a share of an epoch's `total`.

    A resumed run counts its epoch again from the start, since the files may have been repaired.
    """

    def __init__(self, path: Path, total: int, share: float, epoch: int) -> None:
        self.path, self.total, self.share = path, total, share
        self._earlier = read_rows(path, LISTED_AGAIN)
        self.epoch, self.ledger = epoch, Ledger(total, share)
        self._told = False

    def begin(self, epoch: int) -> None:
        """Start to count for an epoch, unless it is the current one."""
        if epoch != self.epoch:
            self._earlier += self._rows()
            self.epoch, self.ledger = epoch, Ledger(self.total, self.share)

    def lose(self, name: str, patches: int, reason: str) -> None:
        """Add an image that cannot be read at all."""
        self.ledger.lose(name, patches, reason)
        self._write()

    def add(self, name: str, source: PatchSource, reasons: Mapping[int, str]) -> None:
        """Add the unreadable patches of an image; `reasons` are by patch."""
        index = list(reasons)
        self.ledger.add(name, source.grid.boxes(index), index, list(reasons.values()))
        self._write()

    def warn(self, what: str) -> None:
        """Warn about the first unreadable patches, unless they end the run; the file alone lists further ones."""
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
