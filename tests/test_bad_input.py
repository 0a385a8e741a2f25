"""Bad input on the real command line: one clear line and exit code 2, or left out and listed; no traceback, no hang."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Said, Say, csv_rows, settings, small_files
from make_images import png
from PIL import Image
from processes import run_process
from safetensors.torch import save_file

from keyhole.runs.checkpoint import read_tensors, write_tensors

SETTINGS = settings(train={"epochs": 1})
FLAGS = [
    f"--{section}.{key.replace('_', '-')}={value}"
    for section, values in SETTINGS.items()
    for key, value in values.items()
]


# Images

FAULTS = {
    "empty.png": r"empty \(0 bytes\)",
    "truncated.png": r"damaged.*Copy (the file|these files) again",
    "text.png": r"holds text .* named \.png",
    "document.tif": r"a PDF document, although it is named \.tif",
    "flipped.png": "checksum",
    "missing.png": "not there|no such file",
    "folder.png": "not a regular file|no images there",
    "pipe.png": "not a regular file",
    "small.png": r"the patch \(16 x 16 px\) is larger than the image \(8 x 8 px\)",
    "white.png": r"no patches: the foreground mask \(non-empty\) leaves none of 16",
    "huge.png": r"900,000,000 pixels, over the limit .*vips tiffsave huge\.png huge\.tif --tile --pyramid",
}
FOUND_LATER = ("truncated.png", "flipped.png")
"""Their headers are whole, so that only decoding shows what is wrong."""
OTHER_ADVICE = ("small.png", "white.png")
"""Sound images that the settings do not fit."""


@pytest.fixture(scope="module")
def faulty(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each of FAULTS."""
    folder = tmp_path_factory.mktemp("faulty")
    good = (toy / "red" / "0.png").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 16
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(good[:-2000])
    (folder / "text.png").write_text("a list of images, not an image\n")
    (folder / "document.tif").write_bytes(b"%PDF-1.7\n" + good)
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    Image.new("RGB", (8, 8)).save(folder / "small.png")
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    (folder / "huge.png").write_bytes(png(30_000, 30_000, 8, 2))
    return folder


@pytest.fixture(scope="module")
def model(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the toy run, as if it had been trained with `--patch.foreground non-empty`."""
    folder = tmp_path_factory.mktemp("model")
    weights, info = read_tensors(toy_run / "best" / "model.safetensors")
    info["patch"]["foreground"] = "non-empty"
    write_tensors(folder / "model.safetensors", weights, info)
    return folder


def labelled(toy: Path, path: Path, *more: Path, split: str = "train") -> Path:
    """A CSV of six good images, four of them in `split`, and the images `more` in `split` too."""
    lines = ["image,label,split"]
    for color in ("red", "green"):
        lines += [f"{toy / color / f'{n}.png'},{color},{split if n else 'val'}" for n in range(3)]
    path.write_text("\n".join([*lines, *(f"{image},red,{split}" for image in more)]) + "\n")
    return path


def test_check_names_missing_files_where_too_few_are_left_for_a_split(say: Say, toy: Path) -> None:
    files = [f"red/{number}.png" if number == 0 else f"gone/{number}.png" for number in range(4)]
    rows = [f"{toy / file},{'red' if number % 2 else 'blue'}" for number, file in enumerate(files)]
    Path("gone.csv").write_text("\n".join(["image,color", *rows]))
    line = say("check", "gone.csv").refusal()
    assert "gone/1.png" in line
    assert "3 images could not be used" in line


@pytest.mark.parametrize("name", FAULTS)
def test_train_refuses_a_bad_image_or_leaves_it_out(name: str, say: Say, toy: Path, faulty: Path) -> None:
    data = labelled(toy, Path("data.csv"), faulty / name)
    flags = [*FLAGS, *(["--patch.foreground=non-empty"] if name == "white.png" else [])]
    line = say("train", data, "--out=runs/one", *flags).refusal()
    assert name in line
    assert_matches(FAULTS[name], line)
    if name not in {*FOUND_LATER, *OTHER_ADVICE}:
        assert "--data.on-bad-image skip" in line
    assert Path("runs").exists() == (name in FOUND_LATER)
    said = say("train", data, "--out=skipped", "--data.on-bad-image=skip", *flags)
    assert said.code == 0, said.err
    (left,) = csv_rows(Path("skipped/left_out.csv"))
    assert left["name"] == str(faulty / name)
    assert_matches(FAULTS[name] + "|no such file", left["reason"])
    assert len(csv_rows(Path("skipped/predictions/train.csv"))) == 4


@pytest.mark.parametrize("name", FAULTS)
def test_predict_refuses_a_bad_image_or_leaves_it_out(
    name: str, say: Say, toy: Path, faulty: Path, model: Path
) -> None:
    line = say("predict", model, faulty / name, "--out=out").refusal()
    assert name in line
    assert_matches(FAULTS[name], line)
    if name not in {*FOUND_LATER, *OTHER_ADVICE, "missing.png", "folder.png"}:
        assert "--on-bad-image skip" in line
    assert not Path("out/predictions.csv").exists()
    good = toy / "red" / "0.png"
    said = say("predict", model, good, faulty / name, good.with_name("1.png"), "--out=out", "--on-bad-image=skip")
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == "predicted: 2, left out: 1; in out"
    assert len(csv_rows(Path("out/predictions.csv"))) == 2
    (left,) = csv_rows(Path("out/left_out.csv"))
    assert left["name"] == str(faulty / name)
    assert f"left out: {faulty / name}: " in said.err


def test_predict_counts_an_image_once_however_often_it_is_named(
    say: Say, toy: Path, tmp_path: Path, model: Path
) -> None:
    folder = Path(shutil.copytree(toy / "red", tmp_path / "red"))
    (folder / "0.png").write_bytes(b"damaged")
    files = sorted(folder.iterdir())
    said = say("predict", model, folder, *files, files[0], "--out=out", "--on-bad-image=skip")
    assert said.out.splitlines()[-1] == f"predicted: {len(files) - 1}, left out: 1; in out"
    assert len(csv_rows(Path("out/predictions.csv"))) == len(files) - 1
    assert len(csv_rows(Path("out/left_out.csv"))) == 1


@pytest.mark.parametrize("name", FAULTS)
def test_evaluate_refuses_a_bad_image_or_leaves_it_out(
    name: str, say: Say, toy: Path, faulty: Path, model: Path
) -> None:
    data = labelled(toy, Path("data.csv"), faulty / name, split="test")
    words = ["evaluate", model, "--data", data, "--out=out"]
    line = say(*words).refusal()
    assert name in line
    assert_matches(FAULTS[name], line)
    assert not Path("out/predictions.csv").exists()
    said = say(*words, "--on-bad-image=skip")
    assert said.code == 0, said.err
    assert "left out 1 image; see out/left_out.csv" in said.out
    (left,) = csv_rows(Path("out/left_out.csv"))
    assert left["name"] == str(faulty / name)
    assert len(csv_rows(Path("out/predictions.csv"))) == 4


def assert_matches(pattern: str, line: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(line)


def test_where_every_image_is_bad_there_is_nothing_to_leave_out(say: Say, toy: Path, faulty: Path, model: Path) -> None:
    bad = [faulty / "empty.png", faulty / "small.png"]
    line = say("predict", model, *bad, "--out=out", "--on-bad-image=skip").refusal()
    assert "none of the 2 images" in line
    assert [left["name"] for left in csv_rows(Path("out/left_out.csv"))] == list(map(str, bad))
    Path("bad.csv").write_text("image,label\n" + "".join(f"{path},red\n" for path in bad))
    line = say("evaluate", model, "--data=bad.csv", "--out=evaluation", "--on-bad-image=skip").refusal()
    assert "none of the 2 test images" in line
    assert "empty.png" in line
    small = labelled(toy, Path("data.csv"))
    line = say("train", small, "--out=run", "--data.on-bad-image=skip", *FLAGS, "--patch.size=100").refusal()
    assert "none of the 4 training images can be used" in line
    assert "larger than the image" in line
    assert not Path("run").exists()


def test_a_class_that_loses_all_its_images_is_named(say: Say, toy: Path, faulty: Path) -> None:
    data = labelled(toy, Path("data.csv"))
    data.write_text(data.read_text().replace(str(toy / "green"), str(faulty)) + f"{faulty / 'empty.png'},green,train\n")
    line = say("train", data, "--out=run", "--data.on-bad-image=skip", *FLAGS).refusal()
    assert "label: " in line
    assert not Path("run").exists()


def test_a_missing_image_of_another_split_does_not_stand_in_the_way(say: Say, toy: Path, toy_run: Path) -> None:
    shutil.copytree(toy, "data")
    assert say("train", "data", "--out=run", *FLAGS).code == 0
    gone = next(Path(row["image"]) for row in csv_rows(Path("run/manifest.csv")) if row["split"] == "train")
    gone.unlink()
    assert str(gone) in say("evaluate", "run", "--split=train").refusal()
    assert say("evaluate", "run", "--split=test").code == 0
    said = say("evaluate", "run", "--split=train", "--on-bad-image=skip")
    assert said.code == 0, said.err
    (left,) = csv_rows(Path("run/evaluation/train/left_out.csv"))
    assert left["reason"] == "no such file"


def test_a_file_name_that_is_no_valid_text_is_no_trouble(say: Say, toy: Path, model: Path) -> None:
    good, bad = (os.fsdecode(name) for name in (b"caf\xe9.png", b"th\xe9.png"))
    shutil.copy(toy / "red" / "0.png", good)
    Path(bad).write_bytes(b"")
    said = say("predict", model, good, bad, "--out=out", "--on-bad-image=skip")
    assert said.code == 0, said.err
    assert "caf\\udce9.png" in said.out
    (left,) = csv_rows(Path("out/left_out.csv"))
    assert left["name"].endswith("th\\udce9.png")


# Data

GOOD = "image,label,split\nred/0.png,red,train\nred/1.png,red,val\ngreen/0.png,green,train\ngreen/1.png,green,val\n"
DATA = {
    "no column image": (GOOD.replace("image,", "imgae,"), r"no column `image` \(did you mean 'imgae'\?\)"),
    "two labels for one image": (GOOD + "red/0.png,green,train\n", "line 6: red/0.png has label 'green', but 'red'"),
    "no image file": (GOOD.replace("/", "_"), "all 4 image files are not there"),
}
"""One of each step of reading; test_manifest.py has the others."""


@pytest.mark.parametrize("verb", ["train", "check", "init"])
@pytest.mark.parametrize("case", DATA)
def test_a_bad_csv_is_refused_by_every_verb_that_reads_it(case: str, verb: str, say: Say, toy: Path) -> None:
    text, message = DATA[case]
    Path("data.csv").write_text(text)
    flags = [] if verb == "check" else ["--out=result"]
    line = say(verb, "data.csv", "--data.root", toy, *flags).refusal()
    assert "data.csv" in line
    assert_matches(message, line)
    assert not Path("result").exists()


@pytest.mark.parametrize("verb", ["train", "check", "init"])
def test_data_that_are_not_there_or_not_data_are_refused(verb: str, say: Say, tmp_path: Path, faulty: Path) -> None:
    Path("nothing").mkdir()
    os.mkfifo("pipe.csv")
    for path in ("nowhere", "nothing", "pipe.csv", str(faulty / "flipped.png")):
        assert Path(path).name in say(verb, path).refusal()
    assert not Path("runs").exists()


OTHER = {
    "another task": ("image,grade\nred/0.png,3\n", "the model predicts label, but the columns with labels are grade"),
    "another class": (
        "image,label\nred/0.png,blue\n",
        "line 2: label: unknown class 'blue'; the classes are green, red",
    ),
    "no such split": ("image,label,split\nred/0.png,red,train\n", "no image in the split 'test'; there are 1 in train"),
    "a missing file": ("image,label\nnone.png,red\n", "--root"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_model_of_other_tasks_is_not_evaluated(case: str, say: Say, toy: Path, toy_run: Path) -> None:
    text, message = OTHER[case]
    Path("data.csv").write_text(text)
    line = say("evaluate", toy_run, "--data=data.csv", "--root", toy, "--out=out").refusal()
    assert "data.csv" in line
    assert message in line
    assert "--data." not in line, "an option that evaluate does not have"
    assert not Path("out").exists()


# Settings

YAML = {
    "train: {lr: -1.0}": ("train.lr", "expected a number greater than 0, or 'auto', got -1"),
    "pach: {size: 16}": ("pach", "did you mean `patch`?"),
    "patch: {size: 16": ("settings.yaml, line", "not valid YAML"),
}
"""One of each step of reading; test_config.py has the others."""


@pytest.mark.parametrize("verb", ["train", "check", "init"])
@pytest.mark.parametrize("text", YAML)
def test_a_bad_configuration_is_refused_by_every_verb_that_takes_one(text: str, verb: str, say: Say, toy: Path) -> None:
    Path("settings.yaml").write_text(text)
    flags = [] if verb == "check" else ["--out=result"]
    line = say(verb, toy, "--config=settings.yaml", *flags).refusal()
    assert "settings.yaml" in line
    for part in YAML[text]:
        assert part in line
    assert not Path("result").exists()


def test_a_configuration_that_is_no_file_is_refused(say: Say, toy: Path) -> None:
    os.mkfifo("pipe.yaml")
    for name in ("pipe.yaml", "nowhere.yaml", "."):
        assert name in say("train", toy, f"--config={name}").refusal()


SETTINGS_OF_THE_DATA = {
    "--patch.level=3": "patch.level (=3) must be 0, the image's only level",
    "--patch.mpp=0.5": "patch.mpp (=0.5) needs the image's microns per pixel",
    "--patch.size=65": "the patch (65 x 65 px) is larger than the image (64 x 64 px)",
    "--data.tasks=lable": "no column 'lable' (did you mean 'label'?)",
    "--data.tasks=label=clas": "label=clas: no such kind",
    "--train.metric=acuracy": "--train.metric acuracy: did you mean 'accuracy'?",
    "--model.heads=3": "must be divisible by `heads` (=3)",
    "--model.weights=nowhere.safetensors": "nowhere.safetensors: there is no such file",
    "--model.encoder=resnet81": "Did you mean 'resnet18'?",
    "--run.device=cuda:99": "--run.device cuda:99: not usable here",
}


@pytest.mark.parametrize("flag", SETTINGS_OF_THE_DATA)
def test_a_setting_that_the_data_or_the_model_do_not_allow_is_refused(flag: str, say: Say, toy: Path) -> None:
    assert SETTINGS_OF_THE_DATA[flag] in say("train", toy, "--out=run", *FLAGS, flag).refusal()
    assert not Path("run").exists()


def test_more_memory_than_there_is_is_one_line(say: Say, toy: Path) -> None:
    for flag in ("--select.chunk=1000000000000", "--model.width=1000000000"):
        line = say("train", toy, f"--out=run{flag}", *FLAGS, flag).refusal()
        assert "memory" in line
        assert "--select.chunk" in line or "smaller" in line


# Places to write

OUTPUTS = {
    "train": "TOY --out=file.txt/run",
    "train, taken": "TOY --out=taken",
    "train, a run": "TOY --out=RUN",
    "predict": "RUN TOY --out=file.txt/out",
    "predict, a file": "RUN TOY --out=file.txt",
    "evaluate": "RUN --out=file.txt/out",
    "init": "TOY --out=file.txt/keyhole.yaml",
    "init, taken": "TOY --out=file.txt",
    "check": "TOY --patch.size=16 --json=file.txt/check.json",
    "demo": "--out=file.txt/demo",
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_place_that_cannot_be_written_or_is_taken_is_refused(case: str, say: Say, toy: Path, toy_run: Path) -> None:
    Path("file.txt").write_text("mine")
    Path("taken").mkdir()
    before = {path: path.stat().st_mtime_ns for path in toy_run.rglob("*")}
    words = OUTPUTS[case].replace("TOY", str(toy)).replace("RUN", str(toy_run)).split()
    flags = FLAGS if case.startswith("train") else []
    line = say(case.partition(",")[0], *words, *flags).refusal()
    assert words[-1].partition("=")[2] in line or "file.txt" in line
    assert Path("file.txt").read_text() == "mine"
    assert {path.name for path in Path().iterdir()} == {"file.txt", "taken"}
    assert not list(Path("taken").iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in toy_run.rglob("*")}


@pytest.mark.parametrize("limit", [100, 2_000, 20_000])
def test_a_full_disk_ends_train_and_leaves_nothing(limit: int, say: Say, toy: Path) -> None:
    with small_files(limit):
        said = say("train", toy, "--out=runs/one", *FLAGS)
    assert "could not be written" in said.refusal()
    assert not list(Path("runs").iterdir())


def test_a_disk_that_fills_during_training_loses_nothing(say: Say, toy: Path, toy_run: Path) -> None:
    # At its start a run has no state of the optimizer, so that the first state is a third of the later ones.
    with small_files((toy_run / "last.safetensors").stat().st_size // 2):
        line = say("train", toy, "--out=run", *FLAGS).refusal()
    assert "run/samples.png" in line or "run/last.safetensors" in line
    assert "could not be written" in line
    assert not list(Path("run").rglob(".*")), "nothing temporary is left"
    said = say("resume", "run")
    assert said.code == 0, said.err
    assert len(csv_rows(Path("run/metrics.csv"))) == 1


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_a_full_disk_ends_predict_and_evaluate(verb: str, say: Say, toy: Path, model: Path) -> None:
    given = [toy / "red"] if verb == "predict" else ["--data", toy]
    with small_files(500):
        line = say(verb, model, *given, "--out=out").refusal()
    assert "could not be written" in line
    assert not Path("out/predictions.csv").exists()
    assert not list(Path("out").rglob(".*")), "nothing temporary is left"


# Models and runs

MODELS: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-5],
    "header alone": lambda data: data[:200],
    "flipped in its header": lambda data: data[:8] + b"x" + data[9:],
    "a pickle": lambda data: pickle.dumps({"weights": [1.0, 2.0]}),
    "text": lambda data: b"no weights at all\n" * 20,
}


@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model_is_refused_by_every_verb(case: str, say: Say, toy: Path, toy_run: Path) -> None:
    shutil.copytree(toy_run, "run")
    for name in ("best/model.safetensors", "last.safetensors"):
        file = Path("run") / name
        data = MODELS[case](file.read_bytes())
        file.unlink()
        if data is not None:
            file.write_bytes(data)
    for words in (["predict", "run", toy / "red", "--out=out"], ["evaluate", "run", "--out=out"]):
        assert "model.safetensors" in say(*words).refusal()
        assert not Path("out").exists()
    assert "last.safetensors" in say("resume", "run").refusal()


def test_a_pickle_in_the_place_of_a_model_is_not_run(say: Say, toy: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'attacked'}",)

    Path("model").mkdir()
    Path("model/model.safetensors").write_bytes(pickle.dumps(Attack()))
    assert "model.safetensors" in say("predict", "model", toy / "red", "--out=out").refusal()
    torch.save({"weights": Attack()}, "model/model.safetensors")
    assert "model.safetensors" in say("predict", "model", toy / "red", "--out=out").refusal()
    assert not Path("attacked").exists()


def test_a_model_with_another_description_is_refused(say: Say, toy: Path, toy_run: Path) -> None:
    weights, info = read_tensors(toy_run / "best" / "model.safetensors")
    Path("model").mkdir()
    file = Path("model/model.safetensors")
    wider = {**info, "model": {**info["model"], "width": 16}}
    nan = {name: torch.full_like(w, torch.nan) if w.is_floating_point() else w for name, w in weights.items()}
    for tensors, told in (
        (weights, {name: value for name, value in info.items() if name != "batch"}),
        (weights, {**info, "tasks": 3}),
        (weights, {**info, "tasks": [{"name": "label"}]}),
        (weights, {**info, "patch": {"size": "large"}}),
        (weights, {**info, "patch": {"newer": 1}}),
        (weights, wider),
        (dict(list(weights.items())[1:]), info),
        (weights | {"more": torch.ones(1)}, info),
    ):
        write_tensors(file, tensors, told)
        assert "model.safetensors" in say("predict", "model", toy / "red", "--out=out").refusal()
        assert not Path("out").exists()
    write_tensors(file, nan, info)
    assert "is NaN" in say("predict", "model", toy / "red", "--out=out").refusal()
    save_file(weights, file)
    assert "no keyhole model" in say("predict", "model", toy / "red", "--out=out").refusal()


def test_what_is_no_run_cannot_be_resumed(say: Say, toy: Path, toy_run: Path) -> None:
    for path, problem in ((toy, "not a run folder"), ("nowhere", "no such run folder"), (toy_run / "best", "")):
        line = say("resume", path).refusal()
        assert str(path) in line
        assert problem in line
    shutil.copytree(toy_run, "run")
    Path("run/manifest.csv").write_text("image,label\n")
    assert "manifest.csv" in say("resume", "run").refusal()
    shutil.copy(toy_run / "manifest.csv", "run/manifest.csv")
    Path("run/config.yaml").write_text("patch: {size: large}")
    assert "config.yaml" in say("resume", "run").refusal()


# Files that would take the process down or hold it up for ever


def in_a_process_that_may_die(*lines: list[str]) -> list[Said]:
    """What each of the command lines ends with, one after the other, under limits of memory and time."""
    return [Said(*end) for end in json.loads(run_process("command_lines", json.dumps(lines), timeout=120).stdout)]


@pytest.mark.parametrize(("name", "problem"), [("page_loop.tif", "form a loop"), ("giant_tile.tif", "65,520 x 65,520")])
def test_hostile_files_are_refused_or_left_out(
    name: str, problem: str, shared: Path, toy: Path, toy_run: Path, tmp_path: Path
) -> None:
    file = shared / "data" / "hostile" / name
    data = str(labelled(toy, tmp_path / "data.csv", file))
    train = ["train", data, *FLAGS, f"--out={tmp_path / 'run'}"]
    predict = ["predict", str(toy_run), str(file), f"--out={tmp_path / 'out'}"]
    good, skip = str(toy / "red" / "0.png"), "--on-bad-image=skip"
    refused, skipped, unpredicted, predicted = in_a_process_that_may_die(
        train, [*train, "--data.on-bad-image=skip"], predict, [*predict, good, skip]
    )
    for said in (refused, unpredicted):
        line = said.refusal()
        assert str(file) in line
        assert problem in line
    for said, folder in ((skipped, "run"), (predicted, "out")):
        assert said.code == 0, said.err
        (left,) = csv_rows(tmp_path / folder / "left_out.csv")
        assert left["name"] == str(file)
        assert problem in left["reason"]
