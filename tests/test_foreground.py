"""The mask of what is worth looking at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from keyhole import foreground as module
from keyhole.errors import ConfigError
from keyhole.foreground import foreground, otsu
from keyhole.images import ArrayImage, Box, Image, Level, Size, open_image


def blank(width: int, height: int, channels: int = 1, value: int = 0) -> NDArray[np.uint8]:
    return np.full((height, width, channels), value, np.uint8)


def cells(mask: NDArray[np.bool_], size: tuple[int, int], x: int, y: int) -> tuple[int, int]:
    """Row and column of the mask that a pixel falls into."""
    block = max(8, -(-max(size) // 2048))
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
    far = np.abs(np.indices(mask.shape) - np.reshape((y // 8, x // 8), (2, 1, 1))).max(axis=0) > 1
    assert not mask[far].any()


def test_a_faint_square_that_fills_its_blocks_is_found_at_its_edges() -> None:
    pixels = blank(256, 256)
    pixels[64:128, 64:128] = 30
    mask = foreground(ArrayImage(pixels), "non-empty")
    assert mask[8:16, 15].all()
    assert mask[15, 8:16].all()
    assert not mask[9:14, 9:14].any()  # of one colour
    assert not mask[20:].any()


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


def test_the_smallest_level_that_is_large_enough_is_read() -> None:
    mask = foreground(_Pyramid(slide()), "tissue", downsample_to=512)
    np.testing.assert_array_equal(mask, foreground(ArrayImage(slide()), "tissue", downsample_to=512))


def test_a_real_slide_is_part_tissue_part_glass(shared: Path) -> None:
    with open_image(shared / "data" / "slides" / "CMU-1-Small-Region.svs") as image:
        mask = foreground(image, "tissue")
    assert mask.shape == (371, 278)
    assert 0.2 < mask.mean() < 0.5
    assert mask[200:360, 110:140].mean() > 0.6
    assert mask[:, 250:].mean() < 0.02
