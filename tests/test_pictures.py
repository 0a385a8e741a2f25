"""What a file holds beside its pixels decides what they mean: bits in use, transparency, stacks, a cut directory."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from make_images import picture, write_tiff
from make_zarr import write_multiscale
from numpy.typing import NDArray

from keyhole.errors import ConfigError, ImageError
from keyhole.images import open_image
from keyhole.images.pixels import eight_bit
from keyhole.images.scale import given_scale


def whole(path: Path) -> NDArray[np.uint8]:
    with open_image(path) as image:
        return image.read((0, 0, *image.size))


@pytest.mark.parametrize("bits", range(1, 17))
def test_white_of_any_number_of_bits_is_255_and_black_0(bits: int) -> None:
    values = np.arange(2**bits).astype(np.uint8 if bits <= 8 else np.uint16)
    pixels = eight_bit(values, bits)
    assert (pixels[0], pixels[-1]) == (0, 255)
    np.testing.assert_array_equal(pixels, np.floor(values * 255.0 / (2**bits - 1) + 0.5))
    with pytest.raises(ValueError, match="a value of"):
        eight_bit(np.array([2**bits], np.uint32), bits)


# --- stacks --------------------------------------------------------------------------------------------------------


def write_stack(folder: Path, axes: str, maker: str) -> Path:
    """Three planes along the first of `axes`."""
    planes = picture(3, 32, 24).transpose(2, 0, 1).copy()
    if maker == "zarr":
        kept = planes[..., None] if axes[0] != "C" else np.moveaxis(np.concatenate([planes, planes[:1]]), 0, -1)
        options = {} if axes[0] == "C" else {"axes": f"{axes[0].lower()}yx", "depth": 3}
        write_multiscale(folder / "a.zarr", [kept[0] if axes[0] != "C" else kept], 2, **options)
        return folder / "a.zarr"
    path = folder / ("a.ome.tif" if maker == "ome" else "a.tif")
    metadata = {"axes": axes, "mode": "composite"} if maker == "imagej" else {"axes": axes}
    tifffile.imwrite(path, planes, imagej=maker == "imagej", photometric="minisblack", metadata=metadata)
    return path


@pytest.mark.parametrize("maker", ["imagej", "ome", "zarr"])
@pytest.mark.parametrize("axes", ["CYX", "ZYX", "TYX"])
def test_stacks_are_refused_alike_with_what_to_do(tmp_path: Path, axes: str, maker: str) -> None:
    path = write_stack(tmp_path, axes, maker)
    expected = r"\d channels; one or RGB is read" if axes[0] == "C" else rf"\(3 along {axes[0].lower()}\); one is read"
    with pytest.raises(ImageError, match=expected + r".*as a file of its own"):
        open_image(path)


@pytest.mark.parametrize(
    ("unit", "per_pixel", "mpp"),
    [("um", 0.25, 0.25), ("micron", 0.5, 0.5), ("\\u00B5m", 0.5, 0.5), ("nm", 250.0, 0.25), ("mm", 0.001, 1.0),
     ("pixel", 0.25, None), ("um", 500.0, None)],
)  # fmt: skip
def test_imagejs_scale_is_in_its_own_unit(tmp_path: Path, unit: str, per_pixel: float, mpp: float | None) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", picture(1)[..., 0], imagej=True, resolution=(1 / per_pixel,) * 2, metadata={"unit": unit}
    )
    with open_image(tmp_path / "a.tif") as image:
        assert image.mpp == (mpp if mpp is None else pytest.approx(mpp))
        assert ("its ImageJ description" in image.mpp_note) == (per_pixel == 500)


def test_a_file_of_several_pictures_says_which_is_read_and_a_pyramid_does_not(tmp_path: Path) -> None:
    pages = np.stack([picture(seed=k) for k in range(3)])
    write_tiff(tmp_path / "pages.tif", pages, tile=(32, 32), photometric="rgb")
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:
        for level in (picture(), picture()[::2, ::2], picture(3, 60, 72)):
            writer.write(level, tile=(32, 32), subfiletype=int(level.shape[1] < 144), metadata=None)
    for name, note in (("pages.tif", "of 3 pages the first is read"), ("pyramid.tif", "")):
        with open_image(tmp_path / name) as image:
            assert image.note == note


# --- a directory that was cut, a scale that somebody gives -----------------------------------------------------------


def cut_tiff(missing: int) -> bytes:
    """A TIFF whose directory is last, without the last bytes of the offset "no next page"."""
    tags = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    data = struct.pack("<2sHI", b"II", 42, 72) + bytes(range(64)) + struct.pack("<H", len(tags)) + entries + bytes(4)
    return data[: len(data) - missing]


@pytest.mark.parametrize("missing", [0, 1, 4, 5])
def test_a_tiff_may_lack_the_bytes_that_say_no_next_page(tmp_path: Path, missing: int) -> None:
    (tmp_path / "a.tif").write_bytes(cut_tiff(missing))
    if missing == 5:  # a tag is cut as well
        with pytest.raises(ImageError, match="ends early"):
            open_image(tmp_path / "a.tif")
    else:
        np.testing.assert_array_equal(whole(tmp_path / "a.tif").ravel(), np.arange(64))


@pytest.mark.parametrize("mpp", [0, -1, 250, "250", "0.25x", float("nan"), float("inf"), 0.001])
def test_a_scale_that_a_user_gives_is_held_to_the_rule_of_files(mpp: Any) -> None:
    assert given_scale(0.25) == given_scale("0.25") == 0.25
    with pytest.raises(ConfigError, match=r"mpp is .* 0\.02 \.\.\. 100"):
        given_scale(mpp)
