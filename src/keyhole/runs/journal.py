"""What was finished since the last state was saved: kept patches of images, results of validation batches.

A pass over a slide of 250,000 patches takes minutes, and a batch has many. A run that is killed in the middle of one
does again only the pass of the image it was at: what other images keep is written as soon as it is known. The state
itself (checkpoint.py) says which step a journal belongs to; one of another step is of no use and is ignored.
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
from keyhole.nn import Kept
from keyhole.runs.checkpoint import read_tensors, write_tensors

MIN_JOURNAL_PATCHES = 100_000
"""Work on at least so many patches is saved by itself."""
WRITE_SECONDS = 10.0
"""Seconds between two writes, so that small images cost nothing. A run that is killed repeats one pass, or so much."""


class SelectionJournal:
    """The kept patches of the images of the current batch whose passes are finished.

    Args:
        path: File in the run folder; it exists only in the middle of a long batch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = time.monotonic()
        self._kept: dict[int, Kept] = {}

    def begin(self, step: int, names: Sequence[str]) -> dict[int, Kept]:
        """Start with a batch; return what a killed run kept of its images, by their place in the batch.

        Raises:
            RunError: the file is damaged.
        """
        self.step, self.names, self._kept = step, list(names), {}
        self._written = time.monotonic()
        if self.path.is_file():
            tensors, info = read_tensors(self.path, "Delete it: the images of one batch are then looked at again.")
            if info.get("step") == step and info.get("names") == self.names:
                self._kept = {row: _kept(tensors, row, self.path) for row in info["rows"]}
        return dict(self._kept)

    def add(self, row: int, kept: Kept) -> None:
        """Add what an image keeps; it is written from time to time.

        Raises:
            OutputError: no space or permission.
        """
        self._kept[row] = kept
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is known."""
        if not self._kept:
            return
        tensors: dict[str, torch.Tensor] = {}
        for place, each in self._kept.items():
            tensors |= {f"{place}.index": each.index, f"{place}.score": each.score}
            if each.arrived is not None:
                tensors[f"{place}.arrived"] = each.arrived
        write_tensors(self.path, tensors, {"step": self.step, "names": self.names, "rows": sorted(self._kept)})
        self._written = time.monotonic()

    def end(self) -> None:
        """Delete the journal of a batch that the model has learned from."""
        self._kept = {}
        self.path.unlink(missing_ok=True)


def _kept(tensors: Mapping[str, torch.Tensor], row: int, path: Path) -> Kept:
    try:
        return Kept(tensors[f"{row}.index"], tensors[f"{row}.score"], None, tensors.get(f"{row}.arrived"))
    except KeyError as error:
        raise RunError(f"{path}: damaged ({error} is missing). Delete it: the batch is then read again.") from error


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


class RowJournal:
    """Rows of JSON, one for each result, appended to a file; each is on the disk when `add` returns.

    Args:
        path: File in the run folder.
        about: What the rows belong to; rows of anything else are dropped.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)

    def read(self) -> list[dict[str, Any]]:
        """Return the rows written before. A row that a kill or a full disk cut off is removed.

        Raises:
            RunError: a whole row is damaged.
        """
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
        """Appends a row with its digest; it has reached the disk when this returns.

        Raises:
            OutputError: no space or permission.
        """
        text = json.dumps({"about": self.about, **row}).encode()
        try:
            with self.path.open("ab") as file:
                file.write(_digest(text) + b" " + text + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}). Free space, then resume.") from error

    def end(self) -> None:
        """Delete the file: its results are kept elsewhere."""
        self.path.unlink(missing_ok=True)
