"""Where evaluations are written, what they say of themselves, and that moved images are found again."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, csv_rows, write_toy
from PIL import Image

import keyhole
from keyhole.cli.main import main
from keyhole.errors import DataError, OutputError
from keyhole.training.interrupt import Interrupt
from keyhole.training.loop import Loop


@pytest.fixture
def own_run(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to write into."""
    return Path(shutil.copytree(toy_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")))


def table(path: Path, images: list[Path]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *([image, image.parent.name] for image in images)])
    return path


def images_of(run: Path, split: str) -> list[Path]:
    return [Path(row["image"]) for row in csv_rows(run / "manifest.csv") if row["split"] == split]


# --- moved images ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_and_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and the folder that its images were moved to from old/toy since."""
    folder = tmp_path_factory.mktemp("moved")
    write_toy(folder / "old" / "toy", count=6)
    run = keyhole.train(folder / "old" / "toy", folder / "run", **(SMALL | {"train": {"epochs": 1, "batch": 4}}))
    shutil.move(folder / "old", folder / "kept")
    return run.path, folder / "kept"


@pytest.fixture
def moved(run_and_images: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, to change; the images are in new/place/toy."""
    run, images = run_and_images
    (tmp_path / "new").mkdir()
    return Path(shutil.copytree(run, tmp_path / "run")), Path(shutil.copytree(images, tmp_path / "new" / "place"))


@pytest.mark.parametrize("below", ["", "toy", ".."])
def test_moved_images_are_found_below_root(
    moved: tuple[Path, Path], below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, place = moved
    if below == "..":
        place.rename(place.parent / "old")  # the folder above what was moved
    assert main(["evaluate", str(run), "--out", str(run.parent / "out")]) == 2
    assert "If they were moved, name the folder that holds them now: --root DIR" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--root", str(place / below)]) == 0
    rows = csv_rows(run / "evaluation" / "test" / "predictions.csv")
    assert rows
    assert all(Path(row["path"]).is_file() for row in rows)
    assert main(["resume", str(run), "--root", str(place / below)]) == 0


def test_other_images_in_root_are_not_taken_for_the_runs(
    moved: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, place = moved
    first = Path(images_of(run, "test")[0])
    other = place / "toy" / first.parent.name / first.name
    pixels = np.asarray(Image.open(other)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(other)

    assert main(["evaluate", str(run), "--root", str(place)]) == 2
    said = capsys.readouterr().err
    assert f"1 image changed since the run began: {other}: " in said
    (tmp_path / "empty").mkdir()
    assert main(["evaluate", str(run), "--root", str(tmp_path / "empty")]) == 2
    assert "none of the" in capsys.readouterr().err
    assert main(["resume", str(run), "--root", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_stopped_run_goes_on_with_moved_images_as_it_would_have(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "old" / "toy")
    with pytest.raises(KeyboardInterrupt):
        Stop(after_epochs=1).train(tmp_path / "old" / "toy", tmp_path / "run")
    (tmp_path / "old").rename(tmp_path / "new")

    resumed = keyhole.resume(tmp_path / "run", root=tmp_path / "new")

    learned = ("epoch", "step", "train.loss", "val.loss")
    rows = [[{name: row[name] for name in learned} for row in run.metrics] for run in (resumed, keyhole.Run(toy_run))]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2


# --- folders ---------------------------------------------------------------------------------------------------------


def test_results_of_other_data_never_go_where_those_of_a_split_are(own_run: Path, tmp_path: Path) -> None:
    own = keyhole.evaluate(own_run)
    before = (own.path / "predictions.csv").read_bytes()
    (tmp_path / "x").mkdir()
    other = keyhole.evaluate(own_run, table(tmp_path / "test.csv", images_of(own_run, "val")))
    third = keyhole.evaluate(own_run, table(tmp_path / "x" / "test.csv", images_of(own_run, "val")[:3]))

    assert len({own.path, other.path, third.path}) == 3
    assert (own.path / "predictions.csv").read_bytes() == before
    assert (own_run / "predictions" / "test.csv").read_bytes() == before
    again = keyhole.evaluate(own_run, tmp_path / "test.csv")
    assert again.path == other.path, "the same data once more"
    assert "replaces the evaluation" in again.lines()[0]


def test_a_folder_with_other_results_is_refused_and_the_same_ones_are_replaced_whole(
    own_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    keyhole.evaluate(own_run, out=out)
    before = (out / "metrics.json").read_bytes()
    with pytest.raises(OutputError, match=r"holds the evaluation of .* \(test\).*Choose another --out"):
        keyhole.evaluate(own_run, split="val", out=out)
    assert (out / "metrics.json").read_bytes() == before
    (out / "lesions.csv").write_text("of an earlier call with annotations\n")
    (out / "mine.txt").write_text("of the user\n")
    keyhole.evaluate(own_run, out=out)
    assert not (out / "lesions.csv").exists()
    assert (out / "mine.txt").exists()
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "predictions.csv").write_text("image\n")
    with pytest.raises(OutputError, match="holds other results"):
        keyhole.evaluate(own_run, out=tmp_path / "answers")


def test_what_lies_in_a_run_is_the_runs_own_after_a_move_or_a_kill(own_run: Path, tmp_path: Path) -> None:
    first = keyhole.evaluate(own_run)
    other = keyhole.evaluate(own_run, table(tmp_path / "other.csv", images_of(own_run, "val")))
    moved = tmp_path / "moved"
    shutil.copytree(own_run, moved)
    again = keyhole.evaluate(moved)
    assert again.path == moved / "evaluation" / "test"
    assert (again.path / "predictions.csv").read_bytes() == (first.path / "predictions.csv").read_bytes()
    assert keyhole.evaluate(moved, tmp_path / "other.csv").path == moved / "evaluation" / other.path.name
    (again.path / "metrics.json").unlink()  # killed between the two files
    keyhole.evaluate(moved)
    assert (again.path / "metrics.json").is_file()


@pytest.mark.parametrize("out", [None, "out"])
def test_an_evaluation_that_was_killed_is_repeated_in_its_own_folder(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    data, place = table(tmp_path / "other.csv", images_of(own_run, "val")), out and tmp_path / out
    folder = place or own_run / "evaluation" / "other"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("keyhole.inference.evaluate.evaluate_task", killed)
        with pytest.raises(KeyboardInterrupt):
            keyhole.evaluate(own_run, data, out=place)
    assert (folder / "predictions.csv").is_file()
    (folder / ".predictions.csv.abcdefgh").write_text("half a ro")
    (folder / ".mine.abcdefgh").write_text("of the user")

    again = keyhole.evaluate(own_run, data, out=place)

    assert again.path == folder
    assert sorted(path.name for path in folder.glob("[.mpu]*")) == [".mine.abcdefgh", "metrics.json", "predictions.csv"]
    before = (folder / "metrics.json").read_bytes()
    keyhole.evaluate(own_run, data, out=place)
    assert (folder / "metrics.json").read_bytes() == before


def test_with_out_nothing_is_written_into_the_run(own_run: Path, tmp_path: Path) -> None:
    def state() -> dict[Path, tuple[int, bytes]]:
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in own_run.rglob("*") if p.is_file()}

    before = state()
    keyhole.evaluate(own_run, out=tmp_path / "out")
    assert state() == before


def test_what_cannot_be_written_is_known_before_the_work(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_run / "evaluation").write_text("a file where the folder should be")
    monkeypatch.setattr(
        "keyhole.inference.predictor.Predictor.predict_items", lambda *_, **__: pytest.fail("the work had begun")
    )
    with pytest.raises(OutputError, match=r"cannot write here.*--out DIR"):
        keyhole.evaluate(own_run)


# --- where the figures come from -------------------------------------------------------------------------------------


def test_images_that_the_model_was_trained_on_are_told_by_their_content(own_run: Path, tmp_path: Path) -> None:
    copies = []
    for number, (split, count) in enumerate([("train", 3), ("val", 2), ("test", 2)]):
        for image in images_of(own_run, split)[:count]:
            copies.append(tmp_path / "copy" / image.parent.name / f"{number}-{image.name}")
            copies[-1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, copies[-1])

    found = keyhole.evaluate(own_run, tmp_path / "copy")

    said = "5 of the 7 images were used before, 3 to train the model and 2 to choose its best epoch"
    assert any(said in line for line in found.lines())
    assert any(said in note for note in json.loads((found.path / "metrics.json").read_text())["notes"])
    fresh = keyhole.evaluate(own_run, table(tmp_path / "fresh.csv", images_of(own_run, "test")))
    assert not any("used before" in line for line in fresh.lines())
    assert not any("used before" in line for line in keyhole.evaluate(own_run).lines())


def test_groups_that_have_the_name_of_one_in_training_are_told(tmp_path: Path) -> None:
    images = sorted(write_toy(tmp_path / "toy", count=6).rglob("*.png"))
    splits = {"a": "train", "b": "train", "c": "val", "d": "test"}

    def grouped(name: str, groups: str, chosen: list[Path], split: bool = False) -> Path:
        rows = [["image", "label", "group", *["split"] * split]]
        for image, group in zip(chosen, groups, strict=True):
            rows.append([str(image), image.parent.name, group.strip(), *[splits[group] for _ in range(split)]])
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        return tmp_path / name

    given = SMALL | {"train": {"epochs": 1, "batch": 4}}
    run = keyhole.train(grouped("d.csv", "aabbcd" * 2, images, split=True), tmp_path / "run", **given).path
    new = sorted(write_toy(tmp_path / "new", count=4, seed=1).rglob("*.png"))

    def told(groups: str) -> list[str]:
        found = keyhole.evaluate(run, grouped(f"{groups.replace(' ', '_')}.csv", groups, new))
        assert list(found.notes) == json.loads((found.path / "metrics.json").read_text())["notes"]
        return [note for note in found.notes if "training or validation split" in note]

    (said,) = told("aaceedff")
    assert said.startswith("2 of the 5 groups (3 of the 8 images) have names of groups in the training")
    assert "run: a, c. If they are the same groups, such as the same patients, the figures are too good" in said
    assert "by chance" in said
    assert told("ddeeffgg") == [], "the test split was not learned from"
    assert told("    eeff") == [], "an image without a group is its own"
    assert not any("names of groups" in line for line in keyhole.evaluate(run).lines())


def test_an_unfinished_run_says_so_and_keeps_no_predictions_of_an_earlier_model(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Stop(after_epochs=1).train(toy, run)

    found = keyhole.evaluate(run, split="val")
    assert "not finished (1 of 2 epochs)" in found.lines()[0]
    keyhole.evaluate(run)
    assert not list(run.glob("predictions/*.csv"))

    keyhole.resume(run)
    finished = keyhole.evaluate(run, split="val")
    assert not any("not finished" in line for line in finished.lines())
    rows = [csv_rows(path) for path in (run / "predictions" / "val.csv", finished.path / "predictions.csv")]
    said = [{row["image"]: float(row["label.probability.red"]) for row in each} for each in rows]
    assert said[0] == pytest.approx(said[1], abs=1e-6)


class Stop:
    """Training that ends after some epochs as if the process had been killed."""

    def __init__(self, after_epochs: int) -> None:
        self.after_epochs = after_epochs

    def train(self, data: Path, out: Path) -> None:
        from keyhole.training.job import start_job

        config = keyhole.Config().replace(**SMALL, data={"path": str(data)}, out=str(out))
        with Interrupt() as interrupt, closing(start_job(config, lambda _: None)) as job:
            loop = Loop(job, interrupt)
            ended = loop.end_epoch

            def end_epoch(row: dict[str, float]) -> None:
                ended(row)
                if loop.job.state.epoch == self.after_epochs:
                    raise KeyboardInterrupt

            loop.end_epoch = end_epoch  # type: ignore[method-assign]
            loop.run()


def test_a_damaged_manifest_is_one_line(own_run: Path, tmp_path: Path) -> None:
    text = (own_run / "manifest.csv").read_text().splitlines()
    header = text[0].split(",")
    cells = text[1].split(",")
    cells[header.index("bytes")] = "many"
    (own_run / "manifest.csv").write_text("\n".join([text[0], ",".join(cells), *text[2:]]) + "\n")
    with pytest.raises(DataError, match=r"manifest\.csv: damaged"):
        keyhole.evaluate(own_run, table(tmp_path / "d.csv", images_of(own_run, "val")))


def test_an_evaluation_keeps_the_scores_of_its_own_rows_alone(own_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "scores").mkdir(parents=True)
    (out / "scores" / "999.npz").write_bytes(b"of an earlier evaluation")
    keyhole.evaluate(own_run, out=out, device="cpu")
    rows = csv_rows(out / "predictions.csv")
    assert {path.name for path in (out / "scores").iterdir()} == {f"{number}.npz" for number, _ in enumerate(rows, 1)}
    for number, row in enumerate(rows, 1):
        with np.load(out / "scores" / f"{number}.npz", allow_pickle=False) as stored:
            told = json.loads(bytes(stored["prediction"]))
            assert told["name"] == row["image"]
            said = told["tasks"]["label"]["probability"]
            assert {name: repr(value) for name, value in said.items()} == {
                name: row[f"label.probability.{name}"] for name in said
            }
            kept = {patch["index"]: patch for patch in told["kept"]["patches"]}
            place = {int(index): number for number, index in enumerate(stored["index"])}
            for index, patch in kept.items():
                assert stored["boxes"][place[index]].tolist() == patch["box"]
                assert stored["score"][place[index]] == np.float32(patch["score"])
