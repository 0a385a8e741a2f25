"""Laws of the grid: every pixel is covered, all descriptions of a patch agree, and reading is slicing."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyhole.errors import ConfigError
from keyhole.images import ArrayImage, Box, Image, Level, Size
from keyhole.images.pixels import Pixels
from keyhole.patches.edge import Edge
from keyhole.patches.grid import Foreground, NoPatches, PatchGrid

laws = settings(max_examples=60, deadline=None)
EDGES: tuple[Edge, ...] = ("drop", "shift", "reflect", "background")


class Pyramid(Image):
    """An image in memory with smaller levels, which counts what is read."""

    def __init__(self, levels: list[Pixels], downsamples: list[float], mpp: float | None = None) -> None:
        self.path = Path("pyramid.tif")
        self.size = Size(levels[0].shape[1], levels[0].shape[0])
        sizes = (Size(pixels.shape[1], pixels.shape[0]) for pixels in levels)
        self.levels = tuple(Level(size, downsample) for size, downsample in zip(sizes, downsamples, strict=True))
        self.mpp = mpp
        self.channels = levels[0].shape[2]
        self.boxes: list[tuple[int, Box]] = []
        self._levels = levels

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return False

    def _read(self, box: Box, level: int) -> Pixels:
        self.boxes.append((level, box))
        return self._levels[level][box.y : box.y + box.height, box.x : box.x + box.width]


def noise(width: int, height: int, channels: int = 1, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def gradient(width: int, height: int) -> Pixels:
    """Grey value rising from left to right and from top to bottom."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.rint(250 * (x / width + y / height) / 2).astype(np.uint8)[:, :, None]


@st.composite
def grids(draw: st.DrawFn) -> PatchGrid:
    width, height, size = draw(st.integers(1, 60)), draw(st.integers(1, 60)), draw(st.integers(1, 20))
    size = min(size, width, height)
    stride = draw(st.integers(1, 30))
    offset = draw(st.integers(-25, 0)), draw(st.integers(-25, 0))
    mask = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        mask = rng.random((draw(st.integers(1, 70)), draw(st.integers(1, 70)))) < 0.4
        mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
        stride = min(stride, size)  # a gap could hold the mask's only pixel
        offset = (0, 0)
    edge = draw(st.sampled_from(EDGES))
    image = ArrayImage(noise(width, height))
    try:
        return PatchGrid(image, size, stride, offset=offset, mask=mask, edge=edge)
    except NoPatches:  # `drop` may leave out the only patch on the mask
        assert edge == "drop"
        return PatchGrid(image, size, stride, offset=offset, edge=edge)


def by_slicing(grid: PatchGrid, boxes: np.ndarray) -> Pixels:
    """The patches of a level-0 grid, cut from the whole picture with a wide border."""
    assert isinstance(grid.image, ArrayImage)
    border = 64
    around = ((border, border), (border, border), (0, 0))
    if grid.edge == "reflect":
        whole = np.pad(grid.image.pixels, around, mode="reflect")
    else:
        whole = np.pad(grid.image.pixels, around, constant_values=255)
    return np.stack([whole[y + border : y + border + h, x + border : x + border + w] for x, y, w, h in boxes])


@laws
@given(grids())
def test_reading_is_slicing_the_padded_picture(grid: PatchGrid) -> None:
    np.testing.assert_array_equal(grid.read(slice(None)), by_slicing(grid, grid.boxes(slice(None))))


@laws
@given(grids(), st.data())
def test_a_patch_does_not_depend_on_what_it_is_read_with(grid: PatchGrid, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(grid) - 1), min_size=1, max_size=30))
    np.testing.assert_array_equal(grid.read(index), grid.read(slice(None))[index])


@laws
@given(grids(), st.data())
def test_a_shifted_grid_has_no_more_patches_than_are_planned_for_where_a_touch_of_foreground_is_enough(
    grid: PatchGrid, data: st.DataObject
) -> None:
    offset = data.draw(st.tuples(*2 * [st.integers(1 - grid.stride, 0)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    lines = np.zeros((grid.image.size.height, grid.image.size.width), bool)
    lines[rng.integers(len(lines))] = lines[:, rng.integers(lines.shape[1])] = True
    for mask in (None, lines, ~lines) if grid.stride <= grid.size else (None,):
        try:
            unshifted = PatchGrid(grid.image, grid.size, grid.stride, mask=mask, edge=grid.edge)
            shifted = PatchGrid(grid.image, grid.size, grid.stride, offset=offset, mask=mask, edge=grid.edge)
        except NoPatches:
            continue
        assert len(shifted) <= unshifted.most_shifted
        assert unshifted.most_shifted <= (unshifted.rows + 1) * (unshifted.columns + 1)


@pytest.mark.parametrize("edge", EDGES)
def test_no_patch_is_there_twice_where_the_image_is_as_large_as_a_patch(edge: Edge) -> None:
    grid = PatchGrid(ArrayImage(noise(8, 8)), 8, 4, offset=(-3, -3), edge=edge)
    assert len(np.unique(grid.boxes(slice(None)), axis=0)) == len(grid)
    if edge in ("drop", "shift"):
        assert len(grid) == 1


@laws
@given(grids())
def test_boxes_centers_and_cells_agree(grid: PatchGrid) -> None:
    boxes, centers, cells = (of(slice(None)) for of in (grid.boxes, grid.centers, grid.cells))
    assert len(boxes) == len(centers) == len(cells) == len(grid)
    np.testing.assert_array_equal(centers, boxes[:, :2] + boxes[:, 2:] / 2)
    np.testing.assert_array_equal(boxes[:, 0], grid.starts[0][cells[:, 1]])
    np.testing.assert_array_equal(boxes[:, 1], grid.starts[1][cells[:, 0]])
    for starts in grid.starts:  # equal steps, but for patches that were shifted inwards
        steps = np.diff(starts)
        assert (steps > 0).all()
        assert (steps[1:-1] == grid.stride).all()
        assert grid.edge == "shift" or (steps == grid.stride).all()
    raster = cells[:, 0] * grid.columns + cells[:, 1]
    assert (np.diff(raster) > 0).all()
    assert (cells >= 0).all()
    assert (cells < (grid.rows, grid.columns)).all()


@laws
@given(grids(), st.tuples(st.integers(-25, 0), st.integers(-25, 0)))
def test_every_pixel_is_covered_and_no_patch_lies_outside(grid: PatchGrid, offset: tuple[int, int]) -> None:
    width, height = grid.image.size
    covered = np.zeros((height, width), bool)
    for x, y, w, h in PatchGrid(grid.image, grid.size, grid.stride, offset=offset, edge=grid.edge).boxes(slice(None)):
        if grid.edge in ("drop", "shift"):
            assert min(x, y) >= 0
            assert x + w <= width
            assert y + h <= height
        assert x < width
        assert y < height
        assert x + w > 0
        assert y + h > 0
        covered[max(y, 0) : y + h, max(x, 0) : x + w] = True
    if grid.stride <= grid.size:
        if grid.edge == "drop":  # less than a stride is left out on each side
            inner = covered[grid.stride - 1 : max(height - grid.stride + 1, 0)]
            assert inner[:, grid.stride - 1 : max(width - grid.stride + 1, 0)].all()
        else:
            assert covered.all()


@laws
@given(st.integers(3, 40), st.integers(3, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 99))
def test_a_patch_is_in_the_grid_if_at_least_the_share_of_the_mask_under_it_is_set(
    width: int, height: int, rows: int, columns: int, seed: int
) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.5
    mask[0, 0] = True
    image = ArrayImage(noise(width, height))
    for share in (0.0, 0.25, 0.3, 1.0):
        expected = []
        full = PatchGrid(image, 3, 2)
        for i, (x, y, w, h) in enumerate(full.boxes(slice(None)).tolist()):
            left, right = x * columns // width, -(-(x + w) * columns // width)
            top, bottom = y * rows // height, -(-(y + h) * rows // height)
            cells = mask[top:bottom, left:right]
            if cells.any() and cells.mean() >= share:
                expected.append(i)
        if expected:
            grid = PatchGrid(image, 3, 2, mask=Foreground(mask, share))
            np.testing.assert_array_equal(grid.boxes(slice(None)), full.boxes(expected))


def test_one_percent_is_enough_and_less_is_not() -> None:
    mask = np.zeros((10, 20), bool)
    mask[3, 4] = True
    image = ArrayImage(noise(200, 100))
    assert PatchGrid(image, 100, mask=Foreground(mask, 0.01)).cells(slice(None)).tolist() == [[0, 0]]
    with pytest.raises(NoPatches):
        PatchGrid(image, 100, mask=Foreground(mask, 0.011))


class Huge(ArrayImage):
    """An image that is only a size."""

    def __init__(self, side: int) -> None:
        super().__init__(np.zeros((1, 1), np.uint8), "huge.tif")
        self.size = Size(side, side)
        self.levels = (Level(self.size, 1.0),)


@pytest.mark.parametrize("stride", [128, 16])
def test_a_million_masked_patches_take_four_bytes_each_and_no_more_while_they_are_found(stride: int) -> None:
    image, mask = Huge(128 * 1000), np.ones((2048, 2048), bool)
    if stride < 128:
        mask[64:] = False  # patches that overlap eight times, on a part of the image
    tracemalloc.start()
    grid = PatchGrid(image, 128, stride, mask=Foreground(mask, 0.01))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(grid) >= 10**6
    assert held <= 4.1 * len(grid) + 2**16
    assert peak <= 8.5 * len(grid) + 2**20
    last = grid.cells([len(grid) - 1])
    assert last.dtype == np.int64
    assert grid.boxes([len(grid) - 1]).tolist() == [[last[0, 1] * stride, last[0, 0] * stride, 128, 128]]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 6.0), st.integers(4, 30), st.integers(3, 40), st.integers(-30, 0), st.booleans())
@example(0.6875, 21, 10, 0, False)
def test_at_another_resolution_the_rules_show_the_same_image(
    scale: float, size: int, stride: int, offset: int, pyramid: bool
) -> None:
    # Pillow clips to 0 ... 255 between its two passes, whose order depends on what it is given: no value comes near.
    levels = [noise(203, 187, 3) // 2 + 64, noise(102, 94, 3) // 2 + 64][: 1 + pyramid]
    image = Pyramid(levels, [1.0, 2.0][: len(levels)], mpp=1.0)
    single = PatchGrid(image, size, 1, mpp=scale)  # a patch at every output pixel
    extent = single.columns + size - 1, single.rows + size - 1
    for edge in EDGES:
        grid = PatchGrid(image, size, stride, mpp=scale, offset=(offset, offset), edge=edge)
        boxes = grid.boxes(slice(None))
        if edge in ("drop", "shift"):
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, :2] + boxes[:, 2:] <= image.size).all()
        index = np.unique(np.linspace(0, len(grid) - 1, 12).astype(int))
        for corner, patch in zip(grid.corners(index).tolist(), grid.read(index), strict=True):
            places = list(zip(corner, extent, strict=True))
            # columns and rows of the image under the patch, mirrored at its border; and which of them are inside
            shown = [np.pad(np.arange(most), 40, mode="reflect")[at + 40 :][:size] for at, most in places]
            within = [(at + np.arange(size) >= 0) & (at + np.arange(size) < most) for at, most in places]
            x, y = (min(max(at, 0), most - size) for at, most in places)
            whole = single.read([y * single.columns + x])[0][(shown[1] - y)[:, None], shown[0] - x]
            if edge == "background":
                whole[~(within[1][:, None] & within[0])] = image.background
            assert np.abs(patch.astype(int) - whole).max() <= 1, edge  # the filter may round by one


def test_neighbours_are_read_with_one_access() -> None:
    image = Pyramid([noise(640, 640)], [1.0])
    grid = PatchGrid(image, 64)
    grid.read(np.arange(10))
    grid.read(np.arange(20, 40))
    assert image.boxes == [(0, Box(0, 0, 640, 64)), (0, Box(0, 128, 640, 128))]


def test_far_patches_are_not_read_with_what_lies_between() -> None:
    image = Pyramid([noise(640, 640)], [1.0])
    grid = PatchGrid(image, 32)
    grid.read([0, 19, 399])
    assert sum(box.width * box.height for _, box in image.boxes) == 3 * 32 * 32


def test_a_level_is_read_in_its_own_pixels() -> None:
    small = noise(50, 40, 3, seed=1)
    image = Pyramid([noise(100, 80, 3), small], [1.0, 2.0])
    grid = PatchGrid(image, 10, level=1)
    assert (grid.columns, grid.rows, grid.scale) == (5, 4, 2.0)
    stitched = grid.read(slice(None)).reshape(4, 5, 10, 10, 3).transpose(0, 2, 1, 3, 4).reshape(40, 50, 3)
    np.testing.assert_array_equal(stitched, small)
    assert grid.boxes([6]).tolist() == [[20, 20, 20, 20]]
    assert grid.centers([6]).tolist() == [[30.0, 30.0]]


def test_microns_per_pixel_choose_the_best_level() -> None:
    levels = [noise(400, 400), noise(100, 100), noise(25, 25)]
    image = Pyramid(levels, [1.0, 4.0, 16.0], mpp=0.25)
    for mpp, level in ((0.1, 0), (0.25, 0), (0.9, 0), (1.0, 1), (0.9995, 1), (3.9, 1), (4.0, 2)):
        assert PatchGrid(image, 4, mpp=mpp).level == level, mpp
    grid = PatchGrid(image, 5, mpp=1.0)
    np.testing.assert_array_equal(grid.read([0, 21]), PatchGrid(image, 5, level=1).read([0, 21]))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 6.0), st.integers(0, 30), st.integers(4, 30), st.booleans())
def test_resampling_keeps_a_gradient_at_the_centres(scale: float, shift: int, size: int, pyramid: bool) -> None:
    width, height = 400, 300
    levels = [gradient(width, height), gradient(width // 2, height // 2)] if pyramid else [gradient(width, height)]
    image = Pyramid(levels, [1.0, 2.0][: len(levels)], mpp=1.0)
    grid = PatchGrid(image, size, mpp=scale, offset=(-shift % size, -shift % size))
    index = np.unique(np.linspace(0, len(grid) - 1, 40).astype(int))
    block = grid.read(index)[..., 0].astype(float)
    x0, y0 = ((grid.centers(index).T / grid.scale) - size / 2)[:, :, None, None]
    step = np.arange(size) + 0.5
    l0_x, l0_y = (x0 + step) * grid.scale, (y0 + step[:, None]) * grid.scale
    expected = 250 * (l0_x / width + l0_y / height) / 2
    margin = 3 * max(scale, 2.0)  # where the filter reaches the border, which is repeated
    inside = (l0_x > margin) & (l0_x < width - margin) & (l0_y > margin) & (l0_y < height - margin)
    assert np.abs(block - expected)[inside].max(initial=0) <= 1.5  # 1 of rounding in and out, 0.5 between two passes
    border = (l0_x < width) & (l0_y < height) & ~inside
    assert np.abs(block - expected)[border].max(initial=0) <= 1.5 + 250 * margin / height


def test_resampled_patches_have_no_background_inside_and_only_background_outside() -> None:
    image = ArrayImage(np.full((101, 203, 3), 7, np.uint8), mpp=0.5)
    grid = PatchGrid(image, 16, mpp=1.3, offset=(-5, -9))
    l0 = grid.scale
    for i in range(len(grid)):
        x, y = np.rint(grid.centers([i])[0] / l0 - 8).astype(int)
        columns, rows = x + np.arange(16), y + np.arange(16)
        inside = ((rows >= 0) & (rows * l0 < 101))[:, None] & ((columns >= 0) & (columns * l0 < 203))
        patch = grid.read([i])[0]
        assert (patch[inside] == 7).all()
        assert (patch[~inside] == 255).all()


@settings(max_examples=15, deadline=None)
@given(st.floats(0.4, 5.0), st.integers(-20, 0), st.data())
def test_a_resampled_patch_does_not_depend_on_what_it_is_read_with(
    scale: float, offset: int, data: st.DataObject
) -> None:
    grid = PatchGrid(ArrayImage(noise(120, 90, 3), mpp=1.0), 12, 8, mpp=scale, offset=(offset, offset))
    index = data.draw(st.lists(st.integers(0, len(grid) - 1), min_size=1, max_size=20))
    alone = np.concatenate([grid.read([i]) for i in index])
    np.testing.assert_array_equal(grid.read(index), alone)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 51}, r"the patch \(51 x 51 px\) is larger than the image \(100 x 50 px\)"),
        ({"size": 30, "mpp": 1.0}, r"larger than the image \(50 x 25 px at 1/2 of its resolution\)"),
        ({"size": 10, "level": 1}, r"patch.level \(=1\) must be 0, the image's only level"),
        (
            {"size": 2, "stride": 1, "mask": Foreground(np.zeros((5, 5), bool), name="foreground mask (tissue)")},
            r"no patches: the foreground mask \(tissue\) leaves none of 4,851. Look at it: keyhole check .* --previews",
        ),
        ({"size": 10, "offset": (0, 50)}, "outside the image"),
    ],
)
def test_a_grid_that_cannot_be_is_one_line_that_names_the_image(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        PatchGrid(ArrayImage(noise(100, 50), "a.png", mpp=0.5), **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith("a.png: ")
    assert "\n" not in str(caught.value)


def test_microns_per_pixel_need_those_of_the_image() -> None:
    with pytest.raises(ConfigError, match=r"a\.png: .*the file does not say.*`mpp`.*--patch\.mpp none"):
        PatchGrid(ArrayImage(noise(100, 50), "a.png"), 10, mpp=0.5)
    odd = ArrayImage(noise(100, 50), "a.png")
    odd.mpp_note = "the file says 0.25 x 0.5 um per pixel"
    with pytest.raises(ConfigError, match=r"not known \(the file says 0.25 x 0.5 um per pixel\)\. Give a column `mpp`"):
        PatchGrid(odd, 10, mpp=0.5)
    assert PatchGrid(odd, 10).scale == 1
    with pytest.raises(ConfigError, match="exclude each other"):
        PatchGrid(ArrayImage(noise(100, 50), "a.png", mpp=1.0), 10, mpp=0.5, level=0)


def test_an_index_outside_or_not_of_integers_is_refused() -> None:
    grid = PatchGrid(ArrayImage(noise(100, 50)), 10)
    for index in ([50], [-1]):
        with pytest.raises(IndexError):
            grid.read(index)
    for wrong in ([0.5], [[1]], [True]):
        with pytest.raises(ValueError):
            grid.read(wrong)
    assert grid.read([]).shape == (0, 10, 10, 1)
