"""IDRiD -> a manifest for keyhole: does a retina photograph show retinopathy, and does it need a referral?

    git clone --depth 1 https://github.com/imsaksham-c/EyeDisease_IDRiD
    python examples/retinopathy/prepare.py EyeDisease_IDRiD/dataset retina --width 1608

516 photographs of 4288 x 2848 px with a grade from 0 to 4 (Porwal et al., 2018, doi 10.3390/data3030025; CC BY 4.0).
Two tasks: any retinopathy (grade 1 and more), and referable (grade 2 and more). Official split: 413 to learn from, 103
to test; a fifth of the first are held out to choose the best model. `--width` makes the pictures smaller; the smallest
lesions are some ten pixels wide in the originals.

Traps: the same file names appear in the training and the test folder, with other eyes. Five photographs are twice in
the training set, and one is in both sets with different grades: copies are left out, of the last pair the one to learn
from. The lesion masks (81 photographs) number their pictures anew; they are found by comparing pictures, and 21 of the
81 are not among the graded ones. Some masks are palettes, some colours; an eye without a kind of lesion has no mask of
it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRADING, SEGMENTATION = "B. Disease Grading", "A. Segmentation"
IMAGES = "1. Original Images"
FOLDERS = {"test": "b. Testing Set", "train": "a. Training Set"}
"""Test first: of a photograph in both, the one to learn from is left out."""
LABELS = {
    "test": "b. IDRiD_Disease Grading_Testing Labels.csv",
    "train": "a. IDRiD_Disease Grading_Training Labels.csv",
}
MASKS = "2. All Segmentation Groundtruths"
OPTIC_DISC = "5. Optic Disc"
"""A folder of masks, but not of lesions."""
SAME = 2.0
"""Mean difference of two thumbnails, of 255, below which they show one photograph; others differ by 3 and more."""


def prepare(root: Path, out: Path, width: int | None) -> Counter[tuple[str, str]]:
    """Write pictures (if they are made smaller), lesion masks and the manifest; return how many have each grade."""
    tables = {split: root / GRADING / "2. Groundtruths" / name for split, name in LABELS.items()}
    for table in tables.values():
        if not table.is_file():
            raise SystemExit(f"{table}: not found. Give the folder with {SEGMENTATION!r} and {GRADING!r}.")
    out.mkdir(parents=True, exist_ok=True)
    grades = {split: _grades(table) for split, table in tables.items()}
    seen: dict[str, str] = {}
    images: dict[Path, tuple[str, str, int]] = {}  # -> name, split, grade
    for split, folder in FOLDERS.items():
        for number, (stem, grade) in enumerate(sorted(grades[split].items())):
            path, name = root / GRADING / IMAGES / folder / f"{stem}.jpg", f"{split}/{stem}"
            if not path.is_file():
                raise SystemExit(f"{path}: is missing. Unpack the data again.")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest in seen:
                print(f"left out: {name}, the same photograph as {seen[digest]}")
                continue
            seen[digest] = name
            images[path] = name, "val" if split == "train" and number % 5 == 0 else split, grade
    lesions = _lesions(root, list(images))
    counts: Counter[tuple[str, str]] = Counter()
    rows = []
    for path, (name, split, grade) in images.items():
        place, target = path.resolve(), out / "images" / f"{name}.jpg"
        if width is not None:
            place = target.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                with Image.open(path) as picture:
                    size = width, round(picture.height * width / picture.width)
                    picture.resize(size, Image.Resampling.LANCZOS).save(target, quality=95)
        mask = ""
        if path in lesions:
            mask = f"lesions/{name}.png"
            (out / mask).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(lesions[path]).save(out / mask)
        labels = ["yes" if grade >= least else "no" for least in (1, 2)]
        rows.append((name, place.as_posix(), *labels, split, mask))
        counts[split, f"grade {grade}"] += 1
        counts[split, "with lesion masks"] += bool(mask)
    with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("name", "image", "retinopathy", "referable", "split", "annotation"))
        table.writerows(rows)
    return counts


def _grades(path: Path) -> dict[str, int]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return {
            row["Image name"].strip(): int(row["Retinopathy grade"])
            for row in csv.DictReader(file)
            if row["Image name"]
        }


def _lesions(root: Path, images: list[Path]) -> dict[Path, NDArray[np.bool_]]:
    """Return the union of the lesion masks of each graded photograph that has some."""
    thumbnails = np.stack([_thumbnail(path) for path in images])
    found = {}
    for split in FOLDERS.values():
        for path in sorted((root / SEGMENTATION / IMAGES / split).glob("*.jpg")):
            apart = np.abs(thumbnails - _thumbnail(path)).mean(axis=(1, 2, 3))
            if apart.min() >= SAME:
                continue
            union: NDArray[np.bool_] | None = None
            for mask in (root / SEGMENTATION / MASKS / split).glob(f"*/{path.stem}_*.tif"):
                if mask.parent.name != OPTIC_DISC:
                    with Image.open(mask) as picture:  # of one kind of file a palette, of another colours
                        part = np.asarray(picture if picture.mode in ("P", "L", "1") else picture.convert("RGB")) > 0
                    part = part.reshape(*part.shape[:2], -1).any(axis=2)
                    union = part if union is None else union | part
            if union is not None:
                found[images[int(apart.argmin())]] = union
    return found


def _thumbnail(path: Path) -> NDArray[np.float32]:
    with Image.open(path) as picture:
        picture.draft("RGB", (536, 356))
        return np.asarray(picture.convert("RGB").resize((134, 89)), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, help=f"the folder with {SEGMENTATION!r} and {GRADING!r}")
    parser.add_argument("out", type=Path, help="folder to write: manifest.csv, lesions, smaller images")
    parser.add_argument("--width", type=int, help="make the pictures so wide, in pixels; default: use them as they are")
    options = parser.parse_args()
    counts = prepare(options.root.resolve(), options.out.resolve(), options.width)
    for split in ("train", "val", "test"):
        print(
            f"{split}: "
            + ", ".join(f"{count} {what}" for (part, what), count in sorted(counts.items()) if part == split)
        )
    print(f"written: {options.out / 'manifest.csv'}")


if __name__ == "__main__":
    main()
