"""A model that starts from a run computes what the run has learned, and a run that does not fit is refused."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import h5py
import pytest
import torch
from conftest import Say
from safetensors.torch import load_file, save_file

import keyhole
from keyhole.config.settings import Config
from keyhole.nn import TimmEncoder
from keyhole.training.setup import new_model

ENCODER = "test_efficientnet"
"""A network of timm with few weights."""
SHAPE = "--patch.size 16 --select.m 4 --model.heads 2 --run.threads 2 --train.epochs 1".split()
STILL = "--train.lr 1e-30 --train.warmup 0 --train.average 0".split()
"""Nothing is learned; only running statistics move."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the encoder."""
    return write_weights(tmp_path_factory.mktemp("weights") / "encoder.safetensors", seed=0)


def write_weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(TimmEncoder(ENCODER).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def learned(toy: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned from stored features of the toy images."""
    folder = tmp_path_factory.mktemp("learned")
    features = folder / "features"
    keyhole.embed(toy, features, encoder=ENCODER, weights=weights, patch={"size": 16}, dtype="float32", quiet=True)
    data = {"path": toy, "features": features}
    settings = {"model": {"heads": 2, "dim": 16}, "select": {"m": 4}, "train": {"epochs": 2, "lr": 1e-2}}
    return keyhole.train(data, folder / "run", **settings).path


def from_images(toy: Path, weights: Path, run: Path) -> list[str | Path]:
    line = ["train", toy, *SHAPE, "--model.encoder", ENCODER, "--model.weights", weights, "--model.dim", "16"]
    return [*line, "--model.start", run]


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "best" / "model.safetensors")


def test_on_its_encoder_what_was_learned_from_features_says_the_same_of_images(
    toy: Path, weights: Path, learned: Path
) -> None:
    old = keyhole.load(learned, device="cpu")
    settings = {"encoder": ENCODER, "weights": weights, "start": learned, "heads": 2, "dim": 16}
    config = Config(model=settings, patch={"size": 16}, train={"explore": 0.0})
    model = new_model(config, old.tasks, torch.device("cpu")).eval()
    encoder = TimmEncoder(ENCODER).eval()
    encoder.load_state_dict(load_file(weights))
    patches = torch.rand(2, 5, 3, 16, 16)
    with torch.no_grad():
        features = encoder(patches.flatten(0, 1)).unflatten(0, (2, 5))
        torch.testing.assert_close(model(patches), old.model.eval()(features))


def test_a_run_from_images_starts_with_what_was_learned_from_features(
    toy: Path, weights: Path, learned: Path, say: Say
) -> None:
    said = say(*from_images(toy, weights, learned), *STILL, "--out", "run")
    assert said.code == 0, said.err
    assert "explore 0" in said.all  # its scores mean something
    new = state(Path("run"))
    for name, tensor in state(learned).items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(new[name.replace("encoder.", "encoder.projector.")], tensor, rtol=0, atol=1e-6)


def test_a_run_from_images_starts_with_all_of_another(toy: Path, toy_run: Path, say: Say) -> None:
    line = ["train", toy, *SHAPE, *STILL, "--model.encoder", "small", "--model.width", "8", "--model.start", toy_run]
    assert say(*line, "--out", "run").code == 0
    new = state(Path("run"))
    for name, tensor in state(toy_run).items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(new[name], tensor, rtol=0, atol=1e-6)


def test_exploring_begins_with_even_attention_all_the_same(toy_run: Path) -> None:
    tasks = keyhole.load(toy_run, device="cpu").tasks
    settings = {"encoder": "small", "width": 8, "heads": 2, "start": toy_run}
    config = Config(model=settings, patch={"size": 16}, train={"explore": 2.0})
    assert not new_model(config, tasks, torch.device("cpu")).pool.key_proj.weight.any()


def test_the_model_stands_alone_and_goes_on_without_the_run_it_started_from(
    toy: Path, toy_run: Path, say: Say, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    keyhole.train(
        toy,
        gone,
        patch={"size": 16},
        select={"m": 4},
        train={"epochs": 1, "explore": 0.0},
        model={
            "encoder": "small",
            "width": 8,
            "heads": 2,
            "start": toy_run,
        },
    )
    moved = toy_run.rename(toy_run.with_name("moved"))
    try:
        assert keyhole.load(gone, device="cpu").config.model.start is None
        assert say("resume", gone, "--train.epochs", "2").code == 0
    finally:
        moved.rename(toy_run)


def with_other_labels(toy: Path, path: Path) -> Path:
    rows = [(file, number % 3) for number, file in enumerate(sorted(toy.glob("*/*.png")))]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "grade"), *((image, f"g{grade}") for image, grade in rows)])
    return path


def test_a_run_that_does_not_fit_is_refused_with_what_to_give(
    toy: Path, weights: Path, learned: Path, toy_run: Path, say: Say, tmp_path: Path
) -> None:
    line = from_images(toy, weights, learned)

    def changed(**words: str | Path) -> str:
        given = dict(zip(line[2::2], line[3::2], strict=True)) | {
            f"--model.{name}": word for name, word in words.items()
        }
        flat = [word for pair in given.items() for word in pair]
        return say("train", toy, *flat, "--out", "run").refusal()

    other = write_weights(tmp_path / "other.safetensors", seed=1)
    assert "learned from features of test_efficientnet with weights" in changed(weights=other)
    assert "is not the encoder here. Give the one that keyhole embed was given" in changed(weights=other)
    assert "Give this model one: --model.projector linear" in changed(projector="none")
    assert "encoder.projector.linear.weight is (16, 256), expected (32, 256)" in changed(dim="32")
    assert "--model.dim 16 --model.heads 2" in changed(dim="32")
    assert "its model is another one" in changed(start=toy_run)
    assert "it has 2 heads, expected 4" in changed(heads="4")
    features = ["train", toy, "--data.features", learned.parent / "features", "--model.start", toy_run, "--out", "run"]
    assert "learned from images, and the data here are stored features" in say(*features).refusal()
    assert "there is no model in it" in changed(start=tmp_path)
    table = with_other_labels(toy, tmp_path / "other.csv")
    refused = say("train", table, *line[2:], "--out", "run").refusal()
    assert "learned label (binary: green, red), and the tasks here are grade (multiclass: g0, g1, g2)" in refused
    assert not Path("run").exists()


def test_features_that_do_not_state_their_encoder_cannot_be_put_on_one(
    toy: Path, weights: Path, learned: Path, say: Say, tmp_path: Path
) -> None:
    features = shutil.copytree(learned.parent / "features", tmp_path / "features")
    for path in features.rglob("*.h5"):
        with h5py.File(path, "r+") as file:
            file["features"].attrs.clear()
    data, model = {"path": toy, "features": features}, {"heads": 2, "dim": 16}
    keyhole.train(data, "unknown", model=model, select={"m": 4}, train={"epochs": 1})
    refused = say(*from_images(toy, weights, Path("unknown")), "--out", "run").refusal()
    assert "learned from features that do not state the weights of their encoder" in refused


@pytest.mark.parametrize("of", ["features", "images"])
def test_one_line_says_that_the_run_before_learned_from_other_patches(
    of: str, toy: Path, toy_run: Path, weights: Path, learned: Path, say: Say
) -> None:
    line = from_images(toy, weights, learned)
    if of == "images":
        line = ["train", toy, *SHAPE, "--model.encoder", "small", "--model.width", "8", "--model.start", toy_run]
    words = "learned from patches of 16 px, level 0, edge shift, and here they are of 24 px, level 0, edge shift."
    assert words in say(*line, "--patch.size", "24", "--out", "other").all
    assert words in Path("other/log.txt").read_text()
    assert "learned from patches of" not in say(*line, "--out", "same").all
