"""The result of a measurement, and one sentence about what limits the speed and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from keyhole.util.threads import reading_cores

MAX_HIDDEN_SHARE, MAX_LEARNING_SHARE = 0.15, 1 / 3
"""Shares of the time up to which a part is not the limit; learning needs more than the others."""
MIN_OWN_RATE = 0.75
"""Share of its rate alone below which something else slows the encoder down."""
MIN_BLANK_SHARE = 0.2
"""Least share of patches of one color for the advice to leave them out."""


@dataclass(frozen=True)
class Speed:
    """The result of a measurement."""

    data: str  # what was measured, in words
    chosen: dict[str, str]  # what the run chose, in words: device, compiling, threads, chunks
    floor: float  # patches/s of the encoder alone
    patches_per_s: float
    images_per_s: float
    first_step: float  # seconds, with what it builds, compiles and allocates
    step: float  # mean seconds of the measured steps
    steps: int  # number of measured steps
    epoch: float  # estimated seconds
    run: float  # estimated seconds
    epochs: str  # both estimates, in words
    seconds: dict[str, float]  # by part, including `other`
    shares: dict[str, float]  # parts overlap on a GPU, so the sum may be more than 1
    advice: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"of_floor": self.patches_per_s / self.floor}

    def lines(self) -> list[str]:
        """Return a table to print."""
        reached = f"{self.patches_per_s:,.0f} patches/s, {self.patches_per_s / self.floor:.0%} of the encoder's"
        rows = [
            ("data", self.data),
            *self.chosen.items(),
            ("encoder alone", f"{self.floor:,.0f} patches/s"),
            ("reached", f"{reached}; {self.images_per_s:,.3g} images/s"),
            ("first step", f"{self.first_step:.2f} s; {self.steps} after the warm-up took {self.step:.2f} s each"),
            ("an epoch", self.epochs),
            *((name, f"{self.seconds[name]:8.2f} s  {self.shares[name]:4.0%}") for name in self.seconds),
        ]
        width = max(len(name) for name, _ in rows)
        return [*(f"{name:{width}}  {value}" for name, value in rows), self.advice]


@dataclass(frozen=True)
class Facts:
    """Facts of a run that the advice is based on."""

    features: bool = False  # learns from stored features, not images
    cuda: bool = False
    threads: int = 1  # that read
    cores: int = 1  # that the process may use
    resident: bool = False  # decoded images stay in memory
    split: bool = False  # the gradient step encodes the kept patches twice, since memory is short
    kept: float = 0.0  # kept patches of all patches, a share
    kept_cost: float = 3.0  # learning from a patch, in patches that the encoder alone scores in that time
    blank: float = 0.0  # share of patches of one color that are encoded
    patches: float = 1000.0  # of an image, on average
    encoding_rate: float = 1.0  # patches/s while encoding, as a share of the encoder alone
    colored_rate: float = 1.0  # of the encoder alone when colors are changed first, as a share of without


def advice(shares: Mapping[str, float], facts: Facts) -> str:
    """Return the sentence, from the share of the time of each part; `other` is the rest."""
    limits = {
        name: share
        for name, share in shares.items()
        if name != "encoding" and share > (MAX_LEARNING_SHARE if name == "learning" else MAX_HIDDEN_SHARE)
    }
    if not limits or (facts.cuda and shares["encoding"] >= 1 - MAX_HIDDEN_SHARE):
        return f"The encoder is the limit, {_of_encoder(facts)}."
    worst = max(limits, key=lambda name: limits[name])
    return f"{worst.capitalize()} takes {limits[worst]:.0%} of the time: {_remedy(worst, facts)}."


def _of_encoder(facts: Facts) -> str:
    if facts.blank >= MIN_BLANK_SHARE:
        return (
            f"and {facts.blank:.0%} of what it encodes is of one colour: "
            "--patch.foreground non-empty (on slides: tissue) leaves such patches out"
        )
    if facts.colored_rate < MIN_OWN_RATE:
        return (
            f"at {facts.colored_rate:.0%} of its rate where colours are changed first: --augment.color 0 does without"
        )
    if facts.encoding_rate < MIN_OWN_RATE and not facts.cuda:
        return (
            f"at {facts.encoding_rate:.0%} of the rate it has alone: reading takes cores from it; "
            "images that stay in memory (--data.cache) or that are cheaper to decode leave it more"
        )
    return (
        "as it should be: only a smaller encoder, fewer patches (--patch.foreground, a larger --patch.stride) "
        "or a faster device would be faster"
    )


def _remedy(part: str, facts: Facts) -> str:
    if part == "reading":
        if facts.threads < reading_cores(facts.cores, facts.cuda):
            return f"give it more of the {facts.cores} cores with --run.threads (now {facts.threads})"
        if facts.features:
            return "a local disk, or files of float16 (keyhole embed --dtype float16), would be read faster"
        if not facts.resident and facts.patches < 5000:
            return "let the decoded images stay in memory, with --data.cache in GB, if they fit"
        return (
            "tiled pyramids of JPEG on a local disk are read fastest; strips, JPEG 2000 and tiles that are much "
            "larger than a patch, or lie across patches, cost more (keyhole check names the format)"
        )
    if part == "learning":
        if facts.split:
            return "with more --memory the kept patches would be encoded once in a step, not twice"
        return (
            f"{facts.kept:.1%} of the patches are kept, and learning from one costs as much as looking at "
            f"{facts.kept_cost:.0f}; a smaller --select.m, or a frozen encoder (--model.freeze), makes it cheaper"
        )
    return {
        "copying": "a larger --select.chunk, or a smaller --patch.size, moves less at a time for each patch encoded"
        if facts.cuda
        else "a larger --select.chunk makes fewer and larger pieces of it",
        "scoring": "a larger --select.chunk, fewer --model.heads or fewer tasks make it cheaper",
        "other": "much of a step is bookkeeping; larger images or a larger --train.batch make more of each step",
    }[part]
