"""Prediction: what it looks at, that it needs its folder alone, and that all it writes says the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Say, csv_rows, settings
from PIL import Image

import keyhole
from keyhole.cli.main import main
from keyhole.config.settings import Config, ModelConfig, PatchConfig, SelectConfig
from keyhole.errors import ConfigError, ImageLost, KeyholeError
from keyhole.images import open_image
from keyhole.inference.evaluate import evaluate
from keyhole.inference.predictor import Predictor, describe
from keyhole.loading.stream import SharedReading
from keyhole.nn import SmallEncoder, build_classifier
from keyhole.patches.grid import PatchGrid
from keyhole.report.files import write_prediction
from keyhole.report.prediction import Prediction
from keyhole.runs.checkpoint import save_model
from keyhole.tasks.kinds import Task
from keyhole.util.files import atomic_file

COLOR = Task("color", "multiclass", ("red", "green", "blue"))
AMOUNT = Task("amount", "regression", mean=10.0, std=2.0)
TAGS = Task("tags", "multilabel", ("a", "b"))


def random_predictor(patch: PatchConfig, select: SelectConfig, **model: Any) -> Predictor:
    """A model of three tasks with fresh weights, whose queries look at different patches."""
    tasks = (COLOR, AMOUNT, TAGS)
    chosen = ModelConfig(**{"encoder": "small", "width": 8, "heads": 2, **model})
    torch.manual_seed(0)
    classifier = build_classifier(chosen, tasks, patch.size)
    with torch.no_grad():
        classifier.pool.query.mul_(50)
    return Predictor(classifier, Config(patch=patch, model=chosen, select=select), tasks)


@pytest.fixture(scope="module")
def predictor(toy_run: Path) -> Predictor:
    return keyhole.load(toy_run)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five images of noise with 1 to 54 patches of 16 px, also such that do not divide by 16."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate([(64, 64), (16, 16), (40, 100), (90, 130), (33, 17)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        paths.append(folder / f"{number}.png")
    return paths


def close(a: Prediction, b: Prediction, tolerance: float) -> bool:
    """Whether two predictions of an image say the same, up to rounding."""
    assert a.image == b.image
    assert a.scores is not None
    assert b.scores is not None
    same = a.label == b.label and np.array_equal(a.kept.boxes, b.kept.boxes)
    numbers = [(of[name], b.probability[task][name]) for task, of in a.probability.items() for name in of]
    return (
        same
        and np.allclose(*zip(*numbers, strict=True), atol=tolerance)
        and np.allclose(a.scores.map(), b.scores.map(), atol=tolerance, equal_nan=True)
    )


# What is looked at


@pytest.mark.parametrize("rule", ["global", "streaming"])
def test_each_patch_is_encoded_and_read_once_and_each_kept_one_once_more(
    rule: Any, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, select = PatchConfig(size=16), SelectConfig(m=6, chunk=7, rule=rule)
    predictor = random_predictor(patch, select)
    predictor.engine.encoders.fast(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))  # built before counting
    encoded, embed = 0, SmallEncoder.embed

    def count(encoder: SmallEncoder, patches: torch.Tensor) -> torch.Tensor:
        nonlocal encoded
        encoded += len(patches)
        return embed(encoder, patches)

    monkeypatch.setattr(SmallEncoder, "embed", count)
    for path, n in zip(images, [16, 1, 21, 54, 6], strict=True):
        encoded = 0
        prediction = predictor.predict(path)
        assert prediction.scores is not None
        assert len(prediction.scores) == n
        assert len(prediction.kept) == min(6, n)
        assert n + min(6, n) <= encoded <= n + n // 8 + min(6, n), "the score map is a by-product"
    encoded = 0
    reader = predictor.engine.reader
    items = [keyhole.inference.predictor.Item(path.name, path, {}) for path in images]
    assert len(list(predictor.predict_items(items, engine=predictor.engine, description=None))) == 5
    predictor.engine.close()
    assert reader.read_patches == 98 + 6 + 1 + 6 + 6 + 6
    assert reader.read_patches <= encoded <= reader.read_patches + 98 // 8, "some more fill up a chunk on a CPU"


@pytest.mark.parametrize("position", ["none", "1d", "2d"])
def test_scores_and_kept_patches_are_those_of_the_model_in_memory(position: Any, images: list[Path]) -> None:
    predictor = random_predictor(PatchConfig(size=16, stride=11), SelectConfig(m=6, chunk=7), position=position)
    for path in images:
        prediction = predictor.predict(path)
        with open_image(path) as image:
            grid = PatchGrid(image, 16, 11, edge="auto")
            patches = torch.from_numpy(grid.read(slice(None))).permute(0, 3, 1, 2)[None]
            where = torch.from_numpy(grid.centers(slice(None))).float()[None] if position == "2d" else None
            boxes = grid.boxes(prediction.kept.index)
        selection = predictor.model.select(patches, 6, 64, "global", position=where)
        assert selection.logits is not None
        score = selection.logits[0].softmax(dim=0).mean(dim=1)  # n t
        assert prediction.scores is not None
        np.testing.assert_allclose(prediction.scores.score, score.mean(dim=1), atol=1e-5)
        for query, task in enumerate(prediction.tasks):
            np.testing.assert_allclose(prediction.scores.per_task[task.name], score[:, query], atol=1e-5)
        np.testing.assert_array_equal(prediction.kept.index, selection.index[0])
        np.testing.assert_array_equal(prediction.kept.boxes, boxes)
        best = prediction.kept.index
        np.testing.assert_allclose(prediction.kept.score, prediction.scores.score[best], atol=1e-6)
        for query, task in enumerate(prediction.tasks):
            share = selection.logits[0, best].softmax(dim=0).mean(dim=1)[:, query]
            np.testing.assert_allclose(prediction.kept.attention[task.name], share, atol=1e-5)


def test_the_answer_rests_on_the_kept_patches_alone(images: list[Path]) -> None:
    predictor = random_predictor(PatchConfig(size=16), SelectConfig(m=3, chunk=7))
    for path in images:
        prediction = predictor.predict(path)
        with open_image(path) as image:
            kept = PatchGrid(image, 16, edge="auto").read(prediction.kept.index)
        with torch.no_grad():
            logits = predictor.model(torch.from_numpy(kept).permute(0, 3, 1, 2)[None])
        for task in predictor.tasks:
            expected = task.probability(logits[task.name][0].numpy())
            found = list(prediction.probability[task.name].values())
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_shares_sum_to_one(predictor: Predictor, toy: Path, images: list[Path]) -> None:
    several = random_predictor(PatchConfig(size=16), SelectConfig(m=4, chunk=16))
    for prediction in [*predictor.predict_many(images), *several.predict_many(images)]:
        for task in prediction.tasks:
            if task.kind in ("binary", "multiclass"):
                assert sum(prediction.probability[task.name].values()) == pytest.approx(1, abs=1e-6)
            assert prediction.kept.attention[task.name].sum() == pytest.approx(1, abs=1e-5)
            assert prediction.scores is not None
            assert np.nansum(prediction.scores.map(task.name)) == pytest.approx(1, abs=1e-5)


# The same from everywhere


def test_an_image_is_predicted_the_same_alone_and_among_others(predictor: Predictor, images: list[Path]) -> None:
    together = list(predictor.predict_many([*images, *images[::-1]]))
    assert len(together) == 10
    for path, prediction in zip([*images, *images[::-1]], together, strict=True):
        assert close(prediction, predictor.predict(path), 1e-6)


@pytest.mark.parametrize(("chunk", "threads"), [(3, 1), (7, 4), (64, 2)])
def test_a_prediction_depends_neither_on_the_chunk_nor_on_the_threads(
    images: list[Path], chunk: int, threads: int
) -> None:
    predictor = random_predictor(PatchConfig(size=16), SelectConfig(m=8, chunk=16), heads=4)
    with torch.no_grad():
        predictor.model.pool.query.mul_(8)
    config = predictor.config.replace(select={"chunk": chunk}, run={"threads": threads})
    other = Predictor(predictor.model, config, predictor.tasks)
    for one, wanted in zip(other.predict_many(images), predictor.predict_many(images), strict=True):
        assert close(one, wanted, 1e-5)
    published = [
        Predictor(predictor.model, each.replace(select={"rule": "streaming"}), predictor.tasks)
        for each in (predictor.config, config)
    ]
    kept = [[each.kept.index.tolist() for each in rule.predict_many(images)] for rule in published]
    assert kept[0] != kept[1], "the published rule depends on the chunk, or this model could not tell"


def test_evaluate_says_of_an_image_what_predict_says(predictor: Predictor, toy_run: Path, tmp_path: Path) -> None:
    evaluate(toy_run, split="val", out=tmp_path)
    table = csv_rows(tmp_path / "predictions.csv")
    assert table
    written = {row["path"]: row for row in csv_rows(toy_run / "predictions" / "val.csv")}
    for row in table:
        prediction = predictor.predict(row["path"])
        assert row["label.predicted"] == prediction.label["label"]
        for name, value in prediction.probability["label"].items():
            assert float(row[f"label.probability.{name}"]) == pytest.approx(value, abs=2e-6)
            assert float(written[row["path"]][f"label.probability.{name}"]) == pytest.approx(value, abs=2e-6)


def test_a_model_predicts_from_its_folder_alone(toy_run: Path, toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_run, tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "best", tmp_path / "elsewhere" / "model")
    shutil.rmtree(tmp_path / "run")
    path = toy / "red" / "3.png"
    before, after = keyhole.load(toy_run).predict(path), keyhole.load(tmp_path / "elsewhere" / "model").predict(path)
    assert before.to_json() == after.to_json()
    assert close(before, after, 0.0)
    (tmp_path / "elsewhere" / "model" / "model.json").unlink()
    assert close(before, keyhole.load(tmp_path / "elsewhere" / "model").predict(path), 0.0)


def test_loading_and_predicting_leave_the_random_state_alone(toy_run: Path, images: list[Path]) -> None:
    before = torch.get_rng_state()
    keyhole.load(toy_run).predict(images[0])
    assert torch.equal(before, torch.get_rng_state())


# Files


def test_all_files_of_a_prediction_say_the_same(toy_run: Path, toy: Path, tmp_path: Path) -> None:
    path = toy / "green" / "5.png"
    assert main(["predict", str(toy_run), str(path), "--out", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "5.png"
    prediction = keyhole.load(toy_run).predict(path)
    told = json.loads((folder / "prediction.json").read_text())
    features = json.loads((folder / "kept.geojson").read_text())["features"]
    rings = [np.array(feature["geometry"]["coordinates"][0]) for feature in features]
    boxes = prediction.kept.boxes.tolist()
    assert [
        [int(row[side]) for side in ("x", "y", "width", "height")] for row in csv_rows(folder / "kept.csv")
    ] == boxes
    assert [patch["box"] for patch in told["kept"]["patches"]] == boxes
    assert [[*ring.min(axis=0), *np.ptp(ring, axis=0)] for ring in rings] == boxes
    (row,) = csv_rows(tmp_path / "out" / "predictions.csv")
    assert row["label.predicted"] == told["tasks"]["label"]["label"] == prediction.label["label"]
    for name, value in prediction.probability["label"].items():
        assert told["tasks"]["label"]["probability"][name] == pytest.approx(value, abs=1e-6)
        assert float(row[f"label.probability.{name}"]) == pytest.approx(value, abs=2e-6)
    assert prediction.scores is not None
    with np.load(folder / "scores.npz", allow_pickle=False) as stored:
        np.testing.assert_allclose(stored["map"], prediction.scores.map(), atol=1e-6)
        assert [int(row["index"]) for row in csv_rows(folder / "scores.csv")] == stored["index"].tolist()


@pytest.mark.parametrize(("mpp", "side"), [(None, 128), (1.0, 257)])
def test_a_slide_is_predicted_in_level_0_pixels(mpp: float | None, side: int, shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    patch = PatchConfig(size=128, mpp=mpp, foreground="tissue")
    prediction = random_predictor(patch, SelectConfig(m=8, chunk=32)).predict(path)
    files = write_prediction(prediction, tmp_path)
    assert set(files) == {"prediction.json", "kept.csv", "kept.geojson", "scores.csv", "scores.npz"}
    assert prediction.size == (2220, 2967)
    with np.load(files["scores.npz"], allow_pickle=False) as stored:
        assert set(stored) >= {"map", "index", "cells", "score", "map.color", "map.amount", "map.tags"}
        assert stored["map"].shape == (-(-2967 // side), -(-2220 // side))
        assert 8 < np.isfinite(stored["map"]).sum() == len(stored["index"]) < stored["map"].size, "tissue alone"
    features = json.loads(files["kept.geojson"].read_text())["features"]
    assert len(features) == 8
    assert prediction.scores is not None
    with open_image(path) as image:
        grid = PatchGrid(image, 128, mpp=mpp, edge="auto")
        for feature, index in zip(features, prediction.kept.index, strict=True):
            ring = np.array(feature["geometry"]["coordinates"][0])
            (x, y), (width, height) = ring.min(axis=0).tolist(), np.ptp(ring, axis=0).tolist()
            assert max(abs(width - side), abs(height - side)) <= 1
            assert 0 <= x < 2220
            assert 0 <= y < 2967
            g_row, g_column = prediction.scores.cells[index].tolist()
            seen, shown = grid.read([g_row * grid.columns + g_column])[0], image.read((x, y, width, height))
            np.testing.assert_allclose(seen.mean(axis=(0, 1)), shown.mean(axis=(0, 1)), atol=1.5)


def test_predict_holds_a_few_predictions_at_a_time(
    toy_run: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Prediction] = weakref.WeakSet()
    most = 0

    def counted(prediction: Prediction, folder: Path, **_options: object) -> None:
        nonlocal most
        alive.add(prediction)
        most = max(most, len(alive))

    monkeypatch.setattr("keyhole.report.table.write_prediction", counted)
    assert main(["predict", str(toy_run), str(toy), "--out", str(tmp_path / "out")]) == 0
    assert len(csv_rows(tmp_path / "out" / "predictions.csv")) == 24
    assert 1 <= most <= 3


def test_options_may_stand_anywhere_on_the_line(toy_run: Path, toy: Path, tmp_path: Path) -> None:
    first, second, run = str(toy / "red" / "0.png"), str(toy / "red" / "1.png"), str(toy_run)
    for number, words in enumerate(
        (
            [run, first, second, "--out", "OUT"],
            ["--out", "OUT", run, first, second],
            [run, "--out", "OUT", first, "--device=cpu", second],
            [run, "--out", "OUT", "--", first, second],
        )
    ):
        out = tmp_path / str(number)
        assert main(["predict", *(word.replace("OUT", str(out)) for word in words)]) == 0
        assert [row["image"] for row in csv_rows(out / "predictions.csv")] == [first, second]


def test_the_files_are_whole_where_nobody_reads_the_lines(toy_run: Path, toy: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = ["predict", str(toy_run), str(toy / "red"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "keyhole", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing)
    assert done.returncode == 141
    assert "error" not in done.stderr
    assert len(csv_rows(tmp_path / "out" / "predictions.csv")) == 12


# Bad images


def test_bad_images_are_told_and_left_out_or_raise(predictor: Predictor, images: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(images[0].read_bytes()[:-500])
    small = tmp_path / "small.png"
    Image.new("RGB", (8, 30)).save(small)
    told: dict[str, str] = {}
    paths = [images[0], bad, images[2], small, images[3]]
    found = list(predictor.predict_many(paths, "skip", told.__setitem__))
    assert [prediction.image for prediction in found] == [images[0], images[2], images[3]]
    assert list(told) == [str(bad), str(small)]
    assert "damaged" in told[str(bad)]
    assert "larger than the image" in told[str(small)]
    for prediction in found:
        assert close(prediction, predictor.predict(prediction.image), 1e-6), "the others are as without it"
    with pytest.raises(KeyholeError, match=r"(bad|small)\.png"):
        list(predictor.predict_many(paths))


def test_a_path_that_is_not_there_is_told_before_anything_is_read(
    predictor: Predictor, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [tmp_path / "misspelt.png", tmp_path / ("long" * 100)]
    told: dict[str, str] = {}
    with monkeypatch.context() as during:
        during.setattr(Predictor, "predict_items", lambda *_, **__: pytest.fail("a reader would try again for 20 s"))
        for path in missing:
            calls = (lambda path=path: predictor.predict(path), lambda path=path: list(predictor.predict_many([path])))
            for call in (*calls, lambda path=path: list(predictor.predict_many([*images, path]))):
                with pytest.raises(ImageLost, match=f"{path.name}: no such file. Check the path"):
                    call()
    monkeypatch.setattr(SharedReading, "retry_in", lambda *_: pytest.fail("nothing is tried again"))
    found = list(predictor.predict_many([missing[0], images[0], missing[1], images[2]], "skip", told.__setitem__))
    assert [prediction.image for prediction in found] == [images[0], images[2]]
    assert told == {str(path): f"{path}: no such file. Check the path." for path in missing}
    assert not list(predictor.predict_many(missing, "skip"))


@pytest.mark.parametrize("rule", ["all", "non-empty"])
def test_masks_are_refused_by_a_model_that_does_not_use_them(rule: Any, images: list[Path], tmp_path: Path) -> None:
    predictor = random_predictor(PatchConfig(size=16, foreground=rule), SelectConfig(m=2, chunk=16))
    Image.new("L", (4, 4), 255).save(mask := tmp_path / "0.png")
    pixels = np.asarray(Image.open(images[0]))
    calls = {
        "mask": [lambda: predictor.predict(images[0], mask=mask), lambda: predictor.predict(pixels, mask="no.png")],
        "masks": [lambda: list(predictor.predict_many(images, masks=tmp_path))],
    }
    for argument, those in calls.items():
        for call in those:
            with pytest.raises(
                ConfigError, match=rf"^{argument} .*patch\.foreground {rule} and does not use masks\. Leave"
            ):
                call()


def test_masks_are_used_by_their_model_which_tells_at_once_that_one_is_not_there(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (4, 4), 255).save(mask := tmp_path / "0.png")
    pixels = np.asarray(Image.open(images[0]))
    predictor = random_predictor(PatchConfig(size=16, foreground="mask"), SelectConfig(m=2, chunk=16))
    assert len(predictor.predict(images[0], mask=mask).kept) == len(predictor.predict(pixels, mask=mask).kept) == 2
    assert len(list(predictor.predict_many(images[:1], masks=tmp_path))) == 1
    monkeypatch.setattr(SharedReading, "retry_in", lambda *_: pytest.fail("nothing is tried again"))
    for image in (images[0], pixels):
        with pytest.raises(ImageLost, match=r"nowhere\.png: no such file"):
            predictor.predict(image, mask=tmp_path / "nowhere.png")


def test_what_is_left_out_is_named_as_it_was_given(
    toy_run: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new" / "empty").mkdir(parents=True)
    (tmp_path / "new" / "good.png").write_bytes(images[0].read_bytes())
    (tmp_path / "new" / "bad.png").write_bytes(images[0].read_bytes()[:-500])
    (tmp_path / "new" / "notes.md").touch()
    given = ["new", "missing.png", "new/empty"]
    assert main(["predict", str(toy_run), *given, "--out", "out", "--on-bad-image", "skip"]) == 0
    named = {row["name"] for row in csv_rows(tmp_path / "out" / "left_out.csv")}
    assert named == {"new/bad.png", "new/notes.md", "missing.png", "new/empty"}
    assert [row["image"] for row in csv_rows(tmp_path / "out" / "predictions.csv")] == ["new/good.png"]


def test_a_model_of_several_tasks_survives_its_folder(toy: Path, tmp_path: Path) -> None:
    lines = ["image,color,amount,tags"]
    for number in range(8):
        for color in ("red", "green"):
            lines.append(f"{toy / color / f'{number}.png'},{color},{number * 1.5},{('a', 'b', 'a|b', '|')[number % 4]}")
    (tmp_path / "data.csv").write_text("\n".join(lines))
    run = keyhole.train(tmp_path / "data.csv", tmp_path / "run", **settings(train={"epochs": 1}))
    prediction = keyhole.load(run.path).predict(toy / "red" / "0.png")
    assert [task.name for task in prediction.tasks] == ["color", "amount", "tags"]
    assert set(prediction.probability["amount"]) == {"value"}
    assert set(prediction.label["tags"].split("|")) <= {"a", "b", ""}
    assert set(prediction.kept.attention) == {"color", "amount", "tags"}


# What the command writes


def test_a_score_means_the_same_in_every_file_under_every_rule(images: list[Path], tmp_path: Path) -> None:
    for rule in ("global", "streaming"):
        predictor = random_predictor(PatchConfig(size=16), SelectConfig(m=6, chunk=7, rule=rule))  # type: ignore[arg-type]
        prediction = predictor.predict(images[3])
        write_prediction(prediction, tmp_path / rule)
        kept, scores = csv_rows(tmp_path / rule / "kept.csv"), csv_rows(tmp_path / rule / "scores.csv")
        of = {row["index"]: np.float32(row["score"]) for row in scores}
        assert [np.float32(row["score"]) for row in kept] == [of[row["index"]] for row in kept], rule
        assert [of[row["index"]] for row in kept] == sorted((of[row["index"]] for row in kept), reverse=True)
        with open_image(images[3]) as image:
            pixels = np.stack([image.read(tuple(box)) for box in prediction.kept.boxes.tolist()])
        assert prediction.pictures is not None
        np.testing.assert_array_equal(prediction.pictures.patches, pixels[prediction.pictures.place])


def named(out: Path) -> set[str]:
    return {row["folder"] for row in csv_rows(out / "predictions.csv")}


def folders(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if path.is_dir()}


def test_every_folder_is_named_and_answers_of_another_call_are_never_lost_or_mixed(
    toy_run: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy)
    out = tmp_path / "out"
    assert main(["predict", str(toy_run), "red/0.png", "green/0.png", "red/1.png", "--out", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4, "a line for each image, and one for all"
    assert [row["image"] for row in csv_rows(out / "predictions.csv")] == ["red/0.png", "green/0.png", "red/1.png"]
    assert next(row["path"] for row in csv_rows(out / "predictions.csv")) == str(toy / "red" / "0.png")
    assert folders(out) == named(out)
    assert len(named(out)) == 3

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["predict", str(toy_run), "red/2.png", "--out", str(out)]) == 2
    assert "holds predictions of 3 other images" in capsys.readouterr().err
    assert main(["predict", str(toy_run), "green/1.png", "red/0.png", "--out", str(out)]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    assert main(["predict", str(toy_run), "red", "green", "--out", str(out)]) == 0
    assert "replaces earlier answers for 3 of these images" in capsys.readouterr().err
    assert folders(out) == named(out), "1.png is now 1.png-12345678, and the old folder is gone"
    assert len(named(out)) == 24
    (out / "damaged").mkdir()
    (out / "damaged" / "prediction.json").write_text("{")
    assert main(["predict", str(toy_run), "red", "green", "--out", str(out)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_what_a_kill_left_half_written_is_removed_and_what_is_being_written_is_not(
    toy_run: Path, toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "2.png").mkdir()
    left = [tmp_path / ".predictions.csv.abcdefgh", tmp_path / "2.png" / ".prediction.json.a_cd0fgh"]
    kept = [tmp_path / ".notes.csv.abcdefgh", tmp_path / "2.png" / ".mine.abcdefgh"]
    for path in left + kept:
        path.write_text("{")
    with atomic_file(tmp_path / "left_out.csv") as held:
        assert main(["predict", str(toy_run), str(toy / "red" / "2.png"), "--out", str(tmp_path)]) == 0
        assert Path(held.name).exists()
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


def test_a_folder_with_an_evaluation_takes_no_predictions(
    toy_run: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    assert main(["predict", str(toy_run), str(toy / "red" / "2.png"), "--out", str(tmp_path)]) == 2
    assert "holds an evaluation" in capsys.readouterr().err


def test_tables_that_excel_saved_and_empty_ones_are_replaced(toy_run: Path, toy: Path, tmp_path: Path) -> None:
    command = ["predict", str(toy_run), str(toy / "red" / "1.png"), "--out", str(tmp_path)]
    assert main(command) == 0
    table = tmp_path / "predictions.csv"
    table.write_bytes("\ufeff".encode() + table.read_bytes())
    assert main(command) == 0
    table.write_bytes(b"")
    assert main(command) == 0
    assert len(csv_rows(table)) == 1


@pytest.mark.parametrize("kind", ["run", "inside", "model", "table", "left out", "file"])
def test_nothing_else_is_written_over(kind: str, toy_run: Path, toy: Path, tmp_path: Path, say: Say) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind in ("run", "model"):
        shutil.copytree(toy_run if kind == "run" else toy_run / "best", out)
    elif kind == "inside":
        out = Path(shutil.copytree(toy_run, tmp_path / "out")) / "predictions"
    else:
        out.mkdir()
        (out / {"table": "predictions.csv", "left out": "left_out.csv"}[kind]).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "out" in say("predict", toy_run, toy / "red" / "1.png", "--out", out).refusal()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_resolution_of_new_images_is_given_on_the_command_line_or_in_a_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = random_predictor(PatchConfig(size=16, mpp=0.5), SelectConfig(m=4, chunk=16))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", predictor.model, describe(predictor.config, predictor.tasks))
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    Image.fromarray(pixels).save(tmp_path / "gone.png")
    model, a = str(tmp_path / "model"), str(tmp_path / "a.png")

    def sizes(*arguments: str) -> dict[str, int]:
        assert main(["predict", model, *arguments, "--out", str(tmp_path / "out")]) == 0
        found = {row["image"]: row["folder"] for row in csv_rows(tmp_path / "out" / "predictions.csv")}
        boxes = {name: csv_rows(tmp_path / "out" / folder / "kept.csv")[0] for name, folder in found.items()}
        shutil.rmtree(tmp_path / "out")
        return {Path(name).name: int(box["width"]) for name, box in boxes.items()}

    assert main(["predict", model, a, "--out", str(tmp_path / "out")]) == 2
    assert "or --mpp of keyhole predict" in capsys.readouterr().err
    assert main(["predict", model, a, "--mpp", "500", "--out", str(tmp_path / "out")]) == 2
    assert "mpp is '500.0'" in capsys.readouterr().err
    assert sizes(a, "--mpp", "0.25") == {"a.png": 32}
    table = tmp_path / "new.csv"
    table.write_text("image,mpp\na.png,0.5\nb.png,\n")
    assert sizes(str(table), "--mpp", "0.25") == {"a.png": 16, "b.png": 32}
    assert sizes(str(table), str(tmp_path / "gone.png"), "--mpp", "0.25") == {"a.png": 16, "b.png": 32, "gone.png": 32}
    table.write_text("image,mpp\na.png,0.5\na.png,0.25\n")
    assert main(["predict", model, str(table), "--out", str(tmp_path / "out")]) == 2
    assert "two rows differ in its mpp" in capsys.readouterr().err
    table.write_text("image,mpp\na.png,0.5\nnowhere.png,0.5\n")
    assert main(["predict", model, str(table), "--out", str(tmp_path / "out")]) == 2
    assert "1 of 2 image files are not there" in capsys.readouterr().err
    assert sizes(str(table), "--on-bad-image", "skip") == {"a.png": 16}
    assert "nowhere.png" in capsys.readouterr().err


def test_few_patches_are_noted_only_where_the_model_is_used_to_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def picture(name: str, patches: int) -> Path:
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16 * patches, 3), dtype=np.uint8)).save(path)
        return path

    def trained(name: str, patches: list[int]) -> Path:
        for number, count in enumerate(patches):
            picture(f"{name}-a/{number}", count), picture(f"{name}-b/{number}", count)
        images = [f"{name}-{label}/{number}.png,{label}" for label in "ab" for number in range(len(patches))]
        rows = [f"{row},{'val' if number % 6 == 5 else 'train'}" for number, row in enumerate(images)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,label,split", *rows]))
        given = settings(select={"m": 8}, train={"epochs": 1})
        return keyhole.train(tmp_path / f"{name}.csv", tmp_path / name, **given).path

    one, two, many = picture("one", 1), picture("two", 2), picture("many", 12)
    slides, photographs = trained("slides", [12] * 6), trained("photographs", [1, 2, 12, 12, 12, 12])
    assert keyhole.load(slides).predict(one).notes == (
        "1 patch, of 8 that the model keeps; nearly all images that it learned from have 12 patches or more",
    )
    for run, image in ((slides, two), (slides, many), (photographs, one), (photographs, many)):
        assert keyhole.load(run).predict(image).notes == ()
    assert keyhole.load(shutil.copytree(slides / "best", tmp_path / "model")).predict(one).notes != ()
    about = tmp_path / "model" / "model.json"
    found = json.loads(about.read_text())
    assert found["usual_patches"] == 12
