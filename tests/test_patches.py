"""Laws of patch sources, views and caches: a turned patch source is the source of the turned image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyhole.config.settings import PatchConfig
from keyhole.errors import ConfigError, ImageError
from keyhole.images import ArrayImage, Image, open_image
from keyhole.images.pixels import Pixels
from keyhole.loading import FetchOnly, Reader
from keyhole.loading.stream import Stream
from keyhole.patches import image_cache as store_module
from keyhole.patches.edge import EDGE_RULES
from keyhole.patches.foreground.rules import FOREGROUND_RULES
from keyhole.patches.grid import NoPatches, PatchGrid
from keyhole.patches.image_cache import ImageCache, MaskCache, ResidentImage, decoded_bytes, fits
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import FilePatches, PatchSource, TensorPatches, View

laws = settings(max_examples=40, deadline=None)
views = st.builds(View, st.booleans(), st.booleans(), st.integers(0, 3))


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def turned(view: View, picture: Pixels) -> Pixels:
    """The whole picture flipped and turned, by numpy's own words."""
    if view.flip_x:
        picture = np.flip(picture, 1)
    if view.flip_y:
        picture = np.flip(picture, 0)
    return np.rot90(picture, view.turns)


@laws
@given(views, st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(2, 6))
def test_a_turned_source_is_the_source_of_the_turned_image(
    view: View, rows: int, columns: int, channels: int, size: int
) -> None:
    picture = noise(columns * size, rows * size, channels)
    image = ArrayImage(picture)
    source = FilePatches(image, PatchGrid(image, size), view)
    twin_image = ArrayImage(np.ascontiguousarray(turned(view, picture)))
    twin = FilePatches(twin_image, PatchGrid(twin_image, size))

    everything = np.arange(len(source))
    place = source.positions_1d(everything)
    assert sorted(place) == list(everything)
    np.testing.assert_array_equal(source.read(everything), twin.read(place))
    np.testing.assert_allclose(source.positions_2d(everything), twin.positions_2d(place), atol=1e-9)
    cells, shape = view.cells(source.grid.cells(everything), rows, columns)
    assert shape == (twin.grid.rows, twin.grid.columns)
    np.testing.assert_array_equal(cells, twin.grid.cells(place))


@laws
@given(views, st.integers(1, 20))
def test_undo_is_the_inverse_of_pixels(view: View, seed: int) -> None:
    block = noise(5, 20, 3, seed).reshape(4, 5, 5, 3)
    np.testing.assert_array_equal(view.pixels(view.undo(block)), block)
    np.testing.assert_array_equal(view.undo(view.pixels(block)), block)


@laws
@given(views, st.sampled_from([1, 3]), st.sampled_from([1, 3, None]), st.integers(1, 9), st.booleans())
def test_all_ways_to_read_give_the_same_pixels(
    view: View, have: int, want: int | None, chunk: int, overlap: bool
) -> None:
    image = ArrayImage(noise(37, 23, have))
    source = FilePatches(image, PatchGrid(image, 7, 4 if overlap else None, offset=(-2, 0)), view, want)
    whole = source.read(slice(None))
    assert whole.shape == (len(source), *source.patch_shape)
    assert whole.dtype == source.dtype
    parts = [source.read(slice(start, start + chunk)) for start in range(0, len(source), chunk)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    some = np.arange(len(source))[::-3]
    np.testing.assert_array_equal(source.read(some), whole[some])
    out = np.zeros((len(some), *source.patch_shape), np.uint8)
    assert source.read(some, out=out) is out
    np.testing.assert_array_equal(out, whole[some])


def test_grey_is_pillows_grey_and_colour_of_grey_is_repeated() -> None:
    picture = noise(20, 20, 3)
    image = ArrayImage(picture)
    grey = FilePatches(image, PatchGrid(image, 20), channels=1).read([0])[0, :, :, 0]
    np.testing.assert_array_equal(grey, np.asarray(PIL.Image.fromarray(picture).convert("L")))
    single = ArrayImage(picture[:, :, :1])
    colour = FilePatches(single, PatchGrid(single, 20), channels=3).read([0])[0]
    np.testing.assert_array_equal(colour, np.repeat(picture[:, :, :1], 3, axis=2))
    with pytest.raises(ConfigError, match=r"channels \(=2\)"):
        FilePatches(image, PatchGrid(image, 20), channels=2)


@pytest.mark.parametrize("array", [noise(8, 40).reshape(5, 8, 8, 3), np.arange(35.0).reshape(7, 5)])
def test_an_array_in_memory_is_a_source(array: np.ndarray) -> None:
    source: PatchSource = TensorPatches(array, "features", centers=np.arange(2 * len(array)).reshape(-1, 2))
    assert (source.patch_shape, source.dtype, len(source)) == (array.shape[1:], array.dtype, len(array))
    np.testing.assert_array_equal(source.read([3, 1]), array[[3, 1]])
    np.testing.assert_array_equal(source.read(slice(None)), array)
    assert source.positions_1d([3, 1]).tolist() == [3, 1]
    assert source.positions_2d([3]).tolist() == [[6.0, 7.0]]
    with pytest.raises(ConfigError, match="needs `centers`"):
        TensorPatches(array).positions_2d([0])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    PIL.Image.fromarray(noise(90, 70)).save(path)
    return path


def test_an_opener_opens_what_it_describes(picture: Path) -> None:
    opener = FileOpener(picture, "the picture", 20, stride=10, channels=1, view=View(turns=1), offset=(-5, -5))
    source = opener()
    with open_image(picture) as image:
        grid = PatchGrid(image, 20, 10, offset=(-5, -5))
        expected = FilePatches(image, grid, View(turns=1), 1).read(slice(None))
    np.testing.assert_array_equal(source.read(slice(None)), expected)
    assert source.name == "the picture"
    source.close()


@pytest.mark.parametrize("keep", [False, True])
def test_microns_per_pixel_of_the_manifest_take_the_files_place(picture: Path, keep: bool) -> None:
    store = ImageCache(keep)
    with pytest.raises(ConfigError, match="microns per pixel"):
        FileOpener(picture, "p", 20, mpp=1.0, cache=store)()
    assert FileOpener(picture, "p", 20, mpp=1.0, cache=store, image_mpp=0.5)().grid.scale == 2.0
    assert FileOpener(picture, "p", 16, mpp=1.0, cache=store, image_mpp=0.25)().grid.scale == 4.0
    with pytest.raises(ConfigError, match="microns per pixel"):
        FileOpener(picture, "p", 20, mpp=1.0, cache=store)()


def test_an_opener_that_fails_closes_the_file(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    original = Image.close

    def spy(path: str | Path, bits: int | None = None) -> Image:
        image = open_image(path, bits)
        monkeypatch.setattr(image, "close", lambda: (closed.append(path), original(image)))
        return image

    monkeypatch.setattr(store_module, "open_image", spy)
    with pytest.raises(ConfigError, match=r"picture\.png: the patch"):
        FileOpener(picture, "p", 500)()
    assert closed == [picture]


def test_only_patches_on_the_foreground_are_in_the_source(tmp_path: Path) -> None:
    pixels = np.full((400, 400, 3), 255, np.uint8)
    pixels[200:300, 100:200] = noise(100, 100)
    path = tmp_path / "blob.png"
    PIL.Image.fromarray(pixels).save(path)
    store = ImageCache()
    source = FileOpener(path, "blob", 100, foreground="non-empty", cache=store)()
    assert [2, 1] in source.grid.cells(slice(None)).tolist()
    assert len(source) < 16
    path.unlink()
    assert store.foreground(path, "non-empty").any()  # made once: the file is not needed again


def speck(folder: Path) -> tuple[Path, Path]:
    """An image of 400 x 300 and a mask of it with one cell of 10 x 10 pixels, at x, y = 90, 190."""
    image, mask = folder / "slide.png", folder / "mask.png"
    PIL.Image.fromarray(noise(400, 300)).save(image)
    cells = np.zeros((30, 40), np.uint8)
    cells[19, 9] = 1
    PIL.Image.fromarray(cells).save(mask)
    return image, mask


def test_the_patches_on_a_mask_file_are_those_with_the_least_share_of_it(tmp_path: Path) -> None:
    image, mask = speck(tmp_path)
    options: dict[str, Any] = {"foreground": "mask", "mask": mask, "min_foreground": 0.01}
    assert FileOpener(image, "s", 100, **options)().grid.cells(slice(None)).tolist() == [[1, 0]]
    assert FileOpener(image, "s", 50, stride=25, **options)().grid.boxes(slice(None))[:, :2].tolist() == [
        [50, 150],
        [75, 150],
        [50, 175],
        [75, 175],
    ]
    assert len(FileOpener(image, "s", 100, foreground="all", mask=mask)()) == 12
    with pytest.raises(
        NoPatches, match=r"slide\.png: no patches: the foreground mask \(.*mask\.png\) leaves none of 12"
    ):
        FileOpener(image, "s", 100, **{**options, "min_foreground": 0.02})()
    outlines = {"type": "Polygon", "coordinates": [[[50000, 0], [50100, 0], [50100, 100], [50000, 0]]]}
    (outside := tmp_path / "outside.geojson").write_text(json.dumps(outlines))
    with pytest.raises(NoPatches, match=r"outside\.geojson\) has nothing inside the image\. Is it of this image"):
        FileOpener(image, "s", 100, foreground="mask", mask=outside)()


def test_a_mask_that_is_asked_for_and_not_given_is_one_line_that_says_how(picture: Path) -> None:
    with pytest.raises(ConfigError, match=r"picture\.png: .*Give a column `mask`.*--data\.masks DIR"):
        FileOpener(picture, "p", 20, foreground="mask")()


def test_a_shifted_grid_whose_patches_miss_the_least_share_falls_back_to_the_unshifted_one(tmp_path: Path) -> None:
    image, mask = speck(tmp_path)
    options: dict[str, Any] = {"foreground": "mask", "mask": mask, "min_foreground": 0.04}
    plain = FileOpener(image, "s", 50, **options)()
    np.testing.assert_array_equal(plain.grid.boxes(slice(None)), [[50, 150, 50, 50]])
    # At (-5, -5) the speck lies on the corner of four patches, of which none has 4 % of it.
    shifted = FileOpener(image, "s", 50, offset=(-5, -5), **options)()
    np.testing.assert_array_equal(shifted.grid.boxes(slice(None)), [[50, 150, 50, 50]])
    moved = FileOpener(image, "s", 50, offset=(-20, -20), **options)()
    np.testing.assert_array_equal(moved.grid.boxes(slice(None)), [[80, 180, 50, 50]])


def test_a_mask_is_the_same_under_every_view_and_is_made_once_for_two_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = (rule := FOREGROUND_RULES["tissue"]).mask
    monkeypatch.setattr(rule, "mask", lambda *given: made.append(given) or original(*given))
    path = tmp_path / "slide.png"
    pixels = np.full((300, 400, 3), 245, np.uint8)
    pixels[100:200, 100:300] = (190, 100, 160)
    PIL.Image.fromarray(pixels).save(path)
    probe = ImageCache()
    store = ImageCache(keep=True, masks=probe.masks)
    expected = [[100, 100], [150, 100], [200, 100], [250, 100], [100, 150], [150, 150], [200, 150], [250, 150]]
    for view in (View(), View(True, False, 1), View(True, True, 3)):
        for each in (probe, store):
            source = FileOpener(path, "s", 50, foreground="tissue", min_foreground=0.5, view=view, cache=each)()
            assert source.grid.boxes(slice(None))[:, :2].tolist() == expected
    assert len(made) == 1


@laws
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_a_packed_mask_is_the_mask(rows: int, columns: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.5
    masks = MaskCache()
    key = (Path("a.svs"), "tissue", None)
    assert key not in masks
    masks[key] = mask
    assert key in masks
    assert masks[key].dtype == bool
    np.testing.assert_array_equal(masks[key], mask)


def test_masks_of_a_thousand_slides_take_little() -> None:
    masks = MaskCache()
    y, x = np.mgrid[:2048, :2048]
    blobs = np.sin(x / 90) * np.sin(y / 70) + 0.2 * np.sin(x / 7) * np.sin(y / 9) > 0.3
    masks[Path("blobs"), "tissue", None] = blobs
    assert masks.nbytes < 100_000
    masks[Path("noise"), "tissue", None] = np.random.default_rng(0).random((2048, 2048)) < 0.5
    assert masks.nbytes < 700_000


def test_a_resident_image_is_the_image_without_its_file(picture: Path) -> None:
    store = ImageCache(keep=True)
    with open_image(picture) as file, store.open(picture) as image:
        assert isinstance(image, ResidentImage)
        for of in ("path", "size", "levels", "mpp", "channels", "background"):
            assert getattr(image, of) == getattr(file, of), of
        boxes = [(0, 0, 90, 70), (-3, 60, 20, 20), (33, 1, 1, 69)]
        for box in boxes:
            np.testing.assert_array_equal(image.read(box), file.read(box))
    picture.unlink()
    with store.open(picture) as again:
        assert again.read((0, 0, 90, 70)).shape == (70, 90, 3)
    with pytest.raises(ImageError):
        ImageCache().open(picture)


def test_few_patches_of_an_image_in_memory_are_copied_by_the_consumer(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, wanted = View(True, False, 1), [11, 0, 5, 5]
    expected = FileOpener(picture, "p", 20, view=view)().read(wanted)
    opener = FileOpener(picture, "p", 20, view=view, cache=ImageCache(keep=True))
    with Reader(threads=1) as reader:
        stream = reader.stream([[FetchOnly(opener)]], 4)
        batch = next(stream)
        monkeypatch.setattr(reader.threads, "submit", lambda *_, **__: pytest.fail("no thread is needed"))
        (found,) = batch.fetch([wanted])
        assert found is not None
        np.testing.assert_array_equal(found, expected)
        assert reader.reread_patches == 4


@pytest.mark.parametrize("hungry", [True, False])
@pytest.mark.parametrize(("keep", "reads"), [(True, 1), (False, 3)])
def test_an_image_in_memory_is_copied_in_one_task(
    picture: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, reads: int, hungry: bool
) -> None:
    """By a reading thread while the consumer waits, else by the thread that plans, which never reads a file."""
    opener = FileOpener(picture, "p", 6, cache=ImageCache(keep=keep))
    expected = FileOpener(picture, "p", 6)().read(slice(None))
    monkeypatch.setattr(Stream, "hungry", hungry)  # else it depends on which thread comes first
    submitted, here = [], []
    with Reader(threads=1) as reader:
        submit, run_here = reader.threads.submit, reader.threads.run_here
        monkeypatch.setattr(reader.threads, "submit", lambda *a, **k: submitted.append(a) or submit(*a, **k))
        monkeypatch.setattr(reader.threads, "run_here", lambda *a: here.append(a) or run_here(*a))
        stream = reader.stream([[opener]], 256)
        (chunk,) = next(stream).chunks()
    np.testing.assert_array_equal(chunk.pixels[: chunk.count], expected)
    copied_here = int(keep and not hungry)
    assert len(here) == copied_here
    assert len(submitted) == 1 + reads - copied_here, "one opens it"


def test_one_rule_decides_what_stays_in_memory(picture: Path) -> None:
    assert decoded_bytes(open_image(picture)) == 90 * 70 * 3
    assert fits(10**9, 1.0)[0]
    assert not fits(10**9 + 1, 1.0)[0]
    assert not fits(0, 0.0)[0]
    keep, sentence = fits(10**18, None)
    assert not keep
    assert "1000000000.0 GB decoded, over the limit" in sentence
    assert "a quarter of" in sentence
    keep, sentence = fits(900_000, 0.0)
    assert (keep, sentence) == (
        False,
        "images are read from their files each time, as data.cache 0 asks: 900 kB decoded",
    )
    assert fits(900_000, 0.0005)[1].endswith("900 kB decoded, over the limit of 500 kB (data.cache)")
    assert fits(1, None)[0]


def test_the_rules_are_those_that_the_settings_name() -> None:
    def named(setting: str) -> set[str]:
        return set(get_args(PatchConfig.model_fields[setting].annotation))

    assert set(FOREGROUND_RULES) == named("foreground")
    assert {*EDGE_RULES, "auto"} == named("edge")
