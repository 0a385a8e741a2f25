"""A TIFF's structure, checked before anything is decoded.

A hostile or damaged file otherwise costs the process: a chain of pages that loops or leaves the file, a tile that
declares gigabytes in a few bytes.
"""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from keyhole.errors import ImageError
from keyhole.images.faults import ends_early, faults_of
from keyhole.images.geometry import Size
from keyhole.images.tiff_tables import COUNTS, OFFSETS, Pread, ShortTables, Table, scan

# numpy's remarks on the odd numbers of a damaged file, where tifffile computes with them.
warnings.filterwarnings("ignore", module=r"tifffile\.")

MAX_PAGES = 4096
"""More pages than any slide has; a file with more is a film or damaged."""
MAX_SEGMENT_PIXELS = 64 * 2**20
"""Pixels of one tile or strip: what is read at once whatever the region asked for. 64 Mpx are 200 MB in RGB."""
CONVERT = "Convert it to a tiled pyramid: vips tiffsave IN.tif OUT.tif --tile --pyramid --compression jpeg --bigtiff"

_MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
_JPEG2000_APERIO = (33003, 33005)
_FOCAL_PLANE = 65424
"""Hamamatsu's tag for the place of a page in depth."""


def is_tiff(head: bytes) -> bool:
    """Whether a file that starts with `head` is a TIFF or BigTIFF."""
    return head[:4] in _MAGIC


def vendor_of(path: Path) -> str | None:
    """The maker of a slide that is TIFF underneath but not plain TIFF; such a file is OpenSlide's. Never raises."""
    if path.suffix.lower() in (".ndpi", ".bif", ".scn"):
        return path.suffix.lower()
    try:
        with open_pages(path) as (tif, _):
            page = tif.pages.first
            xmp = page.tags.valueof(700)
            if page.is_ndpi:
                return "Hamamatsu"
            if page.is_philips or page.software.startswith("Philips"):
                return "Philips"
            if page.software.startswith("MedScan"):
                return "Trestle"
            if "<scn" in page.description[:1000]:
                return "Leica"
            if isinstance(xmp, bytes) and b"<iScan" in xmp:
                return "Ventana"
            if page.is_svs and any(page.compression in _JPEG2000_APERIO for page in tif.pages):
                return "Aperio JPEG 2000"
    except ImageError:
        return None  # damaged: opening it says how
    return None


@contextmanager
def open_pages(path: Path) -> Iterator[tuple[Any, ShortTables]]:
    """A tifffile.TiffFile whose chain of pages is sound, closed at the end, and the file with its tables of tiles.

    All faults inside become ImageError.
    """
    import tifffile

    # Its remarks on odd tags have no handler and would go to stderr; what matters is checked here.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with faults_of(path, "damaged TIFF structure"), path.open("rb") as file:
        pages, order, big = _walk_chain(path, file)
        short = ShortTables(file, order, big)
        if path.suffix.lower() != ".ndpi":  # Hamamatsu: offsets of more than 32 bits, which tifffile puts together
            for page in pages:
                short.shorten(page)
        file.seek(0)
        with tifffile.TiffFile(short, name=path.name) as tif:
            yield tif, short


def check_tiles(path: Path, most_bits: int = 16) -> int:
    """Refuses a TIFF that would take OpenSlide, and with it the process, down: tiles of gigabytes, loops, a cut end.

    Args:
        path: the file.
        most_bits: of a value in a tiled page.

    Returns:
        planes in depth (z) of a Hamamatsu slide, of which OpenSlide reads the one at 0; else 1.

    Raises:
        ImageError: with the reason.
    """
    planes = {0}
    with open_pages(path) as (tif, short):
        for page in tif.pages:
            planes |= {page.tags.valueof(_FOCAL_PLANE, 0)} if page.is_ndpi else set()
            if page.is_tiled and isinstance(page.bitspersample, int) and page.bitspersample > most_bits:
                raise ImageError(
                    path, f"a slide of {page.bitspersample} bits a value is not read. Export it with 8 bits."
                )
            if page.is_tiled:
                check_segment(path, Size(page.tilewidth, page.tilelength))
            elif not page.is_ndpi:  # a Hamamatsu page is one strip with restart marks inside
                check_segment(path, Size(page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength)))
            check_end(path, short.pread, *tables_of(page, short))
    return len(planes)


def _walk_chain(path: Path, file: BufferedReader) -> tuple[list[int], str, bool]:
    """Follows the chain of pages once, without decoding a tag: it must end, inside the file, after a sane number.

    Returns:
        where the pages begin; byte order; whether it is a BigTIFF.
    """
    size = path.stat().st_size
    head = file.read(16)
    order = _MAGIC.get(head[:4])
    if order is None or len(head) < 8:
        raise ImageError(path, "not a TIFF: its first bytes are damaged. Copy it again.")
    big = head[2:3] == b"+" or head[3:4] == b"+"
    wide = big or path.suffix.lower() == ".ndpi"  # Hamamatsu: classic entries, but 64-bit offsets of pages
    entry, count_format = (20, "Q") if big else (12, "H")
    offset_format = "Q" if wide else "I"
    start = 8 if big else 4
    (offset,) = struct.unpack_from(order + offset_format, head.ljust(16, b"\0"), start)
    seen: dict[int, None] = {}
    while offset:
        if offset in seen:
            raise ImageError(path, f"its pages form a loop (page {len(seen)} leads back). Copy or export it anew.")
        if len(seen) == MAX_PAGES:
            raise ImageError(path, f"more than {MAX_PAGES:,} pages; keyhole reads one picture per file")
        seen[offset] = None
        file.seek(offset)
        raw = file.read(struct.calcsize(count_format))
        if len(raw) < struct.calcsize(count_format):
            raise ends_early(path, size, offset + 8)
        (tags,) = struct.unpack(order + count_format, raw)
        link = offset + len(raw) + tags * entry
        if link > size:
            raise ends_early(path, size, link)
        file.seek(link)
        raw = file.read(struct.calcsize(offset_format))
        if len(raw) < struct.calcsize(offset_format):
            if any(raw):
                raise ends_early(path, size, link + struct.calcsize(offset_format))
            break  # only the zeros that say "no next page" are missing: libtiff, Pillow and OpenCV read such a file
        (offset,) = struct.unpack(order + offset_format, raw)
    if not seen:
        raise ImageError(path, "a TIFF without a page. Copy or export it anew.")
    return list(seen), order, big


def page_size(page: Any) -> Size:
    """(width, height) of a tifffile page."""
    return Size(int(page.imagewidth), int(page.imagelength))


def check_segment(path: Path, segment: Size) -> None:
    if segment.width * segment.height > MAX_SEGMENT_PIXELS:
        raise ImageError(
            path,
            f"one tile or strip has {segment.width:,} x {segment.height:,} pixels, more than the "
            f"{MAX_SEGMENT_PIXELS:,} that are decoded at once. {CONVERT}",
        )


def tables_of(page: Any, short: ShortTables) -> tuple[Table, Table]:
    """Where the encoded segments of a tifffile page lie: (offsets, counts)."""
    return short.table(page, OFFSETS, page.dataoffsets), short.table(page, COUNTS, page.databytecounts)


def check_end(path: Path, pread: Pread, offsets: Table, counts: Table) -> None:
    """Every segment, and the tables themselves, must lie inside the file."""
    size, needed = path.stat().st_size, max(offsets.end, counts.end)
    if needed > size:
        raise ends_early(path, size, needed)
    for some_offsets, some_counts in scan(pread, offsets, counts, min(offsets.count, counts.count)):
        if some_offsets.min() < 0 or some_counts.min() < 0:
            raise ImageError(path, "a tile or strip lies before the file's start. Copy it again.")
        needed = max(needed, int((some_offsets + some_counts)[some_counts > 0].max(initial=0)))
    if needed > size:
        raise ends_early(path, size, needed)
