"""Readers: the same picture gives the same pixels, whatever the file, the level and the box."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import PIL.Image
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from make_dicom import write_dicom
from make_images import (
    Stored,
    picture,
    squeeze,
    whole,
    write_many_tiles,
    write_pictures,
    write_pyramids,
    write_tiff,
    write_tiffs,
)
from make_slides import write_vendors
from numpy.typing import NDArray
from processes import run_process

from keyhole.errors import BitsUnknown, ImageError, ImageLost
from keyhole.images import ArrayImage, Box, Image, Level, Size, open_image
from keyhole.images.faults import check_reachable, faults_of
from keyhole.images.geometry import same_shape
from keyhole.images.image import readers
from keyhole.images.openslide import OpenSlideImage
from keyhole.images.pillow import PillowImage, image_in_memory
from keyhole.images.pixels import on_white
from keyhole.images.tiff import TiffImage
from keyhole.images.tiff_file import MAX_LOADED_ENTRIES


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    folder = tmp_path_factory.mktemp("images")
    return {**write_pictures(folder), **write_tiffs(folder), **write_pyramids(folder)}


def padded(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """What a box must give, worked out the slow way."""
    out = np.full((box.height, box.width, pixels.shape[2]), 255, np.uint8)
    for y in range(box.height):
        for x in range(box.width):
            if 0 <= box.y + y < pixels.shape[0] and 0 <= box.x + x < pixels.shape[1]:
                out[y, x] = pixels[box.y + y, box.x + x]
    return out


boxes = st.builds(Box, st.integers(-20, 150), st.integers(-20, 100), st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=15, deadline=None)
@given(box=boxes)
def test_every_lossless_file_gives_the_same_pixels_in_any_box(stored: dict[str, Stored], box: Box) -> None:
    for name, file in stored.items():
        with open_image(file.path) as image:
            for level, pixels in enumerate(file.levels):
                np.testing.assert_array_equal(image.read(box, level), padded(pixels, box), err_msg=f"{name} {level}")


def test_size_levels_and_channels_are_those_of_the_picture(stored: dict[str, Stored]) -> None:
    for file in stored.values():
        with open_image(file.path) as image:
            height, width, channels = file.levels[0].shape
            assert (image.size, image.channels) == (Size(width, height), channels)
            expected = [(Size(p.shape[1], p.shape[0]), 2.0**k) for k, p in enumerate(file.levels)]
            assert [(level.size, level.downsample) for level in image.levels] == expected


@settings(max_examples=15, deadline=None)
@given(box=boxes)
def test_openslide_and_tifffile_agree_on_a_tiled_pyramid(stored: dict[str, Stored], box: Box) -> None:
    path = stored["chain.tif"].path
    with OpenSlideImage(path) as slide, TiffImage(path) as tiff:
        assert slide.levels == tiff.levels
        for level in range(len(tiff.levels)):
            np.testing.assert_array_equal(slide.read(box, level), tiff.read(box, level))


def test_a_real_slide_is_the_same_through_both_readers(shared: Path) -> None:
    path = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    with OpenSlideImage(path) as slide, open_image(path) as tiff:
        assert isinstance(tiff, TiffImage)
        assert (slide.size, slide.levels, slide.mpp) == (tiff.size, tiff.levels, tiff.mpp)
        assert tiff.size == (2220, 2967)
        assert tiff.mpp == 0.499
        for box in [Box(700, 900, 600, 500), Box(2100, 2900, 200, 100), Box(-30, -30, 64, 64)]:
            difference = np.abs(slide.read(box).astype(int) - tiff.read(box))
            assert difference.max() <= 2  # 0 with the decoders of today; both are JPEG decoders of their own


def test_readers_are_chosen_by_content_not_by_name(tmp_path: Path) -> None:
    pixels = picture()
    PIL.Image.fromarray(pixels).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.jpg")
    with open_image(str(tmp_path / "named.jpg")) as image:
        assert isinstance(image, PillowImage)
        np.testing.assert_array_equal(image.read((0, 0, *image.size)), pixels)


@pytest.mark.parametrize("name", ["ünï cödé — 雪.tif", "with space.tif", "no-suffix", "a.b.c.TIFF", "-dash.tif"])
def test_odd_names_are_read(tmp_path: Path, name: str) -> None:
    write_tiff(tmp_path / name, picture(), tile=(32, 32))
    with open_image(tmp_path / name) as image:
        np.testing.assert_array_equal(image.read((0, 0, *image.size)), picture())


@pytest.mark.parametrize(
    ("options", "name"),
    [({"software": "Philips DP v1.0"}, "a.tif"), ({"software": "MedScan 1"}, "a.tif"), ({}, "a.ndpi"), ({}, "a.SCN"),
     ({"description": "Aperio Image Library|MPP = 0.5", "compression": 33005}, "a.svs"),
     ({"extratags": [(700, 1, 12, b"<iScan mag='4", True)]}, "a.tif")],
)  # fmt: skip
def test_a_makers_own_tiff_is_openslides_and_every_other_is_not(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    path = write_tiff(tmp_path / name, picture(), tile=(48, 48), **options)
    plain = write_tiff(tmp_path / "plain.tif", picture(), tile=(48, 48))
    for file, tiff in ((path, False), (plain, True)):
        head = file.read_bytes()[:64]
        assert TiffImage.sniff(file, head) is tiff
        assert OpenSlideImage.sniff(file, head) is not tiff


def test_jpeg2000_of_aperio_is_read_by_openslide(tmp_path: Path) -> None:
    options = {"description": "Aperio Image Library|MPP = 0.5", "compression": 33005, "compressionargs": {"level": 0}}
    write_tiff(tmp_path / "a.svs", picture(), tile=(48, 48), **options)
    with open_image(tmp_path / "a.svs") as image:
        assert isinstance(image, OpenSlideImage)
        assert image.mpp == 0.5
        np.testing.assert_array_equal(image.read((-3, 10, 100, 100)), padded(picture(), Box(-3, 10, 100, 100)))


ORIENTED = {  # EXIF value -> the stored picture, given how it is to be seen
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: np.rot90(seen, 2).swapaxes(0, 1),
    8: lambda seen: np.rot90(seen, -1),
}


@pytest.mark.parametrize("orientation", sorted(ORIENTED))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_orientation_is_obeyed_at_every_box(tmp_path: Path, orientation: int, suffix: str) -> None:
    seen, path = picture(), tmp_path / f"a.{suffix}"
    stored = np.ascontiguousarray(ORIENTED[orientation](seen))
    if suffix == "tif":
        write_tiff(path, stored, tile=(32, 16), extratags=[(274, 3, 1, orientation, True)])
    else:
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        PIL.Image.fromarray(stored).save(path, exif=exif, lossless=True)
    with open_image(path) as image:
        assert image.size == (seen.shape[1], seen.shape[0])
        for box in [Box(0, 0, *image.size), Box(17, 40, 50, 30), Box(100, 60, 80, 80), Box(-5, -5, 20, 10)]:
            np.testing.assert_array_equal(image.read(box), padded(seen, box))


def test_orientation_behind_the_pixels_of_a_png_is_obeyed(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    rest = data[:start] + data[start + len(chunk) :]
    (tmp_path / "a.png").write_bytes(rest[:-12] + chunk + rest[-12:])
    with open_image(tmp_path / "a.png") as image:
        assert image.size == (96, 144)
        np.testing.assert_array_equal(image.read((0, 0, *image.size)), np.rot90(picture(), -1))


def test_sixteen_bits_become_eight_rounded_to_nearest(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (40, 50, 3)).astype(np.uint16)
    PIL.Image.fromarray(deep[..., 0]).save(tmp_path / "grey.png")
    write_tiff(tmp_path / "grey.tif", deep[..., 0], compression="zstd", predictor=True)
    write_tiff(tmp_path / "color.tif", deep, tile=(16, 16))
    for name, expected in [("grey.png", deep[..., :1]), ("grey.tif", deep[..., :1]), ("color.tif", deep)]:
        np.testing.assert_array_equal(whole(tmp_path / name), np.round(expected / 257), err_msg=name)


def test_white_may_be_zero(tmp_path: Path) -> None:
    grey = picture(1)
    write_tiff(tmp_path / "a.tif", squeeze(255 - grey), photometric="miniswhite", tile=(32, 32))
    write_tiff(tmp_path / "deep.tif", squeeze(65535 - grey.astype(np.uint16) * 257), photometric="miniswhite")
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), grey)
    np.testing.assert_array_equal(whole(tmp_path / "deep.tif"), grey)


@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_is_composited_onto_white_alike(tmp_path: Path, channels: int) -> None:
    pixels = picture(channels + 1)
    alpha = pixels[..., -1:].astype(float) / 255
    expected = np.floor(pixels[..., :-1] * alpha + 255 * (1 - alpha) + 0.5)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    write_tiff(tmp_path / "a.tif", pixels, photometric="rgb" if channels == 3 else "minisblack",
               planarconfig="contig", extrasamples=["unassalpha"])  # fmt: skip
    for name in ("a.png", "a.tif"):
        np.testing.assert_allclose(whole(tmp_path / name), expected, atol=0.51, err_msg=name)
    np.testing.assert_array_equal(whole(tmp_path / "a.png"), whole(tmp_path / "a.tif"))


def test_colors_already_multiplied_by_alpha_are_not_multiplied_again(tmp_path: Path) -> None:
    pixels = picture(4)
    straight = on_white(pixels)
    pixels[..., :3] = np.round(pixels[..., :3] * (pixels[..., 3:] / 255)).astype(np.uint8)
    write_tiff(tmp_path / "a.tif", pixels, extrasamples=["assocalpha"])
    np.testing.assert_allclose(whole(tmp_path / "a.tif").astype(int), straight, atol=1)


def test_an_extra_channel_that_is_not_alpha_is_left_out(tmp_path: Path) -> None:
    pixels = picture(4)
    write_tiff(tmp_path / "a.tif", pixels, extrasamples=["unspecified"], tile=(32, 32))
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), pixels[..., :3])


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif"])
def test_palettes_become_rgb(tmp_path: Path, suffix: str) -> None:
    palette = PIL.Image.fromarray(picture()).quantize(40)
    palette.save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(whole(tmp_path / f"a.{suffix}"), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(
    "options", [{}, {"compression": "group4"}, {"compression": "group3"}, {"compression": "packbits"}]
)
def test_black_and_white_becomes_0_and_255(tmp_path: Path, options: dict[str, str]) -> None:
    bilevel = PIL.Image.fromarray(picture(1)[..., 0] > 127)
    bilevel.save(tmp_path / "a.tif", **options)
    bilevel.save(tmp_path / "a.png")
    for name in ("a.tif", "a.png"):
        np.testing.assert_array_equal(whole(tmp_path / name)[..., 0], np.asarray(bilevel) * np.uint8(255), err_msg=name)


def test_cmyk_becomes_rgb_as_pillow_has_it(tmp_path: Path) -> None:
    inks = PIL.Image.frombytes("CMYK", (144, 96), picture(4).tobytes())
    inks.save(tmp_path / "a.tif", compression="tiff_lzw")
    np.testing.assert_allclose(whole(tmp_path / "a.tif").astype(int), np.asarray(inks.convert("RGB")), atol=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_in_tiff_is_as_libtiff_decodes_it(tmp_path: Path, channels: int) -> None:
    original = PIL.Image.fromarray(squeeze(picture(channels)))
    original.save(tmp_path / "a.tif", compression="jpeg", quality=90)
    with PIL.Image.open(tmp_path / "a.tif") as opened:
        expected = np.asarray(opened).reshape(96, 144, channels).astype(int)
    np.testing.assert_allclose(whole(tmp_path / "a.tif"), expected, atol=3)
    original.save(tmp_path / "a.jpg", quality=90)
    with PIL.Image.open(tmp_path / "a.jpg") as opened:
        np.testing.assert_array_equal(whole(tmp_path / "a.jpg"), np.asarray(opened).reshape(96, 144, channels))


NOTES: dict[str, tuple[dict[str, Any], float | None, str]] = {
    "not square": ({"resolution": (40000, 20000), "resolutionunit": 3}, None, "its resolution tag says 0.25 x 0.5 um per pixel: pixels that are not square"),
    "photograph": ({"resolution": (300, 300), "resolutionunit": 2}, None, "its resolution tag says 84.67 um per pixel, outside 0.05 ... 20"),
    "tag": ({"resolution": (40000, 40000), "resolutionunit": 3}, 0.25, ""),
    "tag in inches": ({"resolution": (50800, 50800), "resolutionunit": 2}, 0.5, ""),
    "no pixels": ({"resolution": (0, 0), "resolutionunit": 3}, None, ""),
    "no unit": ({"resolution": (40000, 40000), "resolutionunit": 1}, None, ""),
    "nothing": ({}, None, ""),
    "aperio": ({"description": "Aperio Image Library|MPP = 0.25|x = 1"}, 0.25, ""),
    "aperio agrees": ({"description": "Aperio Image Library|MPP = 0.2501", "resolution": (40000, 40000), "resolutionunit": 3}, 0.2501, ""),
    "aperio contradicts": ({"description": "Aperio Image Library|MPP = 0.25", "resolution": (20000, 20000), "resolutionunit": 3}, None,
                           "the file's description says 0.25, its resolution tag 0.5 um per pixel"),
    "aperio and 72 dpi": ({"description": "Aperio Image Library|MPP = 0.25", "resolution": (72, 72), "resolutionunit": 2}, 0.25, ""),
    "aperio comma": ({"description": "Aperio Image Library|MPP = 0,25"}, 0.25, ""),
    "aperio words": ({"description": "Aperio Image Library|MPP = ?"}, None, "its description says ? x ? um per pixel, which are not two numbers"),
    "aperio zero": ({"description": "Aperio Image Library|MPP = 0", "resolution": (40000, 40000), "resolutionunit": 3}, None, "its description says 0 um per pixel, outside 0.02 ... 100"),
    "aperio huge": ({"description": "Aperio Image Library|MPP = 500"}, None, "its description says 500 um per pixel, outside 0.02 ... 100"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTES)
def test_a_scale_that_is_not_believed_is_none_and_says_why(tmp_path: Path, name: str) -> None:
    options, mpp, note = NOTES[name]
    write_tiff(tmp_path / "a.tif", picture(), tile=(48, 48), **options)
    write_tiff(tmp_path / "a.svs", picture(), tile=(48, 48), compression=33005, compressionargs={"level": 0}, **options)
    with open_image(tmp_path / "a.tif") as image:
        assert (image.mpp, image.mpp_note) == (mpp if mpp is None else pytest.approx(mpp), note)
    if name.startswith("aperio"):
        with open_image(tmp_path / "a.svs") as image:
            assert isinstance(image, OpenSlideImage)
            assert image.mpp == mpp
            assert (image.mpp_note == "") == (note == "" or name == "aperio words")  # OpenSlide leaves those out


@pytest.mark.parametrize(
    ("sizes", "mpp", "note"),
    [({"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, 0.5, ""),  # µm by the schema
     ({"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}, 0.5, ""),
     ({"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "pixel", "PhysicalSizeY": 0.5}, None, "'pixel', which is not a unit of length"),
     ({"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}, None, "its OME-XML says 0.5 x 0.25 um per pixel: pixels that are not square"),
     ({"PhysicalSizeX": 0.5}, None, "its OME-XML says 0.5 x nothing um per pixel"),
     ({"PhysicalSizeX": 500, "PhysicalSizeY": 500}, None, "outside"), ({}, None, "")],
)  # fmt: skip
def test_an_ome_scale_needs_a_unit_of_length_and_square_pixels(
    tmp_path: Path, sizes: dict[str, Any], mpp: float | None, note: str
) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, picture(), ome=True, photometric="rgb", tile=(32, 32), metadata={"axes": "YXS", **sizes})
    with open_image(path) as image:
        assert image.mpp == mpp
        assert note in image.mpp_note
        assert (image.mpp_note == "") == (note == "")


def test_smaller_pages_of_other_proportions_are_no_levels(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for level in (picture(), picture(3, 72, 72), picture(3, 72, 48)):
            writer.write(level, tile=(32, 32), subfiletype=1 if level.shape[1] < 144 else 0, metadata=None)
    for reader in (TiffImage, OpenSlideImage):
        with reader(tmp_path / "a.tif") as image:
            assert [level.size for level in image.levels] == [(144, 96), (72, 48)]


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(2, 200_000),
    height=st.integers(2, 200_000),
    down=st.floats(1.2, 64),
    up=st.tuples(st.booleans(), st.booleans()),
)
def test_levels_are_told_from_other_pictures_by_their_size(
    width: int, height: int, down: float, up: tuple[bool, bool]
) -> None:
    level = Size(
        *(
            max(1, int(np.ceil(side / down) if ceil else side // down))
            for side, ceil in zip((width, height), up, strict=True)
        )
    )
    assert same_shape(Size(width, height), level) or level.width == width
    wider = Size(int(level.width * 1.02) + 2, level.height)
    assert min(level) < 200 or wider.width >= width or not same_shape(Size(width, height), wider)


def test_missing_tiles_are_background(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(), tile=(32, 32), compression="deflate")
    with tifffile.TiffFile(path, mode="r+") as tif:
        tag = tif.pages.first.tags[325]
        counts = list(tag.value)
        counts[1] = 0
        tag.overwrite(counts)
    expected = picture()
    expected[:32, 32:64] = 255
    np.testing.assert_array_equal(whole(path), expected)


@pytest.mark.parametrize("reader", [TiffImage, OpenSlideImage])
def test_a_region_is_read_without_the_rest_of_the_file(tmp_path: Path, reader: type[Image]) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(), tile=(32, 32), compression="deflate")
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    data = bytearray(path.read_bytes())
    for number, (offset, count) in enumerate(spans):
        if number != 6:  # row 1, column 1
            data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)
    with reader(path) as image:  # type: ignore[call-arg]
        np.testing.assert_array_equal(image.read((32, 32, 32, 32)), picture()[32:64, 32:64])
        with pytest.raises(ImageError, match="damaged at"):
            image.read((31, 32, 32, 32))
        # An error is final for a handle of OpenSlide: the good tile is still there, on a new one.
        np.testing.assert_array_equal(image.read((32, 32, 32, 32)), picture()[32:64, 32:64])


def overwrite_tile(path: Path, number: int) -> Box:
    """Harms one tile of level 0; returns where it is."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        row, column = divmod(number, -(-page.imagewidth // page.tilewidth))
        place = Box(column * page.tilewidth, row * page.tilelength, page.tilewidth, page.tilelength)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x55" * count)
    return place


@pytest.mark.parametrize("reader", [TiffImage, OpenSlideImage])
def test_one_damaged_tile_of_a_slide_spoils_no_other_for_any_thread(
    shared: Path, tmp_path: Path, reader: type[Image]
) -> None:
    source = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    path = Path(shutil.copy(source, tmp_path / "a.svs"))
    path.chmod(0o600)
    harmed = [overwrite_tile(path, number) for number in (31, 47, 48)]
    places = [Box(x, y, 120, 120) for y in range(0, 1440, 120) for x in range(0, 2160, 120)]
    bad = [any(h.x <= box.x < h.x + h.width and h.y <= box.y < h.y + h.height for h in harmed) for box in places]

    def outcome(box: Box) -> NDArray[np.uint8] | ImageError:
        try:
            return image.read(box)
        except ImageError as error:
            return error

    with reader(path) as image, reader(source) as sound, ThreadPoolExecutor(8) as pool:  # type: ignore[call-arg]
        for box, damaged, got in zip(places, bad, pool.map(outcome, places), strict=True):
            assert isinstance(got, ImageError) is damaged
            if isinstance(got, ImageError):
                assert f"damaged at {tuple(box)} of level 0" in str(got)
                assert not isinstance(got, ImageLost)
            else:
                np.testing.assert_array_equal(got, sound.read(box))
    assert sum(bad) == 12


def test_a_tile_outside_the_cut_end_is_still_read(tmp_path: Path) -> None:
    path = write_many_tiles(tmp_path / "a.tif", 50, 50)
    with open_image(path) as image:
        first, last = image.read((0, 0, 64, 64)), Box(49 * 64, 49 * 64, 64, 64)
        os.truncate(path, path.stat().st_size - 2500 * 4)  # into the tables
        with pytest.raises(ImageError, match="ends early") as caught:
            image.read(last)
        assert not isinstance(caught.value, ImageLost)
        np.testing.assert_array_equal(image.read((0, 0, 64, 64)), first)


@pytest.mark.parametrize(
    "options",
    [{"rowsperstrip": 1}, {"rowsperstrip": 1, "byteorder": ">"}, {"rowsperstrip": 1, "bigtiff": True, "compression": "zstd"},
     {"rowsperstrip": 2, "planarconfig": "separate"}, {"tile": (16, 16), "compression": "lzw", "bigtiff": True, "byteorder": ">"}],
)  # fmt: skip
def test_tables_that_stay_in_the_file_are_those_that_tifffile_reads(tmp_path: Path, options: dict[str, Any]) -> None:
    pixels = picture(3, 96, 2900)
    path = write_tiff(tmp_path / "a.tif", pixels, **options)
    with tifffile.TiffFile(path) as tif:
        assert len(tif.pages.first.dataoffsets) > MAX_LOADED_ENTRIES
    with TiffImage(path) as image:
        np.testing.assert_array_equal(image.read((0, 0, 96, 2900)), pixels)
        np.testing.assert_array_equal(image.read((50, 2800, 20, 20)), pixels[2800:2820, 50:70])


@pytest.mark.parametrize("suffix", ["tif", "png", "svs", "zarr"])
def test_a_file_that_is_not_there_is_lost_not_damaged(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ImageLost, match="no such file"):
        open_image(tmp_path / f"a.{suffix}")
    for reader in (TiffImage, OpenSlideImage, PillowImage):
        with pytest.raises(ImageLost, match="no such file"):
            reader(tmp_path / f"a.{suffix}")


def test_a_file_that_goes_while_it_is_open_is_lost_and_may_come_back(tmp_path: Path) -> None:
    PIL.Image.fromarray(picture()).save(tmp_path / "a.png")
    svs = {"description": "Aperio Image Library|MPP = 0.5", "compression": 33005, "compressionargs": {"level": 0}}
    write_tiff(tmp_path / "a.svs", picture(), tile=(48, 48), **svs)
    for name in ("a.png", "a.svs"):
        with open_image(tmp_path / name) as image:
            (tmp_path / name).rename(tmp_path / "elsewhere")
            with pytest.raises(ImageLost, match="no such file"):
                image.read((0, 0, 64, 64))
            (tmp_path / "elsewhere").rename(tmp_path / name)
            np.testing.assert_array_equal(image.read((0, 0, 64, 64)), picture()[:64, :64])


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.ETIMEDOUT, errno.EINVAL, errno.EACCES])
def test_what_the_system_says_tells_a_lost_file_from_a_damaged_one(tmp_path: Path, number: int) -> None:
    with pytest.raises(ImageError) as caught, faults_of(tmp_path / "a.tif", "damaged"):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value, ImageLost) is (number not in (errno.EINVAL, errno.EACCES))
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (type(again), str(again)) == (type(caught.value), str(caught.value))
    (tmp_path / "a.tif").touch()
    if number == errno.EIO:  # libraries that give only text
        with pytest.raises(ImageLost):
            check_reachable(tmp_path / "a.tif", "Couldn't read tile: Input/output error")
    check_reachable(tmp_path / "a.tif", "Corrupt JPEG data")


@pytest.mark.parametrize("maker", ["philips", "trestle", "leica"])
def test_a_makers_slide_is_read_by_its_driver_of_openslide(tmp_path: Path, maker: str) -> None:
    path, levels = (slide := write_vendors(tmp_path)[maker]).path, slide.levels
    with open_image(path) as image:
        assert isinstance(image, OpenSlideImage)
        assert openslide.OpenSlide.detect_format(path) == maker
        assert (image.mpp, image.mpp_note) == (pytest.approx(0.5), "")
        assert image.levels == tuple(Level(Size(p.shape[1], p.shape[0]), 2.0**k) for k, p in enumerate(levels))
        for level, pixels in enumerate(levels):
            for box in [Box(0, 0, *image.levels[level].size), Box(16, 10, 40, 30), Box(-5, -5, 30, 30)]:
                np.testing.assert_array_equal(image.read(box, level), padded(pixels, box))


def test_dicom_is_read_level_by_level(tmp_path: Path) -> None:
    pixels = picture(3, 192, 128)
    path, stored = write_dicom(tmp_path, [pixels, np.ascontiguousarray(pixels[::2, ::2])])
    with open_image(path) as image:
        assert isinstance(image, OpenSlideImage)
        assert (image.size, image.mpp, image.mpp_note) == ((192, 128), 0.5, "")
        assert image.levels == (Level(Size(192, 128), 1.0), Level(Size(96, 64), 2.0))
        for level, expected in enumerate(stored):
            for box in [Box(0, 0, *image.levels[level].size), Box(20, 10, 50, 50), Box(-9, 40, 64, 64)]:
                difference = np.abs(image.read(box, level).astype(int) - padded(expected, box))
                assert difference.max() <= 2  # 0 today; two JPEG decoders


def test_dicom_pixels_that_are_not_square_have_no_scale(tmp_path: Path) -> None:
    path, _ = write_dicom(tmp_path, [picture(3, 64, 64)], um=(0.25, 0.5))
    with open_image(path) as image:
        assert (image.mpp, image.mpp_note) == (
            None,
            "the file says 0.25 x 0.5 um per pixel: pixels that are not square",
        )


def test_a_strip_is_decoded_once_for_many_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiff(tmp_path / "a.tif", picture(), rowsperstrip=96, compression="zstd")
    with TiffImage(tmp_path / "a.tif") as image:
        decoded = []
        decode = image.decode_tile
        monkeypatch.setattr(
            image, "decode_tile", lambda level, tile, *rest: decoded.append(tile) or decode(level, tile, *rest)
        )
        for x in range(0, 128, 16):
            np.testing.assert_array_equal(image.read((x, 8, 16, 16)), picture()[8:24, x : x + 16])
        assert decoded == [0]


@pytest.mark.parametrize("name", ["chain.tif", "lzw-strips-3.tif", "picture-3.png", "one-strip-1.tif"])
def test_threads_read_one_image_at_a_time_and_get_what_one_thread_gets(stored: dict[str, Stored], name: str) -> None:
    file = stored[name]
    places = [Box(x, y, 30, 30) for x in range(-10, 140, 13) for y in range(-10, 90, 11)]
    with open_image(file.path) as image, ThreadPoolExecutor(8) as pool:
        for box, pixels in zip(places, pool.map(image.read, places), strict=True):
            np.testing.assert_array_equal(pixels, padded(file.levels[0], box))


def test_a_picture_is_decoded_at_the_first_read_not_at_opening(tmp_path: Path) -> None:
    PIL.Image.fromarray(picture()).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    image = open_image(tmp_path / "a.png")
    assert image.size == (144, 96)
    with pytest.raises(ImageError, match="damaged"):
        image.read((0, 0, 8, 8))


def test_what_was_read_stays_and_later_reads_are_refused_after_closing(stored: dict[str, Stored]) -> None:
    for name in ("picture-3.png", "tiles-3.tif", "one-strip-3.tif"):
        image = open_image(stored[name].path)
        pixels = image.read((0, 0, 8, 8))
        image.close()
        np.testing.assert_array_equal(pixels, picture()[:8, :8])
        with pytest.raises(ImageError):
            image.read((0, 0, 8, 8))


def test_wrong_boxes_and_levels_are_a_programs_mistake(stored: dict[str, Stored]) -> None:
    with open_image(stored["chain.tif"].path) as image:
        with pytest.raises(ValueError, match="level"):
            image.read((0, 0, 8, 8), 3)
        with pytest.raises(ValueError, match="box"):
            image.read((0, 0, 0, 8))


def test_pixels_in_memory_are_an_image_too() -> None:
    image = ArrayImage(picture(1)[..., 0], mpp=0.5)
    assert image.levels == (Level(Size(144, 96), 1.0),)
    np.testing.assert_array_equal(image.read((140, 90, 10, 10)), padded(picture(1), Box(140, 90, 10, 10)))


def test_opening_a_picture_does_not_import_openslide_or_torch(stored: dict[str, Stored]) -> None:
    for name in ("picture-3.png", "tiles-3.tif"):
        path = stored[name].path
        out = run_process("imported", "torch,openslide,tifffile", "read", path).stdout
        assert out == ("[]\n" if path.suffix == ".png" else "['tifffile']\n")


def test_readers_are_asked_highest_priority_first() -> None:
    names = [reader.__name__ for reader in readers()]
    assert names == ["TiffImage", "ZarrImage", "OpenSlideImage", "PillowImage"]


@pytest.mark.parametrize("bits", [None, 12])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_a_picture_of_16_bits_in_memory_gives_the_pixels_of_its_file(
    tmp_path: Path, bits: int | None, order: str
) -> None:
    largest = 2 ** (bits or 16) - 1
    values = np.random.default_rng(0).integers(0, largest, (40, 30), endpoint=True).astype(np.uint16)
    values[0, 0] = largest
    PIL.Image.fromarray(values).save(tmp_path / "deep.png")
    with open_image(tmp_path / "deep.png", bits) as file:
        expected = file.read((0, 0, 30, 40))
    assert (expected.min(), expected.max()) == (0, 255)
    with PIL.Image.open(tmp_path / "deep.png") as picture:
        assert picture.mode == "I;16"
        np.testing.assert_array_equal(image_in_memory(picture, bits).read((0, 0, 30, 40)), expected)
    mode = "I;16" if order == "<u2" else "I;16B"
    made = PIL.Image.frombytes(mode, (30, 40), values.astype(order).tobytes())
    np.testing.assert_array_equal(image_in_memory(made, bits).read((0, 0, 30, 40)), expected)


def test_bits_in_use_of_a_picture_in_memory_are_asked_for_as_of_a_file(tmp_path: Path) -> None:
    values = np.full((40, 30), 3000, np.uint16)
    PIL.Image.fromarray(values).save(path := tmp_path / "deep.png")
    with PIL.Image.open(path) as picture:
        with pytest.raises(BitsUnknown) as of_picture:
            image_in_memory(picture)
        with pytest.raises(BitsUnknown) as of_file:
            open_image(path)
        assert str(of_picture.value) == str(of_file.value)
        with pytest.raises(ImageError, match=r"deep\.png: holds a value of 3,000, .*Correct --patch\.bits"):
            image_in_memory(picture, 10)
    with pytest.raises(ImageError, match=r"grey values of the kind F; save it with 8 bits, or as a 16-bit PNG or TIFF"):
        image_in_memory(PIL.Image.new("F", (20, 20)))
