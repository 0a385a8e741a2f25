"""The files of a prediction: JSON, CSV, arrays, and GeoJSON that QuPath opens (File > Import objects).

The GeoJSON follows RFC 7946, except that coordinates are level-0 pixels, x to the right and y down, as in QuPath. They
start at the corner of the bounds that a slide states (`Image.qupath_origin`), to which QuPath crops it.
Properties are those that QuPath (0.4 and later) writes itself.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keyhole.errors import OutputError
from keyhole.report.prediction import BOX, Prediction, Scores
from keyhole.util.files import atomic_file, csv_text, encoded, writable_folder, write_atomic

FILES = ("prediction.json", "kept.csv", "kept.geojson", "scores.csv", "scores.npz")
"""What `write_prediction` writes."""
PALETTE = tuple(
    tuple(bytes.fromhex(color))
    for color in ["1f77b4", "d62728", "2ca02c", "ff7f0e", "9467bd", "17becf", "e377c2", "8c564b", "bcbd22", "7f7f7f"]
)
"""Colours of classes in index order, repeated where there are more classes."""
_ROWS = 10_000
"""Number of patches whose boxes are computed and written at once."""


def write_prediction(prediction: Prediction, folder: str | Path) -> dict[str, Path]:
    """Write prediction.json, kept.csv, kept.geojson and, where there are scores, scores.csv and scores.npz.

    See `write_scores` for scores.npz.

    Args:
        prediction: What `Predictor.predict` returns.
        folder: Created where it does not exist.

    Returns:
        The paths by file name.

    Raises:
        OutputError: The folder cannot be written. Each file is complete or absent.
    """
    folder, kept = writable_folder(folder), prediction.kept
    table: list[list[object]] = [["rank", "index", *BOX, "score", *(f"attention.{task}" for task in kept.attention)]]
    for rank, row in enumerate(kept.rows(), start=1):
        table.append([rank, row["index"], *row["box"], row["score"], *row["attention"].values()])
    paths = {
        name: write_atomic(folder / name, encoded(text))
        for name, text in {
            "prediction.json": _json(prediction.to_json(), indent=2),
            "kept.geojson": _json(kept_geojson(prediction)),
            "kept.csv": csv_text(table),
        }.items()
    }
    if (scores := prediction.scores) is not None:
        paths |= {name: folder / name for name in ("scores.csv", "scores.npz")}
        with atomic_file(paths["scores.csv"]) as file:
            for line in _score_lines(scores):
                file.write(encoded(line))
        write_scores(prediction, paths["scores.npz"])
    return paths


def write_scores(prediction: Prediction, path: str | Path) -> Path:
    """Write the score of every patch of a prediction that has them, with all that shows them without the model.

    The NumPy archive holds, for n patches, `index` (n), `cells` (n, 2), `boxes` (n, 4), `score` (n) and `map` (rows,
    columns), `score.TASK` and `map.TASK` per task, `arrived` (n) if patches could not be read, and in `prediction` the
    bytes of prediction.json.

    Raises:
        OutputError: The file cannot be written.
    """
    scores = prediction.scores
    assert scores is not None
    arrays: dict[str, Any] = {
        "index": scores.index,
        "cells": scores.cells,
        "boxes": scores.boxes(scores.index).astype(np.int32),
        "score": scores.score,
        "map": scores.map(),
        "prediction": np.frombuffer(encoded(_json(prediction.to_json())), np.uint8),
    }
    arrays |= {} if scores.arrived is None else {"arrived": scores.arrived}
    for task, score in scores.per_task.items():
        arrays |= {f"score.{task}": score, f"map.{task}": scores.map(task)}
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)
    return Path(path)


def kept_geojson(prediction: Prediction) -> dict[str, Any]:
    """Return a FeatureCollection with one polygon per kept patch, best first, classified as the first task's label.

    Patches without a place, such as stored features without coordinates, are left out.

    The measurements of a polygon, by which QuPath can filter and colour, are its rank (1 is best), its selection score,
    and per task its attention weight, as it is and times M.
    """
    task = prediction.tasks[0]
    label = prediction.label[task.name]
    color = PALETTE[task.classes.index(label) % len(PALETTE)] if label in task.classes else PALETTE[0]
    said = {f"predicted {task.name}": prediction.label[task.name] for task in prediction.tasks}
    features, m = [], len(prediction.kept)
    for rank, patch in enumerate(prediction.kept.rows(), start=1):
        x, y, width, height = patch["box"]
        if not width * height:
            continue
        x, y = x - prediction.origin[0], y - prediction.origin[1]
        # Exterior rings turn counter-clockwise in the axes of the RFC and end where they begin.
        ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        features.append(
            {
                "type": "Feature",
                # One id per image and place, so that importing the file twice does not duplicate objects.
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"keyhole:{prediction.name!a}:{patch['box']}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "annotation",
                    "name": f"kept {rank}",
                    "classification": {"name": (label or "none") if task.classes else task.name, "color": list(color)},
                    "isLocked": True,
                    "measurements": {"rank": rank, "selection score": patch["score"]}
                    | {f"attention {task}": weight for task, weight in patch["attention"].items()}
                    | {f"attention {task} times 1/M": weight * m for task, weight in patch["attention"].items()},
                    "metadata": said,
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _score_lines(scores: Scores) -> Iterator[str]:
    yield csv_text([["index", "row", "column", *BOX, "score", *(f"score.{task}" for task in scores.per_task)]])
    columns = [scores.score, *scores.per_task.values()]
    for start in range(0, len(scores), _ROWS):
        some = slice(start, start + _ROWS)
        index = scores.index[some]
        whole = np.column_stack([index, scores.cells[some], scores.boxes(index)]).tolist()
        values = [[f"{value:.9g}" for value in column[some].tolist()] for column in columns]
        yield "".join(",".join([*map(str, row), *numbers]) + "\n" for row, *numbers in zip(whole, *values, strict=True))


def _json(data: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise OutputError(f"a prediction holds NaN or infinity and cannot be written ({error})") from error
