"""What stays on a device: one set of streams and buffers for a predictor, nothing of learning while a run predicts."""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, csv_rows, settings
from narrow_device import narrow
from on_device import DRY, GPU
from safetensors.torch import load_file

import keyhole
from keyhole.errors import Interrupted
from keyhole.inference.predictor import Predictor
from keyhole.nn import IPSClassifier


def test_predictions_in_a_row_share_streams_and_buffers(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = narrow(monkeypatch, 100)
    predictor = keyhole.load(toy_run)
    images = sorted((toy / "red").iterdir())[:4]
    alone = [predictor.predict(image) for image in images]
    assert kind.made == 1
    several = list(predictor.predict_many(images))
    assert kind.made == 1
    pairs = list(zip(predictor.predict_many(images), predictor.predict_many(images), strict=True))
    assert kind.made == 2, "two at a time do not share"
    predictor.predict(images[0])
    assert kind.made == 2
    for one, other, (left, right) in zip(alone, several, pairs, strict=True):
        assert other.probability == left.probability == right.probability
        assert one.probability["label"] == pytest.approx(other.probability["label"], rel=1e-4)  # other chunks
    del predictor
    gc.collect()
    assert not kind.alive


def living(kind: type) -> list[Any]:
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def test_while_a_run_predicts_it_holds_one_model_and_nothing_to_learn_with(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = narrow(monkeypatch, 100)
    before = set(map(id, living(IPSClassifier) + living(torch.optim.AdamW)))
    seen: list[tuple[int, int, int]] = []
    predict = Predictor.predict_items

    def watched(self: Predictor, *args: Any, **options: Any) -> Any:
        gc.collect()
        models, optimizers = (
            [each for each in living(kind) if id(each) not in before] for kind in (IPSClassifier, torch.optim.AdamW)
        )
        gradients = [each for model in models for each in model.parameters() if each.grad is not None]
        seen.append((len(models), len(gradients), sum(len(each.state) for each in optimizers)))
        return predict(self, *args, **options)

    monkeypatch.setattr(Predictor, "predict_items", watched)
    keyhole.train(toy, tmp_path / "run", **SMALL)
    assert seen == [(1, 0, 0)] * 2
    assert kind.made == 1, "the loop's buffers serve the predictions"


def test_a_run_predicts_with_the_best_weights_though_its_model_has_learned_on(toy: Path, tmp_path: Path) -> None:
    run = keyhole.train(toy, tmp_path / "run", **settings(train={"epochs": 3, "lr": 0.3}))
    assert run.best["epoch"] < 3
    table = csv_rows(run.path / "predictions" / "val.csv")
    found = list(keyhole.load(run.path).predict_many([row["path"] for row in table]))
    for row, prediction in zip(table, found, strict=True):
        assert float(row["label.probability.red"]) == pytest.approx(prediction.probability["label"]["red"], rel=1e-5)


def test_a_run_that_is_stopped_while_it_predicts_keeps_its_state(
    toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Predictor.predict_items

    def stopped(self: Predictor, *args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return predict(self, *args, **options)

    monkeypatch.setattr(Predictor, "predict_items", stopped)
    with pytest.raises(Interrupted):
        keyhole.train(toy, tmp_path / "run", **SMALL)
    expected, found = (load_file(folder / "last.safetensors") for folder in (toy_run, tmp_path / "run"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    monkeypatch.undo()
    keyhole.resume(tmp_path / "run")
    for split in ("train", "val"):
        name = f"predictions/{split}.csv"
        assert csv_rows(tmp_path / "run" / name) == csv_rows(toy_run / name)


@pytest.mark.cuda
def test_predictions_in_a_row_make_no_stream_after_the_first(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    kind = torch.cuda.Stream

    def counted(*given: Any, **options: Any) -> Any:
        if "stream_id" not in options:  # else torch describes one that is there
            made.append(1)
        return kind(*given, **options)

    monkeypatch.setattr(torch.cuda, "Stream", counted)
    predictor = keyhole.load(toy_run, device=str(GPU))
    images = sorted((toy / "red").iterdir())[:4]
    for image in images:
        predictor.predict(image)
        assert len(made) == (0 if DRY else 1)
    list(predictor.predict_many(images))
    assert len(made) == (0 if DRY else 1)
