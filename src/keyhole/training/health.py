"""The health of the selection, measured on the images of the watched split while they are validated.

| column | of the kept patches |
|---|---|
| `kept.changed` | share that the epoch before did not keep |
| `kept.attended` | share that the attention rests on, see `attended_share` |
| `kept.blank` | share of one colour; not of stored features |
| `kept.gain` | loss of as many random patches minus their own loss |

Images that keep all their patches count in `kept.attended` and `kept.blank` alone. Without a watched split a few
training images are looked at instead, and there is no gain.

Letters: m kept, h height, w width, c channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import fsum, isnan, nan
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray

from keyhole.data.item import Item
from keyhole.engine import Inference

COLUMNS = "kept.changed", "kept.attended", "kept.blank", "kept.gain"
MAX_COMPARED_PATCHES, MAX_COMPARED_IMAGES = 2**14, 256
"""Kept patches, and the images that keep them, of which the state of a run remembers which these were."""
MAX_TRAINING_SHARE = 1 / 20
"""Share of the training patches that are looked at after an epoch where no split is watched."""
MAX_BLANK_STD = 2.0
"""Largest standard deviation of the values, 0 ... 255, of a patch of one colour: JPEG and sensors add some noise."""
PROBED_PIXELS = 64


def compared_names(items: Sequence[Item], m: int) -> set[str]:
    """Return the images whose kept patches are compared between epochs: the same ones whichever fail."""
    most = min(MAX_COMPARED_IMAGES, max(1, MAX_COMPARED_PATCHES // m))
    return {item.name for item in _mixed(items)[:most]}


def few_items(items: Sequence[Item], counts: Mapping[str, int]) -> list[Item]:
    """Return the images to look at where no split is watched; none where each is a large share of the data."""
    room = MAX_TRAINING_SHARE * sum(counts[item.name] for item in items)
    found: list[Item] = []
    for item in _mixed(items):
        if counts[item.name] <= room:
            found.append(item)
            room -= counts[item.name]
    return found


def _mixed(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (zlib.crc32(item.name.encode(errors="surrogateescape")), item.name))


def measure(found: Inference, items: Sequence[Item], compared: Collection[str]) -> dict[str, Any]:
    """Return what the figures need of a batch, as plain values for the journal."""
    kept, blank, pixels = {}, [], found.bags.pixels
    for row in found.bags.rows:
        image, source, shown = found.bags.kept[row], found.batch.sources[row], pixels[row]
        assert image is not None
        assert source is not None
        if items[row].name in compared and len(image.index) < len(source):
            kept[items[row].name] = image.index.tolist()
        if shown is not None and shown.ndim == 4:
            blank.append(float(of_one_color(shown).mean()))
    rows = [place for place, row in enumerate(found.compared) if row in found.bags.rows]
    return {
        "kept": kept,
        "attended": [] if found.attended is None else found.attended.tolist(),
        "blank": blank,
        "compared": [items[found.compared[place]].name for place in rows],
        "random": {name: values[rows].tolist() for name, values in found.random.items()},
    }


def figures(
    measured: Sequence[Mapping[str, Any]], before: Mapping[str, list[int]], pixels: bool, gain: float | None = None
) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Return the columns of an epoch, and which patches the compared images keep.

    Args:
        measured: results of `measure` for all batches; without any the figures are NaN.
        before: patches that the compared images kept after the epoch before, if they were measured.
        pixels: patches have pixels, not features.
        gain: loss of random patches minus that of the kept ones, NaN where no image has more than m patches; None
            without labels to compare them on.
    """
    kept = {name: index for each in measured for name, index in each["kept"].items()}
    changed = [len(set(index) - set(before[name])) / len(index) for name, index in kept.items() if name in before]
    blank = [share for each in measured for share in each["blank"]]
    row = {"kept.changed": _mean(changed), "kept.attended": _mean(x for each in measured for x in each["attended"])}
    row |= {"kept.blank": _mean(blank)} if pixels else {}
    return row | ({} if gain is None else {"kept.gain": gain}), kept


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return fsum(found) / len(found) if found else nan


def of_one_color(pixels: UInt8[NDArray[np.uint8], "m h w c"]) -> Bool[NDArray[np.bool_], " m"]:
    """Return which patches have nearly one colour everywhere.

    >>> of_one_color(np.stack([np.full((8, 8, 3), 7, np.uint8), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)]))
    array([ True, False])
    """
    flat = pixels.reshape(len(pixels), -1, pixels.shape[-1])
    values, step = flat.reshape(len(flat), -1), max(1, flat.shape[1] // PROBED_PIXELS)
    sure: NDArray[np.bool_] = values.max(axis=1) - values.min(axis=1) <= MAX_BLANK_STD  # black or white
    found: NDArray[np.bool_] = (flat[:, ::step].std(axis=1) < 3 * MAX_BLANK_STD).all(axis=1)  # rules out most others
    rows = (found & ~sure).nonzero()[0]
    found[rows] = (flat[rows].std(axis=1, dtype=np.float32) < MAX_BLANK_STD).all(axis=1)
    return found


def line(row: Mapping[str, float]) -> str:
    """Return the figures of an epoch for the progress line; empty where none was measured.

    >>> line({"kept.changed": 0.124, "kept.attended": 0.5, "kept.blank": 0.0, "kept.gain": 0.0312})
    'kept patches: 12% new, 50% attended, 0% blank, gain 0.0312'
    """
    forms = "{:.0%} new", "{:.0%} attended", "{:.0%} blank", "gain {:.4f}"
    told = [form.format(row[name]) for name, form in zip(COLUMNS, forms, strict=True) if not isnan(row.get(name, nan))]
    return f"kept patches: {', '.join(told)}" if told else ""
