"""A folder of predictions: `predictions.csv`, and a folder for each image."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from keyhole.errors import OutputError
from keyhole.report.files import FILES, write_prediction
from keyhole.report.prediction import Prediction
from keyhole.report.table import TableRow, table_row
from keyhole.util.files import remove_unfinished, writable_folder


class AnswerFolder:
    """Where the predictions of some images are written: an existing folder may hold those of the same images.

    Raises:
        OutputError: It cannot be written, or holds predictions of other images, or an evaluation.
    """

    def __init__(self, out: Path, images: Sequence[Path]) -> None:
        self.out = out
        self._names = folder_names(images)
        self._earlier = _earlier(out)
        ours = {_key(image) for image in images}
        others = sorted({image for image in self._earlier.values() if image not in ours} | _named(out) - ours)
        if (out / "metrics.json").exists():
            raise OutputError(f"{out}: holds an evaluation. Choose another --out.")
        if others:
            raise OutputError(
                f"{out}: holds predictions of {len(others)} other images, such as {others[0]}. Choose another --out, "
                "or delete the folder."
            )
        self.replaced = len(set(self._earlier.values()))
        self._written: set[str] = set()
        writable_folder(out)
        remove_unfinished([out], re.compile(r"(predictions|left_out)\.csv"))
        own = re.compile("|".join(map(re.escape, FILES)))
        remove_unfinished((out / name for name in {*self._names.values(), *self._earlier}), own)

    def write(self, prediction: Prediction) -> TableRow:
        """Write the folder of one image, and return its row of predictions.csv, which names the folder."""
        name = self._names[prediction.image]
        write_prediction(prediction, self.out / name)
        self._written.add(name)
        return table_row(prediction, folder=name)

    def finish(self) -> None:
        """Remove the files of earlier calls that predictions.csv does not name; other files are left."""
        for name in self._earlier.keys() - self._written:
            for file in FILES:
                (self.out / name / file).unlink(missing_ok=True)
            if not any((self.out / name).iterdir()):
                (self.out / name).rmdir()


def folder_names(images: Collection[Path]) -> dict[Path, str]:
    """Return the name of each file, with a hash of its path where another image has the same name."""
    taken = Counter(image.name.lower() for image in images)
    return {
        image: image.name
        if taken[image.name.lower()] == 1
        else f"{image.name}-{hashlib.sha256(os.fsencode(image)).hexdigest()[:8]}"
        for image in images
    }


def _earlier(out: Path) -> dict[str, str]:
    """Which image each folder inside is of, by the name of the folder."""
    if not out.is_dir():
        return {}
    found = {}
    for folder in out.iterdir():
        try:
            found[folder.name] = _key(json.loads((folder / "prediction.json").read_text("utf-8"))["image"])
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError):
            found[folder.name] = f"{folder / 'prediction.json'} (damaged)"
    return found


def _named(out: Path) -> set[str]:
    """The images that an earlier predictions.csv names."""
    try:
        with (out / "predictions.csv").open(newline="", encoding="utf-8", errors="replace") as file:
            return {row["path"] for row in csv.DictReader(file)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, KeyError, csv.Error):
        return {f"{out / 'predictions.csv'} (not one of keyhole predict)"}


def _key(image: str | Path) -> str:
    """A path as it is written to a CSV; a name need not be valid text."""
    return str(image).encode("utf-8", "backslashreplace").decode()
