"""`keyhole bench`: it measures what `keyhole train` does, changes nothing, and says in one line what it cannot take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Say

from keyhole.config.file import recipes, resolve
from keyhole.config.settings import Config
from keyhole.data.manifest import read_manifest
from keyhole.images.geometry import Size
from keyhole.tools.bench.images import DIFFERENT_FILES, Kind, kind_of, write_images
from keyhole.tools.bench.result import Facts, advice
from keyhole.util.timing import PARTS


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a measurement puts its files."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Speed


def check_speed(found: dict[str, Any], steps: int) -> None:
    """What holds of every measurement on a CPU."""
    assert found["steps"] == steps
    assert set(found["seconds"]) == {*PARTS, "other"}
    assert all(part >= 0 for part in found["seconds"].values())
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert sum(found["seconds"].values()) == pytest.approx(found["step"] * steps)
    assert found["seconds"]["encoding"] > 0
    assert found["seconds"]["learning"] > 0
    assert found["floor"] > 0
    assert found["of_floor"] == pytest.approx(found["patches_per_s"] / found["floor"])
    assert found["first_step"] > 0
    assert found["advice"].endswith(".")


def test_a_run_is_measured_and_left_as_it_is(say: Say, toy_run: Path, tmp_path: Path) -> None:
    before = contents(toy_run)
    code, out, err = say("bench", "speed", toy_run, "--steps", "3", "--json", "--run.compile", "off")
    assert code == 0, err
    found = json.loads(out)
    check_speed(found, 3)
    # 16 px patches of a 64 px image are 16, and there are 4 images in a batch
    assert found["patches_per_s"] == pytest.approx(16 * found["images_per_s"])
    assert found["patches_per_s"] * found["step"] == pytest.approx(16 * 4)
    assert found["data"].startswith("16 of 17 training images of ")
    assert "16 patches each, 4 kept" in found["data"]
    assert contents(toy_run) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_other_data_are_measured_with_a_run(say: Say, toy_run: Path, toy: Path) -> None:
    code, out, err = say("bench", "speed", toy_run, "--data", toy, "--steps=1", "--json", "--run.compile=off")
    assert code == 0, err
    assert json.loads(out)["data"].startswith(f"8 of 17 training images of {toy}")


def test_people_get_a_table_with_every_part_and_a_sentence(say: Say, toy_run: Path) -> None:
    code, out, err = say("bench", "speed", toy_run, "--steps", "1", "--run.compile", "off")
    assert code == 0, err
    rows = out.splitlines()
    names = [row.split("  ")[0] for row in rows[:-1]]
    assert names == [
        "data", "computing", "encoder", "reading", "at a time", "encoder alone", "reached", "first step", "an epoch",
        *PARTS, "other",
    ]  # fmt: skip
    assert rows[-1].endswith(".")
    assert "patches/s" in rows[names.index("reached")]


SMALL = {
    "patch": {"size": 256},
    "model": {"encoder": "small", "width": 4, "heads": 2},
    "select": {"m": 2, "chunk": 8},
    "train": {"batch": 2},
    "run": {"threads": 1, "compile": "off"},
}


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({}, "generated photographs of 2048 x 1536 pixels, as JPEG, read from disk each time; 48 patches each, 2 kept"),
        (
            {"model": {"feature_width": 8, "dim": 8, "heads": 2}, "select": {"m": 2, "chunk": 1000}},
            "generated files of 10,000 features of 8 numbers, as HDF5, read from disk each time; "
            "10,000 features each, 2 kept",
        ),
    ],
)
def test_without_data_files_are_written_read_and_removed(
    say: Say, tmp_path: Path, changes: dict[str, Any], data: str
) -> None:
    Path("settings.yaml").write_text(yaml.safe_dump(SMALL | changes))
    code, out, err = say("bench", "speed", "settings.yaml", "--steps", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    check_speed(found, 1)
    assert found["data"] == data
    assert not list((tmp_path / "scratch").iterdir())


def test_no_step_is_begun_after_the_time_given(say: Say, toy_run: Path) -> None:
    code, out, _ = say("bench", "speed", toy_run, "--steps=5", "--seconds=1e-6", "--json", "--run.compile=off")
    assert code == 0
    check_speed(json.loads(out), 1)


def test_every_recipe_has_images_of_its_kind(tmp_path: Path) -> None:
    kinds = {name: kind_of(name, resolve(name)).what for name in recipes()}
    assert kinds["camelyon16-features"] == "features"
    assert kinds["slides"] == kinds["camelyon16"] == "slides"
    assert {kinds["traffic"], kinds["small"], kinds["megapixel-mnist"]} == {"photographs"}


def test_generated_images_are_of_two_classes_and_few_are_written_in_full(tmp_path: Path) -> None:
    path = write_images(Kind("photographs", Size(96, 64)), tmp_path, 10)
    config = Config().replace(data={"path": str(path), "val": 0.0, "test": 0.0})
    manifest = read_manifest(config.data)
    assert len(manifest.split("train")) == 10
    assert manifest.tasks[0].kind == "binary"
    assert len({item.image.stat().st_ino for item in manifest.items}) == DIFFERENT_FILES


# Advice

IDLE = dict.fromkeys((*PARTS, "other"), 0.0)


@pytest.mark.parametrize(
    ("shares", "facts", "words"),
    [
        ({"encoding": 0.9, "learning": 0.1}, Facts(), "The encoder is the limit, as it should be"),
        ({"encoding": 0.8, "learning": 0.2}, Facts(encoding_rate=0.5), "at 50% of the rate it has alone"),
        ({"encoding": 0.8}, Facts(encoding_rate=0.4, colored_rate=0.5), "at 50% of its rate where colours are changed"),
        ({"encoding": 0.9}, Facts(cuda=True, blank=0.4), "40% of what it encodes is of one colour"),
        ({"encoding": 0.97, "reading": 0.6}, Facts(cuda=True), "as it should be"),
        ({"encoding": 0.4, "reading": 0.6}, Facts(threads=2, cores=8), "--run.threads (now 2)"),
        ({"encoding": 0.4, "reading": 0.6}, Facts(threads=2, cores=2), "--data.cache"),
        ({"encoding": 0.4, "reading": 0.6}, Facts(threads=7, cores=8), "--run.threads (now 7)"),
        ({"encoding": 0.4, "reading": 0.6}, Facts(threads=7, cores=8, cuda=True), "--data.cache"),
        ({"encoding": 0.4, "reading": 0.6}, Facts(threads=2, cores=2, patches=50_000), "tiled pyramids"),
        ({"encoding": 0.4, "reading": 0.6}, Facts(features=True), "float16"),
        ({"encoding": 0.4, "copying": 0.5}, Facts(), "--select.chunk"),
        ({"encoding": 0.4, "scoring": 0.5}, Facts(), "--model.heads"),
        ({"encoding": 0.4, "learning": 0.5}, Facts(split=True), "more --memory"),
        ({"encoding": 0.4, "learning": 0.5}, Facts(kept=0.1, kept_cost=4), "10.0% of the patches are kept"),
        ({"encoding": 0.4, "other": 0.5}, Facts(), "--train.batch"),
        ({"encoding": 0.2, "learning": 0.35, "reading": 0.45}, Facts(threads=1, cores=2), "Reading takes 45%"),
    ],
)
def test_the_advice_is_about_what_limits(shares: dict[str, float], facts: Facts, words: str) -> None:
    assert words in advice(IDLE | shares, facts)


def test_some_learning_is_no_limit_and_some_waiting_is_hidden() -> None:
    shares = IDLE | {"encoding": 0.55, "learning": 0.3, "reading": 0.15}
    assert advice(shares, Facts()).startswith("The encoder is the limit")


# What is wrong, in one line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no verb `bench` (did you mean `bench speed`?)"),
        (["sped"], "did you mean `bench speed`?"),
        (["speed"], "nothing to measure given: keyhole bench speed RUN, or a recipe: "),
        (["speed", "trafic"], "trafic: expected a run folder, a settings file or a recipe, found nothing of that name"),
        (["speed", "traffic", "--recipe", "small"], "two recipes are given"),
        (["speed", "small", "--out", "x"], "--out: a measurement leaves no run folder"),
        (["speed", "small", "--steps", "0"], "--steps"),
        (["speed", "small", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["speed", "small", "--patch.size", "-1"], "--patch.size"),
        (["speed", "small", "--patch.sise", "9"], "did you mean `--patch.size`?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(say: Say, words: list[str], said: str) -> None:
    code, out, err = say("bench", *words)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("keyhole: error: ")
    assert said in err


def test_a_run_takes_no_recipe_beside_its_own_settings(say: Say, toy_run: Path) -> None:
    code, _, err = say("bench", "speed", toy_run, "--recipe", "small")
    assert code == 2
    assert "leave out --recipe and --config" in err


def test_help_and_the_configuration_come_without_measuring(say: Say) -> None:
    assert say("bench", "speed", "--help")[0] == 0
    code, out, _ = say("bench", "speed", "small", "--select.m", "9", "--print-config")
    assert code == 0
    assert yaml.safe_load(out)["select"]["m"] == 9
