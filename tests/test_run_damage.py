"""What happens to the files of a run: bits that flip, files that are cut or changed. Each is refused in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Say, settings, write_toy

import keyhole
from keyhole.cli.main import main
from keyhole.errors import RunError
from keyhole.runs.checkpoint import read_info, read_tensors, write_tensors
from keyhole.runs.journal import RowJournal
from keyhole.util.tables import read_rows


def test_no_flipped_bit_of_a_file_of_tensors_goes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "weight": torch.ones(3, 2),
        "count": torch.zeros((), dtype=torch.int64),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "mask": torch.ones(2, dtype=torch.bool),
        "empty": torch.ones(0, 3),
    }
    write_tensors(path, tensors, {"name": "ä", "classes": ["a", "b"]})
    found, info = read_tensors(path)
    assert info == {"name": "ä", "classes": ["a", "b"]} == read_info(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(RunError, match=r"model\.safetensors"):
            read_tensors(path)


@pytest.fixture
def run(toy_run: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(toy_run, tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("keyhole: error: "))
    return line


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def cut(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:-1])


def garble(data: bytes) -> bytes:
    return b"\xff\0" + data[2:]


DELETE, RESTORE = "Delete", "Restore it from a copy"


@pytest.mark.parametrize(
    ("name", "damage", "remedy"),
    [
        ("config.yaml", lambda data: data.replace(b"lr: 0.003", b"lr: 0.001"), r"train\.lr changed .*Delete"),
        ("config.yaml", garble, DELETE),
        ("config.yaml", lambda data: b"", DELETE),
        ("metrics.csv", cut, DELETE),
        ("metrics.csv", garble, DELETE),
        ("metrics.csv", lambda data: data[:-4], DELETE),
        ("best/model.json", garble, DELETE),
        ("best/model.json", lambda data: data[:-20], DELETE),
        ("manifest.csv", cut, RESTORE),
        ("manifest.csv", garble, RESTORE),
        ("left_out.csv", garble, RESTORE),
        ("left_out.csv", lambda data: b"other,columns\n1,2\n", RESTORE),
        ("unreadable.csv", garble, DELETE),
        ("best/model.safetensors", flip, RESTORE),
        ("best/model.safetensors", lambda data: data[:8] + garble(data[8:]), RESTORE),
        ("last.safetensors", flip, RESTORE),
    ],
)
def test_resume_refuses_a_changed_file_and_says_what_to_do(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[bytes], bytes], remedy: str
) -> None:
    path = run / name
    whole = path.read_bytes() if path.exists() else b"epoch,image\n1,a.png\n"
    path.write_bytes(damage(whole))
    line = said(capsys, "resume", run)
    assert str(path) in line
    assert re.search(remedy, line)
    if remedy.endswith(DELETE) and name != "unreadable.csv":
        path.unlink()
        assert main(["resume", str(run)]) == 0
        assert path.read_bytes() == whole


def test_resume_looks_at_the_best_model_before_it_learns(
    run: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = keyhole.train(toy, tmp_path / "other", **settings(train={"epochs": 1, "seed": 5})).path
    best = run / "best" / "model.safetensors"
    shutil.copy(other / "best" / "model.safetensors", best)
    assert "the best model of another run" in said(capsys, "resume", run, "--train.epochs", 3)
    assert "the best model of another run" in said(capsys, "evaluate", run)
    best.unlink()
    assert f"{best}: missing. Restore it from a copy" in said(capsys, "resume", run, "--train.epochs", 3)


def test_a_damaged_journal_is_refused_and_may_be_deleted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("selection.safetensors", "validation.jsonl"):
        (run / name).write_bytes(b"\xff" * 40 + b"\n")
        line = said(capsys, "resume", run, "--train.epochs", 3)
        assert str(run / name) in line
        assert "Delete it" in line
        (run / name).unlink()
    assert main(["resume", str(run)]) == 0
    assert len(read_rows(run / "metrics.csv")) == 3


def test_a_half_row_of_a_journal_is_cut_before_the_next_is_added(tmp_path: Path) -> None:
    journal = RowJournal(tmp_path / "rows.jsonl", {"epoch": 1})
    rows = [{"names": ["a"], "value": 1.5}, {"names": ["b"], "value": 2.5}]
    for row in rows:
        journal.add(row)
    whole = journal.path.read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole)):
        journal.path.write_bytes(whole[:size])
        assert [row["names"] for row in journal.read()] == [["a"]]
        journal.add(rows[1])
        assert journal.path.read_bytes() == whole


def test_changed_images_are_named_by_resume_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_toy(tmp_path / "data", count=8)
    run = keyhole.train(data, tmp_path / "run", **settings(train={"epochs": 1})).path
    of = {split: [Path(row["image"]) for row in read_rows(run / "manifest.csv") if row["split"] == split]
          for split in ("train", "test")}  # fmt: skip
    for split, command in (("train", "resume"), ("test", "evaluate")):
        image = of[split][1]
        whole = image.read_bytes()
        image.write_bytes(flip(whole))
        line = said(capsys, command, run)
        assert f"1 image changed since the run began: {image}: other content of the same size" in line
        image.write_bytes(whole + b" ")
        assert f"{image}: has {len(whole) + 1} bytes, {len(whole)} when the run began" in said(capsys, command, run)
        image.write_bytes(whole)
        assert main([command, str(run)]) == 0
    (run / "manifest.csv").write_bytes(cut((run / "manifest.csv").read_bytes()))
    assert f"{run / 'manifest.csv'}: changed since the run began" in said(capsys, "evaluate", run)


# A run in Python


def test_a_run_is_made_from_text_and_given_as_a_path(run: Path, toy: Path, tmp_path: Path) -> None:
    found = keyhole.Run(str(run))
    assert found == keyhole.Run(run) == keyhole.Run(found)
    assert (found.path, Path(found)) == (run, run)
    losses = [row["val.loss"] for row in found.metrics]
    assert losses == [row["val.loss"] for row in keyhole.Run(run).metrics]
    assert len(losses) == found.config.train.epochs
    image = toy / "red" / "0.png"
    assert keyhole.load(found).predict(image).probability == keyhole.load(run).predict(image).probability
    assert keyhole.load(found, threshold="balanced").thresholds
    assert keyhole.evaluate(found, out=tmp_path / "evaluated").metrics
    assert keyhole.compare([found, run], split="val", out=tmp_path / "compared").metrics
    assert [row["val.loss"] for row in keyhole.resume(found).metrics] == losses
    assert keyhole.embed(toy / "red", tmp_path / "features", run=found, device="cpu").files
    assert keyhole.Config(model={"start": found}).model.start == run


def test_a_run_whose_folder_is_not_there_says_so_where_it_is_used(tmp_path: Path) -> None:
    missing = keyhole.Run(tmp_path / "nowhere")
    uses: list[Callable[[], object]] = [missing.curves, missing.show, missing.summary]
    uses += [partial(getattr, missing, name) for name in ("config", "metrics", "best", "learning")]
    for use in uses:
        with pytest.raises(RunError, match=r"nowhere: there is no such run folder\. Check the path"):
            use()


def test_the_command_line_says_once_that_there_is_no_run(tmp_path: Path, toy: Path, say: Say) -> None:
    said = say("predict", tmp_path / "nowhere", toy / "red" / "0.png", "--out", tmp_path / "out")
    assert "nowhere" in said.refusal()
    assert said.all.count("nowhere") == 1


def test_the_file_of_a_model_is_refused_for_its_folder(run: Path) -> None:
    for file in (run / "best" / "model.safetensors", run / "last.safetensors"):
        with pytest.raises(RunError, match=f"{file.name}: is a file, .*Give the folder that holds it: {file.parent}$"):
            keyhole.load(file)
        keyhole.load(file.parent)
