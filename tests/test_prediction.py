"""What is written of a prediction is valid, complete, and says the same in every file."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import csv_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import keyhole
from keyhole.errors import OutputError, RunError
from keyhole.images.geometry import Size
from keyhole.report.files import kept_geojson, write_prediction
from keyhole.report.prediction import KeptPatches, Prediction, Scores
from keyhole.report.table import table_row, write_table
from keyhole.tasks.kinds import Task

DIGIT = Task("digit", "multiclass", ("0", "1", "2"))
TAGS = Task("tags, all", "multilabel", ("röt", 'b"q'))
AGE = Task("age", "regression", mean=50.0, std=10.0)
SIZE, COLUMNS = 64, 7


def softmax(x: np.ndarray) -> np.ndarray:
    power = np.exp(x - x.max())
    return power / power.sum()


def boxes(index: np.ndarray) -> np.ndarray:
    """Of a grid of 5 x 7 patches of 64 pixels that starts outside the image."""
    row, column = index // COLUMNS, index % COLUMNS
    size = np.full_like(index, SIZE)
    return np.stack([column * SIZE - 10, row * SIZE - 10, size, size], axis=1)


def predicted(tasks: tuple[Task, ...] = (DIGIT,), seed: int = 0, m: int = 4, name: str = "a/b.png") -> Prediction:
    """A prediction on a masked grid: scores are softmaxes of logits, kept are the best of their mean."""
    rng = np.random.default_rng(seed)
    index = np.sort(rng.choice(5 * COLUMNS, 20, replace=False)).astype(np.int64)
    logits = {task.name: rng.normal(size=20) * 3 for task in tasks}
    per_task = {task: softmax(x).astype(np.float32) for task, x in logits.items()}
    score = np.mean(list(per_task.values()), axis=0, dtype=np.float32)
    best = np.argsort(-score, kind="stable")[:m]
    outputs = {task.name: task.probability(rng.normal(size=task.outputs)) for task in tasks}
    return Prediction(
        name=name,
        image=Path("/data") / name,
        size=Size(420, 310),
        tasks=tasks,
        probability={task.name: task.by_column(outputs[task.name]) for task in tasks},
        label={task.name: task.label(outputs[task.name]) for task in tasks},
        kept=KeptPatches(
            index=index[best],
            boxes=boxes(index[best]),
            score=score[best],
            attention={task: softmax(x[best]).astype(np.float32) for task, x in logits.items()},
        ),
        scores=Scores(
            rows=5,
            columns=COLUMNS,
            index=index,
            cells=np.stack([index // COLUMNS, index % COLUMNS], axis=1),
            score=score,
            per_task=per_task,
            boxes=boxes,
        ),
        patch={"size": SIZE, "stride": SIZE, "level": 0, "mpp": None, "scale": 1.0},
        model="runs/demo",
    )


def read_json(path: Path) -> Any:
    def no_constant(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=no_constant)


@given(seed=st.integers(0, 10_000), tasks=st.sampled_from([(DIGIT,), (TAGS, AGE), (AGE,), (DIGIT, TAGS, AGE)]))
@settings(deadline=None, max_examples=15)
def test_csv_json_and_geojson_agree_on_the_kept_patches(
    tmp_path_factory: pytest.TempPathFactory, seed: int, tasks: tuple[Task, ...]
) -> None:
    prediction = predicted(tasks, seed)
    paths = write_prediction(prediction, tmp_path_factory.mktemp("out"))
    rows = csv_rows(paths["kept.csv"])
    patches = read_json(paths["prediction.json"])["kept"]["patches"]
    features = read_json(paths["kept.geojson"])["features"]
    assert len(rows) == len(patches) == len(features) == len(prediction.kept)
    for i, (row, patch, feature) in enumerate(zip(rows, patches, features, strict=True)):
        box = prediction.kept.boxes[i].tolist()
        assert [int(row[side]) for side in ("x", "y", "width", "height")] == patch["box"] == box
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert [*ring.min(axis=0), *np.ptp(ring, axis=0)] == box
        measured = feature["properties"]["measurements"]
        assert float(row["score"]) == patch["score"] == measured["selection score"]
        assert np.float32(row["score"]) == prediction.kept.score[i]
        assert int(row["index"]) == patch["index"] == prediction.kept.index[i]
        assert int(row["rank"]) == measured["rank"] == i + 1
        for task in tasks:
            weight = prediction.kept.attention[task.name][i]
            assert np.float32(row[f"attention.{task.name}"]) == weight
            assert np.float32(patch["attention"][task.name]) == weight
            assert np.float32(measured[f"attention {task.name}"]) == weight
            assert measured[f"attention {task.name} times M"] == pytest.approx(float(weight) * len(rows))
    for task in tasks:
        assert sum(float(row[f"attention.{task.name}"]) for row in rows) == pytest.approx(1, abs=1e-5)


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=10)
def test_scores_are_the_same_in_csv_and_npz_and_the_best_is_kept_first(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    prediction = predicted((DIGIT,), seed)
    scores = prediction.scores
    assert scores is not None
    paths = write_prediction(prediction, tmp_path_factory.mktemp("out"))
    with np.load(paths["scores.npz"], allow_pickle=False) as arrays:
        stored = dict(arrays)
    assert set(stored) == {"index", "cells", "score", "map", "score.digit", "map.digit", "boxes", "prediction"}
    assert (stored["map"].shape, stored["map"].dtype) == ((5, COLUMNS), np.float32)
    rows = csv_rows(paths["scores.csv"])
    assert len(rows) == len(scores) == np.isfinite(stored["map"]).sum()
    np.testing.assert_array_equal(np.float32([row["score"] for row in rows]), scores.score)
    for row, index, (g_row, g_column), box in zip(
        rows, stored["index"], stored["cells"], boxes(scores.index), strict=True
    ):
        assert (int(row["index"]), int(row["row"]), int(row["column"])) == (index, g_row, g_column)
        assert [int(row[side]) for side in ("x", "y", "width", "height")] == box.tolist()
        assert np.float32(row["score"]) == stored["map"][g_row, g_column]
    best = np.unravel_index(np.nanargmax(stored["map"]), stored["map"].shape)
    assert best[0] * COLUMNS + best[1] == prediction.kept.index[0]


def test_maps_of_the_tasks_average_to_the_map() -> None:
    scores = predicted((DIGIT, TAGS)).scores
    assert scores is not None
    np.testing.assert_allclose((scores.map("digit") + scores.map("tags, all")) / 2, scores.map(), rtol=1e-6)
    assert np.isnan(scores.map()).sum() == 35 - 20


def test_json_is_complete(tmp_path: Path) -> None:
    prediction = predicted((DIGIT, TAGS, AGE))
    data = read_json(write_prediction(prediction, tmp_path / "new" / "folder")["prediction.json"])
    assert data["keyhole"] == keyhole.__version__
    assert (data["model"], data["name"], data["image"]) == ("runs/demo", "a/b.png", "/data/a/b.png")
    assert data["size"] == {"width": 420, "height": 310}
    assert (data["mpp"], data["file_mpp"]) == (None, None)
    assert data["patch"] == {"size": 64, "stride": 64, "level": 0, "mpp": None, "scale": 1.0}
    assert data["kept"]["box_order"] == ["x", "y", "width", "height"]
    assert data["kept"]["box_unit"] == "level-0 pixels"
    assert data["scores"] == {"rows": 5, "columns": COLUMNS, "patches": 20}
    for task in prediction.tasks:
        said = data["tasks"][task.name]
        assert said["classes"] == list(task.classes)
        assert said["probability"] == prediction.probability[task.name]
        assert said["label"] == prediction.label[task.name]
    assert sum(data["tasks"]["digit"]["probability"].values()) == pytest.approx(1)


@pytest.mark.parametrize("tasks", [(DIGIT,), (TAGS,), (AGE, DIGIT)], ids=["multiclass", "multilabel", "regression"])
def test_geojson_has_the_structure_of_rfc_7946_and_of_qupath(tmp_path: Path, tasks: tuple[Task, ...]) -> None:
    made = predicted(tasks)
    data = read_json(write_prediction(made, tmp_path)["kept.geojson"])
    assert data["type"] == "FeatureCollection"
    for feature in data["features"]:
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5
        assert ring[0] == ring[-1]
        twice_area = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring))
        assert twice_area == 2 * SIZE * SIZE, "counter-clockwise, and the whole patch"
        properties = feature["properties"]
        assert properties["objectType"] == "annotation"
        assert properties["classification"] == {"name": "kept patch", "color": [255, 127, 14]}, "not that of the image"
        assert all(isinstance(value, int | float) for value in properties["measurements"].values())
        assert properties["metadata"] == {f"predicted {task.name}": made.label[task.name] for task in tasks}
    assert len({feature["id"] for feature in data["features"]}) == len(data["features"])


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    for _ in range(2):
        paths = write_prediction(predicted(), tmp_path)
        content = {name: path.read_bytes() for name, path in paths.items()}
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(paths)
    assert content == {name: path.read_bytes() for name, path in write_prediction(predicted(), tmp_path).items()}


def test_without_scores_no_score_files_are_written(tmp_path: Path) -> None:
    full = predicted()
    bare = Prediction(full.name, full.image, full.size, full.tasks, full.probability, full.label, full.kept, None)
    assert set(write_prediction(bare, tmp_path)) == {"prediction.json", "kept.csv", "kept.geojson"}


def test_a_file_name_that_is_no_valid_text_is_written_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    prediction = predicted(name=name)
    paths = write_prediction(prediction, tmp_path)
    assert read_json(paths["prediction.json"])["name"] == name
    assert csv_rows(write_table([table_row(prediction)], tmp_path / "table.csv"))[0]["image"] == "caf\\udce9.png"


def test_the_table_has_a_row_per_image_with_truth_where_known(tmp_path: Path) -> None:
    tasks = (DIGIT, TAGS, AGE)
    several = [predicted(tasks, seed, name=f"{seed}.png") for seed in range(3)]
    truth = {"0.png": {"digit": "2"}, "1.png": {"digit": "0", "age": "33"}, "2.png": {}}
    path = write_table((table_row(each, truth[each.name]) for each in several), tmp_path / "table.csv")
    rows = csv_rows(path)
    assert [row["image"] for row in rows] == list(truth)
    assert [row["digit.true"] for row in rows] == ["2", "0", ""]
    assert [row["age.true"] for row in rows] == ["", "33", ""]
    for row, prediction in zip(rows, several, strict=True):
        assert row["tags, all.predicted"] == prediction.label["tags, all"]
        assert float(row["digit.probability.1"]) == pytest.approx(prediction.probability["digit"]["1"], rel=1e-5)
        assert (row["width"], row["height"]) == ("420", "310")
    assert "digit.true" not in csv_rows(write_table(map(table_row, several), path))[0]
    assert write_table([], path).read_text() == "image,path,width,height\n"


def test_a_table_that_fails_midway_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_table([table_row(predicted())], tmp_path / "table.csv")
    before = path.read_bytes()

    def failing() -> Any:
        yield table_row(predicted())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(failing(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken: cannot write here"):
        write_prediction(predicted(), tmp_path / "taken")


def test_attention_that_is_no_share_is_refused() -> None:
    kept = predicted().kept
    with pytest.raises(AssertionError):
        KeptPatches(kept.index, kept.boxes, kept.score, {"digit": kept.score * 0})
    with pytest.raises(RunError, match="digit: the attention of the model is NaN"):
        KeptPatches(kept.index, kept.boxes, kept.score, {"digit": kept.score * np.float32("nan")})


# Patches that could not be read, and features that are on no grid


def test_patches_that_could_not_be_read_are_counted_where_there_are_any(tmp_path: Path) -> None:
    whole = [predicted(seed=1, name="a.png"), predicted(seed=2, name="b.png")]
    damaged = replace(whole[1], unreadable=boxes(np.array([3, 9])))
    plain = csv_rows(write_table(map(table_row, whole), tmp_path / "plain.csv"))
    assert "unreadable" not in plain[0]
    table = csv_rows(write_table(map(table_row, [whole[0], damaged]), tmp_path / "damaged.csv"))
    assert [row["unreadable"] for row in table] == ["0", "2"]
    assert [{**row, "unreadable": None} for row in table] == [{**row, "unreadable": None} for row in plain]
    for prediction, listed in ((whole[0], []), (damaged, boxes(np.array([3, 9])).tolist())):
        assert read_json(write_prediction(prediction, tmp_path)["prediction.json"])["unreadable"] == listed


def test_a_patch_without_a_score_is_zero_in_the_list_and_nothing_on_the_map(tmp_path: Path) -> None:
    prediction = predicted()
    scores = prediction.scores
    assert scores is not None
    arrived = np.ones(len(scores), bool)
    arrived[[0, 5]] = False
    zero = np.where(arrived, scores.score, np.float32(0))
    partial = replace(scores, score=zero, per_task={"digit": zero}, arrived=arrived)
    paths = write_prediction(replace(prediction, scores=partial), tmp_path)
    with np.load(paths["scores.npz"], allow_pickle=False) as stored:
        assert np.isfinite(stored["map"]).sum() == len(scores) - 2
        np.testing.assert_array_equal(stored["arrived"], arrived)
    assert [float(row["score"]) for row in csv_rows(paths["scores.csv"])][5] == 0


def test_of_several_patches_in_one_cell_the_map_shows_the_highest_score() -> None:
    scores = predicted().scores
    assert scores is not None
    order = np.random.default_rng(0).permutation(len(scores))
    one = replace(scores, cells=np.zeros_like(scores.cells), score=scores.score[order])
    assert one.map()[0, 0] == scores.score.max()
    assert np.isfinite(one.map()).sum() == 1


def test_patches_without_a_place_are_not_in_the_geojson() -> None:
    prediction = predicted()
    nowhere = replace(prediction, kept=replace(prediction.kept, boxes=np.zeros_like(prediction.kept.boxes)))
    assert kept_geojson(nowhere)["features"] == []
