"""Laws 1 and 3 on whole predictions: kept patches and probabilities of an image depend on nothing but the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import keyhole
from keyhole.config.file import load_config


@pytest.fixture(scope="module")
def expected(toy_run: Path, files: list[Path]) -> list[keyhole.Prediction]:
    return list(keyhole.load(toy_run, device="cpu").predict_many(files))


@pytest.fixture(scope="module")
def files(toy: Path) -> list[Path]:
    return sorted((toy / "red").iterdir())[:5]


def same(found: keyhole.Prediction, expected: keyhole.Prediction) -> None:
    assert found.kept.index.tolist() == expected.kept.index.tolist()
    for task, shares in expected.probability.items():
        np.testing.assert_allclose(list(found.probability[task].values()), list(shares.values()), atol=1e-5)


def test_a_prediction_is_that_of_the_image_alone(
    toy_run: Path, files: list[Path], expected: list[keyhole.Prediction]
) -> None:
    predictor = keyhole.load(toy_run, device="cpu")
    for path, together in zip(files, expected, strict=True):
        same(predictor.predict(path), together)


@pytest.mark.parametrize(("chunk", "threads"), [(3, 1), (7, 4), (64, 2)])
def test_a_prediction_depends_neither_on_the_chunk_nor_on_the_threads(
    toy_run: Path, files: list[Path], expected: list[keyhole.Prediction], tmp_path: Path, chunk: int, threads: int
) -> None:
    model = keyhole.load(toy_run, device="cpu")
    config = load_config(toy_run / "config.yaml")
    config = config.replace(select=config.select.replace(chunk=chunk), run=config.run.replace(threads=threads))
    predictor = keyhole.Predictor(model.model, config, model.tasks)
    for found, wanted in zip(predictor.predict_many(files), expected, strict=True):
        same(found, wanted)
