"""The mask of what is worth looking at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import drawn_slides
import numpy as np
import pytest
from drawn_slides import Slide, draw_slide
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from keyhole.errors import ConfigError
from keyhole.images import ArrayImage, Box, Image, Level, Size, open_image
from keyhole.patches.foreground import rules as module
from keyhole.patches.foreground import tissue
from keyhole.patches.foreground.rules import foreground
from keyhole.patches.foreground.tissue import find_tissue, otsu
from keyhole.patches.grid import Foreground, NoPatches, PatchGrid


def blank(width: int, height: int, channels: int = 1, value: int = 0) -> NDArray[np.uint8]:
    return np.full((height, width, channels), value, np.uint8)


def cells(mask: NDArray[np.bool_], size: tuple[int, int], x: int, y: int) -> tuple[int, int]:
    """Row and column of the mask that a pixel falls into."""
    block = max(2, -(-max(size) // 2048))
    assert mask.shape == (-(-size[1] // block), -(-size[0] // block))
    return y // block, x // block


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), data=st.data())
def test_a_single_differing_pixel_is_never_lost(width: int, height: int, data: st.DataObject) -> None:
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    pixels = blank(width, height)
    assert not foreground(ArrayImage(pixels), "non-empty").any()
    pixels[y, x] = 40
    mask = foreground(ArrayImage(pixels), "non-empty")
    # Alone in its block it is told by the block beside, above or below it, if the image has more than this one pixel.
    if width * height > 1:
        row, column = cells(mask, (width, height), x, y)
        assert mask[max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 1].any()
    far = np.abs(np.indices(mask.shape) - np.reshape((y // 2, x // 2), (2, 1, 1))).max(axis=0) > 1
    assert not mask[far].any()


def test_a_faint_square_that_fills_its_cells_is_found_at_its_edges() -> None:
    pixels = blank(64, 64)
    pixels[16:32, 16:32] = 30
    mask = foreground(ArrayImage(pixels), "non-empty")
    assert mask[8:16, 15].all()
    assert mask[15, 8:16].all()
    assert not mask[9:14, 9:14].any()  # of one colour
    assert not mask[20:].any()


def test_a_soft_shadow_is_found_though_no_neighbours_differ_much() -> None:
    slope = np.clip(np.arange(-100, 156) * 2, 0, 60).astype(np.uint8)  # 2 grey values a pixel, from column 100 to 130
    mask = foreground(ArrayImage(np.broadcast_to(slope[None, :, None], (64, 256, 1)).copy()), "non-empty")
    assert mask[:, 52:64].all()
    assert not mask[:, :46].any()
    assert not mask[:, 68:].any()


@settings(max_examples=30, deadline=None)
@given(
    boxes=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90), st.integers(1, 30)), min_size=1, max_size=4),
    offset=st.tuples(st.integers(0, 15), st.integers(0, 15)),
)
def test_of_sharp_drawings_all_patches_with_an_edge_are_left_and_few_others(
    boxes: list[tuple[int, int, int]], offset: tuple[int, int]
) -> None:
    """What is left has an edge at most three pixels away: within the cell that it touches, or the one after it."""
    pixels = blank(96, 96)
    for x, y, side in boxes:
        pixels[y : y + side, x : x + side] = 200
    image = ArrayImage(pixels)
    mask = foreground(image, "non-empty")
    every = PatchGrid(image, 16, offset=offset).boxes(slice(None)).tolist()
    if not mask.any():  # one square fills the image
        assert len(np.unique(pixels)) == 1
        return
    try:
        kept = PatchGrid(image, 16, offset=offset, mask=mask).boxes(slice(None)).tolist()
    except NoPatches:  # the offset cut them off
        kept = []
    for x, y, width, height in every:
        inside = pixels[y : y + height, x : x + width]
        near = pixels[max(y - 3, 0) : y + height + 3, max(x - 3, 0) : x + width + 3]
        if len(np.unique(inside)) > 1:
            assert [x, y, width, height] in kept
        elif len(np.unique(near)) == 1:
            assert [x, y, width, height] not in kept


def test_noise_of_jpeg_on_one_color_is_empty() -> None:
    noise = np.random.default_rng(0).integers(236, 246, (200, 300, 3), dtype=np.uint8)
    assert not foreground(ArrayImage(noise), "non-empty").any()


class _Recording(ArrayImage):
    """Keeps the size of the largest box read."""

    largest = 0

    def read(self, box: Box | tuple[int, int, int, int], level: int = 0) -> NDArray[np.uint8]:
        self.largest = max(self.largest, box[2] * box[3])
        return super().read(box, level)


@pytest.mark.parametrize("kind", ["non-empty", "tissue"])
@pytest.mark.parametrize("limit", [1, 3 * 8 * 400, 40_000])
def test_bands_do_not_change_the_mask_and_bound_what_is_read(
    monkeypatch: pytest.MonkeyPatch, kind: str, limit: int
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (41, 50, 3), dtype=np.uint8).repeat(9, 0).repeat(8, 1)
    image = _Recording(pixels)
    whole = foreground(image, kind)
    monkeypatch.setattr(module, "_BAND_BYTES", limit)
    image.largest = 0
    np.testing.assert_array_equal(foreground(image, kind), whole)
    assert image.largest <= max(limit // 3, 64)


def test_otsu_splits_two_hills_and_nothing_else() -> None:
    values = np.repeat(np.array([10, 12, 200, 210], np.uint8), [500, 400, 30, 20])
    assert 12 <= otsu(values) < 200
    assert otsu(np.full(9, 7, np.uint8)) == 255
    assert otsu(np.empty(0, np.uint8)) == 255


def slide(width: int = 800, height: int = 600) -> NDArray[np.uint8]:
    """Bright glass with noise, a pink patch of tissue and a stroke of black pen."""
    pixels = np.random.default_rng(0).integers(236, 244, (height, width, 3), dtype=np.uint8)
    pixels[200:400, 160:480] = (200, 120, 170)
    pixels[500:560, 600:760] = (20, 5, 10)
    return pixels


def test_tissue_is_found_and_pen_and_glass_are_not() -> None:
    mask = foreground(ArrayImage(slide()), "tissue")
    assert mask.shape == (75, 100)
    expected = np.zeros_like(mask)
    expected[25:50, 20:60] = True
    np.testing.assert_array_equal(mask, expected)


def test_an_empty_slide_has_no_tissue() -> None:
    assert not foreground(ArrayImage(slide()[:150]), "tissue").any()


def test_tissue_needs_color() -> None:
    with pytest.raises(ConfigError, match="grey"):
        foreground(ArrayImage(blank(20, 20), "grey.png"), "tissue")


class _Pyramid(Image):
    """Two levels, of which the first must not be read."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.path, self._small = Path("pyramid"), pixels
        self.size = Size(pixels.shape[1] * 16, pixels.shape[0] * 16)
        self.levels = (Level(self.size, 1.0), Level(Size(pixels.shape[1], pixels.shape[0]), 16.0))

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return False

    def _read(self, box: Box, level: int) -> NDArray[np.uint8]:
        assert level == 1
        return self._small[box.y : box.y + box.height, box.x : box.x + box.width]


def test_the_smallest_level_that_is_large_enough_is_read_and_its_pixels_may_be_cells() -> None:
    mask = foreground(_Pyramid(slide()), "tissue", longest=800)
    assert mask.shape == (600, 800)
    assert mask[202:398, 162:478].all()
    assert mask.sum() == 200 * 320
    assert foreground(_Pyramid(slide()), "tissue", longest=512).shape == (300, 400)
    assert foreground(_Pyramid(slide()), "non-empty", longest=512).shape == (300, 400)


# Tissue on drawn slides whose truth is known: what a patch of 64 pixels, at least 1 % tissue, shows


SIDE = 64


def kept_patches(slide: Slide) -> NDArray[np.bool_]:
    """Patches (rows, cols) that lie wholly in the image and are in the grid."""
    image = ArrayImage(slide.pixels)
    mask = foreground(image, "tissue")
    rows, columns = (side // SIDE for side in slide.tissue.shape)
    kept = np.zeros((rows + 1, columns + 1), bool)
    if mask.any():
        kept[tuple(PatchGrid(image, SIDE, mask=Foreground(mask, 0.01)).cells(slice(None)).T)] = True
    return kept[:rows, :columns]


def shares(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of each patch that is True."""
    rows, columns = (side // SIDE for side in mask.shape)
    cut = mask[: rows * SIDE, : columns * SIDE]
    return cut.reshape(rows, SIDE, columns, SIDE).mean(axis=(1, 3), dtype=np.float64)


@pytest.mark.parametrize("stain", ["he", "ihc"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"black": 0.6},
        {"glass": (245, 240, 224), "noise": 6.0},
        {"fall_off": 30.0, "seed": 1},
        {"tissue": 0.1, "seed": 1},
        {"density": 0.7},
        {"tissue": 20.0, "pens": ()},
        {"tissue": 0.0, "black": 0.1},
    ],
    ids=["plain", "black", "tinted", "gradient", "small", "pale", "nothing-else", "empty"],
)
def test_patches_of_tissue_are_found_and_those_of_pen_glass_and_black_are_not(
    stain: str, options: dict[str, Any]
) -> None:
    drawn = draw_slide(stain, **options)
    kept = kept_patches(drawn)
    tissue, pen = shares(drawn.tissue), shares(drawn.pen)
    clear = (tissue >= 0.05) & (pen == 0)
    assert kept[clear].sum() >= 0.98 * clear.sum()
    beside_pen = tissue >= 0.05  # the pale edge of a stroke takes a sliver of tissue with it
    assert kept[beside_pen].sum() >= 0.95 * beside_pen.sum()
    only_pen = (tissue == 0) & (pen > 0.02)
    assert kept[only_pen].sum() <= 0.02 * only_pen.sum()
    assert not kept[(tissue == 0) & (pen == 0)].any()


@pytest.mark.parametrize(("stain", "least"), [("he", 0.93), ("ihc", 0.9)])
def test_the_mask_is_the_tissue(stain: str, least: float) -> None:
    drawn = draw_slide(stain)
    mask = foreground(ArrayImage(drawn.pixels), "tissue").repeat(8, 0).repeat(8, 1)
    off_pen = ~drawn.pen
    assert (mask & drawn.tissue).sum() / ((mask | drawn.tissue) & off_pen).sum() > least


INKS = {"light blue": (70, 130, 220), "dark green": (10, 70, 40), "dark red": (150, 20, 40), "thin black": (70, 65, 80)}


@pytest.mark.parametrize("ink", INKS)
def test_pens_of_other_shades_are_no_tissue(ink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drawn_slides.PENS, ink, INKS[ink])
    drawn = draw_slide(tissue=0.0, pens=(ink,))
    assert drawn.pen.any()
    assert not foreground(ArrayImage(drawn.pixels), "tissue").any()


def test_dense_stain_does_not_make_pale_stain_glass() -> None:
    mean = np.full((100, 100, 3), 243, np.uint8)
    mean[10:15], mean[20:25] = (236, 216, 228), (110, 50, 120)
    expected = np.zeros((100, 100), bool)
    expected[10:15] = expected[20:25] = True
    np.testing.assert_array_equal(find_tissue(mean, mean.max(axis=-1) - mean.min(axis=-1)), expected)


def test_what_is_nearly_black_is_no_tissue_whatever_its_tint() -> None:
    mean = np.full((100, 100, 3), 243, np.uint8)
    mean[:, :60], mean[40:60, 70:90] = (45, 5, 25), (190, 100, 160)
    expected = np.zeros((100, 100), bool)
    expected[40:60, 70:90] = True
    np.testing.assert_array_equal(find_tissue(mean, mean.max(axis=-1) - mean.min(axis=-1)), expected)


def test_specks_of_one_or_two_cells_are_dust_and_three_are_a_biopsy() -> None:
    mean = np.full((50, 50, 3), 243, np.uint8)
    for cells_of_it in ([(5, 5)], [(10, 10), (10, 11)], [(20, 20), (20, 21), (21, 20)]):
        mean[tuple(np.transpose(cells_of_it))] = (200, 100, 160)
    found = np.argwhere(find_tissue(mean, mean.max(axis=-1) - mean.min(axis=-1)))
    assert found.tolist() == [[20, 20], [20, 21], [21, 20]]


def test_bands_of_cells_do_not_change_the_tissue(monkeypatch: pytest.MonkeyPatch) -> None:
    image = ArrayImage(draw_slide("ihc", black=0.1, width=800, height=600).pixels)
    whole = foreground(image, "tissue")
    assert whole.any()
    monkeypatch.setattr(tissue, "_BAND_CELLS", 250)
    np.testing.assert_array_equal(foreground(image, "tissue"), whole)


def test_a_real_slide_is_part_tissue_part_glass(shared: Path) -> None:
    with open_image(shared / "data" / "slides" / "CMU-1-Small-Region.svs") as image:
        mask = foreground(image, "tissue")
    assert mask.shape == (371, 278)
    assert 0.3 < mask.mean() < 0.4
    assert mask[200:360, 110:140].mean() > 0.95
    assert mask[330:370, 75:200].mean() > 0.95  # pale connective tissue beside dense
    assert mask[:, 250:].mean() < 0.02
    assert not mask[20:120, :90].any()
