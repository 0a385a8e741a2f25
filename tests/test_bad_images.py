"""Broken, mislabelled and hostile files: one clear line that names the file, never another exception, never a wait."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from make_dicom import write_dicom
from make_images import picture, png, write_broken, write_pictures, write_pyramids, write_tiff, write_tiffs
from processes import run_process

from keyhole.errors import ConfigError, ImageError
from keyhole.images import open_image
from keyhole.images.image import readers
from keyhole.images.openslide import OpenSlideImage

BROKEN = {
    "empty.png": "empty",
    "empty.tif": "empty",
    "text.png": r"holds text \('this is a list.*named \.png",
    "text.svs": "holds text",
    "page.jpg": "web page",
    "random.tif": "unknown kind",
    "pointer.tif": "Git LFS",
    "head-only.png": "PNG data but its header is damaged",
    "cut.png": "damaged",
    "cut.jpg": "truncated",
    "cut.bmp": "truncated",
    "cut.tif": r"the file ends early \(45\.\d of 46\.\d kB or more\)",
    "head-only.tif": "ends early",
    "flipped.png": "checksum",
    "flipped-header.png": "header is damaged",
    "flipped-header.jpg": "damaged",
    "flipped-header.tif": "ends early",
    "no-page.tif": "without a page",
    "float.tif": "floating point of 32 bits",
    "channels.ome.tif": "3 channels",
    "lying-tile.tif": r"holds a picture of \(2048, 2048\)",
    "long-loop.tif": "form a loop",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_broken(tmp_path_factory.mktemp("broken"))


def refusal(path: Path) -> str:
    """The one line that opening and reading `path` ends with."""
    with pytest.raises(ImageError) as caught, open_image(path) as image:
        image.read((0, 0, *image.size))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    return message


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_end_in_one_line_that_says_what_is_wrong(broken: dict[str, Path], name: str) -> None:
    with pytest.raises(ImageError, match=BROKEN[name]):
        raise ImageError("", refusal(broken[name]))


def test_the_table_is_complete(broken: dict[str, Path]) -> None:
    assert set(broken) == set(BROKEN)


@pytest.mark.parametrize("name", ["nowhere.png", "no/such/folder.tif", "x" * 300 + ".png", "nul\0.png"])
def test_missing_files_and_impossible_names(tmp_path: Path, name: str) -> None:
    assert ("no such file" in refusal(tmp_path / name)) == name.startswith("no")


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    for name in ("images", "slide.mrxs", "a.tif"):
        (tmp_path / name).mkdir()
        assert "a folder" in refusal(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert "not a regular file" in refusal(tmp_path / "a.png")
    assert "not a regular file" in refusal(Path(os.devnull))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture())
    path.chmod(0)
    assert "permission" in refusal(path)


def test_a_file_that_loses_its_end_after_opening(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(), tile=(32, 32))
    with open_image(path) as image:
        os.truncate(path, path.stat().st_size // 2)
        image.read((0, 0, 32, 32))
        with pytest.raises(ImageError, match="ends early"):
            image.read((112, 64, 32, 32))


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000)])
def test_pictures_over_the_limit_are_refused_with_the_way_to_convert_them(
    tmp_path: Path, width: int, height: int
) -> None:
    (tmp_path / "huge scan.png").write_bytes(png(width, height, 8, 2))
    message = refusal(tmp_path / "huge scan.png")
    assert f"{width * height:,} pixels" in message
    assert f"{PIL.Image.MAX_IMAGE_PIXELS:,}" in message
    assert "vips tiffsave" in message
    assert "--tile --pyramid" in message


def test_a_picture_of_just_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIL.Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 144 * 96)
    with open_image(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(image.read((0, 0, 144, 96)), picture())
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 144 * 96 - 1)
    assert "13,824 pixels" in refusal(tmp_path / "a.png")


def test_animations_are_refused(tmp_path: Path) -> None:
    frames = [PIL.Image.fromarray(picture(seed=k)) for k in range(3)]
    for suffix in ("gif", "png", "webp"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert "animation" in refusal(tmp_path / f"a.{suffix}")


def in_a_process_that_may_die(path: Path) -> list[str]:
    """The refusals by `open_image` and by OpenSlideImage, under limits of memory and time."""
    done = run_process("refused_image", path, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(("name", "problem"), [("page_loop.tif", "form a loop"), ("giant_tile.tif", "65,520 x 65,520")])
def test_the_hostile_files_are_refused_before_they_cost_anything(shared: Path, name: str, problem: str) -> None:
    path = shared / "data" / "hostile" / name
    lines = in_a_process_that_may_die(path)
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"{path}: ")
        assert problem in line


def test_a_strip_of_gigabytes_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(1)[..., 0], rowsperstrip=96, compression="deflate")
    with tifffile.TiffFile(path, mode="r+") as tif:
        for tag in (256, 257, 278):  # ImageWidth, ImageLength, RowsPerStrip
            tif.pages.first.tags[tag].overwrite(60_000)
    for line in in_a_process_that_may_die(path):
        assert "60,000 x 60,000" in line
        assert "vips tiffsave" in line


def test_a_tile_of_gigabytes_in_dicom_is_refused(tmp_path: Path) -> None:
    path, _ = write_dicom(tmp_path, [picture(3, 32, 32)], declared=30_000)
    for line in in_a_process_that_may_die(path):
        assert "30,000 x 30,000" in line


def test_a_truncated_slide_is_refused_by_openslide_too(broken: dict[str, Path]) -> None:
    with pytest.raises(ImageError, match="ends early"):
        OpenSlideImage(broken["cut.tif"])


def test_a_file_that_only_looks_like_a_slide(tmp_path: Path) -> None:
    (tmp_path / "a.mrxs").write_bytes(b"\0" * 500)
    assert "not a slide" in refusal(tmp_path / "a.mrxs")


def test_a_reader_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, value = "zarr", "missing_package:ZarrImage"

        def load(self) -> None:
            raise ModuleNotFoundError("No module named 'missing_package'")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Broken()])
    readers.cache_clear()
    try:
        PIL.Image.fromarray(picture()).save(tmp_path / "a.png")
        with pytest.raises(ConfigError, match=r"reader zarr .*missing_package.*Reinstall"):
            open_image(tmp_path / "a.png")
    finally:
        monkeypatch.undo()
        readers.cache_clear()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` cut short, or with a few bytes changed: half of the time near its start, where the structure is."""
    if rng.integers(4) == 0:
        return data[: rng.integers(1, len(data))]
    changed = bytearray(data)
    region = min(len(data), 400) if rng.integers(2) else len(data)
    for at in rng.integers(region, size=rng.integers(1, 6)):
        changed[at] = rng.choice([0, 1, 127, 128, 255, changed[at] ^ (1 << rng.integers(8))])
    return bytes(changed)


def outcome(path: Path) -> str:
    """Empty where the file can be opened and read at all levels, else the refusal."""
    try:
        with open_image(path) as image:
            for level, (size, _) in enumerate(image.levels):
                image.read((0, 0, min(size.width, 500), min(size.height, 500)), level)
    except ImageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_read_or_refused_but_nothing_else(tmp_path: Path, seed: int) -> None:
    files = [file.path for write in (write_pictures, write_tiffs, write_pyramids) for file in write(tmp_path).values()]
    PIL.Image.fromarray(picture()).save(tmp_path / "a.jpg")
    PIL.Image.fromarray(picture()).save(tmp_path / "jpeg.tif", compression="jpeg")
    files += [tmp_path / "a.jpg", tmp_path / "jpeg.tif"]
    rng = np.random.default_rng(seed)
    refused = 0
    for round_ in range(100):
        source = files[rng.integers(len(files))]
        path = tmp_path / f"damaged-{round_}{source.suffix}"
        path.write_bytes(damaged(source.read_bytes(), rng))
        message = outcome(path)
        refused += message != ""
        assert message == "" or message.startswith(f"{path}: ")
        assert "\n" not in message
    assert 20 < refused < 100
