"""Estimate the time of an epoch and of a run from measured costs. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

MIN_TOLD_SECONDS = 5.0
"""No estimate is shown for shorter runs."""


@dataclass(frozen=True)
class Work:
    """The amount of work of a run.

    Attributes:
        m: patches kept of an image.
        blind: epochs that draw the kept patches at random and score none.
        resident: decoded images stay in memory after the first epoch.
    """

    train_images: int
    train_patches: int
    val_images: int
    val_patches: int
    m: int
    epochs: int
    blind: float = 0.0
    resident: bool = False


@dataclass(frozen=True)
class Costs:
    """Measured seconds.

    Attributes:
        image: seconds to open an image, on one thread.
        patch: seconds to read a patch, on one thread.
        encode: seconds to score a patch.
        learn: seconds to learn from a kept patch.
        threads: number of reading threads.
        overlap: reading and encoding run at the same time, as with a GPU.
        save: seconds to save the state at the end of an epoch.
    """

    image: float
    patch: float
    encode: float
    learn: float
    threads: int = 1
    overlap: bool = False
    save: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Seconds of the parts of a run. Epochs count from 0; `first` means that no decoded image is in memory yet."""

    work: Work
    costs: Costs

    def training(self, epoch: int, first: bool = False) -> float:
        """Return the seconds of the training images of an epoch."""
        work, kept = self.work, min(self.work.m * self.work.train_images, self.work.train_patches)
        share = min(1.0, max(0.0, epoch + 1 - work.blind))  # share of the epoch that scores patches
        patches = share * work.train_patches + (1 - share) * kept
        return self._pass(work.train_images, patches, share * work.train_patches, first) + kept * self.costs.learn

    def validation(self, first: bool = False) -> float:
        """Return the seconds of the validation images; the kept patches are encoded again."""
        return self._inference(self.work.val_images, self.work.val_patches, first)

    def predicting(self) -> float:
        """Return the seconds of the predictions for both splits at the end."""
        work = self.work
        return self._inference(work.train_images + work.val_images, work.train_patches + work.val_patches)

    def epoch(self) -> float:
        """Return the seconds of an epoch that scores all patches, with decoded images in memory."""
        return self.training(self.work.epochs + round(self.work.blind) + 1) + self.validation() + self.costs.save

    def run(self, start: int = 0) -> float:
        """Return the seconds of the run from the epoch `start` on."""
        each = (self.training(k, k == start) + self.validation(k == start) for k in range(start, self.work.epochs))
        return sum(each) + max(0, self.work.epochs - start) * self.costs.save + self.predicting()

    def after(self, epoch: int, now: float, first: bool = False) -> float:
        """Return the seconds from the end of an epoch's training images on, if these images take `now` seconds.

        The ratio of `now` to its estimate scales everything but saving.
        """
        expected = self.training(epoch, first)
        scale = now / expected if expected else 1.0
        rest = self.validation(first) + self.predicting()
        rest += sum(self.training(k) + self.validation() for k in range(epoch + 1, self.work.epochs))
        return scale * rest + max(0, self.work.epochs - epoch) * self.costs.save

    def line(self, how: str, start: int = 0) -> str | None:
        """Return the line for users before the epoch `start`, which ends with `how` it was estimated; None if short."""
        seconds, left = self.run(start), self.work.epochs - start
        if seconds < MIN_TOLD_SECONDS:
            return None
        what = "the run of 1 epoch" if left == 1 else f"{'the run of' if not start else 'the other'} {left} epochs"
        return f"time: {about(self.epoch())} an epoch, {spoken(seconds)} for {what}: an estimate from {how}"

    def _inference(self, images: int, patches: int, first: bool = False) -> float:
        return self._pass(images, patches, patches + min(self.work.m * images, patches), first)

    def _pass(self, images: int, patches: float, encoded: float, first: bool) -> float:
        reading = patches * self.costs.patch + (images * self.costs.image if first or not self.work.resident else 0.0)
        reading, encoding = reading / self.costs.threads, encoded * self.costs.encode
        return max(reading, encoding) if self.costs.overlap else reading + encoding


def about(seconds: float) -> str:
    """Return an estimate of a duration.

    >>> [about(each) for each in (0.3, 42)]
    ['under a second', 'about 42 s']
    """
    return spoken(seconds) if seconds < 1 else f"about {spoken(seconds)}"


def spoken(seconds: float) -> str:
    """Return a duration in two digits at most.

    >>> [spoken(each) for each in (0.3, 42, 700, 9000, 400_000)]
    ['under a second', '42 s', '12 min', '2.5 h', '4.6 days']
    """
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.2g} h"
    return f"{seconds / 86_400:.2g} days" if seconds < 8_640_000 else f"{seconds / 86_400:.0f} days"
