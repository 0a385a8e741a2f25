"""Writes OME-Zarr by zarr itself: the test picture in every axis order, version and codec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

ORDERS = ("cyx", "yxc", "tczyx", "zcyx", "xyc", "tyxc")
"""Axis orders that the test picture is stored in."""
_KINDS = {"t": "time", "c": "channel"}


def write_array(
    path: Path,
    pixels: NDArray[Any],
    version: int,
    axes: str = "cyx",
    *,
    chunk: int = 32,
    shards: int = 0,
    compressors: Any = "auto",
    separator: str = "/",
    key: dict[str, str] | None = None,
    names: Sequence[str] | None = None,
    depth: int = 1,
) -> Path:
    """One array of `pixels` (h, w, c), its axes in the order `axes`; those beside y, x and c have the length `depth`.

    Args:
        chunk, shards: sides in y and x.
        names: the axes as the array itself names them.
    """
    order = ["yxc".index(axis) for axis in axes.replace("w", "x") if axis in "yxc"]
    values = (pixels if "c" in axes else pixels[..., 0]).transpose(order)
    shape = [depth if axis in "tz" else 0 for axis in axes]
    lengths = iter(values.shape)
    shape = [length or next(lengths) for length in shape]
    values = np.broadcast_to(
        values.reshape([1 if axis in "tz" else length for axis, length in zip(axes, shape, strict=True)]), shape
    )

    def sides(side: int) -> tuple[int, ...]:
        return tuple(side if axis in "yxw" else length for axis, length in zip(axes, shape, strict=True))

    encoding = key or {"name": "v2" if version == 2 else "default", "separator": separator}
    array = zarr.create_array(
        path,
        shape=shape,
        chunks=sides(chunk),
        shards=sides(shards) if shards else None,
        dtype=values.dtype,
        compressors=compressors,
        fill_value=255 if values.dtype.kind == "u" else 0,
        zarr_format=version,  # type: ignore[arg-type]
        chunk_key_encoding=encoding,  # type: ignore[arg-type]
        dimension_names=names if version == 3 else None,
        attributes={"_ARRAY_DIMENSIONS": list(names)} if names and version == 2 else None,
    )
    array[...] = values
    return path


def scale_step(axes: str, scale: Sequence[float], down: float = 1.0) -> dict[str, Any]:
    """A coordinateTransformation; `scale` is that of y and x."""
    lengths = {"y": scale[0] * down, "x": scale[1] * down}
    return {"type": "scale", "scale": [float(lengths.get(axis, 1.0)) for axis in axes]}


def write_multiscale(
    path: Path,
    levels: Sequence[NDArray[Any]],
    version: int,
    *,
    axes: str = "cyx",
    unit: str | None = "micrometer",
    scale: Sequence[float] | None = (0.25, 0.25),
    all_levels: list[dict[str, Any]] | None = None,
    omero: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """An OME-Zarr image, 0.4 in zarr v2 or 0.5 in v3, of levels (h, w, c)."""
    group = zarr.open_group(path, mode="w", zarr_format=version)  # type: ignore[arg-type]
    datasets = []
    for number, pixels in enumerate(levels):
        write_array(path / str(number), pixels, version, axes, **options)
        dataset: dict[str, Any] = {"path": str(number)}
        if scale is not None:
            dataset["coordinateTransformations"] = [scale_step(axes, scale, levels[0].shape[1] / pixels.shape[1])]
        datasets.append(dataset)
    named = []
    for axis in axes:
        entry = {"name": axis, "type": _KINDS.get(axis, "space")}
        if entry["type"] == "space" and unit is not None:
            entry["unit"] = unit
        named.append(entry)
    multiscale: dict[str, Any] = {"axes": named, "datasets": datasets, "name": path.name}
    if all_levels is not None:
        multiscale["coordinateTransformations"] = all_levels
    ome: dict[str, Any] = {"multiscales": [multiscale]}
    if omero is not None:
        ome["omero"] = omero
    if version == 2:
        multiscale["version"] = "0.4"
        group.attrs.update(ome)
    else:
        group.attrs["ome"] = {"version": "0.5", **ome}
    return path
