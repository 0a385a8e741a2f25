"""DeepPCB -> a manifest for keyhole: which of six defects does a circuit board have?

    git clone --depth 1 https://github.com/tangsanli5201/DeepPCB
    python examples/circuit_boards/prepare.py DeepPCB boards.csv

1,500 binarized pictures of 640 x 640 px, each with a defect-free template and boxes of its defects (Tang et al., 2019,
arXiv 1902.06197; MIT). Official split: 1,000 boards to learn from, 500 to test; a fifth of the first are held out to
choose the best model. A defect covers 0.3 % of the picture.

Traps: the lists name `X.jpg`, the files are `X_test.jpg` (the board) and `X_temp.jpg` (the template, not used here,
since its grey values alone tell it from a board); a folder has neighbouring pictures of one panel, and the official
split puts seven of the eleven folders into both sets.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections import Counter
from pathlib import Path

DEFECTS = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
"""Kinds 1 to 6 of the annotation files."""
LISTS = {"trainval": "trainval.txt", "test": "test.txt"}


def prepare(root: Path, out: Path) -> Counter[tuple[str, str]]:
    """Write the manifest and, beside it, outlines of the defects; return how many boards have each, by split."""
    data, outlines = root / "PCBData", out.with_suffix("")
    for name in LISTS.values():
        if not (data / name).is_file():
            raise SystemExit(f"{data / name}: not found. Give the unpacked repository.")
    outlines.mkdir(parents=True, exist_ok=True)
    counts: Counter[tuple[str, str]] = Counter()
    rows = []
    for part, name in LISTS.items():
        lines = (data / name).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(line for line in lines if line.strip()):
            picture, boxes = (data / word for word in line.split())
            image = picture.with_name(f"{picture.stem}_test{picture.suffix}")
            if not image.is_file() or not boxes.is_file():
                raise SystemExit(f"{data / name}: {line!r} has no {image.name} or {boxes.name}. Unpack the data again.")
            split = "test" if part == "test" else "val" if number % 5 == 0 else "train"
            found = [[int(value) for value in row.split()] for row in boxes.read_text().splitlines() if row.strip()]
            kinds = sorted({DEFECTS[box[4] - 1] for box in found})
            outline = outlines / f"{picture.stem}.geojson"
            outline.write_text(json.dumps(_geojson(found)), encoding="utf-8")
            places = [os.path.relpath(path, out.parent) for path in (image, outline)]
            rows.append((picture.stem, places[0], "|".join(kinds) or "|", split, places[1] if found else ""))
            counts.update((split, kind) for kind in (*kinds, "boards"))
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("name", "image", "defects", "split", "annotation"))
        table.writerows(rows)
    return counts


def _geojson(boxes: list[list[int]]) -> dict[str, object]:
    """Return boxes (left, top, right, bottom, kind) as outlines."""
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {"classification": {"name": DEFECTS[kind - 1]}},
                "geometry": {"type": "Polygon", "coordinates": [[[x, y], [u, y], [u, v], [x, v], [x, y]]]},
            }
            for x, y, u, v, kind in boxes
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, help="the unpacked repository")
    parser.add_argument("out", type=Path, help="manifest to write, such as boards.csv")
    options = parser.parse_args()
    counts = prepare(options.root.resolve(), options.out.resolve())
    for split in ("train", "val", "test"):
        with_defect = ", ".join(f"{counts[split, kind]} {kind}" for kind in DEFECTS)
        print(f"{split}: {counts[split, 'boards']} boards; {with_defect}")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
