"""The health of the selection: what is measured after each epoch, and that it depends on the model and images alone."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import csv_rows, settings, write_toy
from PIL import Image

import keyhole
from keyhole.config.settings import Config, ModelConfig, PatchConfig, SelectConfig
from keyhole.data.item import Item
from keyhole.engine import Engine
from keyhole.engine.bags import positions
from keyhole.engine.opening import opener
from keyhole.engine.random_patches import RandomPatches, attended_share, draw
from keyhole.nn import build_classifier, guessing_loss, total_loss
from keyhole.nn.selection import RULES
from keyhole.nn.tensors import AsRead, values_of
from keyhole.patches.image_cache import ImageCache
from keyhole.tasks.kinds import Task
from keyhole.training import validation
from keyhole.training.health import compared_names, few_items, measure, of_one_color

SIZE, M = 16, 4
TASKS = [Task("a", "binary", ("no", "yes")), Task("b", "multiclass", ("x", "y", "z"))]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four images; the third has fewer patches than are kept, the last a damaged end."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for number, shape in enumerate([(70, 50, 3), (33, 90, 3), (16, 48, 3), (64, 64, 3)]):
        paths.append(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.mark.parametrize("position", ["none", "1d", "2d"])
@pytest.mark.parametrize("rule", RULES)
def test_random_patches_are_the_same_whatever_the_chunks_and_answer_as_the_model_does(
    images: list[Path], rule: Any, position: Any
) -> None:
    config = Config(
        patch=PatchConfig(size=SIZE), model=ModelConfig(encoder="small", width=4, heads=2, position=position)
    )
    torch.manual_seed(0)
    model, store = build_classifier(config.model, TASKS, SIZE).eval(), ImageCache()
    openers = [opener(config, store, Item(path.name, path, {})) for path in images]
    for chunk, batches in ((5, [openers]), (64, [openers[:1], openers[1:]])):
        with closing(Engine(model, SelectConfig(m=M, chunk=chunk, rule=rule))) as engine:
            rows = 0
            for done in engine.infer(batches, compare=True):
                names, sources = done.batch.names, done.batch.sources
                assert [names[row] for row in done.compared] == [name for name in names if name != "2.png"]
                for place, row in enumerate(done.compared):
                    source = sources[row]
                    assert source is not None
                    index = draw(names[row], len(source), M)
                    pixels = values_of(AsRead(torch.from_numpy(source.read(index).copy())))[None]
                    where = None if model.position is None else torch.from_numpy(positions(model, source, index))[None]
                    with torch.no_grad():
                        expected = model(pixels, where)
                    for task, logits in done.random.items():
                        torch.testing.assert_close(logits[place], expected[task][0], atol=1e-4, rtol=1e-3)
                    rows += 1
            assert rows == 3


def test_a_random_patch_that_cannot_be_read_is_left_out_and_so_is_an_image_that_fails() -> None:
    batch: Any = SimpleNamespace(names=["a", "b", "c"], sources=[range(50)] * 3, failed={1: "gone"})
    model: Any = SimpleNamespace(position=None)
    drawn, every, index = RandomPatches(batch, 5), np.arange(50), draw("a", 50, 5)
    embedding = torch.rand(50, 3)
    assert drawn.bags(model) is None
    good = every != index[2]
    drawn.take(np.zeros(49, np.int64), every[good], embedding[torch.from_numpy(good)])
    drawn.take(np.full(50, 1), every, embedding)
    bags = drawn.bags(model)
    assert bags is not None
    assert bags.rows == [0]
    assert bags.mask.tolist() == [[True] * 4]
    torch.testing.assert_close(bags.embedding, embedding[np.delete(index, 2)])


def test_draws_depend_on_name_and_number_alone() -> None:
    index = draw("a.png", 1000, 50)
    assert np.array_equal(index, draw("a.png", 1000, 50))
    assert len(set(index.tolist())) == 50
    assert index.min() >= 0
    assert index.max() < 1000
    assert not np.array_equal(index, draw("b.png", 1000, 50))
    counts = np.bincount(np.concatenate([draw(f"{number}", 10, 3) for number in range(400)]), minlength=10)
    assert counts.min() > 80
    assert counts.max() < 165


def test_the_attended_share_does_not_depend_on_the_size_of_the_set() -> None:
    for m in (1, 3, 50):
        flat = torch.zeros(1, m, 2, 3)
        torch.testing.assert_close(attended_share(flat, None), torch.ones(1))
        flat[:, 0] = 1000.0
        torch.testing.assert_close(attended_share(flat, None), torch.full((1,), 1 / m))
        half = torch.zeros(1, 2 * m, 2, 3)
        half[:, m:] = -1000.0
        torch.testing.assert_close(attended_share(half, None), torch.full((1,), 0.5))
    padded = torch.zeros(1, 5, 1, 1)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(attended_share(padded, mask), torch.ones(1))


def test_patches_of_one_colour_may_have_the_noise_of_a_camera() -> None:
    rng = np.random.default_rng(0)
    blank = np.clip(rng.normal(200, 1.0, (3, 64, 64, 3)), 0, 255).astype(np.uint8)
    stroke, noise = blank.copy(), np.clip(rng.normal(128, 12, (3, 64, 64, 3)), 0, 255).astype(np.uint8)
    stroke[:, 30:33, 20:44] = 40
    assert of_one_color(blank).all()
    assert not of_one_color(stroke).any()
    assert not of_one_color(noise).any()
    assert of_one_color(blank[..., :1]).all()


def test_what_is_remembered_and_looked_at_is_bounded_and_stays_the_same() -> None:
    items = [Item(f"{number}.png", Path(f"{number}.png"), {}) for number in range(1000)]
    assert len(compared_names(items, 1)) == 256
    assert len(compared_names(items, 1000)) == 16
    assert len(compared_names(items, 10**6)) == 1
    some = compared_names(items, 16)
    assert some == compared_names(items[::-1], 16)
    counts = {item.name: 10 for item in items} | {"7.png": 9000}
    looked = few_items(items, counts)
    assert 0.04 < sum(counts[item.name] for item in looked) / sum(counts.values()) <= 0.05
    assert few_items(items[:5], counts) == [], "each would be a large share of the work"


def test_guessing_is_the_best_constant_answer_of_every_kind() -> None:
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 3, (50, 1))).float()
    three, share = Task("t", "multiclass", ("a", "b", "c")), torch.bincount(truth[:, 0].long()) / 50
    assert guessing_loss([three], {"t": truth}) == pytest.approx(-(share * share.log()).sum().item(), abs=1e-4)
    balanced = {"t": three.class_weights(truth)}
    assert balanced["t"] is not None
    assert guessing_loss([three], {"t": truth}, balanced) == pytest.approx(math.log(3), abs=1e-4)
    size = torch.from_numpy(rng.normal(50, 10, (50, 1)))
    number = Task("n", "regression").fit(size.numpy())
    assert guessing_loss([number], {"n": size}) == pytest.approx(1.0, abs=1e-3)
    tags = torch.from_numpy(rng.integers(0, 2, (50, 2))).float()
    tags[::5] = torch.nan
    several = [three, Task("n", "multilabel", ("p", "q"))]
    best = guessing_loss(several, {"t": truth, "n": tags})
    known = tags[~tags.isnan().any(dim=1)].mean(dim=0)
    said = {"t": share.log().expand(50, -1), "n": known.logit().expand(50, -1)}
    assert best == pytest.approx(total_loss(several, said, {"t": truth, "n": tags}).item(), abs=1e-4)


# On the path that production takes

FIGURES = ("kept.changed", "kept.attended", "kept.blank", "kept.gain")


def columns(run: Path) -> list[str]:
    return [name for name in csv_rows(run / "metrics.csv")[0] if name.startswith("kept.")]


def test_each_epoch_has_the_figures_in_a_row_and_in_the_line(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The squares of the toy images are found, so that random patches answer worse."""
    run = keyhole.train(toy, tmp_path / "run", **settings(train={"epochs": 4, "explore": 2.0}))
    rows = run.metrics
    assert columns(run.path) == list(FIGURES)
    assert all(math.isnan(rows[0][name]) for name in FIGURES), "all kept patches are random in the first epoch"
    assert math.isnan(rows[1]["kept.changed"])
    for row in rows[2:]:
        assert 0 <= row["kept.changed"] < 1
        assert 1 / 4 < row["kept.attended"] <= 1
        assert row["kept.blank"] < 0.5, "a square may fill a patch"
    assert rows[-1]["kept.gain"] > 0.1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  validation loss")]
    assert "kept patches" not in lines[0]
    assert lines[-1].endswith(f"{rows[-1]['kept.blank']:.0%} blank, gain {rows[-1]['kept.gain']:.4f}")
    assert "kept.gain" in (run.path / "log.txt").read_text()


@pytest.mark.parametrize("data", ["test", "none"])
def test_the_watched_split_is_measured_or_a_few_training_images(data: str, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "data", count=24)
    parts = {"path": folder, "val": 0.0, "test": 0.2 if data == "test" else 0.0}
    watch = {"watch": "test"} if data == "test" else {}
    run = keyhole.train(parts, tmp_path / "run", **settings(train={"epochs": 2, **watch}))
    assert columns(run.path) == list(FIGURES if data == "test" else FIGURES[:3])
    row = run.metrics[-1]
    assert all(math.isfinite(row[name]) for name in columns(run.path))
    assert ("test.loss" in row) == (data == "test")


@pytest.mark.parametrize("rule", RULES)
def test_stored_features_have_no_colour_and_tasks_of_every_kind_a_gain(rule: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["image,one,three,amount,tags,split"]
    for number in range(16):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["features"] = rng.normal(size=(3 if number == 0 else 20, 6)).astype(np.float32)
        labels = (
            "ab"[number % 2],
            "" if number == 3 else "xyz"[number % 3],
            f"{rng.normal():.3f}",
            "p|q" if number % 3 else "p",
        )
        lines.append(f"{number}.h5,{','.join(labels)},{'val' if number % 4 == 3 else 'train'}")
    (tmp_path / "l.csv").write_text("\n".join(lines))
    sections = settings(model={"dim": 16, "heads": 2, "position": "1d"}, select={"m": 3, "rule": rule, "chunk": 8})
    del sections["model"]["width"], sections["model"]["encoder"]
    run = keyhole.train(tmp_path / "l.csv", tmp_path / "run", **sections)
    assert columns(run.path) == ["kept.changed", "kept.attended", "kept.gain"]
    assert all(math.isfinite(run.metrics[-1][name]) for name in columns(run.path))


def test_images_that_keep_all_patches_are_not_compared(toy: Path, tmp_path: Path) -> None:
    run = keyhole.train(toy, tmp_path / "run", **settings(select={"m": 16}))
    row = run.metrics[-1]
    assert math.isnan(row["kept.gain"])
    assert math.isnan(row["kept.changed"])
    assert 0 < row["kept.attended"] <= 1


def test_a_validation_that_is_cut_off_goes_on_to_the_same_figures(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images large enough for a journal: only those that are missing in it are read again."""
    monkeypatch.setattr(validation, "MIN_JOURNAL_PATCHES", 1)
    calls: list[object] = []

    def cut_off(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        if len(calls) == 7:
            raise RuntimeError("killed")
        return measure(*arguments)

    sections = settings(train={"epochs": 3})
    whole = keyhole.train(toy, tmp_path / "whole", **sections)
    monkeypatch.setattr(validation, "measure", cut_off)
    with pytest.raises(RuntimeError, match="killed"):
        keyhole.train(toy, tmp_path / "cut", **sections)
    found = keyhole.resume(tmp_path / "cut")
    images = len(csv_rows(whole.path / "predictions" / "val.csv"))
    assert len(calls) == 3 * images + 1, "images in the journal are not measured again"
    for expected, row in zip(whole.metrics, found.metrics, strict=True):
        same = [name for name in expected if name not in ("seconds", "peak_gb")]
        assert str([row[name] for name in same]) == str([expected[name] for name in same])
