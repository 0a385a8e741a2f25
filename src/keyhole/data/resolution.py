"""The resolution at which a model learned, and whether an image has another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1.2
"""Largest ratio of two resolutions that count as equal: scanners of one nominal magnification differ by less."""
MAX_MICROSCOPE_MPP = 20.0  # coarser values are the print resolution of photographs
MAX_MPP_DIFFERENCE = 0.05
"""Relative difference between a given resolution and that of the file which rounding and calibration explain."""
HOW_TO_GIVE = "a column `mpp` in a CSV, or --mpp of predict"


@dataclass(frozen=True)
class Resolution:
    """The smallest and largest microns per pixel of the patches that a model learned from."""

    low: float | None = None
    high: float | None = None
    unknown: int = 0  # number of images that do not state it

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Resolution:
        """Return the resolution of images from one value each."""
        values = list(values)
        known = [value for value in values if value is not None]
        return cls(min(known, default=None), max(known, default=None), len(values) - len(known))

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Resolution:
        """Read the dict in model.json; unknown for a model that does not state it."""
        return cls(**data) if data else cls()

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return "unknown"
        return f"{self.low:.3g}" if self.high / self.low < 1.01 else f"{self.low:.3g} to {self.high:.3g}"

    def spread(self) -> tuple[str, str] | None:
        """Return the problem and its fix if the images differ from each other."""
        if self.low is None or self.high is None or self.low > MAX_MICROSCOPE_MPP:
            return None
        if self.high / self.low > TOLERANCE:
            return f"images differ in resolution, {self} um per pixel", f"Read all at one: --patch.mpp {self.high:.3g}."
        if self.unknown:
            problem = f"{self.unknown} images do not state their resolution; the others have {self} um per pixel"
            return problem, "Give it in a column `mpp`."
        return None

    def doubt(self, mpp: float | None) -> str:
        """Return a warning if the model did not learn from patches of `mpp` microns per pixel; else an empty text."""
        if self.low is None or self.high is None or self.low > MAX_MICROSCOPE_MPP:
            return ""
        if mpp is None:
            said = f"no resolution is stated, and the model learned at {self} um per pixel. Give it: {HOW_TO_GIVE}"
            return "" if self.unknown else said
        if self.low / TOLERANCE <= mpp <= self.high * TOLERANCE:
            return ""
        times = self.low / mpp if mpp < self.low else mpp / self.high
        size = "larger" if mpp < self.low else "smaller"
        return (
            f"patches of {mpp:.3g} um per pixel, but the model learned at {self}: everything is {times:.1f} times "
            f"{size} than it knows. If a file is wrong, give the true value: {HOW_TO_GIVE}. A model trained with "
            "--patch.mpp resamples"
        )


def overridden(given: float | None, stated: float | None, source: str = "the CSV") -> str:
    """Return a sentence if microns per pixel that the user gives replace others that the file states; else "".

    `source` is where the user gives them.

    >>> overridden(0.25, 0.5)
    "0.25 microns per pixel in the CSV, 0.5 in the file; the CSV's is used"
    >>> overridden(0.5, 0.499), overridden(None, 0.5), overridden(0.5, None)
    ('', '', '')
    """
    if given is None or stated is None or abs(given / stated - 1) <= MAX_MPP_DIFFERENCE:
        return ""
    where = "in" if source == "the CSV" else "by"
    return f"{given:g} microns per pixel {where} {source}, {stated:.4g} in the file; {source}'s is used"


def enlarged(l0_mpp: float | None, scale: float) -> str:
    """Return a sentence if patches are finer than the image, of `l0_mpp` microns per pixel, by more than `TOLERANCE`.

    `scale` is level-0 pixels per pixel of a patch.

    >>> enlarged(1.0, 0.5)
    'enlarged 2 x: the slide has 1 um per pixel, and patches are read at 0.5'
    >>> enlarged(0.25, 2.0), enlarged(None, 0.5)
    ('', '')
    """
    if l0_mpp is None or scale * TOLERANCE >= 1:
        return ""
    times = f"enlarged {1 / scale:.2g} x"
    return f"{times}: the slide has {l0_mpp:.3g} um per pixel, and patches are read at {l0_mpp * scale:.3g}"


NOT_KNOWN = Resolution()  # the resolution of a model that does not state it
