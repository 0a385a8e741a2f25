"""Polygons: read from QuPath's and ASAP's files, filled, and how much of a box they cover."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyhole.errors import DataError
from keyhole.patches.foreground.region_files import read_regions
from keyhole.patches.foreground.regions import Region, covered, rasterize, touching

Rectangle = tuple[int, int, int, int]
SIDE = 40


def ring(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], np.float64)


def rectangle(x: float, y: float, width: float, height: float, *holes: tuple[float, float, float, float]) -> Region:
    return Region((ring(x, y, width, height), *(ring(*hole) for hole in holes)))


def painted(rectangles: list[Rectangle], holes: list[Rectangle] = []) -> np.ndarray:  # noqa: B006 - never changed
    """The same by slices, each pixel of the image a cell."""
    mask = np.zeros((SIDE, SIDE), bool)
    for x, y, width, height in rectangles:
        mask[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)] = True
    for x, y, width, height in holes:
        mask[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)] = False
    return mask


place, length = st.integers(-10, SIDE + 5), st.integers(1, SIDE)
rectangles = st.lists(st.tuples(place, place, length, length), max_size=4)


@given(rectangles)
@settings(max_examples=60, deadline=None)
def test_rectangles_on_pixel_borders_fill_their_very_pixels_together(boxes: list[Rectangle]) -> None:
    regions = [rectangle(*box) for box in boxes]

    assert (rasterize(regions, (SIDE, SIDE), (SIDE, SIDE)) == painted(boxes)).all()
    assert (rasterize(regions, (SIDE, SIDE), (SIDE, SIDE), touched=True) == painted(boxes)).all()


@given(st.tuples(place, place, length, length), rectangles)
@settings(max_examples=60, deadline=None)
def test_what_is_in_any_hole_is_not_in_the_region(box: Rectangle, holes: list[Rectangle]) -> None:
    regions = [rectangle(*box, *holes)]

    assert (rasterize(regions, (SIDE, SIDE), (SIDE, SIDE)) == painted([box], holes)).all()
    assert (rasterize(regions, (SIDE, SIDE), (SIDE, SIDE), touched=True) == painted([box], holes)).all()


polygons = st.lists(st.tuples(st.floats(-5, SIDE + 5), st.floats(-5, SIDE + 5)), min_size=3, max_size=8).map(
    lambda points: Region((np.array(points, np.float64),))
)


@given(polygons)
@settings(max_examples=60, deadline=None)
def test_a_touched_cell_is_one_that_holds_some_of_the_region_at_a_fine_look(region: Region) -> None:
    fine = rasterize([region], (SIDE, SIDE), (SIDE * 16, SIDE * 16)).reshape(SIDE, 16, SIDE, 16).any(axis=(1, 3))
    centres = rasterize([region], (SIDE, SIDE), (SIDE, SIDE))
    touched = rasterize([region], (SIDE, SIDE), (SIDE, SIDE), touched=True)

    assert not (fine & ~touched).any()
    assert not (centres & ~touched).any()
    # and never one that is nowhere near: half a cell's diagonal from a filled one or an edge
    edges = np.stack([region.rings[0], np.roll(region.rings[0], -1, axis=0)], axis=1)
    steps = np.linspace(0, 1, 400)[None, :, None]
    line = (edges[:, :1] * (1 - steps) + edges[:, 1:] * steps).reshape(-1, 2)
    rows, columns = np.nonzero(touched & ~centres)
    apart = [
        np.abs(line - (column + 0.5, row + 0.5)).max(axis=1).min() for row, column in zip(rows, columns, strict=True)
    ]
    assert all(distance <= 0.5 + 0.1 for distance in apart)


@given(polygons, st.integers(-20, 20), st.integers(-20, 20))
@example(Region((np.array([(0, 0), (0, 1), (28.747641206943257, 28.747641206943257)]),)), 4, 0)
@settings(max_examples=40, deadline=None)
def test_a_region_that_moves_with_its_box_covers_the_same_share(region: Region, right: int, down: int) -> None:
    moved = Region((region.rings[0] + (right * 64.0, down * 64.0),))

    here = covered([region], [[0, 0, SIDE, SIDE]])
    there = covered([moved], [[right * 64, down * 64, SIDE, SIDE]])

    # Coordinates are rounded by their size, so that points that lie on the outline fall to either side of it.
    outline = np.linalg.norm(np.diff(region.rings[0], axis=0, append=region.rings[0][:1]), axis=1).sum()
    assert here == pytest.approx(there, abs=outline / (64 * SIDE))


def test_a_polygon_of_any_shape_has_its_area() -> None:
    turn = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    disc = Region((np.stack([500 + 300 * np.cos(turn), 500 + 300 * np.sin(turn)], axis=1),))

    mask = rasterize([disc], (1000, 1000), (500, 500))

    assert mask.sum() * 4 == pytest.approx(np.pi * 300**2, rel=0.002)
    assert covered([disc], [[0, 0, 1000, 1000]])[0] == pytest.approx(np.pi * 0.09, abs=0.005)


def test_a_box_is_covered_by_what_lies_in_it_and_counts_it_once() -> None:
    regions = [rectangle(0, 0, 100, 100, (0, 0, 50, 50)), rectangle(50, 0, 50, 100)]
    boxes = [[0, 0, 100, 100], [0, 0, 50, 50], [50, 50, 50, 50], [75, 50, 50, 50], [100, 0, 10, 10], [-50, 50, 100, 50]]

    assert covered(regions, boxes).tolist() == [0.75, 0, 1, 0.5, 0, 0.5]
    assert touching(regions, boxes).tolist() == [True, False, True, True, False, True]
    assert covered([], boxes).tolist() == [0] * 6
    assert covered(regions, np.empty((0, 4))).shape == (0,)


def test_the_smallest_region_touches_its_cell_and_no_other() -> None:
    speck = rectangle(1000.1, 2000.2, 0.01, 0.01)

    assert not rasterize([speck], (4096, 4096), (16, 16)).any()
    assert np.argwhere(rasterize([speck], (4096, 4096), (16, 16), touched=True)).tolist() == [[7, 3]]
    assert touching([speck], [[768, 1792, 256, 256], [1024, 1792, 256, 256]]).tolist() == [True, False]


# --- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


SQUARE = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]
HOLE = [[25, 25], [75, 25], [75, 75], [25, 75], [25, 25]]


def feature(geometry: object, **properties: object) -> dict[str, object]:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def test_geojson_in_every_wrapping_is_the_same_polygon(tmp_path: Path) -> None:
    geometry = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}
    one = feature(geometry, objectType="annotation", classification={"name": "Tumor", "color": [200, 0, 0]}, name="a")
    wrappings = {
        "collection": {"type": "FeatureCollection", "features": [one]},
        "list": [one],
        "feature": one,
        "geometry": geometry,
        "collected": {"type": "GeometryCollection", "geometries": [geometry]},
        "deep": feature({"type": "Polygon", "coordinates": [[[*point, 0.0] for point in r] for r in (SQUARE, HOLE)]}),
    }
    for name, content in wrappings.items():
        (region,) = read_regions(write(tmp_path, f"{name}.geojson", content))
        assert [each.tolist() for each in region.rings] == [SQUARE[:-1], HOLE[:-1]], name
        assert region.name == ("Tumor" if name in ("collection", "list", "feature") else ""), name


def test_a_multipolygon_is_a_region_per_polygon_and_names_fall_back(tmp_path: Path) -> None:
    two = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [[[x + 200, y] for x, y in SQUARE]]]}
    path = write(tmp_path, "a.geojson", [feature(two, name="nest"), feature({"type": "Point", "coordinates": [1, 2]})])

    regions = read_regions(path)

    assert [region.name for region in regions] == ["nest", "nest"]
    assert [len(region.rings) for region in regions] == [2, 1]
    assert covered(regions, [[0, 0, 400, 100]])[0] == 0.4375


def test_a_file_that_says_no_region_has_none(tmp_path: Path) -> None:
    assert read_regions(write(tmp_path, "a.geojson", {"type": "FeatureCollection", "features": []})) == []
    assert read_regions(write(tmp_path, "a.xml", "<ASAP_Annotations><Annotations/></ASAP_Annotations>")) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "expected GeoJSON"),
        ([3], "feature 1: expected a feature"),
        ([feature({"type": "Point", "coordinates": [1, 2]})], "no feature has an area"),
        ([feature(None)], "feature 1: expected a Polygon or MultiPolygon with its coordinates, got no geometry"),
        ([feature({"type": "Circle", "coordinates": [1, 2]})], "got Circle"),
        ([feature({"type": "Polygon", "coordinates": []})], "expected a Polygon"),
        ([feature({"type": "Polygon"})], "expected a Polygon"),
        ([feature({"type": "Polygon", "coordinates": [SQUARE]}), feature({"type": "Polygon", "coordinates": [[[1]]]})], "feature 2: a ring"),
        ([feature({"type": "Polygon", "coordinates": [[["1", "2"], ["3", "4"], ["5", "6"]]]})], "a ring is not a list"),
        ([feature({"type": "Polygon", "coordinates": [[[1, 2], [3, 4, 5], [5, 6]]]})], "a ring is not a list"),
        ('[{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [1, 1]]]}]', "not a pixel of an image"),
        ('[{"type": "Polygon", "coordinates": [[[0, 0], [1e300, 1], [1, 1]]]}]', "not a pixel of an image"),
        ('[{"type": "Polygon", "coordinates": [[[0, 0], [' + "9" * 400 + ", 1], [1, 1]]]}]", "a ring is not a list"),
    ],
)  # fmt: skip
def test_geojson_that_cannot_be_meant_is_one_line_with_file_and_feature(
    tmp_path: Path, content: object, said: str
) -> None:
    path = write(tmp_path, "bad.geojson", content)
    with pytest.raises(DataError, match=said) as error:
        read_regions(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def asap(*annotations: tuple[str, str, list[tuple[float, float]]], before: str = "") -> str:
    """ASAP's layout; points are written in reverse, since Order says where each belongs."""
    lines = [f'<?xml version="1.0"?>{before}<ASAP_Annotations><Annotations>']
    for number, (kind, group, points) in enumerate(annotations):
        lines.append(f'<Annotation Name="Annotation {number}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">')
        lines.append("<Coordinates>")
        lines += [f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, (x, y) in reversed([*enumerate(points)])]
        lines.append("</Coordinates></Annotation>")
    lines.append('</Annotations><AnnotationGroups><Group Name="_0" PartOfGroup="None" Color="#00ff00"><Attributes />')
    return "\n".join([*lines, "</Group></AnnotationGroups></ASAP_Annotations>"])


SQUARE_POINTS = [(0.5, 0.0), (100.0, 0.0), (100.0, 100.0), (0.5, 100.0)]


def test_asap_groups_0_and_1_are_regions_and_2_is_cut_out_of_them(tmp_path: Path) -> None:
    inner = [(25.0, 25.0), (75.0, 25.0), (75.0, 75.0), (25.0, 75.0)]
    far = [(x + 300, y) for x, y in inner]
    path = write(
        tmp_path,
        "tumor_001.xml",
        asap(
            ("Polygon", "_0", SQUARE_POINTS), ("Polygon", "_2", inner), ("Spline", "_1", far), ("Dot", "_0", [(1, 1)])
        ),
    )

    first, second = read_regions(path)

    assert (first.name, second.name) == ("_0", "_1")
    assert first.rings[0].tolist() == [list(point) for point in SQUARE_POINTS]
    assert len(first.rings) == 2
    assert len(second.rings) == 1
    assert covered([first, second], [[25, 25, 50, 50], [325, 25, 50, 50]]).tolist() == [0, 1]


def test_annotations_of_other_groups_and_of_none_are_regions(tmp_path: Path) -> None:
    path = write(tmp_path, "a.xml", asap(("Polygon", "Tumor", SQUARE_POINTS), ("Polygon", "None", SQUARE_POINTS)))
    assert [region.name for region in read_regions(path)] == ["Tumor", "Annotation 1"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not XML"),
        ("<ASAP_Annotations>", "not XML"),
        ("<svg/>", "expected XML of ASAP"),
        (asap(("Dot", "_0", [(1, 1)])), "no annotation has an area"),
        (asap(("Polygon", "_0", [(0, 0), (1, 1)])), "no annotation has an area"),
        (asap(("Polygon", "_0", SQUARE_POINTS)).replace('X="0.5"', 'X="0,5"'), "annotation 1: Order, X and Y"),
        (asap(("Polygon", "_0", SQUARE_POINTS)).replace('X="0.5"', ""), "annotation 1: Order, X and Y"),
        (asap(("Polygon", "_0", SQUARE_POINTS)).replace('X="0.5"', 'X="inf"'), "not a pixel of an image"),
        (asap(before='<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]>'), "document type"),
    ],
)
def test_xml_that_is_not_asaps_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = write(tmp_path, "bad.xml", content)
    with pytest.raises(DataError, match=said) as error:
        read_regions(path)
    assert str(error.value).startswith(str(path))


def test_a_document_type_is_refused_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "wide.xml"
    path.write_bytes('<!DOCTYPE a [<!ENTITY b "ha">]><ASAP_Annotations>&b;</ASAP_Annotations>'.encode("utf-16"))
    with pytest.raises(DataError, match="document type"):
        read_regions(path)


def test_a_file_that_is_not_there_too_large_or_of_another_kind_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_regions(tmp_path / "none.xml")
    with pytest.raises(DataError, match=r"\.geojson .* and \.xml"):
        read_regions(write(tmp_path, "a.png", ""))
    os.mkfifo(tmp_path / "pipe.xml")
    with pytest.raises(DataError, match="not a regular file"):
        read_regions(tmp_path / "pipe.xml")
    huge = tmp_path / "huge.geojson"
    with huge.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="too much for outlines"):
        read_regions(huge)


def test_an_outline_of_very_many_points_is_filled_in_little_memory() -> None:
    rng = np.random.default_rng(0)
    scribble = Region((rng.uniform(0, 1000, (8_000, 2)),))

    tracemalloc.start()
    try:
        mask = rasterize([scribble], (1000, 1000), (500, 500), touched=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert mask.mean() > 0.9
    assert peak < 200 * 2**20  # several times as much where all edges are worked on at once
