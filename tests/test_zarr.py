"""OME-Zarr: real stores of zarr v2 and v3, written by zarr itself, give the pixels and metadata of the picture."""

from __future__ import annotations

import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from make_images import picture, pyramid, whole, write_pyramids
from make_zarr import ORDERS, scale_step, write_array, write_multiscale
from processes import run_process
from test_bad_images import damaged, outcome, refusal
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from keyhole.errors import ImageError, ImageLost
from keyhole.images import Box, Image, open_image
from keyhole.images.zarr import ZarrImage

LEVELS = pyramid(picture())


def failure(image: Image, box: Box) -> ImageError:
    with pytest.raises(ImageError) as caught:
        image.read(box)
    return caught.value


V2: dict[str, Any] = {
    "blosc": numcodecs.Blosc("lz4", 5, numcodecs.Blosc.BITSHUFFLE), "zlib": numcodecs.Zlib(1), "gzip": numcodecs.GZip(1),
    "zstd": numcodecs.Zstd(1), "lz4": numcodecs.LZ4(), "bz2": numcodecs.BZ2(1), "none": None,
}  # fmt: skip
V3: dict[str, Any] = {
    "blosc": BloscCodec(cname="zstd", typesize=1), "zstd": ZstdCodec(), "zstd-sums": ZstdCodec(checksum=True),
    "gzip": GzipCodec(), "none": None, "sums-inside": [Crc32cCodec(), ZstdCodec()], "sums-outside": [ZstdCodec(), Crc32cCodec()],
}  # fmt: skip
STORES: dict[str, dict[str, Any]] = {
    **{f"v2-{name}": {"version": 2, "compressors": codec} for name, codec in V2.items()},
    **{f"v3-{name}": {"version": 3, "compressors": codec} for name, codec in V3.items()},
    "v2-dots": {"version": 2, "separator": "."},
    "v3-v2-keys": {"version": 3, "key": {"name": "v2", "separator": "/"}},
    "v3-shards": {"version": 3, "shards": 64},
    "v3-shards-of-one": {"version": 3, "shards": 32, "compressors": GzipCodec()},
    "v3-shards-plain": {"version": 3, "shards": 96, "compressors": None},
    **{f"v{version}-{axes}": {"version": version, "axes": axes} for axes in ORDERS for version in (2, 3)},
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("zarr")
    return {name: write_multiscale(folder / f"{name}.ome.zarr", LEVELS, **options) for name, options in STORES.items()}


boxes = st.builds(Box, st.integers(-20, 150), st.integers(-20, 100), st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=6, deadline=None)
@given(box=boxes)
def test_every_store_gives_the_pixels_of_the_tiff_in_any_box(
    stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, box: Box
) -> None:
    with open_image(write_pyramids(tmp_path_factory.mktemp("tiff"))["pyramid.ome.tif"].path) as tiff:
        for name, path in stores.items():
            with open_image(path) as image:
                assert isinstance(image, ZarrImage)
                assert (image.size, image.levels, image.channels) == (tiff.size, tiff.levels, 3)
                assert (image.mpp, image.mpp_note) == (tiff.mpp, "")
                for level in range(3):
                    np.testing.assert_array_equal(image.read(box, level), tiff.read(box, level), err_msg=name)


@pytest.mark.parametrize("version", [2, 3])
def test_grey_and_sixteen_bits(tmp_path: Path, version: int) -> None:
    grey, deep = picture(1), np.random.default_rng(0).integers(0, 2**16, (96, 144, 3)).astype(np.uint16)
    write_multiscale(tmp_path / "grey.zarr", [grey], version, axes="yx")
    write_multiscale(tmp_path / "deep.zarr", [deep], version, axes="czyx")
    np.testing.assert_array_equal(whole(tmp_path / "grey.zarr"), grey)
    np.testing.assert_array_equal(whole(tmp_path / "deep.zarr"), np.round(deep / 257))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("axes", "names"), [("yx", None), ("yxc", None), ("cyx", None), ("xy", ["x", "y"])])
def test_an_array_by_itself_is_an_image(tmp_path: Path, version: int, axes: str, names: list[str] | None) -> None:
    pixels = picture(3 if "c" in axes else 1)
    write_array(tmp_path / "a.zarr", pixels, version, axes, names=names)
    with open_image(tmp_path / "a.zarr") as image:
        assert (len(image.levels), image.mpp, image.mpp_note) == (1, None, "")
        np.testing.assert_array_equal(image.read((0, 0, 144, 96)), pixels)


def test_an_array_of_doubtful_axes_is_not_guessed_at(tmp_path: Path) -> None:
    write_array(tmp_path / "a.zarr", np.zeros((3, 20, 3), np.uint8), 3, "yxc")
    assert "does not name its axes" in refusal(tmp_path / "a.zarr")


@pytest.mark.parametrize("version", [2, 3])
def test_of_a_bioformats2raw_folder_the_first_series_is_read(tmp_path: Path, version: int) -> None:
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version)
    marks = {"bioformats2raw.layout": 3}
    root.attrs.update(marks if version == 2 else {"ome": {"version": "0.5", **marks}})
    write_multiscale(tmp_path / "a.zarr" / "0", LEVELS, version)
    write_multiscale(tmp_path / "a.zarr" / "1", [picture(seed=1)], version)
    np.testing.assert_array_equal(whole(tmp_path / "a.zarr", 1), LEVELS[1])
    np.testing.assert_array_equal(whole(tmp_path / "a.zarr" / "1"), picture(seed=1))
    named = root.create_group("OME")
    named.attrs.update({"series": ["1", "0"]} if version == 2 else {"ome": {"series": ["1", "0"]}})
    np.testing.assert_array_equal(whole(tmp_path / "a.zarr"), picture(seed=1))


@pytest.mark.parametrize(
    ("axes", "unit", "scale", "mpp", "note"),
    [("yx", "micrometer", (0.5, 0.5), 0.5, ""), ("yx", "nanometer", (250, 250), 0.25, ""), ("yx", "millimeter", (1e-3, 1e-3), 1.0, ""),
     ("yx", None, (0.5, 0.5), None, "gives 0.5 as the size of a pixel, without a unit"),
     ("yx", "furlong", (0.5, 0.5), None, "'furlong', which is not a unit of length"),
     ("yx", "micrometer", (0.5, 0.25), None, "says 0.25 x 0.5 um per pixel: pixels that are not square"),
     ("yx", "micrometer", (0.501, 0.5), 0.5, ""), ("yx", "meter", (0.5, 0.5), None, "5e+05 um per pixel, outside 0.02 ... 100"),
     ("yx", "micrometer", None, None, "")],
)  # fmt: skip
@pytest.mark.parametrize("version", [2, 3])
def test_the_scale_needs_a_unit_and_square_pixels(
    tmp_path: Path, version: int, axes: str, unit: str | None, scale: Any, mpp: float | None, note: str
) -> None:
    write_multiscale(tmp_path / "a.zarr", [picture(1)], version, axes=axes, unit=unit, scale=scale)
    with open_image(tmp_path / "a.zarr") as image:
        assert image.mpp == (mpp if mpp is None else pytest.approx(mpp, rel=0.01))
        assert note in image.mpp_note
        assert (image.mpp_note == "") == (note == "")


def test_a_scale_for_all_levels_multiplies_that_of_each(tmp_path: Path) -> None:
    write_multiscale(tmp_path / "a.zarr", LEVELS, 3, all_levels=[scale_step("cyx", (2.0, 2.0))])
    with open_image(tmp_path / "a.zarr") as image:
        assert image.mpp == 0.5


def test_levels_of_another_factor_in_x_than_in_y_are_no_levels(tmp_path: Path) -> None:
    odd = picture()[::2, ::4]
    write_multiscale(tmp_path / "a.zarr", [LEVELS[0], LEVELS[1], odd, LEVELS[2]], 3)
    with open_image(tmp_path / "a.zarr") as image:
        assert [level.size for level in image.levels] == [(144, 96), (72, 48), (36, 24)]
        np.testing.assert_array_equal(image.read((0, 0, 36, 24), 2), LEVELS[2])


def test_only_the_chunks_that_a_box_touches_are_read(stores: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(stores["v2-cyx"], tmp_path / "a.zarr"))
    for chunk in (path / "0").rglob("*"):
        if (
            chunk.is_file()
            and not chunk.name.startswith(".")
            and chunk.relative_to(path / "0").parts != ("0", "1", "1")
        ):
            chunk.write_bytes(b"damaged")
    with open_image(path) as image:
        np.testing.assert_array_equal(image.read((32, 32, 32, 32)), picture()[32:64, 32:64])


@pytest.mark.parametrize("name", ["v2-blosc", "v2-zlib", "v2-zstd", "v2-none", "v3-zstd", "v3-gzip", "v3-shards"])
@pytest.mark.parametrize("harm", ["overwritten", "cut"])
def test_a_damaged_chunk_is_an_error_of_its_box_and_of_no_other(
    stores: dict[str, Path], tmp_path: Path, name: str, harm: str
) -> None:
    path = Path(shutil.copytree(stores[name], tmp_path / "a.zarr"))
    chunk = path / "0" / ("0/1/1" if name.startswith("v2") else "c/0/1/1")
    data = chunk.read_bytes()
    chunk.write_bytes(b"\xff" * len(data) if harm == "overwritten" else data[: len(data) // 2])
    side = 64 if "shards" in name else 32
    if harm == "overwritten" and name == "v2-none":
        pytest.skip("bytes without structure decode to anything")
    bad = Box(side, side, 32, 32)
    with open_image(path) as image, ThreadPoolExecutor(8) as pool:
        sound = [Box(x, y, 16, 16) for x in range(0, 128, 16) for y in range(0, 96, 16)
                 if not (side <= x < 2 * side and side <= y < 2 * side)]  # fmt: skip
        failing = pool.submit(lambda: [failure(image, bad) for _ in range(20)])
        for box, pixels in zip(sound, pool.map(image.read, sound), strict=True):
            np.testing.assert_array_equal(pixels, picture()[box.y : box.y + 16, box.x : box.x + 16])
        for error in failing.result():
            assert f"damaged at {tuple(bad)} of level 0" in str(error)
            assert "\n" not in str(error)
            assert not isinstance(error, ImageLost)


@pytest.mark.parametrize("name", ["v2-blosc", "v3-zstd"])
def test_a_chunk_that_is_not_there_reads_as_the_fill_value_and_a_folder_that_is_gone_is_lost(
    stores: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path = Path(shutil.copytree(stores[name], tmp_path / "a.zarr"))
    (path / "0" / ("0/1/1" if name.startswith("v2") else "c/0/1/1")).unlink()
    image = open_image(path)
    np.testing.assert_array_equal(image.read((32, 32, 32, 32)), np.full((32, 32, 3), 255, np.uint8))
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(ImageLost, match="no such file"):
        image.read((0, 0, 32, 32))
    (tmp_path / "elsewhere").rename(path)
    np.testing.assert_array_equal(image.read((0, 0, 32, 32)), picture()[:32, :32])
    image.close()
    with pytest.raises(ImageError, match="closed"):
        image.read((0, 0, 8, 8))


def test_a_large_chunk_is_decoded_once_for_many_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.tile(picture(3, 600, 600), (2, 2, 1))
    write_multiscale(tmp_path / "a.zarr", [pixels], 3, chunk=600)
    with ZarrImage(tmp_path / "a.zarr") as image, ThreadPoolExecutor(4) as pool:
        decoded = []
        decode = image.decode_tile
        monkeypatch.setattr(
            image, "decode_tile", lambda level, tile, *rest: decoded.append(tile) or decode(level, tile, *rest)
        )
        places = [Box(x, y, 100, 100) for y in (50, 550) for x in range(0, 1100, 50)]
        for box, patch in zip(places, pool.map(image.read, places), strict=True):
            np.testing.assert_array_equal(patch, pixels[box.y : box.y + 100, box.x : box.x + 100])
        assert len(decoded) == 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "4 channels": ({"levels": [np.zeros((20, 20, 4), np.uint8)]}, "4 channels; one or RGB"),
    "stack": ({"axes": "zyx", "levels": [np.zeros((20, 20, 1), np.uint8)], "depth": 5}, r"stack of pictures \(5 along z\)"),
    "float": ({"levels": [np.zeros((20, 20, 3), np.float32)]}, "float32 are not read"),
    "signed": ({"levels": [np.zeros((20, 20, 3), np.int8)]}, "int8 are not read"),
    "no x": ({"axes": "cyw"}, "expected y and x"),
    "stains": ({"omero": {"channels": [{"color": c} for c in ("0000FF", "00FF00", "FF00FF")]}}, "not red, green and blue"),
    "upside down": ({"levels": list(reversed(LEVELS))}, "first level is not its largest"),
}  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_picture_is_refused_with_what_to_do(tmp_path: Path, version: int, name: str) -> None:
    options, message = REFUSED[name]
    write_multiscale(tmp_path / "a.zarr", version=version, **{"levels": LEVELS, **options})
    with pytest.raises(ImageError, match=message):
        raise ImageError("", refusal(tmp_path / "a.zarr"))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({"plate": {"wells": []}}, "a plate"), ({"well": {"images": []}}, "a plate"), ({}, "without `multiscales`"),
     ({"labels": ["a"]}, "without `multiscales`"), ({"multiscales": []}, "without `multiscales`"),
     ({"multiscales": [{"datasets": [{"path": "9"}], "axes": ["y", "x"]}]}, "damaged zarr metadata"),
     ({"multiscales": [{"datasets": []}]}, "names no arrays"), ({"multiscales": 3}, "damaged zarr metadata"),
     ({"bioformats2raw.layout": 3}, "damaged zarr metadata"), ({"image-label": {}, "multiscales": [{}]}, "a label image")],
)  # fmt: skip
@pytest.mark.parametrize("version", [2, 3])
def test_other_groups_are_refused(tmp_path: Path, version: int, attributes: dict[str, Any], message: str) -> None:
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version)
    root.attrs.update(attributes if version == 2 else {"ome": {"version": "0.5", **attributes}})
    assert message in refusal(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"zarr_format": 9}', b'{"zarr_format": 3, "node_type": "array"}', b"\0" * 9]
)
@pytest.mark.parametrize("name", ["zarr.json", ".zgroup", ".zarray"])
def test_broken_metadata_ends_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / name).write_bytes(content)
    refusal(tmp_path / "a.zarr")


def test_a_folder_without_zarr_and_a_zipped_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    assert "a folder" in refusal(tmp_path / "a.zarr")
    shutil.make_archive(str(tmp_path / "b.zarr"), "zip", tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "zarr.json").write_text("{}")
    shutil.make_archive(str(tmp_path / "b.zarr"), "zip", tmp_path / "a.zarr")
    assert "unpack" in refusal(tmp_path / "b.zarr.zip")


def one_chunk_of(path: Path, version: int, side: int, **options: Any) -> Path:
    """A store that declares one chunk of `side` x `side`, and holds nothing."""
    zarr.create_array(path, shape=(side, side), chunks=(side, side), dtype="u1", zarr_format=version, **options)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_of_gigabytes_is_refused(tmp_path: Path, version: int) -> None:
    assert "32,768 x 32,768" in refusal(one_chunk_of(tmp_path / "a.zarr", version, 32768))
    small = one_chunk_of(tmp_path / "b.zarr", version, 64)
    metadata = small / (".zarray" if version == 2 else "zarr.json")
    metadata.write_text(metadata.read_text().replace("64", "100000"))
    assert "100,000 x 100,000" in refusal(small)


ENCODERS: dict[str, Any] = {
    "gzip": numcodecs.GZip(1), "zlib": numcodecs.Zlib(1), "bz2": numcodecs.BZ2(1), "zstd": numcodecs.Zstd(1),
    "lz4": numcodecs.LZ4(), "blosc": numcodecs.Blosc("zstd", 1),
}  # fmt: skip


def bomb(name: str, size: int) -> bytes:
    """An encoded chunk that inflates to `size` bytes of zeros."""
    return bytes(ENCODERS[name].encode(np.zeros(size, np.uint8)))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_chunk_that_inflates_beyond_its_size_is_refused(tmp_path: Path, name: str) -> None:
    path = write_array(tmp_path / "a.zarr", picture(1, 64, 64), 2, "yx", chunk=64, compressors=ENCODERS[name])
    whole(path)
    for size in (2**12 + 1, 2**20):
        (path / "0" / "0").write_bytes(bomb(name, size))
        assert "a chunk " in refusal(path)


def test_zstd_frames_that_state_gigabytes_or_no_size_are_refused(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.zarr", picture(1, 64, 64), 2, "yx", chunk=64, compressors=numcodecs.Zstd(1))
    gigabytes = bytes.fromhex("28b52ffdc000") + (2**40).to_bytes(8, "little") + b"\1\0\0"
    block = ((1 << 1) + (2**17 << 3)).to_bytes(
        3, "little"
    ) + b"\0"  # one byte, repeated; then the same as the last block
    unstated = bytes.fromhex("28b52ffd0058") + block * 63 + (1 + (1 << 1) + (2**17 << 3)).to_bytes(3, "little") + b"\0"
    for data in (gigabytes, unstated):
        (path / "0" / "0").write_bytes(data)
        assert "does not decode to its 4,096 bytes" in refusal(path)


@pytest.mark.parametrize("name", ["gzip", "zstd", "shard", "whole shard"])
def test_such_a_chunk_costs_no_memory(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"compressors": GzipCodec() if name == "gzip" else ZstdCodec()}
    if "shard" in name:
        options["shards"] = (64, 128) if name == "shard" else (64, 64)
    array = zarr.create_array(tmp_path / "a.zarr", shape=(64, 128), chunks=(64, 64), dtype="u1", **options)
    array[:] = 7
    data = bomb("gzip" if name == "gzip" else "zstd", 2**28)
    file = tmp_path / "a.zarr" / "c" / "0" / "0"
    if "shard" in name:
        places = [0, len(data)] if name == "whole shard" else [0, len(data), 2**64 - 1, 2**64 - 1]
        index = struct.pack(f"<{len(places)}Q", *places)
        data += index + bytes(numcodecs.CRC32C().encode(index)[-4:])
    file.write_bytes(data)
    done = run_process("bounded_read", tmp_path / "a.zarr", timeout=60)
    assert "does not decode to its 4,096 bytes" in done.stdout


def test_a_codec_without_a_bound_is_refused(tmp_path: Path) -> None:
    write_multiscale(tmp_path / "a.zarr", LEVELS, 2, compressors=numcodecs.LZMA())
    assert "codec lzma" in refusal(tmp_path / "a.zarr")
    path = write_multiscale(tmp_path / "b.zarr", [picture(1)], 2, axes="yx", compressors=None)
    metadata = json.loads((path / "0" / ".zarray").read_text())
    metadata["filters"] = [{"id": "delta", "dtype": "|u1"}]
    (path / "0" / ".zarray").write_text(json.dumps(metadata))
    assert "filter delta" in refusal(path)


def test_reading_does_not_import_zarr_with_its_event_loop(stores: dict[str, Path]) -> None:
    assert run_process("imported", "zarr,asyncio", "read", stores["v2-blosc"]).stdout == "[]\n"


@pytest.mark.parametrize("name", ["v2-blosc", "v2-zlib", "v2-lz4", "v3-zstd", "v3-shards"])
def test_damage_anywhere_is_read_or_refused_but_nothing_else(
    stores: dict[str, Path], tmp_path: Path, name: str
) -> None:
    rng, refused = np.random.default_rng(0), 0
    for number in range(25):
        path = Path(shutil.copytree(stores[name], tmp_path / f"{number}.zarr"))
        files = sorted(file for file in path.rglob("*") if file.is_file())
        metadata = [file for file in files if file.name.startswith((".", "zarr"))]
        file = (metadata if rng.integers(2) else files)[rng.integers(len(metadata))]
        file.write_bytes(damaged(file.read_bytes(), rng))
        message = outcome(path)
        refused += message != ""
        assert message == "" or message.startswith(f"{path}: ")
        assert "\n" not in message
    assert refused > 5
