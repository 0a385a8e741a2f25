"""A training step with one patch, or one row of features, is a step like any other: batch norm does not end the run."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from keyhole.cli.main import main
from keyhole.engine import split_backward
from keyhole.nn import CrossAttentionPool, FeatureProjector, IPSClassifier, SmallEncoder
from keyhole.nn.encoder import TimmEncoder
from keyhole.runs.run import find_run

TINY = "--select.m 1 --train.epochs 2 --train.batch 4 --data.val 0 --data.test 0 --run.threads 1".split()


def write_images(folder: Path) -> list[str]:
    """Five images of 16 px: with batches of four, each epoch's last step has one patch."""
    rng = np.random.default_rng(0)
    for number in range(5):
        image = folder / ("ab"[number % 2]) / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(image)
    return [str(folder), "--patch.size", "16", "--model.encoder", "small", "--model.width", "4", "--model.heads", "2"]


def write_slide_embeddings(folder: Path) -> list[str]:
    """One row of features for each of five slides."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        with h5py.File(folder / f"s{number}.h5", "w") as file:
            file["features"] = rng.normal(size=(1, 6)).astype(np.float32)
    labels = folder / "labels.csv"
    labels.write_text("image,label\n" + "".join(f"s{number},{'ab'[number % 2]}\n" for number in range(5)))
    return [str(labels), "--data.features", str(folder), "--model.dim", "8", "--model.heads", "2"]


@pytest.mark.parametrize("write", [write_images, write_slide_embeddings])
@pytest.mark.parametrize("flags", [(), ("--train.precision", "bf16"), ("--train.batch", "1")], ids=str)
def test_a_run_whose_last_step_has_one_patch_ends_well(write: object, flags: tuple[str, ...], tmp_path: Path) -> None:
    assert callable(write)
    out = tmp_path / "run"
    assert main(["train", *write(tmp_path / "data"), *TINY, *flags, "--out", str(out)]) == 0
    run = find_run(out)
    assert len(run.metrics) == 2
    assert all(np.isfinite(row["train.loss"]) for row in run.metrics)


ENCODERS = {
    "small": lambda: SmallEncoder(width=4),
    "resnet, maps of one pixel": lambda: TimmEncoder("resnet10t"),
    "features": lambda: FeatureProjector(6, 32),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_one_patch_uses_the_running_statistics_and_leaves_them_and_the_modes_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name]()
    model = IPSClassifier(encoder, pool := CrossAttentionPool(encoder.dim, 2), {"label": nn.Linear(encoder.dim, 2)})
    del pool
    shape = (6,) if name == "features" else (3, 16, 16)
    model.train()
    model.encode(torch.rand(8, *shape))  # statistics that are not those of a new network
    modes = [part.training for part in model.modules()]
    norm = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)][-1]
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    loose = torch.rand(1, *shape)
    loss = split_backward(
        model,
        lambda start, stop: loose[start:stop],
        None,
        torch.ones(1, 1, dtype=torch.bool),
        lambda logits: logits["label"].square().sum(),
    )
    assert loss.isfinite()
    assert torch.equal(norm.running_mean, before)
    assert [part.training for part in model.modules()] == modes
    assert all(part.grad is not None and part.grad.isfinite().all() for part in encoder.parameters())
    if name == "features":  # its only norm: what one row gives in training is what it gives in evaluation
        assert torch.equal(model.encode(loose), model.eval().encode(loose))


def test_a_failed_step_leaves_batch_norm_in_training_mode() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    norm = nn.BatchNorm1d(6)
    model = IPSClassifier(nn.Sequential(norm, Fails()), CrossAttentionPool(6, 2), {"label": nn.Linear(6, 2)}).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        model.encode(torch.rand(1, 6))
    assert norm.training
    with pytest.raises(RuntimeError, match="out of memory"):
        model.encode(torch.rand(2, 6))
    assert norm.num_batches_tracked == 1  # of two patches it learns, as always
