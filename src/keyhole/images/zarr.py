"""OME-Zarr: a folder of chunks, and metadata that name the arrays that are the levels of one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import faults_of, not_one_picture
from keyhole.images.geometry import Size, same_shape
from keyhole.images.pixels import Pixels, bits_of_largest, eight_bit
from keyhole.images.scale import TO_MICRONS, Scale, plausible_scale
from keyhole.images.tiff_file import MAX_SEGMENT_PIXELS
from keyhole.images.tiles import TiledImage
from keyhole.images.zarr_array import METADATA, UnsupportedCodec, ZarrArray, ZarrGroup, child, open_node

_OLD_AXES = "tczyx"
_RGB = ("FF0000", "00FF00", "0000FF")


class ZarrImage(TiledImage):
    """OME-Zarr 0.4 (zarr v2) and 0.5 (zarr v3), the first series of a bioformats2raw folder, or one zarr array.

    Axes may be in any order, with one time point, one plane, and one channel or three (red, green, blue). Values are
    uint8, or uint16, which is scaled to 8 bits. Chunks may be in shards, and compressed with Blosc, Zstd, gzip, zlib,
    LZ4 or bz2.

    A missing chunk has the fill value, since zarr leaves empty chunks out. A damaged chunk is an error.
    """

    priority: ClassVar[int] = 20
    folder_suffixes: ClassVar[frozenset[str]] = frozenset({".zarr"})

    def __init__(self, path: Path) -> None:
        with faults_of(path, "damaged zarr metadata"):
            try:
                picture = picture_of(path)
            except UnsupportedCodec as error:
                what = f"{error}, which is not read. Save it with Blosc or Zstd and without filters."
                raise ImageError(path, what) from error
        self._axes, (self.mpp, self.mpp_note) = picture.axes, picture.scale
        sizes = [picture.size(array.shape) for array in picture.arrays]
        kept = [k for k, size in enumerate(sizes) if k == 0 or same_shape(sizes[0], size)]
        kept = [k for n, k in enumerate(kept) if n == 0 or sizes[k].width < sizes[kept[n - 1]].width]
        self._arrays = [picture.arrays[k] for k in kept]
        bits = 8 * self._arrays[0].dtype.itemsize
        super().__init__(
            path,
            [sizes[k] for k in kept],
            [picture.size(array.chunks) for array in self._arrays],
            channels=picture.channels,
            bits=picture.bits or bits,
            says_bits=picture.bits is not None or bits == 8,
        )

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return not head and any(os.path.isfile(os.path.join(path, name)) for name in METADATA)  # noqa: PTH113, PTH118

    def _stored_values(self, tile: int) -> list[NDArray[Any]]:
        return [self._tile_values(0, tile, None)]

    def _coded(self, level: int, tiles: Sequence[int]) -> Iterator[list[bytes | None]]:
        """Yield the encoded chunks of each tile, one after the other along the channels."""
        array, (columns, _) = self._arrays[level], self._grids[level]
        parts = math.ceil(self.channels / array.chunks[self._axes.index("c")]) if "c" in self._axes else 1
        for tile in tiles:
            row, column = divmod(tile, columns)
            places = [{"y": row, "x": column, "c": part} for part in range(parts)]
            yield [array.encoded([place.get(axis, 0) for axis in self._axes]) for place in places]

    def decode_tile(self, level: int, tile: int, coded: list[bytes | None] | None, out: Pixels | None) -> Pixels:
        """Return stored values as (h, w, c) uint8; in `out` where that helps and fits."""
        values = self._tile_values(level, tile, coded)
        left = "".join(axis for axis in self._axes if axis in "yxc")
        values = eight_bit(values, self.bits if values.dtype.itemsize == 2 else 8)
        if left == "yxc":
            return values
        planes = values.transpose([left.index(axis) for axis in "cyx" if axis in left])
        planes = planes if "c" in left else planes[None]
        shape = (*planes.shape[1:], self.channels)
        if out is None or out.shape != shape:
            out = np.empty(shape, np.uint8)
        for channel, plane in enumerate(planes):
            out[:, :, channel] = plane  # six times as fast as a copy of the transposed array
        return out

    def _tile_values(self, level: int, tile: int, coded: list[bytes | None] | None) -> NDArray[Any]:
        """Return the stored values of a tile inside the level, with the axes y, x and, if there is one, c."""
        array, (wide, high), size = self._arrays[level], self._tiles[level], self._stored[level]
        parts = [array.decoded(data) for data in (coded or next(self._coded(level, [tile])))]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self._axes.index("c"))
        row, column = divmod(tile, self._grids[level][0])
        ends = {"y": size.height - row * high, "x": size.width - column * wide, "c": self.channels}
        return values[tuple(slice(ends[axis]) if axis in ends else 0 for axis in self._axes)]


class Picture(NamedTuple):
    """Arrays of one picture, largest first; `axes` has a letter for each dimension, `bits` are in use if stated."""

    arrays: tuple[ZarrArray, ...]
    axes: str
    channels: int
    scale: Scale
    bits: int | None = None

    def size(self, shape: Sequence[int]) -> Size:
        """Return the width and height of an array or a chunk of this shape."""
        return Size(shape[self.axes.index("x")], shape[self.axes.index("y")])


def picture_of(path: Path) -> Picture:
    """Find the picture in a zarr folder; ImageError for plates, label images, stacks and missing metadata."""
    root = path.absolute()
    node = open_node(root, root)
    if isinstance(node, ZarrArray):
        axes = _array_axes(path, node)
        return Picture((node,), axes, _channels(path, node, axes), Scale())
    ome = _ome(node)
    if "multiscales" not in ome and "bioformats2raw.layout" in ome:
        series = _ome(child(node, "OME", root)).get("series") if (node.folder / "OME").is_dir() else None
        node = child(node, str(series[0]) if series else "0", root)
        ome = _ome(node)
    if "plate" in ome or "well" in ome:
        raise ImageError(path, "a plate of wells, not one picture. Name one field of it, as in plate.zarr/A/1/0.")
    if "image-label" in ome:
        raise ImageError(path, "a label image: numbers of objects, not a picture. Name the image it belongs to.")
    if not ome.get("multiscales") or isinstance(node, ZarrArray):
        raise ImageError(path, "a zarr group without `multiscales`. Name the image or array in it, or export it again.")
    nodes = [child(node, str(dataset["path"]), root) for dataset in ome["multiscales"][0]["datasets"]]
    arrays = tuple(array for array in nodes if isinstance(array, ZarrArray))
    if not arrays or len(arrays) < len(nodes):
        raise ImageError(path, "its `multiscales` names no arrays. Export it again.")
    first = ome["multiscales"][0]
    named = first.get("axes", list(_OLD_AXES) if first.get("version") in ("0.1", "0.2") else None)
    if not isinstance(named, list):
        raise ImageError(path, "its `multiscales` has no axes. Export it as OME-Zarr 0.4 or 0.5.")
    axes = "".join(str(axis["name"] if isinstance(axis, dict) else axis).lower() for axis in named)
    if len(axes) != len(named):
        raise ImageError(path, f"axes {named} are not read. Export it with axes among t, c, z, y and x.")
    scale = _scale(axes, named, first, first["datasets"][0])
    channels = [_channels(path, array, axes) for array in arrays]
    if len(set(channels)) > 1:
        raise ImageError(path, f"its levels have {channels} channels. Export it again.")
    picture = Picture(arrays, axes, channels[0], scale, _bits(path, channels[0], ome))
    if picture.size(arrays[0].shape) != max(picture.size(array.shape) for array in arrays):
        raise ImageError(path, "its first level is not its largest. Export it again.")
    return picture


def _ome(node: ZarrArray | ZarrGroup) -> dict[str, Any]:
    """Return OME's part of the attributes, which is under `ome` since 0.5."""
    ome = node.attributes.get("ome", node.attributes)
    return ome if isinstance(ome, dict) else {}


def _channels(path: Path, array: ZarrArray, axes: str) -> int:
    """Return 1 or 3; refuse stacks, other values than uint8 and uint16, and chunks too large to be decoded."""
    if len(axes) != len(array.shape) or sorted(axes) != sorted(set(axes)) or not {"x", "y"} <= set(axes):
        raise ImageError(path, f"axes {axes!r} for an array of {array.shape}; expected y and x, and each once.")
    if min(array.shape) < 1:
        raise ImageError(path, f"an array of {array.shape} has no pixels. Export it again.")
    lengths = dict(zip(axes, array.shape, strict=True))
    many = {axis: length for axis, length in lengths.items() if axis not in "cyx" and length != 1}
    channels = lengths.get("c", 1)
    if channels not in (1, 3):
        many["c"] = channels
    if many:
        raise not_one_picture(path, many)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ImageError(path, f"pixels of {array.dtype} are not read. Save them as uint8 or uint16.")
    if math.prod(array.chunks) > MAX_SEGMENT_PIXELS * channels:
        chunk = " x ".join(f"{side:,}" for side in array.chunks)
        problem = f"one chunk has {chunk} pixels, more than the {MAX_SEGMENT_PIXELS:,} that are decoded at once."
        raise ImageError(path, f"{problem} Save it again in chunks of 256 to 1024 pixels a side.")
    return channels


def _bits(path: Path, count: int, ome: dict[str, Any]) -> int | None:
    """Return the bits in use by the largest value of a channel's slider, 12 for 4095; refuse three stains."""
    channels = (ome.get("omero") or {}).get("channels", [])
    colors = [str(channel.get("color", "")).upper().lstrip("#") for channel in channels]
    if count == len(colors) == 3 and all(colors) and tuple(colors) != _RGB:
        problem = f"3 channels of the colours {', '.join(colors)}, not red, green and blue."
        raise ImageError(path, f"{problem} Save the channel that you want, or merge the channels to RGB.")
    largest = [(channel.get("window") or {}).get("max") for channel in channels]
    known = [value for value in largest if isinstance(value, int | float)]
    return bits_of_largest(max(known)) if known and len(known) == len(channels) else None


def _scale(axes: str, named: list[Any], first: dict[str, Any], dataset: dict[str, Any]) -> Scale:
    """Return microns per pixel of the largest level: its scale times that of all levels, in the units of the axes."""
    sizes: list[float | None] = []
    for axis in "xy":
        at = axes.index(axis) if axis in axes else -1
        factors = [
            float(step["scale"][at])
            for holder in (dataset, first)
            for step in holder.get("coordinateTransformations") or []
            if step.get("type") == "scale" and "scale" in step
        ]
        if not factors:
            return Scale()
        unit = named[at].get("unit") if isinstance(named[at], dict) else None
        product = factors[0] * (factors[1] if len(factors) > 1 else 1.0)
        if unit not in TO_MICRONS:
            what = "without a unit" if unit is None else f"in {unit!r}, which is not a unit of length"
            return Scale(None, f"its OME-Zarr gives {product:g} as the size of a pixel, {what}")
        sizes.append(product * TO_MICRONS[unit])
    return plausible_scale(sizes[0], sizes[1], "its OME-Zarr")


def _array_axes(path: Path, array: ZarrArray) -> str:
    """Return the axes of a single array: those that it names, else those of its shape if that leaves no doubt."""
    names = array.dimension_names
    if names and all(isinstance(name, str) and len(name) == 1 for name in names):
        return "".join(names).lower()
    if len(array.shape) == 2:
        return "yx"
    if len(array.shape) == 3 and (array.shape[2] in (1, 3)) != (array.shape[0] in (1, 3)):
        return "yxc" if array.shape[2] in (1, 3) else "cyx"
    raise ImageError(path, f"an array of {array.shape} that does not name its axes. Export it as OME-Zarr.")
