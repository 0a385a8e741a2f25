"""At which resolution a model learned, and whether an image has another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 1.2
"""Resolutions whose ratio is at most this are alike: scanners of one nominal magnification differ by less."""
MICROSCOPE = 20.0
"""Microns per pixel; coarser ones are the print resolution of a photograph and say nothing of what it shows."""

GIVEN = "a column `mpp` in a CSV, or --mpp of predict"
"""How the user gives the resolution of an image."""


@dataclass(frozen=True)
class Resolution:
    """Microns per pixel of the patches that a model learned from.

    Attributes:
        low, high: the least and the greatest of them; None where no image said it.
        unknown: images that did not say it.
    """

    low: float | None = None
    high: float | None = None
    unknown: int = 0

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Resolution:
        """The resolution of images, one value for each."""
        values = list(values)
        known = [value for value in values if value is not None]
        return cls(min(known, default=None), max(known, default=None), len(values) - len(known))

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Resolution:
        """As `to_json` gives it; nothing is known of a model that does not say it."""
        return cls(**data) if data else cls()

    def to_json(self) -> dict[str, Any]:
        """A plain dict, for model.json."""
        return asdict(self)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return "unknown"
        return f"{self.low:.3g}" if self.high / self.low < 1.01 else f"{self.low:.3g} to {self.high:.3g}"

    def spread(self) -> tuple[str, str] | None:
        """What is wrong and what to do, where the images differ among themselves."""
        if self.low is None or self.high is None or self.low > MICROSCOPE:
            return None
        if self.high / self.low > TOLERANCE:
            return f"images differ in resolution, {self} um per pixel", f"Read all at one: --patch.mpp {self.high:.3g}."
        if self.unknown:
            problem = f"{self.unknown} images do not say their resolution; the others have {self} um per pixel"
            return problem, "Give it in a column `mpp`."
        return None

    def doubt(self, mpp: float | None) -> str:
        """A sentence where patches of `mpp` microns per pixel are not what the model learned from; else ""."""
        if self.low is None or self.high is None or self.low > MICROSCOPE:
            return ""
        if mpp is None:
            said = f"no resolution is stated, and the model learned at {self} um per pixel. Give it: {GIVEN}"
            return "" if self.unknown else said
        if self.low / TOLERANCE <= mpp <= self.high * TOLERANCE:
            return ""
        times = self.low / mpp if mpp < self.low else mpp / self.high
        size = "larger" if mpp < self.low else "smaller"
        return (
            f"patches of {mpp:.3g} um per pixel, but the model learned at {self}: everything is {times:.1f} times "
            f"{size} than it knows. If a file is wrong, give the true value: {GIVEN}. A model trained with "
            "--patch.mpp resamples"
        )


NOT_KNOWN = Resolution()
"""The resolution of a model that does not say at which one it learned."""
