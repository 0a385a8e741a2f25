"""Polygons drawn on an image, from QuPath or ASAP: as a mask of any resolution, and how much of a box they cover.

A point is in a region if it is in its outer ring and in none of its holes; what several regions cover counts once.
A ring that crosses itself is filled by the even-odd rule. A cell of a mask is filled if its centre is inside, so that
areas are exact where rings run along cells, and regions that share a border share no cell.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import DataError
from keyhole.patches.foreground.fill import Outline, fill

Ring = NDArray[np.float64]

GEOJSON_SUFFIXES = (".geojson", ".json")
ASAP_SUFFIX = ".xml"
EXCLUDED = frozenset({"_2", "normal", "exclusion"})
"""Groups of ASAP that are cut out of the others: `_2` is CAMELYON16's, `normal` CAMELYON17's. In lower case."""
WITHOUT_AREA = frozenset({"Point", "MultiPoint", "LineString", "MultiLineString"})
ASAP_WITHOUT_AREA = frozenset({"Dot", "PointSet", "Measurement"})
LARGEST_FILE = 128 * 2**20
"""Bytes; a slide's outlines are a hundredth of this."""
FARTHEST = 1e8
"""Level-0 pixels from the origin; no image is as large, and products of coordinates stay exact enough."""
CELLS = 64
"""Cells along each side of a box in which its covered share is counted."""


@dataclass(frozen=True)
class Region:
    """One polygon.

    Attributes:
        rings: (n, 2) each, x and y in level-0 pixels, the outer one first, then its holes; not closed by repetition.
        name: what it is called or classified as; may be empty.
    """

    rings: tuple[Ring, ...]
    name: str = ""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_regions(path: str | Path, origin: tuple[int, int] = (0, 0)) -> list[Region]:
    """The regions of a GeoJSON or ASAP XML file, told apart by its suffix, in level-0 pixels.

    Args:
        path: the file.
        origin: `Image.qupath_origin` of the image, which GeoJSON counts from; ASAP counts from the corner of level 0.

    Raises:
        DataError: another suffix, or as `read_geojson` and `read_asap_xml`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in GEOJSON_SUFFIXES:
        return read_geojson(path, origin)
    if suffix == ASAP_SUFFIX:
        return read_asap_xml(path)
    raise DataError(
        f"{path}: outlines are read from .geojson (QuPath) and .xml (ASAP) files, not {suffix or 'this'!r}."
    )


def read_geojson(path: str | Path, origin: tuple[int, int] = (0, 0)) -> list[Region]:
    """Polygons of a GeoJSON file in level-0 pixels, as QuPath exports them: counted from `origin`, and moved by it.

    A FeatureCollection, a list of features, one feature or one geometry. A MultiPolygon becomes a region per polygon.
    Points, lines and rings of fewer than three points have no area and cover nothing; a file of nothing else is an
    error. A file without any feature says that there is no region.

    Raises:
        DataError: file and number of the feature, what was expected and what to do.
    """
    path = Path(path)
    try:
        content = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}). Expected GeoJSON; in QuPath: File > Export objects.") from error
    features = content.get("features") if isinstance(content, dict) and "features" in content else content
    if isinstance(features, dict):
        features = [features]
    if not isinstance(features, list):
        raise DataError(f"{path}: expected GeoJSON with features. In QuPath: File > Export objects as GeoJSON.")
    regions: list[Region] = []
    for number, feature in enumerate(features, start=1):
        where = f"{path}, feature {number}"
        if not isinstance(feature, dict):
            raise DataError(f"{where}: expected a feature with a geometry. Export the file again.")
        geometry = feature.get("geometry") if feature.get("type") == "Feature" else feature
        name = _name(feature.get("properties"))
        for rings in _polygons(where, geometry):
            outer, *holes = (_ring(where, ring) for ring in rings)
            outer, holes = outer + origin, [hole + origin for hole in holes]
            if len(outer) >= 3:
                regions.append(Region((outer, *(hole for hole in holes if len(hole) >= 3)), name))
    if features and not regions:
        raise DataError(f"{path}: no feature has an area; points and lines cover nothing. Draw and export areas.")
    return regions


def _polygons(where: str, geometry: Any) -> Iterator[list[Any]]:
    """The rings of each polygon in a geometry."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind in WITHOUT_AREA:
        return
    parts = geometry.get("geometries" if kind == "GeometryCollection" else "coordinates") if kind else None
    if kind == "GeometryCollection" and isinstance(parts, list):
        for part in parts:
            if isinstance(part, dict) and part.get("type") == "GeometryCollection":
                raise DataError(f"{where}: a GeometryCollection inside another. Expected Polygon or MultiPolygon.")
            yield from _polygons(where, part)
        return
    polygons = [parts] if kind == "Polygon" else parts if kind == "MultiPolygon" else None
    if not isinstance(polygons, list) or not all(isinstance(rings, list) and rings for rings in polygons):
        raise DataError(
            f"{where}: expected a Polygon or MultiPolygon with its coordinates, got {kind or 'no geometry'}. "
            "Export the file again, or delete the feature."
        )
    yield from polygons


def _ring(where: str, points: Any) -> Ring:
    try:
        ring = np.asarray(points)
    except ValueError:  # points of different lengths
        ring = np.empty(0, object)
    if ring.dtype.kind not in "iuf" or ring.ndim != 2 or ring.shape[1] < 2:
        raise DataError(f"{where}: a ring is no list of [x, y] in pixels. Export the file again.")
    return _checked(where, ring[:, :2].astype(np.float64))


def _name(properties: Any) -> str:
    """QuPath's class of an object, or else the name it was given."""
    if not isinstance(properties, dict):
        return ""
    classification = properties.get("classification")
    named = classification.get("name") if isinstance(classification, dict) else None
    return str(named or properties.get("name") or "")


def read_asap_xml(path: str | Path) -> list[Region]:
    """Polygons of an ASAP annotation file, in level-0 pixels; the format of CAMELYON16's lesion annotations.

    Every annotation is a region, but those of the groups `_2` (CAMELYON16), `normal` (CAMELYON17) and `exclusion` are
    holes in all regions that they meet. The name is the group's, or the annotation's own where it is in none. Splines
    are taken as polygons through their points. Dots, measurements and annotations of fewer than three points have no
    area and cover nothing; a file of nothing else is an error.

    Raises:
        DataError: file and number of the annotation, what was expected and what to do.
    """
    path = Path(path)
    found = _annotations(path)
    outlines = [
        (group, _asap_ring(path, number, points))
        for number, (kind, group, points) in enumerate(found, start=1)
        if kind not in ASAP_WITHOUT_AREA
    ]
    outlines = [(group, ring) for group, ring in outlines if len(ring) >= 3]
    if found and not outlines:
        raise DataError(f"{path}: no annotation has an area; dots and lines cover nothing. Draw areas.")
    holes = [ring for group, ring in outlines if group.lower() in EXCLUDED]
    return [
        Region((ring, *(hole for hole in holes if _boxes_meet(ring, hole))), group)
        for group, ring in outlines
        if group.lower() not in EXCLUDED
    ]


Annotation = tuple[str, str, list[tuple[str, str, str]]]
"""Type, group (or name), and order, x and y of each point as written."""


def _annotations(path: Path) -> list[Annotation]:
    """Streamed by expat, so that no tree of a large file is built and a document type is refused where it begins."""
    found: list[Annotation] = []
    root: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if not root:
            root.append(tag)
        if tag == "Annotation":
            group = attributes.get("PartOfGroup", "")
            own = group if group not in ("", "None") else attributes.get("Name", "")
            found.append((attributes.get("Type", "Polygon"), own, []))
        elif tag == "Coordinate" and found:
            found[-1][2].append((attributes.get("Order", "0"), attributes.get("X", ""), attributes.get("Y", "")))

    def refuse(*_: object) -> None:
        raise DataError(f"{path}: has a document type (<!DOCTYPE ...>), which ASAP never writes, so it is not read.")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.StartDoctypeDeclHandler = start, refuse
    try:
        parser.Parse(_bytes(path), True)
    except expat.ExpatError as error:
        raise DataError(
            f"{path}: not XML ({error}). Expected ASAP annotations; copy or save the file again."
        ) from error
    if root != ["ASAP_Annotations"]:
        raise DataError(f"{path}: expected XML of ASAP (<ASAP_Annotations>), got <{root[0]}>. Save it with ASAP.")
    return found


def _asap_ring(path: Path, number: int, points: list[tuple[str, str, str]]) -> Ring:
    where = f"{path}, annotation {number}"
    try:
        numbers = np.array([[float(text) for text in point] for point in points], np.float64).reshape(-1, 3)
    except ValueError as error:
        raise DataError(f"{where}: Order, X and Y of a Coordinate must be numbers ({error}). Save it again.") from error
    return _checked(where, numbers[np.argsort(numbers[:, 0], kind="stable"), 1:])


def _checked(where: str, ring: Ring) -> Ring:
    if not (np.abs(ring) < FARTHEST).all():  # also NaN
        raise DataError(f"{where}: a coordinate is no pixel of an image. Expected level-0 pixels; export it again.")
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        return ring[:-1]
    return ring


def _bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file. Expected GeoJSON of QuPath or XML of ASAP.")
        if status.st_size > LARGEST_FILE:
            megabytes = f"{status.st_size / 2**20:.0f} MB"
            raise DataError(f"{path}: {megabytes} is too much for outlines of areas; export only those.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error


# --- filling ---------------------------------------------------------------------------------------------------------


def rasterize(
    regions: Sequence[Region], l0_size: tuple[int, int], shape: tuple[int, int], touched: bool = False
) -> NDArray[np.bool_]:
    """Mask (rows, cols) over a whole image.

    Args:
        regions: what to fill; parts outside the image are cut off.
        l0_size: width and height of the image in level-0 pixels.
        shape: rows and columns of the mask.
        touched: fill every cell that a region shares area with, however small, and not only those whose centre it
            covers. Where outline and hole cut the same cell, it counts.
    """
    return fill(_outlines(regions), (0, 0, *l0_size), shape, touched)


def covered(regions: Sequence[Region], boxes: ArrayLike) -> NDArray[np.float64]:
    """Share (k,) of each box (k, 4), level-0 x, y, width and height, that lies in the regions.

    Counted on 64 x 64 points of the box: exact to about the length of the outline in it over 64 of its side.
    """
    shares = np.zeros(len(np.reshape(boxes, (-1, 4))))
    for index, box, near in _near(regions, boxes):
        shares[index] = fill(near, box, (CELLS, CELLS), False).mean()
    return shares


def touching(regions: Sequence[Region], boxes: ArrayLike) -> NDArray[np.bool_]:
    """Which of the boxes (k, 4) share area with a region, however little."""
    touched = np.zeros(len(np.reshape(boxes, (-1, 4))), bool)
    for index, box, near in _near(regions, boxes):
        touched[index] = fill(near, box, (1, 1), True)[0, 0]
    return touched


def _outlines(regions: Sequence[Region]) -> list[Outline]:
    return [[np.concatenate([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in each.rings] for each in regions]


def _near(regions: Sequence[Region], boxes: ArrayLike) -> Iterator[tuple[int, tuple[float, ...], list[Outline]]]:
    """Each box that the bounding box of a region meets, by its index, with the outlines of these regions."""
    if not regions:
        return
    outlines = _outlines(regions)
    left, top, right, bottom = np.array(
        [[*region.rings[0].min(axis=0), *region.rings[0].max(axis=0)] for region in regions]
    ).T
    for index, box in enumerate(np.reshape(np.asarray(boxes, np.float64), (-1, 4)).tolist()):
        x, y, width, height = box
        meets = (left < x + width) & (right > x) & (top < y + height) & (bottom > y)
        if meets.any():
            yield index, tuple(box), [outline for outline, meet in zip(outlines, meets, strict=True) if meet]


def _boxes_meet(one: Ring, other: Ring) -> bool:
    return bool((one.min(axis=0) <= other.max(axis=0)).all() and (other.min(axis=0) <= one.max(axis=0)).all())
