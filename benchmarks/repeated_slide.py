"""A slide of any size in seconds: a TIFF whose places for tiles refer to a thousand JPEG tiles, again and again.

    python benchmarks/repeated_slide.py FILE [--side 128000]

To read it is as much work as to read any slide of its size: every place of the grid is read and decoded for itself,
and nothing keeps decoded tiles of an aligned grid. What it lacks is bytes: some 16 MB stay in the system's page cache,
where a file of 4 GB would be read from a disk the first time.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
from pathlib import Path

import numpy as np
import tifffile

from keyhole.datasets.slides import make_slide

TILE = 256
SOURCE = 8192
"""Side of the slide that the tiles are taken from: 1,024 of them."""
SHORT, LONG, LONG8 = 3, 4, 16
CODES = {SHORT: "H", LONG: "I", LONG8: "Q"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--side", type=int, default=128_000, help="pixels; a multiple of 256")
    options = parser.parse_args()
    print(write_repeated(options.file, options.side))


def write_repeated(path: Path, side: int, source: int = SOURCE) -> Path:
    """Write a square slide of generated tissue without glass, of one level; does nothing where `path` exists.

    Args:
        path: of the file.
        side: pixels, a multiple of 256.
        source: side of the slide whose tiles are repeated.
    """
    if path.exists():
        return path
    if side % TILE:
        raise ValueError(f"side (={side}) must be a multiple of {TILE}")
    tiles = tissue_tiles(source)
    part = path.with_suffix(".part")  # so that a process that is stopped leaves no half of a slide
    with part.open("wb") as file:
        file.write(bytes(16))
        offsets = []
        for tile in tiles:
            offsets.append(file.tell())
            file.write(tile)
        places = np.arange((side // TILE) ** 2) % len(tiles)
        directory = _align(file.tell())
        file.seek(directory)
        file.write(
            _directory(
                directory, side, np.array(offsets, "<u8")[places], np.array([len(t) for t in tiles], "<u4")[places]
            )
        )
        file.seek(0)
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, directory))  # a BigTIFF
    return part.replace(path)


def tissue_tiles(source: int = SOURCE) -> list[bytes]:
    """The JPEG tiles of 256 px of a generated slide, in raster order."""
    with tempfile.TemporaryDirectory() as scratch:
        slide = make_slide(Path(scratch) / "source.tif", source, 0, tissue=1.0, positive=True).path
        with tifffile.TiffFile(slide) as tif, slide.open("rb") as file:
            page = tif.pages.first
            assert isinstance(page, tifffile.TiffPage)
            tiles = []
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                file.seek(offset)
                tiles.append(file.read(count))
    return tiles


def _directory(start: int, side: int, offsets: np.ndarray, counts: np.ndarray) -> bytes:
    """The tags of a page of JPEG tiles in YCbCr with colours at half the resolution, which begins at `start`."""
    tags: list[tuple[int, int, list[int] | np.ndarray]] = [
        (256, LONG, [side]),
        (257, LONG, [side]),
        (258, SHORT, [8, 8, 8]),
        (259, SHORT, [7]),  # JPEG
        (262, SHORT, [6]),  # YCbCr
        (277, SHORT, [3]),
        (284, SHORT, [1]),
        (322, SHORT, [TILE]),
        (323, SHORT, [TILE]),
        (324, LONG8, offsets),
        (325, LONG, counts),
        (530, SHORT, [2, 2]),
    ]
    head, tail = struct.pack("<Q", len(tags)), b""
    behind = start + len(head) + 20 * len(tags) + 8
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{CODES[kind]}", *np.asarray(values).tolist())
        if len(packed) <= 8:
            place = packed.ljust(8, b"\0")
        else:
            place = struct.pack("<Q", behind + len(tail))
            tail += packed.ljust(_align(len(packed)), b"\0")
        head += struct.pack("<HHQ", tag, kind, len(values)) + place
    return head + bytes(8) + tail


def _align(at: int) -> int:
    return -(-at // 8) * 8


if __name__ == "__main__":
    main()
