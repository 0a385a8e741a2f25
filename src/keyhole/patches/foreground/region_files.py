"""Files of polygons: GeoJSON of QuPath and XML of ASAP."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from keyhole.errors import DataError
from keyhole.patches.foreground.regions import Region, Ring

GEOJSON_SUFFIXES = (".geojson", ".json")
ASAP_SUFFIX = ".xml"
ASAP_HOLES = frozenset({"_2", "normal", "exclusion"})
"""Groups of ASAP that are cut out of the others: `_2` is CAMELYON16's, `normal` CAMELYON17's. In lower case."""
GEOJSON_WITHOUT_AREA = frozenset({"Point", "MultiPoint", "LineString", "MultiLineString"})
ASAP_WITHOUT_AREA = frozenset({"Dot", "PointSet", "Measurement"})
MAX_FILE_BYTES = 128 * 2**20
"""The outlines of a slide take a hundredth of this."""
MAX_COORDINATE = 1e8
"""Level-0 pixels; no image is as large, and products of coordinates stay exact enough."""


def read_regions(path: str | Path, origin: tuple[int, int] = (0, 0)) -> list[Region]:
    """Read the regions of a GeoJSON (QuPath) or XML (ASAP) file; its suffix says which it is.

    Args:
        path: the file.
        origin: `Image.qupath_origin` of the image, from which GeoJSON counts; ASAP counts from the corner of level 0.

    Returns:
        Regions in level-0 pixels.

    Raises:
        DataError: another suffix, nothing that has an area, or a broken file; names the feature or annotation.

    >>> square = '{"type": "Polygon", "coordinates": [[[0, 0], [30, 0], [30, 30], [0, 30]]]}'
    >>> _ = Path("square.geojson").write_text(square)
    >>> len(read_regions("square.geojson"))
    1
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


def read_geojson(path: Path, origin: tuple[int, int] = (0, 0)) -> list[Region]:
    """Read the polygons of a GeoJSON file as QuPath exports it, with coordinates that count from `origin`.

    The file has a FeatureCollection, a list of features, one feature or one geometry. Points, lines and rings of fewer
    than three points have no area; a file with nothing else is an error, one without any feature has no region.
    """
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
    """Yield the rings of each polygon in a geometry."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind in GEOJSON_WITHOUT_AREA:
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
        raise DataError(f"{where}: a ring is not a list of [x, y] in pixels. Export the file again.")
    return _checked(where, ring[:, :2].astype(np.float64))


def _name(properties: Any) -> str:
    """Return QuPath's class of an object, or else its name."""
    if not isinstance(properties, dict):
        return ""
    classification = properties.get("classification")
    named = classification.get("name") if isinstance(classification, dict) else None
    return str(named or properties.get("name") or "")


def read_asap_xml(path: Path) -> list[Region]:
    """Read the polygons of an ASAP annotation file, the format of CAMELYON16's lesion annotations.

    Annotations of the groups `ASAP_HOLES` are holes in all regions that they meet. The name is that of the group, or of
    the annotation if it is in none. Splines are taken as polygons through their points.
    """
    found = _annotations(path)
    outlines = [
        (group, ring)
        for number, (kind, group, points) in enumerate(found, start=1)
        if kind not in ASAP_WITHOUT_AREA and len(ring := _asap_ring(path, number, points)) >= 3
    ]
    if found and not outlines:
        raise DataError(f"{path}: no annotation has an area; dots and lines cover nothing. Draw areas.")
    holes = [ring for group, ring in outlines if group.lower() in ASAP_HOLES]

    def meet(one: Ring, other: Ring) -> bool:
        return bool((one.min(0) <= other.max(0)).all() and (other.min(0) <= one.max(0)).all())

    return [
        Region((ring, *(hole for hole in holes if meet(ring, hole))), group)
        for group, ring in outlines
        if group.lower() not in ASAP_HOLES
    ]


def _annotations(path: Path) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """Return kind and group, or else name, of each annotation, and order, x and y of its points as written.

    expat builds no tree of a large file, and can refuse a document type where it begins.
    """
    found: list[tuple[str, str, list[tuple[str, str, str]]]] = []
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
    if not (np.abs(ring) < MAX_COORDINATE).all():  # also NaN
        raise DataError(f"{where}: a coordinate is not a pixel of an image. Expected level-0 pixels; export it again.")
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        return ring[:-1]
    return ring


def _bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file. Expected GeoJSON of QuPath or XML of ASAP.")
        if status.st_size > MAX_FILE_BYTES:
            megabytes = f"{status.st_size / 2**20:.0f} MB"
            raise DataError(f"{path}: {megabytes} is too much for outlines of areas; export only those.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error
