"""Swedish Traffic Signs as published: which of 50, 70 and 80 km/h a photograph of a road shows, or that it is empty.

The data set (Larsson and Felsberg, SCIA 2011) has two folders, each with an annotations.txt of lines

    name.jpg:VISIBILITY, x_max, y_max, x_min, y_min, TYPE, NAME;...

in pixels; `MISC_SIGNS` among the signs stands for further ones without a place. Of the annotated images, 747 in Set1
are for training and 684 in Set2 for testing, as Katharopoulos and Fleuret (ICML 2019) chose them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import PIL.Image

from keyhole.datasets.new_folder import NewFolder
from keyhole.errors import DataError
from keyhole.images import Box, open_image
from keyhole.util.files import atomic_file, relative_path, write_atomic
from keyhole.util.wording import counted, listed

SETS = ("Set1", "Set2")
TrainSet = Literal["auto", "Set1", "Set2"]
SPLITS = ("train", "test")
PUBLISHED = {"train": 747, "test": 684}
"""Number of images of each split."""
MD5 = {"Set1": "9106a905a86209c95dc9b51d12f520d6", "Set2": "09debbc67f6cd89c1e2a2688ad1d03ca"}
"""Checksums of the original files annotations.txt."""
LIMITS = {"50_SIGN": "50", "70_SIGN": "70", "80_SIGN": "80"}
"""Names of the signs that are told apart, and their classes."""
EMPTY = "empty"
CLASSES = (EMPTY, *LIMITS.values())
VISIBILITIES = ("VISIBLE", "BLURRED", "SIDE_ROAD", "OCCLUDED")
"""From the most to the least visible."""
WITHOUT_PLACE = "MISC_SIGNS"
SIZE = (1600, 1200)
"""Width and height that the published code enlarges the images to."""
_FORM = "expected name.jpg:VISIBLE, x_max, y_max, x_min, y_min, TYPE, NAME;"
_NUMBER = re.compile(r"\s*([+-]?\d+(?:\.\d*)?)")


class Sign(NamedTuple):
    """An annotated sign; its box in pixels of the image."""

    visibility: str
    left: float
    top: float
    right: float
    bottom: float
    name: str

    @property
    def rank(self) -> tuple[int, float]:
        """How well it is seen, smallest is best: by its visibility, then by its area."""
        known = self.visibility in VISIBILITIES
        place = VISIBILITIES.index(self.visibility) if known else len(VISIBILITIES)
        return place, -(self.right - self.left) * (self.bottom - self.top)


class SignImage(NamedTuple):
    """An image of the published task.

    Attributes:
        file: where it is.
        signs: the visible signs of its class, the largest first; none if it is empty.
    """

    file: Path
    signs: tuple[Sign, ...]

    @property
    def label(self) -> str:
        """One of `CLASSES`."""
        return LIMITS[self.signs[0].name] if self.signs else EMPTY


@dataclass(frozen=True)
class SignSet:
    """What a folder of the data set holds for the published task.

    Attributes:
        folder: Set1 or Set2.
        images: in the order of annotations.txt.
        left_out: name and reason of the images that are not used.
        original: whether annotations.txt is the original one.
        odd: number of coordinates with something behind the number; the number counts, as in the published code.
    """

    folder: Path
    images: tuple[SignImage, ...]
    left_out: tuple[tuple[str, str], ...]
    original: bool
    odd: int

    def lines(self, split: str) -> list[str]:
        """Describe it for people: classes, and why images are left out."""
        classes = Counter(image.label for image in self.images)
        found = ", ".join(f"{classes[name]} {name}" for name in CLASSES)
        reasons = Counter(reason for _, reason in self.left_out)
        lines = [f"{split}: {counted(len(self.images))} of {self.folder} ({found})"]
        lines += [f"{split}: {counted(count)} left out: {reason}" for reason, count in reasons.most_common()]
        if self.odd:
            lines.append(f"{split}: {counted(self.odd, 'coordinate')} with something behind the number, left off")
        return lines


def read_traffic_signs(root: Path, train_set: TrainSet = "auto") -> dict[str, SignSet]:
    """Read a copy of the data set, without its pixels.

    Args:
        root: holds the folders Set1 and Set2, in any case. Images are in them or in their subfolders.
        train_set: the folder to learn from. "auto" is the one with 747 images where the other has 684.

    Returns:
        What is for training and for testing, under `train` and `test`.

    Raises:
        DataError: a folder, annotations.txt or an image is missing, a line cannot be read, or the numbers of images are
            not the published ones and `train_set` is "auto".
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Give the one that holds {' and '.join(SETS)}.")
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    if missing := [name for name in SETS if name.lower() not in folders]:
        raise DataError(
            f"{root}: {' and '.join(missing)} not found in it. Expected {' and '.join(SETS)}, each with "
            "annotations.txt and the images of SetNPart0.zip."
        )
    found = {name: _read_set(folders[name.lower()], name) for name in SETS}
    first, second = (len(signs.images) for signs in found.values())
    if train_set == "auto":
        if sorted((first, second)) != sorted(PUBLISHED.values()):
            raise DataError(
                f"{root}: {counted(first)} in Set1 and {second} in Set2 are left by the published filter, expected "
                f"{PUBLISHED['train']} to learn from and {PUBLISHED['test']} to test on. Copy the data set again, or "
                "use it as it is: --train-set Set1 (the published one) or Set2."
            )
        train_set = "Set1" if first == PUBLISHED["train"] else "Set2"
    test_set = SETS[1 - SETS.index(train_set)]
    return {"train": found[train_set], "test": found[test_set]}


def _read_set(folder: Path, name: str) -> SignSet:
    path = folder / "annotations.txt"
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Copy it from the data set.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8. Copy it again.") from error
    files = _files(folder)
    images, left_out, lost, odd = [], [], [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, signs, more = _read_line(line, f"{path}, line {number}")
        odd += more
        chosen = choose(signs)
        if isinstance(chosen, str):
            left_out.append((f"{folder.name}/{image}", chosen))
        elif image not in files:
            lost.append(image)
        else:
            images.append(SignImage(files[image], chosen))
    if lost:
        raise DataError(
            f"{folder}: {len(lost)} of {len(images) + len(lost)} images are missing: {listed(lost)}. Unpack "
            f"{name}Part0.zip in it."
        )
    original = hashlib.md5(content, usedforsecurity=False).hexdigest() == MD5[name]
    return SignSet(folder, tuple(images), tuple(left_out), original, odd)


def _files(folder: Path) -> dict[str, Path]:
    """Return the files in a folder and its subfolders by name; the first of each name, those of the folder before."""
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.iterdir()):
            found.setdefault(path.name, path)
    return found


def _read_line(line: str, where: str) -> tuple[str, list[Sign], int]:
    """Return the image of a line, its signs, and how many coordinates have something behind the number."""
    image, colon, rest = line.partition(":")
    if not colon or not image.strip():
        raise DataError(f"{where}: {_FORM} Copy the file again.")
    signs, odd = [], 0
    for text in filter(None, (text.strip() for text in rest.split(";"))):
        visibility, *parts = (part.strip() for part in text.split(","))
        if visibility == WITHOUT_PLACE:
            continue
        numbers = [_NUMBER.match(part) for part in parts[:4]]
        if len(parts) < 6 or not all(numbers):
            raise DataError(f"{where}: {_FORM} Found {text!r}. Copy the file again.")
        right, bottom, left, top = (float(number[1]) for number in numbers if number is not None)
        odd += sum(
            number is not None and number.end() < len(part) for number, part in zip(numbers, parts, strict=False)
        )
        signs.append(Sign(visibility, left, top, right, bottom, parts[5]))
    return image.strip(), signs, odd


def choose(signs: Sequence[Sign]) -> tuple[Sign, ...] | str:
    """Apply the published filter to the signs of an image.

    Args:
        signs: all that have a place.

    Returns:
        The visible signs of its class, which is that of the most visible speed sign, the largest of equally visible
        ones; an image without signs is empty. Or the reason why the image is not used.

    >>> near, far = Sign("VISIBLE", 0, 0, 60, 60, "70_SIGN"), Sign("VISIBLE", 0, 0, 20, 20, "50_SIGN")
    >>> choose([far, near]) == (near,), choose([]), choose([far._replace(name="STOP")])
    (True, (), 'it shows other signs only')
    """
    if not signs:
        return ()
    limits = sorted((sign for sign in signs if sign.name in LIMITS), key=lambda sign: sign.rank)
    if not limits:
        return "it shows other signs only"
    best = limits[0]
    if best.visibility != VISIBILITIES[0]:
        return "its speed signs are not well visible"
    return tuple(sign for sign in limits if (sign.name, sign.visibility) == (best.name, best.visibility))


def write_traffic_signs(
    out: Path,
    data: Mapping[str, SignSet],
    size: tuple[int, int] | None = None,
    written: Callable[[], None] = lambda: None,
) -> Path:
    """Write `left_out.csv`, the boxes of the signs and, last, `manifest.csv` into a folder.

    `manifest.csv` has the columns image, sign, split, annotation; `annotations/*.geojson` outline the visible signs of
    an image's class; `left_out.csv` has image and reason.

    Args:
        out: the folder, created if needed; it must be empty.
        data: by split, as `read_traffic_signs` returns it.
        size: width and height at which the images are written too, as `images/*.png`; the published code enlarges
            them to `SIZE`. Without it they stay where they are.
        written: called after each image, on any thread.

    Returns:
        Path of `manifest.csv`.

    Raises:
        ImageError: an image cannot be read, and `size` is given.
        OutputError: `out` holds something, or cannot be written.
        DataError: the name of a folder is not valid text.
    """
    jobs = [(split, signs.folder.name, image) for split, signs in data.items() for image in signs.images]
    inside = ("annotations", "images") if size else ("annotations",)
    with NewFolder(out, *inside) as folder, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:

        def write(job: tuple[str, str, SignImage]) -> tuple[str, ...]:
            split, place, image = job
            name, scale = f"{place}-{image.file.stem}", (1.0, 1.0)
            shown, annotation = relative_path(image.file, out), ""
            if size is not None:
                shown = f"images/{name}.png"
                scale = _resize(image.file, size, folder.file(shown))
            if image.signs:
                annotation = f"annotations/{name}.geojson"
                write_atomic(folder.file(annotation), _geojson(image, scale))
            written()
            return shown, image.label, split, annotation

        rows = list(pool.map(write, jobs))
        left_out = [each for signs in data.values() for each in signs.left_out]
        folder.write_csv("left_out.csv", ("image", "reason"), left_out)
        return folder.write_csv("manifest.csv", ("image", "sign", "split", "annotation"), rows)


def _resize(file: Path, size: tuple[int, int], to: Path) -> tuple[float, float]:
    """Write an image at another size, by the bilinear filter; return how much wider and higher it is."""
    with open_image(file) as image:
        width, height = image.size
        picture = PIL.Image.fromarray(image.read(Box(0, 0, width, height)))
    with atomic_file(to) as out:
        picture.resize(size, PIL.Image.Resampling.BILINEAR).save(out, "PNG", compress_level=1)
    return size[0] / width, size[1] / height


def _geojson(image: SignImage, scale: tuple[float, float]) -> str:
    """Return the boxes of its signs as QuPath writes them, scaled by (x, y)."""
    features = []
    for sign in image.signs:
        left, right = scale[0] * sign.left, scale[0] * sign.right
        top, bottom = scale[1] * sign.top, scale[1] * sign.bottom
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "annotation", "classification": {"name": image.label}},
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}) + "\n"
