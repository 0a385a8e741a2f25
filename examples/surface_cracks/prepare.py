"""KolektorSDD -> a manifest for keyhole: does the surface of a commutator have a crack?

    git clone --depth 1 https://github.com/stoy95536/KolektorSDD_Yolov8_Datasets
    python examples/surface_cracks/prepare.py KolektorSDD_Yolov8_Datasets cracks.csv

399 photographs of 500 x 1,235 to 1,285 px of the plastic of electrical commutators, eight of each of 50 items, 52 of
them with a crack (Tabernik et al., 2020, doi 10.1007/s10845-019-01476-x; CC BY-NC-SA 4.0). The repository has them
numbered, with outlines of the cracks.

Traps: photographs of one item look alike, so whole items are held out, a third of them for testing; the split of the
repository cuts through an item. Two items are there twice, pixel for pixel; the copies are left out. One item has seven
photographs, and the numbers alone do not say which of four it is; these four stay together.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

from PIL import Image

COUNT, PER_ITEM = 399, 8
TOGETHER = range(104, 135)
"""Photographs of four items, one of which has seven."""
SPLITS = ("test", "val", "train", "test", "train", "train")
"""Of the items, in turn: a third to test, a sixth to choose the best epoch, half to learn from."""


def prepare(root: Path, out: Path) -> Counter[tuple[str, str]]:
    """Write the manifest and, beside it, outlines of the cracks; return how many photographs each split and class has.

    Raises:
        SystemExit: the photographs are not those of the repository.
    """
    data, outlines = root / "Datasets", out.with_suffix("")
    images = sorted((data / "images").glob("*/*.jpg"), key=lambda path: path.name)
    if [path.stem for path in images] != [f"{number:03d}" for number in range(COUNT)]:
        found = f"expected 000.jpg to 398.jpg, found {len(images)} files"
        raise SystemExit(f"{data / 'images'}: {found}. Give the unpacked repository.")
    outlines.mkdir(parents=True, exist_ok=True)
    counts: Counter[tuple[str, str]] = Counter()
    seen: dict[str, str] = {}
    rows = []
    for number, image in enumerate(images):
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        if digest in seen:
            print(f"left out: {image.name}, the same file as {seen[digest]}")
            continue
        seen[digest] = image.name
        lines = (data / "labels" / image.parent.name / f"{image.stem}.txt").read_text(encoding="utf-8").splitlines()
        label, outline = "no", ""
        if lines:
            with Image.open(image) as picture:
                size = picture.size
            path = outlines / f"{image.stem}.geojson"
            path.write_text(json.dumps(_geojson(lines, size)), encoding="utf-8")
            label, outline = "yes", os.path.relpath(path, out.parent)
        item = item_of(number)
        split = "train" if number in TOGETHER else SPLITS[item % len(SPLITS)]
        rows.append((image.stem, os.path.relpath(image, out.parent), label, f"item {item}", split, outline))
        counts[split, label] += 1
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("name", "image", "crack", "group", "split", "annotation"))
        table.writerows(rows)
    return counts


def item_of(number: int) -> int:
    """Return the item of a photograph; the four of `TOGETHER` count as one.

    >>> [item_of(number) for number in (0, 7, 8, 103, 104, 134, 135, 143)]
    [0, 0, 1, 12, 13, 13, 14, 15]
    """
    if number < TOGETHER.start:
        return number // PER_ITEM
    first = TOGETHER.start // PER_ITEM
    return first if number in TOGETHER else first + 1 + (number - TOGETHER.stop) // PER_ITEM


def _geojson(lines: list[str], size: tuple[int, int]) -> dict[str, object]:
    """Return outlines, each a kind and corners x y in shares of the width and height, in pixels."""
    features = []
    for line in lines:
        values = [float(word) for word in line.split()[1:]]
        ring = [[x * size[0], y * size[1]] for x, y in zip(values[::2], values[1::2], strict=True)]
        features.append(
            {
                "type": "Feature",
                "properties": {"classification": {"name": "crack"}},
                "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
            }
        )
    return {"type": "FeatureCollection", "features": features}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, help="the unpacked repository")
    parser.add_argument("out", type=Path, help="manifest to write, such as cracks.csv")
    options = parser.parse_args()
    counts = prepare(options.root.resolve(), options.out.resolve())
    for split in ("train", "val", "test"):
        print(f"{split}: {counts[split, 'yes']} with a crack, {counts[split, 'no']} without")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
