"""The published procedure, step for step: keyhole's own training loop against the literal rendering of the published code."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import keyhole
from keyhole.config.file import load_config
from keyhole.engine.engine import Engine
from keyhole.loading import Reader, Shuffled
from keyhole.patches.sources import TensorPatches
from keyhole.training.setup import new_model

COUNT, SIDE, PATCH, M, CHUNK, STEPS, WARMUP = 6, 96, 16, 8, 6, 20, 5
TASKS = ("shade=multiclass", "marks=multilabel")
ACTIVATIONS = {"shade": "softmax", "marks": "sigmoid"}
PUBLISHED: dict[str, Any] = {
    "patch": {"size": PATCH, "edge": "drop"},
    "model": {
        "encoder": "small",
        "channels": 1,
        "width": 8,
        "heads": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "position": "1d",
    },
    "select": {"m": M, "chunk": CHUNK, "rule": "streaming"},
    "train": {
        **{"epochs": STEPS, "batch": COUNT, "lr": 1e-3, "warmup": WARMUP, "final_lr": 0.001, "weight_decay": 0.1},
        **{"decay": "all", "clip": 0.0, "explore": 0.0, "precision": "float32"},
    },
    "augment": {"flip": False, "rotate": False, "shift": False, "color": 0.0},
    "run": {"threads": 2},
}


def write_images(folder: Path) -> Path:
    """Noise with some bright or dark squares: a step's loss has something to fall by."""
    rng, rows = np.random.default_rng(0), []
    for number in range(COUNT):
        pixels = rng.integers(60, 180, (SIDE, SIDE)).astype(np.uint8)
        shade, marks = number % 3, [name for name in ("a", "b") if rng.random() < 0.5]
        for _ in range(3):
            x, y = rng.integers(0, SIDE - 12, 2)
            pixels[y : y + 10, x : x + 10] = 90 * shade + 20 * len(marks)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"s{shade}", "|".join(marks) or "|", "train"))
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "shade", "marks", "split"), *rows])
    return folder / "data.csv"


def test_twenty_steps_from_files_are_those_of_the_published_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark: Callable[[str], Any]
) -> None:
    data = write_images(tmp_path)
    kept: list[dict[str, set[int]]] = []
    select = Engine.select

    def watched(engine: Engine, batch: Any, **options: Any) -> Any:
        found = select(engine, batch, **options)
        kept.append({name: set(each.index.tolist()) for name, each in zip(batch.names, found, strict=True) if each})
        return found

    monkeypatch.setattr(Engine, "select", watched)
    run = keyhole.train({"path": data, "tasks": TASKS, "val": 0.0}, tmp_path / "run", **PUBLISHED)
    losses = [row["train.loss"] for row in run.metrics]

    config = load_config(run.path / "config.yaml")
    tasks = keyhole.load(run.path).tasks
    model = new_model(config, tasks, torch.device("cpu"))
    network = benchmark("published").published_from(model.train(), M, CHUNK, ACTIVATIONS)
    names = [f"{number}.png" for number in range(COUNT)]
    images = torch.from_numpy(np.stack([np.asarray(Image.open(tmp_path / name)) for name in names]))
    patches = images.float().div(255).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(1, 2)[:, :, None]
    with data.open(newline="") as file:
        labels = list(csv.DictReader(file))
    targets = {
        "shade": torch.tensor([int(row["shade"][1]) for row in labels]),
        "marks": torch.tensor([[float(name in row["marks"].split("|")) for name in ("a", "b")] for row in labels]),
    }
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(STEPS):
        q = (1 + math.cos(math.pi * (step + 1 - WARMUP) / (STEPS - WARMUP))) / 2
        rate = (step + 1) / WARMUP if step + 1 < WARMUP else q + 0.001 * (1 - q)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        index = network.ips(patches)[2]
        theirs = {name: set(rows) for name, rows in zip(names, index.tolist(), strict=True)}
        assert kept[step] == theirs, f"the kept patches of step {step}"
        loss = network.step(patches, targets, optimizer)
        assert losses[step] == pytest.approx(loss, abs=1e-4), f"the loss of step {step}"
    assert losses[-1] < losses[0], "something was learned, or the comparison would say little"
    assert any(kept[step] != kept[0] for step in range(STEPS)), "so that selection was compared, too"


def test_shuffled_patches_come_once_each_in_one_order_for_equal_images_of_a_step() -> None:
    def opener(name: str, count: int, seed: int) -> Shuffled:
        def source() -> TensorPatches:
            return TensorPatches(np.arange(count)[:, None], name)

        source.name = name  # type: ignore[attr-defined]
        return Shuffled(source, (seed,))

    orders = []
    with Reader(threads=2) as reader:
        images = [("one", 50, 0), ("two", 50, 0), ("three", 70, 0), ("four", 50, 1)]
        for batch in reader.stream([[opener(*image) for image in images]], chunk=16):
            read: dict[int, list[int]] = {}
            for chunk in batch.chunks():
                assert chunk.pixels[: chunk.count, 0].tolist() == chunk.index.tolist(), "each with its own pixels"
                for image, index in zip(chunk.image.tolist(), chunk.index.tolist(), strict=True):
                    read.setdefault(image, []).append(index)
            orders = [read[image] for image in range(len(images))]
    assert [sorted(order) for order in orders] == [list(range(count)) for _, count, _ in images]
    assert orders[0] == orders[1] != orders[3]
    assert orders[0] != sorted(orders[0])


def test_a_shuffled_model_predicts_each_image_by_itself(toy: Path, tmp_path: Path) -> None:
    settings = PUBLISHED | {
        "select": {"m": 4, "chunk": 4, "rule": "streaming", "order": "shuffled"},
        "train": PUBLISHED["train"] | {"epochs": 1, "batch": 4, "warmup": 0.0},
    }
    one = keyhole.train(toy, tmp_path / "one", **settings)
    predictor = keyhole.load(one.path)
    paths = sorted(toy.rglob("*.png"))[:5]
    together = [prediction.kept.index.tolist() for prediction in predictor.predict_many(paths)]
    assert together == [predictor.predict(path).kept.index.tolist() for path in paths]
