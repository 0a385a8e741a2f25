"""The small test images: one picture through every lossless way to store it, and files broken in every way.

Tests import the functions; `python tests/make_images.py FOLDER` writes all of it to look at, some kilobytes each.
"""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL.Image
import tifffile
from numpy.typing import NDArray

from keyhole.images import open_image

WIDTH, HEIGHT = 144, 96
"""Of level 0. Divisible by 4, so that OpenSlide's downsamples are whole numbers."""


@dataclass(frozen=True)
class Stored:
    """A file and the pixels (h, w, c) that each of its levels must give."""

    path: Path
    levels: tuple[NDArray[np.uint8], ...]


def picture(channels: int = 3, width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> NDArray[np.uint8]:
    """(h, w, channels) uint8: gradients, sharp edges and noise, so that a shift by one pixel shows everywhere."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [(x * 3 + y * 5 + 60 * k + 90 * ((x // 17 + y // 13 + k) % 2)) % 256 for k in range(channels)]
    noise = rng.integers(0, 12, (height, width, channels))
    return np.clip(np.stack(planes, axis=-1) + noise, 0, 255).astype(np.uint8)


def pyramid(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], ...]:
    """Three levels, each every second pixel of the one before."""
    return tuple(np.ascontiguousarray(pixels[::step, ::step]) for step in (1, 2, 4))


def squeeze(pixels: NDArray[Any]) -> NDArray[Any]:
    """(h, w, 1) -> (h, w), as writers want grey."""
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def write_pictures(folder: Path) -> dict[str, Stored]:
    """PNG, BMP and lossless WebP of the picture, grey and in colour."""
    out = {}
    for channels in (1, 3):
        pixels = picture(channels)
        for suffix, options in (("png", {}), ("bmp", {}), ("webp", {"lossless": True, "exact": True})):
            if suffix == "webp" and channels == 1:
                continue  # WebP has no grey
            path = folder / f"picture-{channels}.{suffix}"
            PIL.Image.fromarray(squeeze(pixels)).save(path, **options)
            out[path.name] = Stored(path, (pixels,))
    return out


_TIFFS: dict[str, dict[str, Any]] = {
    "strips": {"rowsperstrip": 7},
    "one-strip": {"rowsperstrip": HEIGHT},
    "tiles": {"tile": (32, 48)},
    "big-endian": {"tile": (32, 32), "byteorder": ">"},
    "bigtiff": {"tile": (32, 32), "bigtiff": True},
    "bigtiff-big-endian": {"rowsperstrip": 10, "bigtiff": True, "byteorder": ">"},
    "lzw": {"tile": (32, 32), "compression": "lzw", "predictor": True},
    "lzw-strips": {"rowsperstrip": 16, "compression": "lzw"},
    "deflate": {"tile": (32, 32), "compression": "deflate", "predictor": True},
    "zstd": {"tile": (64, 64), "compression": "zstd"},
    "lzma": {"rowsperstrip": 20, "compression": "lzma"},
    "packbits": {"rowsperstrip": 9, "compression": "packbits"},
    "webp": {"tile": (32, 32), "compression": "webp", "compressionargs": {"level": -1}},
    "jpeg2000": {"tile": (64, 64), "compression": "jpeg2000", "compressionargs": {"level": 0, "reversible": True}},
    "planes": {"tile": (32, 32), "planarconfig": "separate", "compression": "deflate"},
    "planes-strips": {"rowsperstrip": 11, "planarconfig": "separate"},
}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes | None = b"", before: bytes = b"") -> bytes:
    """A PNG that declares a size and a kind, whatever it holds.

    Args:
        color: 0 for grey, 2 for colour.
        rows: a byte for the filter and the pixels of each row; None leaves the pixels out.
        before: chunks in front of the pixels.
    """
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels = b"" if rows is None else png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + png_chunk(b"IEND", b"")


def whole(path: Path, level: int = 0) -> NDArray[np.uint8]:
    """All pixels of an image."""
    with open_image(path) as image:
        return image.read((0, 0, *image.levels[level].size), level)


def write_tiffs(folder: Path) -> dict[str, Stored]:
    """The picture in TIFF's lossless variety, grey and in colour."""
    out = {}
    for name, options in _TIFFS.items():
        for channels in (1, 3):
            if channels == 1 and (name == "webp" or name.startswith("planes")):
                continue
            pixels = picture(channels)
            path = folder / f"{name}-{channels}.tif"
            write_tiff(path, squeeze(pixels), **options)
            out[path.name] = Stored(path, (pixels,))
    return out


def write_tiff(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    """One page by tifffile; `planarconfig="separate"` takes (h, w, c) here too."""
    file = {key: options.pop(key) for key in ("byteorder", "bigtiff") if key in options}
    if options.get("planarconfig") == "separate":
        pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    photometric = options.pop("photometric", "rgb" if pixels.ndim == 3 else "minisblack")
    tifffile.imwrite(path, pixels, photometric=photometric, metadata=None, **file, **options)
    return path


def write_pyramids(folder: Path) -> dict[str, Stored]:
    """Pyramids as SubIFDs (OME), as a chain of pages (generic), and as a miniature of an Aperio slide."""
    levels = pyramid(picture())
    tiles: dict[str, Any] = {"tile": (32, 32), "photometric": "rgb", "compression": "deflate"}
    ome, chain, svs = folder / "pyramid.ome.tif", folder / "chain.tif", folder / "miniature.svs"
    with tifffile.TiffWriter(ome, ome=True) as writer:
        scale = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25}
        writer.write(levels[0], subifds=2, metadata=scale, **tiles)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, **tiles)
    with tifffile.TiffWriter(chain) as writer:
        for number, level in enumerate(levels):
            writer.write(
                level, subfiletype=int(number > 0), metadata=None, resolution=(20000, 20000), resolutionunit=3, **tiles
            )
    with tifffile.TiffWriter(svs) as writer:
        strips: dict[str, Any] = {"photometric": "rgb", "metadata": None}
        writer.write(
            levels[0], description="Aperio Image Library\n144x96|AppMag = 20|MPP = 0.4990", metadata=None, **tiles
        )
        writer.write(levels[2], description="Aperio thumbnail", **strips)
        for level in levels[1:]:
            writer.write(level, description="Aperio Image Library", metadata=None, **tiles)
        writer.write(picture(3, 60, 72), description="Aperio label", subfiletype=1, **strips)
        writer.write(picture(3, 72, 48), description="Aperio macro", subfiletype=9, **strips)
    return {path.name: Stored(path, levels) for path in (ome, chain, svs)}


def write_many_tiles(path: Path, columns: int, rows: int, tile: int = 64, kinds: int = 20) -> Path:
    """A BigTIFF of JPEG tiles that share the bytes of a few: 250,000 tiles in 3 MB, nearly all of it their tables."""
    rng = np.random.default_rng(0)
    out = bytearray(b"II+\0" + struct.pack("<HHQ", 8, 0, 0))
    places = []
    for kind in range(kinds):
        data = imagecodecs.jpeg8_encode(picture(3, tile, tile, seed=kind), level=80, subsampling="444")
        places.append((len(out), len(data)))
        out += data
    chosen = np.array(places)[rng.integers(0, kinds, columns * rows)]
    offsets = len(out)
    out += chosen[:, 0].astype("<u8").tobytes()
    counts = len(out)
    out += chosen[:, 1].astype("<u4").tobytes()
    number = columns * rows
    entries = [
        (256, 4, 1, columns * tile), (257, 4, 1, rows * tile), (258, 3, 3, 8 * (1 + 2**16 + 2**32)), (259, 3, 1, 7),
        (262, 3, 1, 6), (277, 3, 1, 3), (322, 4, 1, tile), (323, 4, 1, tile), (324, 16, number, offsets),
        (325, 4, number, counts), (530, 3, 2, 1 + 2**16),
    ]  # fmt: skip
    struct.pack_into("<Q", out, 8, len(out))
    out += struct.pack("<Q", len(entries)) + b"".join(struct.pack("<HHQQ", *entry) for entry in entries) + bytes(8)
    path.write_bytes(out)
    return path


def write_broken(folder: Path) -> dict[str, Path]:
    """Files that must not be read, by what is wrong with them."""
    pixels = picture()
    sound = folder / "sound"
    sound.mkdir(exist_ok=True)
    png, jpeg, tif = sound / "a.png", sound / "a.jpg", sound / "a.tif"
    PIL.Image.fromarray(pixels).save(png)
    PIL.Image.fromarray(pixels).save(jpeg, quality=90)
    write_tiff(tif, pixels, tile=(32, 32))
    bmp = sound / "a.bmp"
    PIL.Image.fromarray(pixels).save(bmp)

    contents: dict[str, bytes] = {
        "empty.png": b"",
        "empty.tif": b"",
        "text.png": b"this is a list of labels, not an image\n",
        "text.svs": b"image,label\na.png,1\n",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>" * 4,
        "random.tif": np.random.default_rng(1).bytes(2000),
        "pointer.tif": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "head-only.png": png.read_bytes()[:40],
        "cut.png": png.read_bytes()[: png.stat().st_size // 2],
        "cut.jpg": jpeg.read_bytes()[: jpeg.stat().st_size // 2],
        "cut.bmp": bmp.read_bytes()[: bmp.stat().st_size // 2],
        "cut.tif": tif.read_bytes()[: tif.stat().st_size - 1000],
        "head-only.tif": tif.read_bytes()[:8],
        "flipped.png": _flip(png.read_bytes(), png.stat().st_size // 2),
        "flipped-header.png": _flip(png.read_bytes(), 18),
        "flipped-header.jpg": _flip(jpeg.read_bytes(), 3),
        "flipped-header.tif": _flip(tif.read_bytes(), 5),
        "no-page.tif": b"II*\0" + b"\0" * 20,
    }
    paths = {name: folder / name for name in contents}
    for name, data in contents.items():
        paths[name].write_bytes(data)
    paths |= _write_odd_tiffs(folder)
    return paths


def _write_odd_tiffs(folder: Path) -> dict[str, Path]:
    """Sound TIFFs of kinds that are refused, and hostile ones."""
    floats, stack, lying = folder / "float.tif", folder / "channels.ome.tif", folder / "lying-tile.tif"
    tifffile.imwrite(floats, np.zeros((16, 16), np.float32), tile=(16, 16))
    options: dict[str, Any] = {"photometric": "minisblack", "tile": (16, 16), "metadata": {"axes": "CYX"}}
    tifffile.imwrite(stack, np.zeros((3, 16, 16), np.uint8), ome=True, **options)
    # A tile of 16 x 16 that holds a JPEG of another size: decoding it would cost what the JPEG says.
    write_tiff(lying, picture(3, 16, 16), tile=(16, 16), compression="jpeg")
    with tifffile.TiffFile(lying, mode="r+") as tif:
        page = tif.pages.first
        big = imagecodecs.jpeg_encode(np.zeros((2048, 2048, 3), np.uint8))
        end = lying.stat().st_size
        page.tags[324].overwrite(end)
        page.tags[325].overwrite(len(big))
    with lying.open("ab") as file:
        file.write(big)
    loop = folder / "long-loop.tif"
    loop.write_bytes(_looping_chain(pages=150))
    return {path.name: path for path in (floats, stack, lying, loop)}


def _looping_chain(pages: int) -> bytes:
    """A TIFF of empty pages of which the last leads back to the third from the end."""
    offsets = [8 + 18 * number for number in range(pages)]
    entry = (256).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little") + bytes([16, 0, 0, 0])
    body = b"".join(
        (1).to_bytes(2, "little") + entry + following.to_bytes(4, "little") for following in [*offsets[1:], offsets[-3]]
    )
    return b"II*\0" + (8).to_bytes(4, "little") + body


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


if __name__ == "__main__":  # make_zarr.py and make_dicom.py have the formats that need their own packages
    target = Path(sys.argv[1])
    for write in (write_pictures, write_tiffs, write_pyramids, write_broken):
        subfolder = target / write.__name__.removeprefix("write_")
        subfolder.mkdir(parents=True, exist_ok=True)
        print(f"{len(write(subfolder))} files in {subfolder}")
