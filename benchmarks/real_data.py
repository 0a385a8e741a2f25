"""What the arms of `real_images.py` read: part of a data set, and stored features."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keyhole.data.item import Item
from keyhole.data.manifest import Manifest
from keyhole.util.files import csv_text, write_atomic

Row = dict[str, str]
FILES = ("image", "annotation")
NOT_LABELS = (*FILES, "name", "split")


def rows_of(manifest: Path) -> list[Row]:
    """Return the rows of a manifest, its paths made absolute."""
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: str(manifest.parent.resolve() / row[name]) for name in FILES if row.get(name)}
    return rows


def write_part(manifest: Path, counts: Mapping[str, int | None], out: Path) -> Path:
    """Write a manifest with `counts` images of each split (None: all), the labels and groups in proportion.

    Groups are left out of it, so that intervals are over images: they compare arms on the same few roads.
    """
    rows = rows_of(manifest)
    kept: list[Row] = []
    for split, count in counts.items():
        each = sorted((row for row in rows if row["split"] == split), key=_in_proportion)
        count = len(each) if count is None else min(count, len(each))
        kept += [each[number * len(each) // count] for number in range(count)]
    return write_rows(out, [{name: value for name, value in row.items() if name != "group"} for row in kept])


def _in_proportion(row: Row) -> tuple[list[str], str]:
    """Images with equal labels, and of one group, are neighbours; among them the order is arbitrary, but fixed."""
    return [row[name] for name in row if name not in NOT_LABELS], hashlib.sha256(row["name"].encode()).hexdigest()


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(rows[0])
    return write_atomic(path, csv_text([names, *([row[name] for name in names] for row in rows)]))


def image_side(manifest: Path) -> float:
    """Return the side of a square of as many pixels as an image has, in the median."""
    sides = []
    for row in rows_of(manifest):
        with Image.open(row["image"]) as image:
            sides.append((image.width * image.height) ** 0.5)
    return float(np.median(sides))


def patch_counts(items: Sequence[Item]) -> list[int]:
    """Return how many features each image has."""
    counts = []
    for item in items:
        with h5py.File(item.features) as file:
            counts.append(len(file["features"]))
    return counts


def write_drawn(manifest: Path, stored: Manifest, m: int, draws: int, seed: int, folder: Path) -> Path:
    """Write features of m patches of each image, drawn at random, and their manifest; training images are drawn often.

    Args:
        manifest: of the images.
        stored: the same images with the features of all patches.
        m: patches to draw.
        draws: number of times that each training image is drawn; the others are drawn once.
        seed: of the draws.
        folder: to write to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(seed), []
    features = {item.name: item.features for item in stored.items}
    for row in rows_of(manifest):
        with h5py.File(features[row["name"]]) as source:
            for number in range(draws if row["split"] == "train" else 1):
                target = folder / f"{file_name(row)}-{number}.h5"
                n = len(source["features"])
                index = np.sort(rng.choice(n, min(m, n), replace=False))
                with h5py.File(target, "w") as file:
                    for part in ("features", "coords"):
                        file[part] = source[part][:][index]
                        file[part].attrs.update(source[part].attrs)
                kept = {name: value for name, value in row.items() if name != "annotation"}
                rows.append(kept | {"name": target.stem, "image": str(target)})
    return write_rows(folder / "images.csv", rows)


def mean_features(items: Sequence[Item]) -> NDArray[np.float32]:
    """Return the mean feature over all patches of each image (b f)."""
    means = []
    for item in items:
        with h5py.File(item.features) as file:
            means.append(file["features"][:].astype(np.float32).mean(axis=0))
    return np.stack(means)


def file_name(row: Row) -> str:
    return row["name"].replace("/", "-")
