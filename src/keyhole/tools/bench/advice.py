"""Says in one sentence what limits a run, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from keyhole.util.threads import reading_cores

MAX_HIDDEN_SHARE, MAX_LEARNING_SHARE = 0.15, 1 / 3
"""Shares of the time up to which a part other than the encoder is not the limit; some learning is needed."""
MIN_OWN_RATE = 0.75
"""Share of its rate alone: below it the encoder is slowed down by something else."""
MIN_BLANK_SHARE = 0.2
"""Share of patches of one color from which leaving them out is worth a sentence."""


@dataclass(frozen=True)
class Facts:
    """Facts of a run that the advice is based on.

    Attributes:
        features: learns from stored features, not images.
        cuda: computed on a GPU.
        threads: that read.
        cores: of this machine that the process may use.
        resident: decoded images stay in memory.
        split: the gradient step encodes the kept patches twice, since memory is short.
        kept: kept patches of all patches, a share.
        kept_cost: learning from a patch, in patches that the encoder alone scores in that time.
        blank: share of patches of one color that are encoded.
        patches: of an image, on average.
        encoding_rate: patches/s while encoding, as a share of the encoder alone.
        colored_rate: of the encoder alone when colors are changed first, as a share of without.
    """

    features: bool = False
    cuda: bool = False
    threads: int = 1
    cores: int = 1
    resident: bool = False
    split: bool = False
    kept: float = 0.0
    kept_cost: float = 3.0
    blank: float = 0.0
    patches: float = 1000.0
    encoding_rate: float = 1.0
    colored_rate: float = 1.0


def advice(shares: Mapping[str, float], facts: Facts) -> str:
    """Return the sentence.

    Args:
        shares: of the time that passed, by part; `other` is the rest.
        facts: of the run.
    """
    limits = {
        name: share
        for name, share in shares.items()
        if share > (MAX_LEARNING_SHARE if name == "learning" else MAX_HIDDEN_SHARE)
    }
    limits.pop("encoding", None)
    if not limits or (facts.cuda and shares["encoding"] >= 1 - MAX_HIDDEN_SHARE):
        return _of_encoder(facts)
    worst = max(limits, key=lambda name: limits[name])
    return f"{worst.capitalize()} takes {limits[worst]:.0%} of the time: {_REMEDIES[worst](facts)}."


def _of_encoder(facts: Facts) -> str:
    if facts.blank >= MIN_BLANK_SHARE:
        return (
            f"The encoder is the limit, and {facts.blank:.0%} of what it looks at is of one colour: "
            "--patch.foreground non-empty (on slides: tissue) leaves such patches out."
        )
    if facts.colored_rate < MIN_OWN_RATE:
        return (
            f"The encoder is the limit, at {facts.colored_rate:.0%} of its rate where colours are changed first: "
            "--augment.color 0 does without."
        )
    if facts.encoding_rate < MIN_OWN_RATE and not facts.cuda:
        return (
            f"The encoder is the limit, at {facts.encoding_rate:.0%} of the rate it has alone: reading takes cores "
            "from it; images that stay in memory (--data.cache) or that are cheaper to decode leave it more."
        )
    return (
        "The encoder is the limit, as it should be: only a smaller encoder, fewer patches (--patch.foreground, a "
        "larger --patch.stride) or a faster device would be faster."
    )


def _of_reading(facts: Facts) -> str:
    if facts.threads < reading_cores(facts.cores, facts.cuda):
        return f"give it more of the {facts.cores} cores with --run.threads (now {facts.threads})"
    if facts.features:
        return "a local disk, or files of float16 (keyhole embed --dtype float16), would be read faster"
    if not facts.resident and facts.patches < 5000:
        return "let the decoded images stay in memory, with --data.cache in GB, if they fit"
    return (
        "tiled pyramids of JPEG on a local disk are read fastest; strips, JPEG 2000 and tiles that are much larger "
        "than a patch, or lie across patches, cost more (keyhole check names the format)"
    )


def _of_copying(facts: Facts) -> str:
    if facts.cuda:
        return "a larger --select.chunk, or a smaller --patch.size, moves less at a time for each patch encoded"
    return "a larger --select.chunk makes fewer and larger pieces of it"


def _of_scoring(_: Facts) -> str:
    return "a larger --select.chunk, fewer --model.heads or fewer tasks make it cheaper"


def _of_learning(facts: Facts) -> str:
    if facts.split:
        return "with more --memory the kept patches would be encoded once in a step, not twice"
    return (
        f"{facts.kept:.1%} of the patches are kept, and learning from one costs as much as looking at "
        f"{facts.kept_cost:.0f}; a smaller --select.m, or a frozen encoder (--model.freeze), makes it cheaper"
    )


def _of_other(_: Facts) -> str:
    return "much of a step is bookkeeping; larger images or a larger --train.batch make more of each step"


_REMEDIES = {
    "reading": _of_reading,
    "copying": _of_copying,
    "scoring": _of_scoring,
    "learning": _of_learning,
    "other": _of_other,
}
