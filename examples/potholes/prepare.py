"""Cracks and Potholes in Road Images -> a manifest for keyhole: does a road photograph show a pothole?

    git clone --depth 1 https://github.com/biankatpas/Cracks-and-Potholes-in-Road-Images-Dataset
    python examples/potholes/prepare.py Cracks-and-Potholes-in-Road-Images-Dataset potholes.csv

2,235 photographs of 1024 x 640 px from Brazilian highways (Passos et al., 2020, doi 10.17632/t576ydh9v8; MIT), each in
a folder with its masks. A pothole is present where its mask is not empty.

Traps: photographs of one road look alike, and on some roads nearly all show potholes, so whole roads are held out
(`TEST`, `VAL`, or the roads of `--test`); a random split would measure how well roads are told apart. One photograph is
there twice; the copy is left out. Sizes differ: those of the Federal District are 630 px high.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TEST = ("RS386", "DF070")
VAL = ("DF080", "DF020")
"""Roads, by state and number, so that each split has many and few potholes; all others are learned from."""


def prepare(root: Path, out: Path, test: Sequence[str] = TEST) -> Counter[tuple[str, str]]:
    """Write the manifest, with some roads to test on; return how many photographs each split and class has."""
    folders = sorted(path for path in (root / "Dataset").glob("*") if path.is_dir())
    if not folders:
        raise SystemExit(f"{root / 'Dataset'}: no folders of photographs. Give the unpacked repository.")
    counts: Counter[tuple[str, str]] = Counter()
    seen: dict[str, str] = {}
    rows = []
    for folder in folders:
        image, mask = folder / f"{folder.name}_RAW.jpg", folder / f"{folder.name}_POTHOLE.png"
        found = re.match(r"\d+_([A-Z]{2})_(\d{3})_", folder.name)
        if found is None or not image.is_file() or not mask.is_file():
            raise SystemExit(f"{folder}: expected a folder like 820316_ES_259_259ES000000_03065 with _RAW and _POTHOLE")
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        if digest in seen:
            print(f"left out: {image.name}, the same file as {seen[digest]}")
            continue
        seen[digest] = image.name
        road = "".join(found.groups())
        with Image.open(mask) as picture:
            present = bool(np.asarray(picture).any())
        label, split = ("yes" if present else "no"), "test" if road in test else "val" if road in VAL else "train"
        places = [os.path.relpath(path, out.parent) for path in (image, mask)]
        rows.append((folder.name, places[0], label, road, split, places[1] if present else ""))
        counts[split, label] += 1
    roads = {row[3] for row in rows}
    if unknown := [road for road in test if road not in roads]:
        raise SystemExit(f"--test: no photograph is of {', '.join(unknown)}. The roads are {', '.join(sorted(roads))}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("name", "image", "pothole", "group", "split", "annotation"))
        table.writerows(rows)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, help="the unpacked repository")
    parser.add_argument("out", type=Path, help="manifest to write, such as potholes.csv")
    parser.add_argument("--test", nargs="+", default=TEST, metavar="ROAD", help=f"to test on; default {' '.join(TEST)}")
    options = parser.parse_args()
    counts = prepare(options.root.resolve(), options.out.resolve(), options.test)
    for split in ("train", "val", "test"):
        print(f"{split}: {counts[split, 'yes']} with a pothole, {counts[split, 'no']} without")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
