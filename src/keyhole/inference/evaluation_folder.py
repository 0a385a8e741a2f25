"""The folder of an evaluation, and notes on its data and its run.

`metrics.json` states the run, the data and the split of the results in a folder. Until an evaluation is complete,
`unfinished.json` states them, so that the same command finds its folder again after a kill.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyhole.data.hashes import hash_files, stored_hashes
from keyhole.data.item import SPLITS, Item, absolute
from keyhole.data.read_csv import read_csv
from keyhole.errors import KeyholeError, OutputError
from keyhole.runs.run import Run
from keyhole.runs.seal import read_state, sealed_config
from keyhole.util.files import file_names, file_size, remove_unfinished, writable_folder, write_atomic
from keyhole.util.wording import counted, listed

OPTIONAL_FILES = ("confusion_*.csv", "lesions.csv", "contact_sheet.png")
"""Files that not every evaluation writes; `finish` removes those of an earlier call."""
UNFINISHED = "unfinished.json"
NAMES = re.compile(
    r"confusion_.*\.csv|(lesions|predictions|left_out)\.csv|contact_sheet\.png|report\.html|(metrics|unfinished)\.json"
)
"""Names of all files that an evaluation writes beside the scores."""
SCORES = re.compile(r"\d+\.npz")
"""Names of the files of scores, by the row of predictions.csv."""


@dataclass(frozen=True)
class Subject:
    """The run, the data (None for the run's own) and the split of an evaluation."""

    run: Path
    data: Path | None
    split: str

    def to_json(self) -> dict[str, Any]:
        data = self.run if self.data is None else self.data
        return {"run": str(absolute(self.run)), "data": str(absolute(data)), "split": self.split}

    @property
    def folder(self) -> Path:
        """The default folder for the results; that of other data never has the name of a split."""
        parent = self.run / "evaluation"
        if self.data is None:
            return parent / self.split
        (name,) = file_names([absolute(self.data).stem], "data")
        names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        free = (parent / each for each in names if each not in SPLITS)
        return next(folder for folder in free if not folder.exists() or self.is_in(folder))

    def is_in(self, folder: Path) -> bool:
        """Return True if the results in a folder are of this subject.

        Results inside the run's folder belong to the run, also after it was moved or copied.
        """
        held, wanted = _subject_in(folder), self.to_json()
        own = absolute(self.run) / "evaluation"
        if held is None:  # an evaluation that was killed before it was complete
            return self.data is None and absolute(folder) == own / self.split
        if own in absolute(folder).parents:
            held = {
                **held,
                "run": wanted["run"],
                "data": wanted["run"] if held["data"] == held["run"] else held["data"],
            }
        return held == wanted


def open_folder(subject: Subject, out: str | Path | None) -> tuple[Path, list[str]]:
    """Return the folder for the results, made writable, and a note if they replace earlier ones."""
    folder = subject.folder if out is None else Path(out)
    notes: list[str] = []
    earlier = [path for name in ("metrics.json", "predictions.csv") if (path := folder / name).exists()]
    if earlier:
        if not subject.is_in(folder):
            held = _subject_in(folder)
            what = f"the evaluation of {held['data']} ({held['split']}) by {held['run']}" if held else "other results"
            raise OutputError(f"{folder}: holds {what}. Choose another --out, or delete it.")
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(earlier[0].stat().st_mtime))
        notes.append(f"{folder}: replaces the evaluation of the same images of {made}")
    try:
        writable_folder(folder)
        remove_unfinished([folder], NAMES)
        write_atomic(folder / UNFINISHED, json.dumps(subject.to_json(), indent=2) + "\n")
    except OutputError as error:
        hint = " Results can go anywhere: --out DIR" if out is None else ""
        raise OutputError(f"{error}{hint}") from error
    return folder, notes


def empty_scores(folder: Path) -> Path:
    """Return the folder for the scores of every patch, without those of an earlier evaluation."""
    scores = writable_folder(folder / "scores")
    for path in scores.iterdir():
        if SCORES.fullmatch(path.name):
            path.unlink(missing_ok=True)
    remove_unfinished([scores], SCORES)
    return scores


def finish(folder: Path, written: Collection[str]) -> None:
    """Remove files of an earlier evaluation that this one did not write."""
    for pattern in OPTIONAL_FILES:
        for path in folder.glob(pattern):
            if path.name not in written:
                path.unlink(missing_ok=True)
    (folder / UNFINISHED).unlink(missing_ok=True)


def _subject_in(folder: Path) -> dict[str, Any] | None:
    """Return run, data and split of the results in a folder; None if unknown."""
    for file in (UNFINISHED, "metrics.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            held = json.loads((folder / file).read_text())
            return {name: held[name] for name in ("run", "data", "split")}
    return None


def unfinished(run: Path) -> str:
    """Return a sentence if a run is not finished; "" if it is, or if the folder is a model without its run."""
    if not (run / "last.safetensors").is_file():
        return ""
    try:
        state = read_state(Run(run))
        epochs = sealed_config(state).train.epochs
    except KeyholeError as error:
        return f"whether the run is finished is not known ({error})"
    if state.epoch >= epochs or state.stopped:
        return ""
    return (
        f"the run is not finished ({state.epoch} of {epochs} epochs): these are figures of its best model so far, "
        f"epoch {state.best_epoch or state.epoch}"
    )


def seen_in_training(run: Path, items: Sequence[Item]) -> str:
    """Return a sentence if evaluated images were used to train or to choose the model; else "".

    Images are compared by SHA-256, or by path if the manifest has only sizes (`data.hash_gb`).
    """
    manifest = run / "manifest.csv"
    if not manifest.is_file():
        return ""
    stored = stored_hashes(manifest)
    used = [row.item for row in read_csv(manifest).rows if row.item.split in ("train", "val")]
    splits = {stored[item.name].sha256: item.split for item in used if item.name in stored and stored[item.name].sha256}
    places = {item.source: item.split for item in used}
    sizes = {stored[item.name].bytes for item in used if item.name in stored}
    alike = [item for item in items if item.source not in places and file_size(item.source) in sizes]
    # A file that cannot be read is reported when its image is opened.
    hashes = hash_files(alike, skip_unreadable=True) if splits else {}
    found = [
        places.get(item.source) or splits.get(hashes[item.name].sha256 if item.name in hashes else "", "")
        for item in items
    ]
    train, val = found.count("train"), found.count("val")
    if not train + val:
        return ""
    parts = [f"{train} to train the model"] * bool(train) + [f"{val} to choose its best epoch"] * bool(val)
    return (
        f"{train + val} of the {len(items)} images were used before, {' and '.join(parts)}: the figures are too good. "
        "Evaluate images that the run has not seen."
    )


def groups_in_training(run: Path, items: Sequence[Item]) -> str:
    """Return a sentence if groups of evaluated images have names of groups that the run trained on; else "".

    Other images of the same patients make figures too good too, but equal names can be chance.
    """
    manifest = run / "manifest.csv"
    if not manifest.is_file():
        return ""
    used = {row.item.group for row in read_csv(manifest).rows if row.item.split in ("train", "val")}
    groups = Counter(item.group for item in items if item.group)
    shared = {group: count for group, count in groups.items() if group in used}
    if not shared:
        return ""
    named = "has the name of one" if len(shared) == 1 else "have names of groups"
    return (
        f"{len(shared)} of the {counted(len(groups), 'group')} ({sum(shared.values())} of the {counted(len(items))}) "
        f"{named} in the training or validation split of the run: {listed(shared)}. If they are the same groups, such "
        "as the same patients, the figures are too good: leave them out. Other data may have equal names by chance, "
        "such as 1, 2, 3."
    )
