"""A column, a class or an image may be called anything: users' text is never an identifier or a file name unmapped."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import keyhole
from keyhole.cli.main import main
from keyhole.util.files import file_names
from keyhole.util.wording import distinct

COLUMNS = [
    "type", "tumor.grade", "values", "ER/PR status", "a/b", "..", "x" * 300, "肿瘤", "Grade", "grade", "training",
    "forward", "probability", "label", "loss", "0", "by_task", "a", "a.probability.b", "p=q", "split in\ntwo", "50 %",
]  # fmt: skip
SETTINGS = "--patch.size=16 --model.encoder=small --model.width=4 --model.heads=2 --select.m=2 --train.epochs=1 --run.threads=1".split()


@pytest.fixture(scope="module")
def table(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy images under a CSV with every column of `COLUMNS`, of the classes `b.predicted` and `c/d`."""
    path = tmp_path_factory.mktemp("names") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *COLUMNS])
        for color, label in (("green", "b.predicted"), ("red", "c/d")):
            for number in range(8):
                writer.writerow([toy / color / f"{number}.png", *[label] * len(COLUMNS)])
    return path


@pytest.fixture(scope="module")
def run(table: Path) -> Path:
    out = table.parent / "run"
    assert main(["train", str(table), "--out", str(out), *SETTINGS]) == 0
    return out


def test_any_column_name_trains_evaluates_saves_and_loads(run: Path, toy: Path, tmp_path: Path) -> None:
    names = [" ".join(name.split()) for name in COLUMNS]
    assert main(["evaluate", str(run)]) == 0
    folder = run / "evaluation" / "test"
    found = json.loads((folder / "metrics.json").read_text())
    assert list(found["tasks"]) == names
    files = found["confusion_files"]
    assert list(files) == names
    assert len({file.lower() for file in files.values()}) == len(names)
    for name, file in files.items():
        assert (folder / file).is_file(), name
    assert files["tumor.grade"] == "confusion_tumor.grade.csv"
    assert files["ER/PR status"] == "confusion_ER_PR_status.csv"

    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert len(set(header)) == len(header)
    assert {f"{name}.true" for name in names} <= set(header)

    assert main(["resume", str(run)]) == 0
    assert main(["predict", str(run), str(toy / "red" / "9.png"), "--out", str(tmp_path / "p")]) == 0
    prediction = keyhole.load(run).predict(toy / "red" / "9.png")
    assert list(prediction.probability) == names


def test_file_names_are_safe_and_differ_also_where_case_does_not_count() -> None:
    found = file_names([*COLUMNS, "", "CON/../..", "é", "/etc/passwd"], "task")
    assert len({name.lower() for name in found}) == len(found)
    for name in found:
        assert name.isascii()
        assert 0 < len(name) < 130
        assert not set(name) & set('/\\:*?"<>| \n')
        assert not name.startswith(".")


def test_columns_of_one_name_are_numbered() -> None:
    assert distinct(["a", "b", "a", "a (2)", "a"]) == ["a", "b", "a (2)", "a (2) (2)", "a (3)"]
