"""Generated slides: labelled pyramidal TIFF files of stained tissue on glass, of any side up to 200,000 pixels.

A positive slide holds small nests of three hollow nuclei, on less than 0.1 % of its tissue. Nothing else depends on the
label: one seed gives the same slide with and without nests, and hollow nuclei absorb as much light as filled ones, so
that neither a thumbnail nor the amount of tissue or colour shows the class.

Every tile is computed by itself from coarse maps and periodic pictures (`slide_tissue`, `slide_nests`), and streams
into the file (`tiff_pyramid`): memory does not grow with the slide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keyhole.datasets.new_folder import NewFolder
from keyhole.datasets.slide_nests import MAX_NEST_SHARE, NO_NESTS, Nests, place_nests
from keyhole.datasets.slide_tissue import EDGE, NUCLEI, STROMA, Number, Texture, Tissue, make_texture, make_tissue
from keyhole.datasets.tiff_pyramid import TILE, Pixels, write_pyramid
from keyhole.errors import ConfigError
from keyhole.images.geometry import Box, Size

MIN_SIDE, MAX_SIDE = 2048, 200_000  # on a smaller slide a single nest could exceed its share of the tissue
MPP = 0.5
CLASSES = ("negative", "positive")
_ROUGH = 12  # standard deviation of the edge of tissue in pixels


@dataclass(frozen=True, eq=False)
class Slide:
    """A slide that was written."""

    path: Path
    positive: bool  # it has nests
    nests: NDArray[np.int64]  # their boxes (k, 4): x, y, width, height in level-0 pixels
    nest_pixels: NDArray[np.int64]  # pixels of each (k,) that differ from the same slide without it
    tissue: int  # number of level-0 pixels that are tissue, fat included


def make_slide(
    path: Path,
    side: int,
    seed: int | Sequence[int],
    *,
    tissue: float | None = None,
    positive: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Slide:
    """Write one square slide at 0.5 microns per pixel: JPEG tiles of 256 px, each level a quarter of the one before.

    The same arguments give the same bytes. With and without `positive`, only the nests differ.

    Args:
        path: the file; its folder must exist.
        side: width and height in pixels, 2,048 to 200,000.
        seed: seed of everything random.
        tissue: share of the slide that is tissue, 0.1 to 0.6, or 1 for a slide without glass; None draws 0.3 to 0.6.
        positive: whether it has nests.
        progress: called with the number of level-0 pixels done since the last call.

    Returns:
        What was written.

    Raises:
        ConfigError: an argument is out of its range.
        OutputError: the file cannot be written; an earlier file is unchanged.

    Example:
        >>> from pathlib import Path
        >>> slide = make_slide(Path("slide.tif"), side=2048, seed=0, positive=True)
        >>> slide.positive, slide.nests.shape[1]
        (True, 4)
    """
    return draw_scene(side, seed, tissue=tissue, positive=positive).write(Path(path), progress=progress)


@dataclass(frozen=True)
class SlideSet:
    """Settings of `make_slides`.

    Attributes:
        count: number of slides, those of `val` and `test` included.
        side: width and height in pixels, 2,048 to 200,000.
        positive: share of the slides with nests, spread evenly over their numbers.
        seed: seed of everything random.
        val: number of slides that choose the model; they come before those of `test`. With neither `val` nor `test` the
            manifest has no splits.
        test: number of slides for testing, the last ones.
        mpp: microns per pixel that the files state.

    Raises:
        ConfigError: a value is out of its range.
    """

    count: int = 100
    side: int = 6144
    positive: float = 0.5
    seed: int = 0
    val: int = 0
    test: int = 0
    mpp: float = MPP

    def __post_init__(self) -> None:
        _check_slide(self.side, self.seed)
        if not 0.05 <= self.mpp <= 20:
            raise ConfigError(f"mpp: must be 0.05 to 20 microns per pixel, not {self.mpp}; a microscope's are.")
        if self.count < 1:
            raise ConfigError(f"count: must be 1 or more slides, not {self.count}.")
        if not 0 <= self.positive <= 1:
            raise ConfigError(f"positive: must be a share of the slides, 0 to 1, not {self.positive}.")
        if min(self.val, self.test) < 0 or self.val + self.test >= self.count:
            raise ConfigError(
                f"val, test: expected counts that leave slides to train on, not {self.val} and {self.test} of "
                f"{self.count}."
            )

    def has_nests(self, number: int) -> bool:
        """Return True if slide `number` is positive: of the first n slides n * positive, rounded, are."""
        return math.floor((number + 1) * self.positive + 0.5) > math.floor(number * self.positive + 0.5)

    def split(self, number: int) -> tuple[str, ...]:
        """Return the cell `split` of slide `number`; empty without splits."""
        if not self.val and not self.test:
            return ()
        left = self.count - number
        return ("test" if left <= self.test else "val" if left <= self.test + self.val else "train",)


def make_slides(out: Path, slides: SlideSet | None = None, progress: Callable[[int], None] | None = None) -> Path:
    """Write `slides/*.tif`, `nests.csv` and, last, `manifest.csv` into a folder.

    `manifest.csv` has the columns image, label (negative or positive) and, with `val` or `test`, split; `read_manifest`
    reads it. `nests.csv` has the box of each nest (slide, x, y, width, height in level-0 pixels) and its pixels. Slide
    number k does not depend on the number of slides. On an error, everything written is removed.

    Args:
        out: the folder, created if needed; it must be empty.
        slides: number of slides and what they show.
        progress: called with the number of level-0 pixels done since the last call.

    Returns:
        Path of `manifest.csv`.

    Raises:
        OutputError: `out` holds something, or cannot be written.

    Example:
        >>> from pathlib import Path
        >>> manifest = make_slides(Path("slides"), SlideSet(count=2, side=2048))
        >>> print(manifest.read_text(), end="")
        image,label
        slides/slide-0000.tif,positive
        slides/slide-0001.tif,negative
    """
    slides = slides or SlideSet()
    rows: list[Sequence[object]] = []
    nests: list[Sequence[object]] = []

    def scene(number: int) -> Scene:
        return draw_scene(slides.side, (slides.seed, number), positive=slides.has_nests(number))

    with NewFolder(Path(out), "slides") as folder, ThreadPoolExecutor(1) as pool:
        coming = pool.submit(scene, 0)
        for number in range(slides.count):
            now, coming = coming, pool.submit(scene, min(number + 1, slides.count - 1))
            name = f"slides/slide-{number:04d}.tif"
            slide = now.result().write(folder.file(name), slides.mpp, progress=progress)
            rows.append((name, CLASSES[slide.positive], *slides.split(number)))
            nests += [(name, *nest) for nest in np.column_stack((slide.nests, slide.nest_pixels)).tolist()]
        folder.write_csv("nests.csv", ["slide", "x", "y", "width", "height", "pixels"], nests)
        return folder.write_csv("manifest.csv", ["image", "label", "split"][: len(rows[0])], rows)


@dataclass(frozen=True, eq=False)
class Scene:
    """A slide before it is drawn; `tile` draws a part of it."""

    tissue: Tissue
    texture: Texture
    stroma_at: tuple[int, int]  # x and y of the slide's corner in the periodic picture
    nuclei_at: tuple[int, int]
    fat_at: tuple[int, int]
    nests: Nests

    def tile(self, column: int, row: int) -> Pixels | None:
        """Return the pixels (256, 256, 3) of a level-0 tile, or None if it is only glass."""
        inside = self.tissue.nodes(self.tissue.inside, column, row)
        if inside.max() < -EDGE:
            return None
        light = _piece(self.texture.stroma, self.stroma_at, column, row).astype(np.uint16)
        light *= self._nuclei(column, row)
        light >>= 8
        # Absorb less light where the section is stained less; never more, so that no value wraps around.
        strength = self.tissue.over_tile(self.tissue.stain, column, row) * 256
        light = np.asarray(255 - ((255 - light) * strength.astype(np.uint16)[:, :, None] >> 8), np.uint16)
        if self.tissue.nodes(self.tissue.fat, column, row).max() > -EDGE:
            fat = _piece(self.texture.fat, self.fat_at, column, row)
            light = _blend(light, fat, self._cover(self.tissue.fat, column, row))
        if inside.min() < EDGE:
            light = _blend(self.texture.glass, light, self._cover(self.tissue.inside, column, row))
        return light.astype(np.uint8)

    def write(
        self, path: Path, mpp: float = MPP, threads: int | None = None, progress: Callable[[int], None] | None = None
    ) -> Slide:
        """Write the slide; see `make_slide`. The bytes do not depend on the number of threads."""
        side, glass, nests = self.tissue.side, self.texture.glass, self.nests
        write_pyramid(path, Size(side, side), self.tile, mpp=mpp, background=glass, threads=threads, progress=progress)
        return Slide(path, len(nests.boxes) > 0, nests.boxes, nests.pixels, round(self.tissue.share * side * side))

    def _nuclei(self, column: int, row: int) -> Pixels:
        """Return the light that passes the nuclei; those of nests are hollow."""
        filled = _piece(self.texture.nuclei, self.nuclei_at, column, row)
        touched = self.nests.by_tile.get((column, row))
        if touched is None:
            return filled
        hollow = _piece(self.texture.hollow, self.nuclei_at, column, row)
        nest = self.nests.mask(touched, Box(column * TILE, row * TILE, TILE, TILE))
        return np.where(nest[:, :, None], hollow, filled)

    def _cover(self, map_: NDArray[np.float32], column: int, row: int) -> NDArray[np.uint16]:
        """Return the share 0 ... 256 (256, 256, 1) of each pixel that is inside an edge, which is rough."""
        rough = _piece(self.texture.rough, self.fat_at, column, row)
        inside = self.tissue.over_tile(map_, column, row) + _ROUGH * rough
        return (np.clip(inside / 3 + 0.5, 0, 1) * 256).astype(np.uint16)[:, :, None]


def _piece(picture: NDArray[Number], at: tuple[int, int], column: int, row: int) -> NDArray[Number]:
    period = len(picture) - TILE
    x, y = (at[0] + column * TILE) % period, (at[1] + row * TILE) % period
    return picture[y : y + TILE, x : x + TILE]


def draw_scene(side: int, seed: int | Sequence[int], *, tissue: float | None = None, positive: bool = False) -> Scene:
    """Draw everything random about a slide. Nests use another random stream, so that nothing else depends on them."""
    _check_slide(side, seed, tissue)
    entropy = [seed] if isinstance(seed, int) else list(seed)
    rng, nest_rng = (np.random.default_rng([*entropy, purpose]) for purpose in (0, 1))
    texture = make_texture(rng)
    where = make_tissue(rng, side, tissue)
    stroma_at, nuclei_at, fat_at = (
        (int(x), int(y)) for x, y in (rng.integers(0, period, 2) for period in (STROMA, NUCLEI, STROMA))
    )
    nests = place_nests(nest_rng, where, texture, nuclei_at) if positive else NO_NESTS
    assert nests.pixels.sum() < MAX_NEST_SHARE * where.share * side * side, "nests cover more than 0.1 % of the tissue"
    return Scene(where, texture, stroma_at, nuclei_at, fat_at, nests)


def _blend(
    outside: NDArray[np.unsignedinteger], inside: NDArray[np.unsignedinteger], cover: NDArray[np.uint16]
) -> NDArray[np.uint16]:
    return np.asarray((inside * cover + outside * (256 - cover)) >> 8, np.uint16)


def _check_slide(side: int, seed: int | Sequence[int], tissue: float | None = None) -> None:
    if not MIN_SIDE <= side <= MAX_SIDE:
        raise ConfigError(f"side: must be {MIN_SIDE:,} to {MAX_SIDE:,} pixels, not {side:,}.")
    if min([seed] if isinstance(seed, int) else seed) < 0:
        raise ConfigError(f"seed: must be 0 or more, not {seed}.")
    if tissue is not None and not (0.1 <= tissue <= 0.6 or tissue == 1):
        raise ConfigError(f"tissue: must be 0.1 to 0.6, or 1 for a slide without glass, not {tissue}.")
