"""Warn once per run of a selection that has collapsed, a loss that does not fall, answers that any patches give, and
training images learned by heart.

All is judged by the rows of metrics.csv, so that a resumed run says the same. Where the thresholds come from:
`benchmarks/health_2cpu_2026-11-27.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, nan
from statistics import median

from torch import Tensor

from keyhole.config.auto import number
from keyhole.config.settings import Config
from keyhole.nn import guessing_loss
from keyhole.tasks.learning import first_steps
from keyhole.training.job import Job
from keyhole.training.setup import targets
from keyhole.training.trial import blind_epochs

AT_CHANCE = 0.97
"""Share of the loss of guessing from which a training loss is one of guessing."""
MOSTLY_BLANK, STILL = 0.8, 0.01
"""Shares of the kept patches: of one colour, and changed since the epoch before, that are a collapse at chance."""
FEW, LONG = (3, 1 / 10), (5, 1 / 4)
"""Successive epochs that a collapse and answers from any patches take, and a loss that does not fall: the least number,
and as a share of all epochs."""
GOOD_LOSS = 0.7
"""Share of the loss of guessing below which a model answers well."""
NO_GAIN = 0.2
"""Share of what a model is better than guessing by, below which the gain over random patches is small."""
RISEN, FALLEN = 1.2, 0.5
"""Loss on the watched images over that of the best epoch, and training loss over that of the same epoch, from which a
model has learned by heart."""
MIN_COMPARED, MIN_CHOICE = 8, 4
"""Images with more than M patches, and their median number of patches as a multiple of M, for that comparison."""

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Doubts:
    """What the rows of a run are judged by.

    Attributes:
        config: with numbers for what is `auto`.
        guessing: loss of the best constant answer, by split.
        comparable: enough images have many more patches than are kept.
    """

    config: Config
    guessing: Mapping[str, float]
    comparable: bool

    @classmethod
    def of(cls, job: Job, weights: Mapping[str, Tensor]) -> Doubts:
        """Return those of a run; `weights` are those of the classes, by task."""
        watch, m = job.config.train.watch, job.config.select.m
        splits = {split: job.manifest.split(split) for split in ("train", watch)}
        counts = [count for item in splits[watch] if (count := job.images.counts[item.name]) > m]
        guessing = {
            split: guessing_loss(job.tasks, targets(job.manifest, items), weights)
            for split, items in splits.items()
            if items
        }
        return cls(job.config, guessing, len(counts) >= MIN_COMPARED and median(counts) >= MIN_CHOICE * m)

    def new(self, rows: Sequence[Row], told: Sequence[str]) -> dict[str, str]:
        """Return the warnings that hold after the last of the rows, by kind, without the kinds told before.

        Epochs of warm-up, and those in which all patches are random, do not count.
        """
        settled = max(blind_epochs(self.config), self.config.train.warmup)
        counted = [row for row in rows if _figure(row, "epoch") > settled]
        checks = {
            "collapse": self._collapse,
            "stagnation": self._stagnation,
            "like random": self._like_random,
            "by heart": self._by_heart,
        }
        found = {kind: text for kind, check in checks.items() if kind not in told and (text := check(counted))}
        if "collapse" in (*found, *told):
            found.pop("stagnation", None)
        if "stagnation" in told:  # the rate falls to zero, and with it the number of new patches
            found.pop("collapse", None)
        return found

    def _collapse(self, rows: Sequence[Row]) -> str:
        last = self._last(rows, FEW)
        if not last or not self._at_chance(last):
            return ""
        facts, steps = [], first_steps(self.config)
        if all(_figure(row, "kept.blank") >= MOSTLY_BLANK for row in last):
            facts.append(f"{_figure(last[-1], 'kept.blank'):.0%} of the kept patches have one colour")
            if self.config.patch.foreground == "all":
                steps = ["--patch.foreground non-empty, which leaves out most such patches", *steps]
        if all(_figure(row, "kept.changed") <= STILL for row in last):
            facts.append(f"the kept patches have not changed in {len(last)} epochs")
        if not facts:
            return ""
        why = f"{', '.join(facts)}, and {self._losses(last[-1])}"
        return f"the selection has collapsed: {why}. Train again with: {'; '.join(steps)}"

    def _stagnation(self, rows: Sequence[Row]) -> str:
        last = self._last(rows, LONG)
        if not last or not self._at_chance(last):
            return ""
        why = f"after {len(last)} epochs at the full rate {self._losses(last[-1])}"
        return f"nothing is being learned: {why}. Try: {'; '.join(first_steps(self.config))}"

    def _like_random(self, rows: Sequence[Row]) -> str:
        watch, explored = self.config.train.watch, number(self.config.train.explore, "train.explore")
        last = self._last([row for row in rows if _figure(row, "epoch") > explored], FEW)
        if not last or not self.comparable:
            return ""
        for row in last:
            better = self.guessing[watch] - _figure(row, f"{watch}.loss")
            good = better > (1 - GOOD_LOSS) * self.guessing[watch]
            if not (good and _figure(row, "kept.gain") < NO_GAIN * better):
                return ""
        loss, gain = _figure(last[-1], f"{watch}.loss"), _figure(last[-1], "kept.gain")
        return (
            f"random patches answer as well (loss {loss + gain:.3f}) as the kept ones ({loss:.3f}): what tells the "
            "classes apart is in every patch. If it should not be, look for what else differs between them, such as "
            "scanner, light or compression. If it may be, fewer patches are enough: "
            f"--select.m {max(1, self.config.select.m // 4)}"
        )

    def _by_heart(self, rows: Sequence[Row]) -> str:
        name, last = f"{self.config.train.watch}.loss", self._last(rows, FEW)
        known = [row for row in rows if isfinite(_figure(row, name))]
        if not last or not known:
            return ""
        best = min(known, key=lambda row: _figure(row, name))
        risen = all(_figure(row, name) >= RISEN * _figure(best, name) for row in last)
        if not risen or not _figure(last[-1], "train.loss") <= FALLEN * _figure(best, "train.loss"):
            return ""
        watched = "validation" if self.config.train.watch == "val" else "test"
        loss, train = ([_figure(row, each) for row in (best, last[-1])] for each in (name, "train.loss"))
        augment, epoch = self.config.augment, int(_figure(best, "epoch"))
        steps = ["more images"]
        if self.config.model.feature_width is None:
            ways = {"shift": augment.shift, "flip": augment.flip, "rotate": augment.rotate}
            off = " ".join(f"--augment.{way}" for way, on in ways.items() if not on)
            steps += [f"{off}, where that changes no label"] if off else []
        steps.append(f"fewer epochs: --train.epochs {max(2, epoch)}")
        return (
            f"the training images are learned by heart: since epoch {epoch} the training loss fell from {train[0]:.3f} "
            f"to {train[1]:.3f}, and the {watched} loss rose from {loss[0]:.3f} to {loss[1]:.3f}. "
            f"Try: {'; '.join(steps)}"
        )

    def _last(self, rows: Sequence[Row], epochs: tuple[int, float]) -> Sequence[Row]:
        """Return the last rows, as many as needed; none if there are not enough."""
        count = max(epochs[0], ceil(epochs[1] * self.config.train.epochs))
        return rows[-count:] if len(rows) >= count else ()

    def _at_chance(self, rows: Sequence[Row]) -> bool:
        return all(_figure(row, "train.loss") >= AT_CHANCE * self.guessing["train"] for row in rows)

    def _losses(self, row: Row) -> str:
        loss, guessing = _figure(row, "train.loss"), self.guessing["train"]
        return f"the training loss is {loss:.3f}, as that of guessing ({guessing:.3f})"


def _figure(row: Row, name: str) -> float:
    """Return a figure of an epoch; NaN, with which no comparison is true, where it was not measured."""
    value = row.get(name)
    return nan if value is None else value
