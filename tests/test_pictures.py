"""What a file holds beside its pixels decides what they mean: bits in use, transparency, stacks, a cut directory."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from make_images import picture, png, png_chunk, squeeze, whole, write_tiff
from make_zarr import write_multiscale
from numpy.typing import NDArray

from keyhole.cli.main import main
from keyhole.errors import BitsUnknown, ConfigError, ImageError
from keyhole.images import open_image
from keyhole.images.openslide import check_bits, planes
from keyhole.images.pixels import eight_bit
from keyhole.images.scale import given_scale
from keyhole.images.tiff_file import check_tiles


@pytest.mark.parametrize("bits", range(1, 17))
def test_white_of_any_number_of_bits_is_255_and_black_0(bits: int) -> None:
    values = np.arange(2**bits).astype(np.uint8 if bits <= 8 else np.uint16)
    pixels = eight_bit(values, bits)
    assert (pixels[0], pixels[-1]) == (0, 255)
    np.testing.assert_array_equal(pixels, np.floor(values * 255.0 / (2**bits - 1) + 0.5))
    with pytest.raises(ValueError, match="holds a value of"):
        eight_bit(np.array([2**bits], np.uint32), bits)


def deep(largest: int, channels: int = 1, dtype: type = np.uint16) -> NDArray[Any]:
    """(24, 32, channels) values from 0 to `largest`, both of them there."""
    values = np.random.default_rng(largest).integers(0, largest, (24, 32, channels), endpoint=True).astype(dtype)
    values[0, 0], values[0, 1] = 0, largest
    return values


def write_deep(folder: Path, name: str, values: NDArray[Any]) -> Path:
    """One picture of 16 bits a value in a format that has no place for the bits in use, or leaves it empty."""
    path = folder / f"{name}-{values.shape[2]}"
    if name == "zarr":
        write_multiscale(path, [values], 2, axes="yxc" if values.shape[2] == 3 else "yx")
    elif name.startswith("tif"):
        options = {"tiff-tiles": {"tile": (16, 16)}, "tiff-planes": {"planarconfig": "separate"}}.get(name, {})
        write_tiff(path, squeeze(values), **options)
    elif name == "ome":
        path = path.with_suffix(".ome.tif")
        options = {"metadata": {"axes": "YXS"[: 3 if values.shape[2] == 3 else 2], "SignificantBits": 16}}
        tifffile.imwrite(path, squeeze(values), photometric="rgb" if values.shape[2] == 3 else "minisblack", **options)
    elif name == "png":
        path.write_bytes(imagecodecs.png_encode(squeeze(values)))
    elif name == "jp2":
        path.write_bytes(imagecodecs.jpeg2k_encode(squeeze(values), bitspersample=16, level=0, reversible=True))
    else:
        kind = b"P5" if values.shape[2] == 1 else b"P6"
        path.write_bytes(kind + b"\n# a comment\n32 24\n65535\n" + values.astype(">u2").tobytes())
    return path


UNSTATED = ["tiff", "tiff-tiles", "tiff-planes", "ome", "zarr", "png", "jp2", "pnm"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", UNSTATED)
def test_sixteen_bits_are_scaled_by_what_all_images_have_in_common_and_never_by_their_own_range(
    tmp_path: Path, name: str, channels: int
) -> None:
    if (name, channels) == ("tiff-planes", 1):
        return
    bright, dim = deep(50_000, channels), deep(3_000, channels)
    np.testing.assert_array_equal(whole(write_deep(tmp_path, name, bright)), np.round(bright / 257))
    path = write_deep(tmp_path, name, dim)
    with pytest.raises(BitsUnknown, match=r"the largest value is 3,000 of 65,535.*--patch\.bits") as caught:
        open_image(path)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (str(again), again.largest) == (str(caught.value), 3_000)
    for bits in (12, 14, 16):
        with open_image(path, bits) as image:
            assert image.bits == bits
            np.testing.assert_array_equal(image.read((0, 0, 32, 24)), np.floor(dim * 255.0 / (2**bits - 1) + 0.5))
    with open_image(path, 10) as image, pytest.raises(ImageError, match=r"a value of 3,000.*Correct --patch\.bits"):
        image.read((0, 0, 32, 24))


def write_stated(folder: Path, name: str, values: NDArray[Any], bits: int) -> Path:
    """A picture that says how many bits it uses; its channels are 1 or 3."""
    path, white = folder / "a", 2**bits - 1
    if name == "ome":
        path = path.with_suffix(".ome.tif")
        metadata = {"axes": "YXS"[: 3 if values.shape[2] == 3 else 2], "SignificantBits": bits}
        tifffile.imwrite(
            path, squeeze(values), photometric="rgb" if values.shape[2] == 3 else "minisblack", metadata=metadata
        )
    elif name == "tag":
        write_tiff(path, squeeze(values), extratags=[(281, 3, values.shape[2], (white,) * values.shape[2], True)])
    elif name == "zarr":
        channels = [{"window": {"min": 0, "max": white}}] * values.shape[2]
        write_multiscale(path, [values], 2, axes="yxc" if values.shape[2] == 3 else "yx", omero={"channels": channels})
    elif name == "jp2":
        path.write_bytes(imagecodecs.jpeg2k_encode(squeeze(values), bitspersample=bits, level=0, reversible=True))
    elif name == "packed":
        write_tiff(path, squeeze(values), bitspersample=bits)
    else:
        path.write_bytes(
            (b"P5" if values.shape[2] == 1 else b"P6") + f"\n32 24\n{white}\n".encode() + values.astype(">u2").tobytes()
        )
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("name", ["ome", "tag", "zarr", "jp2", "packed", "pnm"])
def test_bits_that_a_file_states_are_believed(tmp_path: Path, name: str, bits: int, channels: int) -> None:
    values = deep(2**bits - 1, channels) // 2  # no value shows it
    values[0, 0] = 2**bits - 1
    path = write_stated(tmp_path, name, values, bits)
    for given in (None, 16):
        with open_image(path, given) as image:
            pixels = image.read((0, 0, 32, 24))
        assert pixels.max() == 255
        np.testing.assert_allclose(pixels, values * 255.0 / (2**bits - 1), atol=1 if name == "pnm" else 0.51)


def test_the_largest_value_of_one_picture_is_not_taken_for_the_cameras_white(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", squeeze(deep(3_000)), extratags=[(281, 3, 1, 3_000, True)])
    with pytest.raises(BitsUnknown):
        open_image(tmp_path / "a.tif")
    write_tiff(tmp_path / "b.tif", squeeze(deep(15, dtype=np.uint8)), extratags=[(281, 3, 1, 15, True)])
    assert whole(tmp_path / "b.tif").max() == 15


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_jpeg2000_of_few_bits_has_a_white_of_255(tmp_path: Path, bits: int, channels: int) -> None:
    values = deep(2**bits - 1, channels, np.uint8)
    coded = imagecodecs.jpeg2k_encode(squeeze(values), bitspersample=bits, level=0, reversible=True)
    (tmp_path / "a.jp2").write_bytes(coded)
    np.testing.assert_array_equal(whole(tmp_path / "a.jp2"), np.floor(values * 255.0 / (2**bits - 1) + 0.5))


def test_a_set_of_dim_pictures_is_refused_checked_and_learned_from_with_its_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for k, name in enumerate("ab"):
        (data / name).mkdir(parents=True)
        for i in range(4):
            values = squeeze(deep(4095 if i % 2 else 250)) >> k
            write_tiff(data / name / f"{i}.tif", values)
    write_tiff(tmp_path / "new.tif", squeeze(deep(4000)))
    options = ["--patch.size", "8", "--select.m", "3", "--run.threads", "1"]
    assert main(["check", str(data), *options]) == 1
    out = capsys.readouterr().out
    assert "error: 8 images: 16 bits a value" in out
    assert "largest value 4,095 of 65,535" in out
    assert "--patch.bits 12" in out
    assert main(["check", str(data), *options, "--patch.bits", "16"]) == 0
    assert "images: nearly black: no pixel that was read is above" in capsys.readouterr().out
    assert main(["check", str(data), *options, "--patch.bits", "12"]) == 0
    assert "warning: 8 images: nearly black" not in capsys.readouterr().out
    tiny = [
        *options,
        "--model.encoder",
        "small",
        "--model.width",
        "4",
        "--model.heads",
        "1",
        "--train.epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", str(data), *tiny]) == 2
    assert "--patch.bits 12, for example" in capsys.readouterr().err
    assert main(["train", str(data), *tiny, "--patch.bits", "12"]) == 0
    predict = ["predict", str(tmp_path / "run"), str(tmp_path / "new.tif"), "--out"]
    assert main([*predict, str(tmp_path / "answers")]) == 0  # the model keeps the bits that it learned with
    capsys.readouterr()
    assert main([*predict, str(tmp_path / "too-few"), "--bits", "11"]) == 2
    assert "a value of 4,000, but 11 bits in use end at 2,047" in capsys.readouterr().err


def test_check_warns_of_pictures_of_one_value_nearly_black_ones_and_further_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            write_tiff(tmp_path / name / f"{i}.tif", picture(seed=i))
    write_tiff(tmp_path / "a" / "flat.tif", np.full((40, 40, 3), 7, np.uint8))
    write_tiff(tmp_path / "a" / "dark.tif", picture(3, 40, 40) // 40)
    write_tiff(tmp_path / "b" / "pages.tif", np.stack([picture(seed=k) for k in range(3)]), photometric="rgb")
    assert main(["check", str(tmp_path), "--patch.size", "32", "--select.m", "3", "--run.threads", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "a/flat.tif: all pixels that were read have one value" in out
    assert "a/dark.tif: nearly black: no pixel that was read is above 6 of 255" in out
    assert "b/pages.tif: of 3 pages the first is read" in out


def test_a_makers_slide_of_sixteen_bits_is_refused_and_what_it_says_of_planes_is_told(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", deep(50_000, 3), tile=(16, 16), software="Philips DP v1.0")
    with pytest.raises(ImageError, match="a slide of 16 bits a value is not read"):
        open_image(tmp_path / "a.tif")
    said = {f"zeiss.Information.Image.{name}": value for name, value in {"SizeZ": "5", "SizeT": "1"}.items()}
    with tifffile.TiffWriter(tmp_path / "planes.tif") as writer:
        for plane in (0, 1, -1):
            tags = [(65420, 4, 1, 1, True), (65424, 9, 1, plane, True), (271, 2, 10, "Hamamatsu", True)]
            writer.write(picture(), tile=(32, 32), extratags=tags, metadata=None)
    assert check_tiles(tmp_path / "planes.tif") == 3
    assert planes({}, 3) == "a stack of pictures (3 along z), of which one is read"
    assert planes({}, 1) == ""
    assert planes(said, 1) == "a stack of pictures (5 along z), of which one is read"
    deep_slide = {"zeiss.Information.Image.PixelType": "Bgr48", "zeiss.Information.Image.ComponentBitCount": "12"}
    with pytest.raises(ImageError, match="of which 12 are in use"):
        check_bits(tmp_path / "a.czi", deep_slide)
    check_bits(tmp_path / "a.czi", {**deep_slide, "zeiss.Information.Image.PixelType": "Bgr24"})


# --- transparency, and JPEGs that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "key", "row", "expected"),
    [(1, 0, b"\x0f", [255] * 8), (2, 1, b"\x1b\xe4", [0, 255, 170, 255, 255, 170, 255, 0]),
     (4, 15, b"\x0f\x1f\x2f\x3f", [0, 255, 17, 255, 34, 255, 51, 255]), (8, 9, bytes([0, 9, 1, 9, 2, 9, 3, 9]), [0, 255, 1, 255, 2, 255, 3, 255]),
     (16, 9, struct.pack(">8H", 65535, 9, 257, 9, 514, 9, 2313, 9), [255, 255, 1, 255, 2, 255, 9, 255])],
)  # fmt: skip
def test_the_transparent_value_of_a_png_is_white(
    tmp_path: Path, depth: int, key: int, row: bytes, expected: list[int]
) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 1, depth, 0, b"\0" + row, png_chunk(b"tRNS", struct.pack(">H", key))))
    with open_image(tmp_path / "a.png") as image:
        assert image.channels == 1
        assert image.read((0, 0, 8, 1)).ravel().tolist() == expected


def make_palette(path: Path) -> None:
    """Turn grey into numbers of the palette that is there; tifffile writes none with alpha."""
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages.first.tags[262].overwrite(3)


@pytest.mark.parametrize("extra", [["unassalpha"], ["assocalpha"], ["unspecified", "unassalpha"]])
@pytest.mark.parametrize("kind", ["minisblack", "miniswhite", "rgb", "separated", "palette"])
def test_alpha_of_a_tiff_is_white_whatever_the_colours(tmp_path: Path, kind: str, extra: list[str]) -> None:
    colors = {"rgb": 3, "separated": 4}.get(kind, 1)
    plain = picture(colors, 32, 24)
    options: dict[str, Any] = {"photometric": kind, "tile": (16, 16)}
    if kind == "palette":
        palette = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257
        options |= {"photometric": "minisblack", "extratags": [(320, 3, 768, palette.ravel().tolist(), True)]}
    write_tiff(tmp_path / "plain.tif", squeeze(plain), **options)
    if kind == "palette":
        make_palette(tmp_path / "plain.tif")
    seen = whole(tmp_path / "plain.tif").astype(float)
    alpha = np.full((24, 32, 1), 255, np.uint8)
    alpha[8:16], alpha[16:] = 128, 0
    if len(extra) + colors == 3 and kind != "rgb":
        return  # grey of three samples is refused
    stored = plain.copy()
    if extra == ["assocalpha"] and kind != "palette":
        stored = np.round(plain * (alpha / 255)).astype(np.uint8)
    samples = [stored, *([plain[..., :1]] if len(extra) > 1 else []), alpha]
    write_tiff(
        tmp_path / "a.tif", np.concatenate(samples, axis=-1), extrasamples=extra, planarconfig="contig", **options
    )
    if kind == "palette":
        make_palette(tmp_path / "a.tif")
    share = alpha / 255
    np.testing.assert_allclose(whole(tmp_path / "a.tif"), seen * share + 255 * (1 - share), atol=2)
    assert (whole(tmp_path / "a.tif")[16:] == 255).all()


def test_a_jpeg_that_is_not_read_says_what_it_is(tmp_path: Path) -> None:
    sound = imagecodecs.jpeg8_encode(picture(3, 32, 24), level=90)
    at = sound.index(b"\xff\xc0")
    files = {
        "lossless": (imagecodecs.ljpeg_encode(squeeze(deep(4095))), "a lossless JPEG of .* bits"),
        "twelve": (sound[: at + 4] + b"\x0c" + sound[at + 5 :], "a JPEG of 12 bits"),
        "two": (sound[: at + 9] + b"\x02" + sound[at + 10 :], "2 channels"),
        "ls": (imagecodecs.jpegls_encode(picture(1, 32, 24)[..., 0]), "JPEG-LS"),
        "head": (sound[:3] + bytes(40), "header is cut or damaged"),
    }
    for name, (data, expected) in files.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
        with pytest.raises(ImageError, match=expected) as caught:
            open_image(tmp_path / f"{name}.jpg")
        assert "MPO" not in str(caught.value)


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
    for name, note, levels in (("pages.tif", "of 3 pages the first is read", 1), ("pyramid.tif", "", 2)):
        with open_image(tmp_path / name) as image:
            assert (image.note, len(image.levels)) == (note, levels)
            np.testing.assert_array_equal(image.read((0, 0, *image.size)), pages[0])


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
