"""Weights come from a run, its model, or a file; what cannot be had, or does not fit, ends in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
import torch
from conftest import SMALL
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import keyhole
from keyhole.cli.main import main
from keyhole.errors import ConfigError, RunError
from keyhole.nn import SmallEncoder, TimmEncoder
from keyhole.nn.weights import check_pretrained
from keyhole.runs.checkpoint import load_encoder

Say = pytest.CaptureFixture[str]
TINY = "--patch.size 16 --model.heads 2 --select.m 4 --train.epochs 1 --train.lr 1e-30 --train.warmup 0 --run.threads 2"


def encoder_weights(run: Path) -> dict[str, torch.Tensor]:
    """The learned weights of a run's encoder, without running statistics, which move at any rate."""
    model = load_file(run / "best" / "model.safetensors")
    return {
        name: tensor
        for name, tensor in model.items()
        if name.startswith("encoder.") and "running" not in name and "num_b" not in name
    }


@pytest.mark.parametrize("place", ["", "best", "best/model.safetensors"])
def test_the_encoder_of_a_run_starts_another(toy: Path, toy_run: Path, place: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = [
        "train",
        str(toy),
        *TINY.split(),
        "--model.encoder",
        "small",
        "--model.width",
        "8",
        "--model.weights",
        str(toy_run / place),
    ]
    assert main([*line, "--out", str(out)]) == 0
    learned, taken = encoder_weights(toy_run), encoder_weights(out)
    assert learned.keys() == taken.keys()
    for name, tensor in learned.items():
        torch.testing.assert_close(taken[name], tensor, rtol=0, atol=1e-6)


def test_a_run_of_another_encoder_is_refused_with_its_settings(
    toy: Path, toy_run: Path, tmp_path: Path, capsys: Say
) -> None:
    line = ["train", str(toy), *TINY.split(), "--model.weights", str(toy_run), "--out", str(tmp_path / "run")]
    assert main([*line, "--model.encoder", "small", "--model.width", "4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{toy_run}/best/model.safetensors: the weights do not fit the model's encoder: " in error
    assert "body.0.0.weight is (8, 3, 7, 7), expected (4, 3, 7, 7)" in error
    assert "They were made with --model.encoder small --model.channels 3 --model.width 8." in error
    assert main([*line, "--model.encoder", "resnet10t"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected names such as" in error
    assert "found encoder.body" in error.replace("found heads", "found encoder.body")
    assert main([*line[:-2], "--out", str(tmp_path / "other"), "--model.weights", str(tmp_path)]) == 2
    assert "there is no model in it (no model.safetensors)" in capsys.readouterr().err


def test_a_run_embeds_with_its_own_encoder_and_patches(toy: Path, toy_run: Path, tmp_path: Path, capsys: Say) -> None:
    assert main(["embed", str(toy), "--run", str(toy_run), "--out", str(tmp_path / "f")]) == 0
    with h5py.File(tmp_path / "f" / "red" / "0.png.h5") as file:
        stored = torch.from_numpy(file["features"][:])
        assert file["coords"].attrs["patch_size"] == SMALL["patch"]["size"]
    predictor = keyhole.load(toy_run, device="cpu")
    with keyhole.open_image(toy / "red" / "0.png") as image:
        pixels = torch.from_numpy(keyhole.PatchGrid(image, size=16).read(slice(None)))
    with torch.no_grad():
        expected = predictor.model.encode(pixels.permute(0, 3, 1, 2))
    torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-3)
    assert main(["embed", str(toy), "--run", str(toy_run), "--encoder", "resnet18", "--out", str(tmp_path / "g")]) == 2
    assert "--run gives the encoder and its weights: leave out --encoder" in capsys.readouterr().err


def test_weights_of_colour_are_summed_for_grey_patches_as_timm_does(tmp_path: Path) -> None:
    color, grey = TimmEncoder("resnet10t"), TimmEncoder("resnet10t", channels=1)
    path = tmp_path / "model.safetensors"
    save_file({f"body.{name}": tensor for name, tensor in color.body.state_dict().items()}, path)
    load_encoder(grey, path)
    first = "conv1.0.weight"
    torch.testing.assert_close(grey.body.state_dict()[first], color.body.state_dict()[first].sum(1, keepdim=True))
    with pytest.raises(
        RunError, match=r"the weights do not fit the model's encoder: expected names such as .*, found body\."
    ):
        load_encoder(SmallEncoder(), path)


# Downloads


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a server that is not there, for the library that downloads; it reads its variables once."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("verb", ["train", "embed"])
def test_a_download_that_fails_says_which_file_to_fetch(
    toy: Path, hub: Path, verb: str, offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Say
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    out, option = tmp_path / "out", "--model." if verb == "train" else "--"
    line = [verb, str(toy), "--patch.size", "16", f"{option}encoder", "resnet10t", f"{option}pretrained"]
    assert main([*line, "--out", str(out)]) == 2
    said = capfd.readouterr().err
    assert "Retry" not in said  # one question, no minute of further tries
    error = said.splitlines()[-1]
    assert error.startswith(
        f"keyhole: error: {option}encoder resnet10t: its pretrained weights cannot be downloaded or loaded ("
    )
    assert ("offline" in error) == offline
    assert "Fetch model.safetensors of the repository timm/resnet10t.c3_in1k" in error
    assert f"{option}weights FILE instead of {option}pretrained" in error
    assert not (out / "config.yaml").exists()


def cached(hub: Path) -> Path:
    """Where the cache has the weights of resnet10t."""
    place = hub / "models--timm--resnet10t.c3_in1k"
    for folder in ("refs", "snapshots/abc"):
        (place / folder).mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    return place / "snapshots" / "abc" / "model.safetensors"


def test_weights_in_the_cache_need_no_network(hub: Path, capfd: Say) -> None:
    state = TimmEncoder("resnet10t").body.state_dict()
    rest = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    save_file(state | rest, cached(hub))
    taken = TimmEncoder("resnet10t", pretrained=True).body.state_dict()
    assert all(torch.equal(taken[name], tensor) for name, tensor in state.items())
    cut = TimmEncoder("resnet10t", pretrained=True, stages=1, channels=1).body.state_dict()
    assert torch.equal(cut["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert "Retry" not in capfd.readouterr().err


def test_weights_in_the_cache_that_are_damaged_are_one_line(hub: Path) -> None:
    cached(hub).write_bytes(b"not weights")
    with pytest.raises(ConfigError, match=r"model\.encoder resnet10t: its pretrained weights cannot be"):
        TimmEncoder("resnet10t", pretrained=True)


def test_a_name_without_pretrained_weights_is_refused(toy: Path, tmp_path: Path, capsys: Say) -> None:
    with pytest.raises(ConfigError, match="timm has no pretrained weights for it"):
        check_pretrained("vit_giant_patch14_224")
    line = ["embed", str(toy), "--encoder", "regnetz_005", "--pretrained", "--out", str(tmp_path / "f")]
    assert main(line) == 2
    assert "--encoder regnetz_005: timm has no pretrained weights for it" in capsys.readouterr().err
