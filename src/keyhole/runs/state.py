"""How far a run is: what is saved with every state, so that nothing else needs to be remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keyhole.errors import RunError


@dataclass
class State:
    """How far a run is; saved with every state, so that nothing else needs to be remembered.

    Attributes:
        epoch: epochs finished.
        batch: batches done in the epoch under way.
        step: optimizer steps done.
        steps_per_epoch: fixed at the start, so that the schedule does not move when an image is left out.
        loss_sum, loss_count, patches: of the epoch under way, since its beginning.
        metric: what names the best model; empty without a validation split.
        best: (value, loss) of the best epoch, or None.
        best_epoch: counted from 1.
        waiting: epochs since.
        stopped: early stopping has ended the learning.
        plan: how memory is used; with another one the last bits of a resumed run could differ. It is made
            anew where the run goes on with another kind of device.
        left_out: image -> (epoch it failed in, reason); it is used no more from the next epoch on.
        tasks: as resolved at the start.
        history: the rows of metrics.csv.
        run: identifies the run: its best model carries the same.
        config: text of config.yaml.
        config_before: its text before the number of epochs was changed.
        manifest: SHA-256 of manifest.csv.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    steps_per_epoch: int = 1
    loss_sum: float = 0.0
    loss_count: int = 0
    patches: int = 0
    metric: str = ""
    best: tuple[float, float] | None = None
    best_epoch: int = 0
    waiting: int = 0
    stopped: bool = False
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float | None]] = field(default_factory=list)
    run: str = ""
    config: str = ""
    config_before: str = ""
    manifest: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def mean_loss(self) -> float | None:
        """The mean loss of the epoch under way; None before the first step."""
        return self.loss_sum / self.loss_count if self.loss_count else None

    def add_loss(self, loss: float, images: int) -> None:
        """Counts the loss of a step on so many images."""
        self.loss_sum += loss * images
        self.loss_count += images

    def advance(self, patches: int) -> None:
        """Counts a step, for which so many patches were read."""
        self.step, self.batch, self.patches = self.step + 1, self.batch + 1, self.patches + patches

    def end_epoch(self, row: Mapping[str, float | None]) -> None:
        """Counts an epoch as finished, with its row of metrics.csv."""
        plain = {name: value if isinstance(value, int | None) else float(value) for name, value in row.items()}
        self.history.append(plain)
        self.epoch, self.batch, self.loss_sum, self.loss_count, self.patches = self.epoch + 1, 0, 0.0, 0, 0

    @classmethod
    def from_json(cls, data: dict[str, Any], path: Path) -> State:
        """The state that a file holds; `path` is its name for messages.

        Raises:
            RunError: it describes no state of a run.
        """
        try:
            best = data["best"]
            left_out = {name: (int(epoch), reason) for name, (epoch, reason) in data["left_out"].items()}
            return cls(**{**data, "best": None if best is None else (best[0], best[1]), "left_out": left_out})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path}: not the state of a run ({error!r}). Was another file copied over it?") from error
