"""Foreground from files: PNG of any kind and resolution, outlines of QuPath, and what is wrong with some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from conftest import Say
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_images import png
from numpy.typing import NDArray

from keyhole.errors import ImageError, ImageLost
from keyhole.images import ArrayImage, Size
from keyhole.patches.foreground import mask_file as module
from keyhole.patches.foreground.mask_file import read_mask
from keyhole.patches.grid import Foreground, PatchGrid

SIZE = Size(600, 400)


def drawn() -> NDArray[np.bool_]:
    mask = np.zeros((40, 60), bool)
    mask[5:9, 10:30] = mask[38, 59] = True
    return mask


def save(path: Path, mode: str, mask: NDArray[np.bool_]) -> Path:
    """The mask in a PNG mode, with the least value that is not 0 where there is one."""
    values = np.uint8(mask)
    if mode == "1":
        picture = PIL.Image.fromarray(mask)
    elif mode == "I;16":
        picture = PIL.Image.fromarray(np.uint16(mask) * 7)
    elif mode == "P":
        picture = PIL.Image.fromarray(1 - values).convert("P")  # the background is not number 0 of the palette
        picture.putpalette([0, 90, 0, 0, 0, 0])
    elif mode == "L":
        picture = PIL.Image.fromarray(values)
    else:
        planes = [np.zeros_like(values)] * (len(mode) - 1) + [values]
        if mode in ("LA", "RGBA"):  # what is transparent is no foreground, whatever its colour; black is none either
            planes = [np.full_like(values, 200)] * (len(mode) - 1) + [values * 255]
            planes[0] = np.where(np.arange(values.shape[0])[:, None] < 4, 0, planes[0]).astype(np.uint8)
        picture = PIL.Image.merge(mode, [PIL.Image.fromarray(plane) for plane in planes])
    picture.save(path)
    with PIL.Image.open(path) as stored:
        assert stored.mode == mode
    return path


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "LA", "RGB", "RGBA"])
def test_what_is_not_black_is_foreground_in_every_kind_of_png(mode: str, tmp_path: Path) -> None:
    mask = read_mask(save(tmp_path / "mask.png", mode, drawn()), SIZE)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, drawn())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 300), height=st.integers(1, 300), longest=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_large_png_is_shrunk_and_no_pixel_is_lost_or_moved(
    tmp_path: Path, width: int, height: int, longest: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width), bool)
    y, x = rng.integers(0, height, 5), rng.integers(0, width, 5)
    pixels[y, x] = True
    PIL.Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", Size(width, height), longest)
    assert max(mask.shape) <= longest
    rows, columns = mask.shape
    expected = np.zeros_like(mask)
    expected[y * rows // height, x * columns // width] = True
    np.testing.assert_array_equal(mask, expected)


def test_bands_do_not_change_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).random((400, 600)) < 0.01
    path = save(tmp_path / "mask.png", "P", pixels)
    whole = read_mask(path, SIZE, 64)
    monkeypatch.setattr(module, "_BAND_PIXELS", 1000)
    np.testing.assert_array_equal(read_mask(path, SIZE, 64), whole)


WHOLE = png(60, 40, 1, 0, (b"\0" + b"\xff" * 8) * 40)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a PNG. Expected a PNG or GeoJSON"),
        (b"\xff\xd8\xff\xe0 a photograph, whatever it is named", "not a PNG"),
        (WHOLE[:20], "not a PNG"),
        (WHOLE[:-30], "this mask is damaged"),
        (WHOLE.replace(b"IDAT", b"IDAX"), "this mask is damaged"),
        (WHOLE[:-25] + bytes([WHOLE[-25] ^ 1]) + WHOLE[-24:], "damaged"),  # its sum shows one flipped bit
        (png(60_000, 40_000, 1, 0, None), "60,000 x 40,000 pixels are too many for a mask"),
        (png(60, 50, 1, 0, None), "60 x 50 pixels has other proportions than its image of 600 x 400"),
        (png(40, 60, 1, 0, None), "seems to be turned"),
        (png(60, 0, 1, 0, None), "no pixels"),
        (png(60, 40, 16, 2, None), "16 bits a channel"),
    ],
)
def test_a_file_that_is_no_mask_is_one_line_with_its_name(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=said) as caught:
        read_mask(path, SIZE)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_mask_that_is_gone_may_come_back(tmp_path: Path) -> None:
    for name in ("mask.png", "mask.geojson"):
        with pytest.raises(ImageLost, match=name):
            read_mask(tmp_path / name, SIZE)


@pytest.mark.parametrize("size", [(600, 400), (6, 4), (605, 400), (59, 40), (7, 5)])
def test_proportions_may_differ_by_rounding(size: tuple[int, int], tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", "L", np.ones(size[::-1], bool))
    assert read_mask(path, SIZE).all()


# Outlines


def feature(rings: list[list[tuple[float, float]]], name: str = "") -> dict[str, Any]:
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": properties}


def box(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]


def write(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_outlines_fill_their_pixels_but_not_their_holes_nor_what_is_ignored(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mask.geojson",
        feature([box(100, 50, 200, 100), box(150, 80, 20, 20)], "Tissue"),
        feature([box(400, 300, 100, 60)], "Region*"),
        feature([box(250, 0, 100, 400)], "Ignore*"),
    )
    mask = read_mask(path, SIZE)
    expected = np.zeros((400, 600), bool)
    expected[50:150, 100:300] = expected[300:360, 400:500] = True
    expected[80:100, 150:170] = expected[:, 250:350] = False
    np.testing.assert_array_equal(mask, expected)


def test_a_mask_of_outlines_is_at_most_2048_cells_long(tmp_path: Path) -> None:
    path = write(tmp_path / "mask.geojson", feature([box(0, 0, 100_000, 5_000)]))
    mask = read_mask(path, Size(100_000, 50_000))
    assert mask.shape == (1024, 2048)
    assert mask.mean() == pytest.approx(0.1, abs=0.002)


@pytest.mark.parametrize("at", [(0.0, 0.0), (1234.5, 777.7), (119_999.0, 89_999.0)])
def test_an_annotation_far_smaller_than_a_cell_keeps_the_patch_it_is_in(
    at: tuple[float, float], tmp_path: Path
) -> None:
    path = write(tmp_path / "mask.geojson", feature([box(*at, 0.8, 0.8)]))
    image = ArrayImage(np.zeros((1, 1), np.uint8))
    image.size = Size(120_000, 90_000)
    image.levels = (image.levels[0]._replace(size=image.size),)
    grid = PatchGrid(image, 256, mask=Foreground(read_mask(path, image.size), 0.01))
    cell = [int(at[1]) // 256, int(at[0]) // 256]
    assert cell in grid.cells(slice(None)).tolist()
    assert len(grid) <= 4


def test_damaged_outlines_are_one_line_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text("not json")
    with pytest.raises(ImageError, match="not JSON") as caught:
        read_mask(path, SIZE)
    assert str(caught.value).count(str(path)) == 1
    assert "\n" not in str(caught.value)


def test_masks_for_a_model_that_does_not_use_them_are_refused(
    toy: Path, toy_run: Path, tmp_path: Path, say: Say
) -> None:
    lines = (
        ("predict", toy_run, toy / "red" / "0.png", "--masks", tmp_path, "--out", "answers"),
        ("evaluate", toy_run, "--data", toy, "--masks", tmp_path, "--out", "evaluated"),
    )
    for line in lines:
        assert "was trained with patch.foreground all and does not use masks. Leave" in say(*line).refusal()
    line = ("embed", toy / "red", "--run", toy_run, "--masks", tmp_path, "--out", "features")
    assert "not used with patch.foreground all. Add --patch.foreground mask" in say(*line).refusal()
    assert not Path("answers").exists()
    assert not Path("evaluated").exists()
    save(tmp_path / "0.png", "L", drawn())
    rows = tmp_path / "rows.csv"
    rows.write_text(f"image,label,mask\n{toy / 'red' / '0.png'},red,0.png\n")
    for line in (
        ("predict", toy_run, rows, "--out", "answers"),
        ("evaluate", toy_run, "--data", rows, "--out", "evaluated"),
    ):
        said = say(*line)
        assert "the mask of 1 image is not used, since the model was trained with patch.foreground all" in said.all
