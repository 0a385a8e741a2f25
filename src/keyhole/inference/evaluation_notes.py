"""Notes on the data and the run behind an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keyhole.data.hashes import hash_files, stored_hashes
from keyhole.data.item import Item
from keyhole.data.read_csv import read_csv
from keyhole.errors import KeyholeError
from keyhole.runs.run import Run
from keyhole.runs.seal import read_state, sealed_config
from keyhole.util.files import file_size


def unfinished(run: Path) -> str:
    """Return a sentence where a run is not finished; "" where it is, or where the folder is a model without its run."""
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
    """Return a sentence where evaluated images were used to train or to choose the model; else "".

    Images are compared by SHA-256, whatever their path and name; where the manifest has only sizes (`data.hash_gb`), by
    path.
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
