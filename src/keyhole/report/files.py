"""The files of a prediction: JSON, CSV, arrays, GeoJSON for QuPath, and pictures."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from keyhole.errors import OutputError
from keyhole.report.drawing import as_picture
from keyhole.report.geojson import kept_geojson, tile_lines
from keyhole.report.kept_sheet import kept_sheet
from keyhole.report.overlay import overlay as draw_overlay
from keyhole.report.predicted import pictures_of
from keyhole.report.prediction import BOX, Prediction, Scores
from keyhole.util.files import atomic_file, csv_text, encoded, file_names, writable_folder, write_atomic

PATCHES = "patches"
"""Folder of the kept patches' pixels."""
OWN = re.compile(
    r"prediction\.json|kept\.(csv|geojson)|scores\.(csv|npz)|tiles\.geojson|(overlay|kept)_.*\.png"
    r"|\d+_x-?\d+_y-?\d+\.png"
)
"""Names of the files that `write_prediction` writes."""
_ROWS = 10_000
"""Number of patches whose boxes are computed and written at once."""


def write_prediction(
    prediction: Prediction, folder: str | Path, *, overlay: bool = False, tiles: bool = False
) -> dict[str, Path]:
    """Write a prediction into a folder, from which files of an earlier prediction are removed.

    Always prediction.json, kept.csv and kept.geojson; scores.csv and scores.npz (see `write_scores`) where there are
    scores; patches/RANK_xX_yY.png for each patch of `Pictures.whole`.

    Args:
        prediction: What `Predictor.predict` returns.
        folder: Created where it does not exist.
        overlay: Also draw overlay_TASK.png and kept_TASK.png per task, for which the prediction has to carry pictures.
        tiles: Also write tiles.geojson, every patch as a tile with its scores; see `tile_lines`.

    Returns:
        The paths by file name.

    Raises:
        OutputError: The folder cannot be written. Each file is complete or absent.
        ValueError: `overlay` of a prediction without pictures.
    """
    if overlay:
        pictures_of(prediction)  # before anything is written
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
        streams = {"scores.csv": _score_lines(scores)} | ({"tiles.geojson": tile_lines(prediction)} if tiles else {})
        for name, lines in streams.items():
            paths[name] = folder / name
            with atomic_file(paths[name]) as file:
                for line in lines:
                    file.write(encoded(line))
        paths["scores.npz"] = write_scores(prediction, folder / "scores.npz")
    if overlay:
        names = file_names([task.name for task in prediction.tasks], "task")
        for task, name in zip(prediction.tasks, names, strict=True):
            paths |= _write_png(folder, f"overlay_{name}.png", draw_overlay(prediction, task))
            paths |= _write_png(folder, f"kept_{name}.png", kept_sheet(prediction, task))
    if prediction.pictures is not None and len(prediction.pictures.whole):
        writable_folder(folder / PATCHES)
        for rank, pixels in enumerate(prediction.pictures.whole, start=1):
            x, y = kept.boxes[rank - 1, :2].tolist()
            paths |= _write_png(folder, f"{PATCHES}/{rank:03}_x{x}_y{y}.png", as_picture(pixels))
    remove_files(folder, set(paths.values()))
    return paths


def remove_files(folder: Path, kept: Collection[Path] = ()) -> None:
    """Remove what `write_prediction` wrote into a folder, but for some paths; other files stay."""
    for place in (folder / PATCHES, folder):
        if place.is_dir():
            for path in place.iterdir():
                if OWN.fullmatch(path.name) and path not in kept:
                    path.unlink(missing_ok=True)
            if not any(place.iterdir()):
                place.rmdir()


def _write_png(folder: Path, name: str, picture: Picture.Image) -> dict[str, Path]:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return {name: write_atomic(folder / name, data.getvalue())}


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
