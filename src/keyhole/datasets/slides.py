"""Generated slides: labelled pyramidal TIFF files of stained tissue on glass, of any side up to 200,000 pixels.

    make_slide(path, side, seed, *, tissue=None, positive=False, mpp=0.5, threads=None, progress=None) -> Slide
    make_slides(out, *, count, side=6144, positive=0.5, seed=0, val=0, test=0, mpp=0.5, ...) -> manifest.csv

A positive slide holds small nests of three nuclei that are hollow instead of filled, together under 0.1 % of its
tissue. Nothing else depends on the label: the same seed gives the same slide with and without nests, and hollow nuclei
take as much light as filled ones, so that neither a thumbnail nor an amount of tissue or colour tells the class. A
model has to find a nest and to look at it at level 0.

Every tile is computed by itself, from coarse maps of the slide (`slide_tissue`) and periodic pictures of its texture
(`slide_texture`), and streams into the file (`tiff_pyramid`): memory does not grow with the slide.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from keyhole.datasets.slide_texture import NUCLEI, STROMA, Texture, make_texture
from keyhole.datasets.slide_tissue import (
    EDGE,
    LARGEST_SHARE,
    Nests,
    Tissue,
    make_tissue,
    nest_mask,
    no_nests,
    place_nests,
)
from keyhole.datasets.tiff_pyramid import TILE, Pixels, write_pyramid
from keyhole.errors import ConfigError, OutputError
from keyhole.images.geometry import Box, Size
from keyhole.util.files import writable_folder, write_atomic

SMALLEST_SIDE, LARGEST_SIDE = 2048, 200_000
"""On a smaller slide a single nest could take more than its share of the tissue."""
MPP = 0.5
"""Microns per pixel: 20x."""
CLASSES = ("negative", "positive")
Number = TypeVar("Number", bound=np.generic)

_ROUGH = 12
"""Pixels by which the edge of tissue wanders, one standard deviation."""


@dataclass(frozen=True, eq=False)
class Slide:
    """A slide that was written.

    Attributes:
        path: of the file.
        positive: whether it has nests.
        nests: their boxes (k, 4): x, y, width, height in level-0 pixels.
        nest_pixels: of each (k,): those that are other than they would be without it.
        tissue: pixels of level 0 that are tissue, fat included.
    """

    path: Path
    positive: bool
    nests: NDArray[np.int64]
    nest_pixels: NDArray[np.int64]
    tissue: int


def make_slide(
    path: Path,
    side: int,
    seed: int | Sequence[int],
    *,
    tissue: float | None = None,
    positive: bool = False,
    mpp: float = MPP,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Slide:
    """Writes one square slide: JPEG tiles of 256 px, each level a quarter of the side of the one before.

    The same arguments give the same bytes, whatever the threads; with and without `positive` only the nests differ.

    Args:
        path: of the file; its folder must exist.
        side: pixels, 2,048 to 200,000.
        seed: everything random follows from it.
        tissue: share of the slide that is tissue, 0.1 to 0.6, or 1 for a slide without glass; None draws one of 0.3
            to 0.6.
        positive: put nests into it.
        mpp: microns per pixel that the file states.
        threads: default one per core, at most 16.
        progress: called with the number of level-0 pixels done since the last call.

    Raises:
        ConfigError: an argument out of its range.
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    _check_slide(side, seed, tissue, mpp)
    scene = draw_scene(side, seed, tissue=tissue, positive=positive)
    return _write(Path(path), scene, mpp, threads, progress)


def make_slides(
    out: Path,
    *,
    count: int,
    side: int = 6144,
    positive: float = 0.5,
    seed: int = 0,
    val: int = 0,
    test: int = 0,
    mpp: float = MPP,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes `slides/*.tif`, `nests.csv` and, last, `manifest.csv` into `out`.

    `manifest.csv` has the columns image, label (negative or positive) and, where `val` or `test` is given, split; it is
    what `read_manifest` reads. `nests.csv` says where the nests are (slide, x, y, width, height in level-0 pixels) and
    how many pixels each has.
    Slide number k is the same however many are written. If anything fails, what was written is removed again.

    Args:
        out: folder, created if need be; must be empty.
        count: slides, those of `val` and `test` included.
        side: pixels, 2,048 to 200,000.
        positive: share of the slides with nests, spread evenly over their numbers.
        seed: everything random follows from it.
        val, test: how many, from the end, are for choosing the model and for testing it; test ones are last.
        mpp: microns per pixel that the files state.
        threads: default one per core, at most 16.
        progress: called with the number of level-0 pixels done since the last call.

    Returns:
        Path of `manifest.csv`.

    Raises:
        ConfigError: an argument out of its range.
        OutputError: `out` holds something, or cannot be written.
    """
    _check_slide(side, seed, None, mpp)
    _check_set(count, positive, val, test)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is there already and not empty" if out.is_dir() else "is a file, expected a folder"
        raise OutputError(f"{out}: {what}. Choose another folder or remove what is there.")
    created = not out.exists()
    writable_folder(out / "slides")
    rows: list[Sequence[object]] = []
    nests: list[Sequence[object]] = []
    names = [f"slides/slide-{number:04d}.tif" for number in range(count)]

    def scene(number: int) -> Scene:
        return draw_scene(side, (seed, number), positive=_label(number, positive))

    try:
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(scene, 0)
            for number, name in enumerate(names):
                now, coming = coming, pool.submit(scene, min(number + 1, count - 1))
                slide = _write(out / name, now.result(), mpp, threads, progress)
                rows.append((name, CLASSES[slide.positive], *_split(number, count, val, test)))
                found = zip(slide.nests.tolist(), slide.nest_pixels.tolist(), strict=True)
                nests += [(name, *box, pixels) for box, pixels in found]
        write_atomic(out / "nests.csv", _table(("slide", "x", "y", "width", "height", "pixels"), nests))
        header = ("image", "label", "split")[: len(rows[0])]
        return write_atomic(out / "manifest.csv", _table(header, rows))
    except BaseException:
        for name in (*names, "nests.csv"):
            (out / name).unlink(missing_ok=True)
        (out / "slides").rmdir()
        if created:
            out.rmdir()
        raise


# --- one slide -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scene:
    """All of a slide before it is drawn; `tile` draws a part of it.

    Attributes:
        tissue: where it is.
        texture: what it looks like.
        stroma_at, nuclei_at, fat_at: x and y of the slide's corner in each periodic picture.
        nests: where nuclei are hollow.
        nests_of: nests by tile.
    """

    tissue: Tissue
    texture: Texture
    stroma_at: tuple[int, int]
    nuclei_at: tuple[int, int]
    fat_at: tuple[int, int]
    nests: Nests
    nests_of: dict[tuple[int, int], list[int]]

    def tile(self, column: int, row: int) -> Pixels | None:
        """Pixels (256, 256, 3) of a level-0 tile, or None where there is only glass."""
        inside = self.tissue.nodes(self.tissue.inside, column, row)
        if inside.max() < -EDGE:
            return None
        light = self._piece(self.texture.stroma, STROMA, self.stroma_at, column, row).astype(np.uint16)
        light *= self._nuclei(column, row)
        light >>= 8
        light = self._stained(light, column, row)
        if self.tissue.nodes(self.tissue.fat, column, row).max() > -EDGE:
            fat = self._piece(self.texture.fat, STROMA, self.fat_at, column, row)
            light = _blend(light, fat, self._cover(self.tissue.fat, column, row))
        if inside.min() < EDGE:
            light = _blend(self.texture.glass, light, self._cover(self.tissue.inside, column, row))
        return light.astype(np.uint8)

    def _nuclei(self, column: int, row: int) -> Pixels:
        """What nuclei let pass, with those of nests in their own pattern."""
        filled = self._piece(self.texture.nuclei, NUCLEI, self.nuclei_at, column, row)
        nests = self.nests_of.get((column, row))
        if nests is None:
            return filled
        hollow = self._piece(self.texture.hollow, NUCLEI, self.nuclei_at, column, row)
        nest = nest_mask(self.nests.nuclei[nests], Box(column * TILE, row * TILE, TILE, TILE))
        return np.where(nest[:, :, None], hollow, filled)

    def _stained(self, light: NDArray[np.uint16], column: int, row: int) -> NDArray[np.uint16]:
        """Less taken of the light where the section is stained less; never more, so that nothing wraps around."""
        strength = self.tissue.over_tile(self.tissue.stain, column, row) * 256
        taken = (255 - light) * strength.astype(np.uint16)[:, :, None] >> 8
        return np.asarray(255 - taken, np.uint16)

    def _cover(self, map_: NDArray[np.float32], column: int, row: int) -> NDArray[np.uint16]:
        """0 ... 256 (256, 256, 1): how much of a tile's pixels lies inside of an edge, which is rough."""
        rough = self._piece(self.texture.rough, STROMA, self.fat_at, column, row)
        inside = self.tissue.over_tile(map_, column, row) + _ROUGH * rough
        return (np.clip(inside / 3 + 0.5, 0, 1) * 256).astype(np.uint16)[:, :, None]

    def _piece(
        self, picture: NDArray[Number], period: int, at: tuple[int, int], column: int, row: int
    ) -> NDArray[Number]:
        x, y = (at[0] + column * TILE) % period, (at[1] + row * TILE) % period
        return picture[y : y + TILE, x : x + TILE]


def draw_scene(side: int, seed: int | Sequence[int], *, tissue: float | None = None, positive: bool = False) -> Scene:
    """Everything random about a slide; nests come from a stream of their own, so that nothing else depends on them."""
    entropy = [seed] if isinstance(seed, int) else list(seed)
    rng, nest_rng = (np.random.default_rng([*entropy, purpose]) for purpose in (0, 1))
    texture = make_texture(rng)
    where = make_tissue(rng, side, tissue)
    stroma_at, nuclei_at, fat_at = (
        (int(x), int(y)) for x, y in (rng.integers(0, period, 2) for period in (STROMA, NUCLEI, STROMA))
    )
    nests = place_nests(nest_rng, where, texture, nuclei_at) if positive else no_nests()
    assert nests.pixels.sum() < LARGEST_SHARE * where.share * side * side, "nests cover more than 0.1 % of the tissue"
    return Scene(where, texture, stroma_at, nuclei_at, fat_at, nests, nests.by_tile())


def _write(path: Path, scene: Scene, mpp: float, threads: int | None, progress: Callable[[int], None] | None) -> Slide:
    side = scene.tissue.side
    write_pyramid(
        path,
        Size(side, side),
        scene.tile,
        mpp=mpp,
        background=scene.texture.glass,
        threads=threads,
        progress=progress,
    )
    nests = scene.nests
    return Slide(path, len(nests.boxes) > 0, nests.boxes, nests.pixels, round(scene.tissue.share * side * side))


def _blend(
    outside: NDArray[np.unsignedinteger], inside: NDArray[np.unsignedinteger], cover: NDArray[np.uint16]
) -> NDArray[np.uint16]:
    return np.asarray((inside * cover + outside * (256 - cover)) >> 8, np.uint16)


# --- the set ---------------------------------------------------------------------------------------------------------


def _label(number: int, positive: float) -> bool:
    """Whether slide `number` has nests: as many of the first n as n * positive, rounded, for every n."""
    return math.floor((number + 1) * positive + 0.5) > math.floor(number * positive + 0.5)


def _split(number: int, count: int, val: int, test: int) -> tuple[str, ...]:
    if not val and not test:
        return ()
    return ("test" if number >= count - test else "val" if number >= count - test - val else "train",)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _check_slide(side: int, seed: int | Sequence[int], tissue: float | None, mpp: float) -> None:
    if not SMALLEST_SIDE <= side <= LARGEST_SIDE:
        raise ConfigError(f"side: must be {SMALLEST_SIDE:,} to {LARGEST_SIDE:,} pixels, not {side:,}.")
    if min([seed] if isinstance(seed, int) else seed) < 0:
        raise ConfigError(f"seed: must be 0 or more, not {seed}.")
    if tissue is not None and not (0.1 <= tissue <= 0.6 or tissue == 1):
        raise ConfigError(f"tissue: must be 0.1 to 0.6, or 1 for a slide without glass, not {tissue}.")
    if not 0.05 <= mpp <= 20:
        raise ConfigError(f"mpp: must be 0.05 to 20 microns per pixel, not {mpp}; a microscope's are.")


def _check_set(count: int, positive: float, val: int, test: int) -> None:
    if count < 1:
        raise ConfigError(f"count: must be 1 or more slides, not {count}.")
    if not 0 <= positive <= 1:
        raise ConfigError(f"positive: must be a share of the slides, 0 to 1, not {positive}.")
    if min(val, test) < 0 or val + test >= count:
        raise ConfigError(f"val, test: expected counts that leave slides to train on, not {val} and {test} of {count}.")
