"""Patches read from files, beside what their decoder alone reaches and beside OpenSlide.

    python benchmarks/reading.py [--side 20480] [--rounds 5] [--quick] [--folder DIR] [--only JPEG,Zstd]

Writes a JPEG pyramid of generated tissue, cuts a square out of it into TIFF and OME-Zarr of other codecs, and reads
patches of one tile through `keyhole.loading.Reader`: the grid laid on the tiles (aligned), half a tile beside them
(unaligned), and with patches that overlap by half. The floor is the codec of the format decoding the same tiles into
memory that is used again and again, bytes read by their offsets, by as many threads. All pieces take turns; medians.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from machine import cores, write_result

from keyhole.datasets.slides import make_slide
from keyhole.images import open_image
from keyhole.loading import Reader
from keyhole.patches.opener import FileOpener

TILE = 256
CHUNK = 64
OPENSLIDE_PATCHES = 100
"""Patches of one measurement of OpenSlide, which takes a millisecond for each."""
SLIDE = Path(__file__).parents[2] / "shared" / "data" / "slides" / "CMU-1-Small-Region.svs"
CODECS: dict[str, dict[str, Any]] = {
    "JPEG 2000": {"compression": "jpeg2000", "compressionargs": {"level": 40}},
    "Deflate": {"compression": "deflate"},
    "Zstd": {"compression": "zstd"},
}

Work = Callable[[int], int]
"""(threads) -> patches or tiles done."""


@dataclass(frozen=True)
class Stored:
    """A file of tiles: how large they are, and how to decode some of them."""

    name: str
    path: Path
    tile: int
    tiles: int
    decode: Callable[[range], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=20_480, help="of the JPEG pyramid; other codecs take half of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are written and stay")
    parser.add_argument("--only", default="", help="names of formats, by commas")
    parser.add_argument("--quick", action="store_true", help="2048 pixels, three rounds")
    options = parser.parse_args()
    if options.quick:
        options.side, options.rounds = 2048, 3
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = [file for file in write_files(folder, options.side) if not options.only or file.name in options.only]
        lines = [line for file in files for line in compare(file, options.rounds)]
        scaling = [line for file in files if file.name == "JPEG" for line in scale(file, options.rounds)]
    text = report(options, lines, scaling)
    print("\n".join(text))
    if options.quick or options.only:
        print("no result written: --quick and --only are for looking")
    else:
        print(write_result("reading", "Reading patches from files", text))


# --- files -----------------------------------------------------------------------------------------------------------


def write_files(folder: Path, side: int) -> list[Stored]:
    """The same picture in every format; the real slide where it is at hand."""
    jpeg = folder / f"jpeg-{side}.tif"
    if not jpeg.exists():
        make_slide(jpeg, side, 0, tissue=1.0, positive=True)
    with open_image(jpeg) as image:
        pixels = image.read((0, 0, side // 2, side // 2))
    files = [tiff("JPEG", jpeg)]
    for name, codec in CODECS.items():
        path = folder / f"{name.replace(' ', '-').lower()}-{side}.tif"
        part = pixels[: side // 4, : side // 4] if name == "JPEG 2000" else pixels
        if not path.exists():
            tifffile.imwrite(path, part, tile=(TILE, TILE), photometric="rgb", metadata=None, **codec)
        files.append(tiff(name, path))
    files.append(ome_zarr(folder / f"zstd-{side}.zarr", pixels))
    return files + ([tiff("CMU-1-Small-Region.svs", SLIDE)] if SLIDE.exists() else [])


def tiff(name: str, path: Path) -> Stored:
    """A tiled TIFF, whose tiles are decoded by their codec as it is."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        assert isinstance(page, tifffile.TiffPage)
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        side, kind, tables = page.tilewidth, int(page.compression), page.jpegtables
        jpeg: dict[str, Any] = {"tables": tables, "outcolorspace": 2}
        if page.photometric == 2 and not page.is_jfif:
            jpeg["colorspace"] = 2
    file = path.open("rb")

    def decode(tiles: range) -> None:
        out = np.empty((CHUNK, side, side, 3), np.uint8)
        for number in tiles:
            offset, count = places[number % len(places)]
            data = os.pread(file.fileno(), count, offset)
            row = out[number % CHUNK]
            if kind == 7:
                imagecodecs.jpeg8_decode(data, out=row, **jpeg)
            elif kind in (8, 32946):
                imagecodecs.deflate_decode(data, out=row.nbytes)
            elif kind == 50000:
                imagecodecs.zstd_decode(data, out=row.nbytes)
            elif kind == 34712:
                imagecodecs.jpeg2k_decode(data)
            else:
                raise ValueError(f"{path.name}: no floor for compression {kind}")

    if kind == 7:
        return Stored(name, path, side, len(places), fastest_jpeg(decode, places, file, tables, side))
    return Stored(name, path, side, len(places), decode)


def fastest_jpeg(
    decode: Callable[[range], None], places: list[tuple[int, int]], file: Any, tables: bytes | None, side: int
) -> Callable[[range], None]:
    """imagecodecs' libjpeg-turbo, or simplejpeg's where that is installed and faster."""
    try:
        import simplejpeg
    except ImportError:
        return decode

    def by_simplejpeg(tiles: range) -> None:
        out = np.empty((CHUNK, side, side, 3), np.uint8)
        for number in tiles:
            offset, count = places[number % len(places)]
            data = os.pread(file.fileno(), count, offset)
            whole = tables[:-2] + data[2:] if tables else data
            simplejpeg.decode_jpeg(whole, buffer=out[number % CHUNK])

    taken = {}
    for way in (decode, by_simplejpeg):
        start = time.perf_counter()
        way(range(200))
        taken[time.perf_counter() - start] = way
    return taken[min(taken)]


def ome_zarr(path: Path, pixels: np.ndarray[Any, Any]) -> Stored:
    """OME-Zarr 0.5 of one level in chunks of a tile, channel first, compressed by Zstd."""
    import zarr

    rows, columns = (extent // TILE for extent in pixels.shape[:2])
    if not path.exists():
        group = zarr.open_group(path, mode="w", zarr_format=3)
        array = group.create_array("0", shape=(3, *pixels.shape[:2]), chunks=(3, TILE, TILE), dtype="uint8")
        array[...] = pixels.transpose(2, 0, 1)
        axes = [{"name": axis, "type": "channel" if axis == "c" else "space"} for axis in "cyx"]
        steps = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
        level = {"path": "0", "coordinateTransformations": steps}
        group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}

    def decode(tiles: range) -> None:
        for number in tiles:
            row, column = divmod(number % (rows * columns), columns)
            data = (path / "0" / "c" / "0" / str(row) / str(column)).read_bytes()
            imagecodecs.zstd_decode(data, out=3 * TILE * TILE)

    return Stored("OME-Zarr (Zstd)", path, TILE, rows * columns, decode)


# --- measuring -------------------------------------------------------------------------------------------------------


def floor(file: Stored, passes: int) -> Work:
    def work(threads: int) -> int:
        total = file.tiles * passes
        edges = np.linspace(0, total, threads + 1).astype(int).tolist()
        parts = [range(*edge) for edge in itertools.pairwise(edges)]
        run_together([lambda part=part: file.decode(part) for part in parts])
        return total

    return work


def reading(file: Stored, grid: dict[str, Any], passes: int) -> Work:
    def work(threads: int) -> int:
        opener = FileOpener(file.path, file.path.name, file.tile, **grid)
        with Reader(threads) as reader:
            return sum(chunk.count for batch in reader.stream([[opener]] * passes, CHUNK) for chunk in batch.chunks())

    return work


def openslide_reading(file: Stored, grid: dict[str, Any]) -> Work | None:
    """`read_region` of the same patches, a hundred of them, one handle for all threads; None where it cannot."""
    import openslide

    try:
        slide = openslide.OpenSlide(file.path)
        slide.read_region((0, 0), 0, (8, 8))
    except (openslide.OpenSlideError, OSError):
        return None
    with FileOpener(file.path, file.path.name, file.tile, **grid)().image as image:
        opener = FileOpener(file.path, file.path.name, file.tile, **grid)
        boxes = opener.grid(image).boxes(slice(None))[:OPENSLIDE_PATCHES]

    def some(part: list[list[int]]) -> None:
        for x, y, width, height in part:
            np.asarray(slide.read_region((x, y), 0, (width, height)))[..., :3].copy()

    def work(threads: int) -> int:
        slide.set_cache(openslide.OpenSlideCache(2**25))
        run_together([lambda k=k: some(boxes[k::threads].tolist()) for k in range(threads)])
        return len(boxes)

    return work


def run_together(pieces: list[Callable[[], None]]) -> None:
    """Each on a thread of its own; what one raises is raised."""
    with ThreadPoolExecutor(len(pieces)) as pool:
        for done in [pool.submit(piece) for piece in pieces]:
            done.result()


def rates(pieces: dict[Any, tuple[Work, int]], rounds: int) -> dict[Any, float]:
    """Patches a second of each (work, threads), in turns; the median of the rounds, after one that does not count."""
    found: dict[Any, list[float]] = {key: [] for key in pieces}
    for count in range(rounds + 1):
        for key, (work, threads) in pieces.items():
            start = time.perf_counter()
            done = work(threads)
            if count:
                found[key].append(done / (time.perf_counter() - start))
    return {key: median(values) for key, values in found.items()}


def compare(file: Stored, rounds: int) -> list[str]:
    """The rows of one format."""
    passes = max(1, cores() // 2)
    half = file.tile // 2
    grids: dict[str, dict[str, Any]] = {
        "aligned": {},
        "unaligned": {"offset": (-half, -half)},
        "50 % overlap": {"stride": half},
    }
    counts = sorted({1, cores()})
    pieces: dict[Any, tuple[Work, int]] = {("floor", "", n): (floor(file, passes), n) for n in counts}
    for name, grid in grids.items():
        slide = openslide_reading(file, grid)
        for n in counts:
            pieces["keyhole", name, n] = reading(file, grid, passes), n
            if slide is not None:
                pieces["openslide", name, n] = slide, n
    found = rates(pieces, rounds)
    lines = []
    for name in grids:
        for n in counts:
            keys: tuple[Any, ...] = ("keyhole", name, n), ("floor", "", n), ("keyhole", "aligned", n)
            own, least, aligned = (found[key] for key in keys)
            other = found.get(("openslide", name, n))
            beside = "cannot read it | |" if other is None else f"{other:,.0f} | {own / other:.1f} |"
            lines.append(
                f"| {file.name} | {name} | {n} | {own:,.0f} | {least:,.0f} | {own / least:.2f} | "
                f"{aligned / own:.2f} | {beside}"
            )
    return lines


def scale(file: Stored, rounds: int) -> list[str]:
    """Aligned JPEG by threads."""
    passes = max(1, cores() // 2)
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n < cores()] + [cores()]
    pieces: dict[Any, tuple[Work, int]] = {}
    for n in counts:
        pieces["floor", n] = floor(file, passes), n
        pieces["keyhole", n] = reading(file, {}, passes), n
    found = rates(pieces, rounds)
    return [
        f"| {n} | {found['keyhole', n]:,.0f} | {found['keyhole', n] / found['keyhole', 1] / n:.2f} | "
        f"{found['floor', n]:,.0f} | {found['keyhole', n] / found['floor', n]:.2f} |"
        for n in counts
    ]


def report(options: argparse.Namespace, lines: list[str], scaling: list[str]) -> list[str]:
    head = (
        "format | grid | threads | keyhole | floor | of the floor | aligned is faster by | OpenSlide | times OpenSlide"
    )
    return [
        f"Patches of one tile (RGB) a second; {options.side:,} x {options.side:,} pixels of generated tissue as JPEG "
        f"(quality 80, colour at half the resolution), {options.side // 2:,} squared in other codecs "
        f"({options.side // 4:,} in JPEG 2000). Files in the page cache; median of {options.rounds} rounds in turns. "
        "Floor: tiles a second by the codec alone. Opening the file is part of keyhole's time. "
        f"Load average at the end (1, 5, 15 minutes): {', '.join(f'{load:.1f}' for load in os.getloadavg())}; above "
        f"{cores()} others were at work, and the figures are rough.",
        "",
        f"| {head} |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
        "",
        "Aligned JPEG by threads (share of a perfect scaling of one thread; the floor by as many threads):",
        "",
        "| threads | keyhole | of perfect | floor | of the floor |",
        "|---|---|---|---|---|",
        *scaling,
    ]


if __name__ == "__main__":
    main()
