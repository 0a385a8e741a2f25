"""The command line: every verb, every mistake one line, exit codes as documented."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Say
from PIL import Image
from processes import run_process

from keyhole.cli.main import VERBS, main, module_of
from keyhole.cli.options import flags_of
from keyhole.config.file import leaves, load_config, recipes
from keyhole.config.settings import Config
from keyhole.errors import Interrupted


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes, dark and light, of twelve grey and noisy images each."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, brightness in (("dark", 40), ("light", 210)):
        (folder / label).mkdir()
        for number in range(12 if label == "dark" else 5):
            noise = random.integers(-30, 30, (128, 96))
            Image.fromarray((brightness + noise).astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


SMALL = [
    "--patch.size=32",
    "--select.m=2",
    "--model.encoder=small",
    "--model.width=8",
    "--train.epochs=1",
    "--run.threads=1",
    "--run.device=cpu",
]


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, made by the real command."""
    out = tmp_path_factory.mktemp("runs") / "one"
    done = keyhole("train", str(images), "--out", str(out), *SMALL)
    assert done.returncode == 0, done.stderr
    return out


def keyhole(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "keyhole.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **options)


# --- finding the verb ------------------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_every_verb_has_help(say: Say) -> None:
    code, out, _ = say("--help")
    assert code == 0
    for verb, what in VERBS.items():
        assert f"  {verb} " in out
        assert what in out
        code, text, _ = say(*verb.split(), "--help")
        assert code == 0
        assert f"usage: keyhole {verb}" in text
        assert "--print-config" in text


def flags(text: str) -> list[str]:
    """The options that a help shows, each as a line of its own."""
    return re.findall(r"^(?:│| ) (--[a-z][a-z.-]*)", text, re.MULTILINE)


def test_help_of_train_shows_what_matters_and_help_all_every_option(say: Say) -> None:
    code, short, _ = say("train", "--help")
    assert code == 0
    assert 12 <= len(flags(short)) <= 17
    assert "\n    keyhole train photos --patch.size 100" in short
    code, whole, _ = say("train", "--help-all")
    assert code == 0
    options = {f"--{path.replace('_', '-')}" for path, _ in leaves(Config())}
    assert options | {"--recipe", "--config", "--print-config", "--help-all"} == set(flags(whole))
    assert set(flags(short)) < set(flags(whole))
    for name in recipes():
        assert name in short


@pytest.mark.parametrize("verb", ["train", "check", "init", "embed", "bench speed"])
def test_what_a_verb_calls_essential_or_idle_are_options_it_takes(verb: str, say: Say) -> None:
    module = import_module(module_of(verb))
    (kind,) = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and getattr(each, "ESSENTIAL", ())
    ]
    taken = {flag.name for flag in flags_of(kind)}
    idle = getattr(kind, "IDLE", ())
    assert set(kind.ESSENTIAL) <= taken
    assert all(name in taken or any(each.startswith(name) for each in taken) for name in idle)
    assert not set(kind.ESSENTIAL) & set(idle)
    _, out, _ = say(*verb.split(), "--help-all")
    assert not [flag for flag in flags(out) for name in idle if flag == f"--{name}" or flag.startswith(f"--{name}.")]
    assert "--out" not in flags(out) or verb in ("train", "init", "embed")


@pytest.mark.parametrize("columns", ["60", "100", "400"])
def test_a_help_fits_the_terminal(columns: str, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for verb in VERBS:
        _, out, _ = say(*verb.split(), "--help-all")
        rows = out[out.index("--help") :].splitlines()[1:]
        assert rows
        assert all(len(row) <= int(columns) for row in rows)


def test_help_imports_nothing_heavy() -> None:
    for verb in ([], ["train"], ["init"], ["check"], ["doctor"], ["demo"], ["predict"], ["evaluate"], ["resume"]):
        light = "" if verb else ",pydantic,tyro,socket"
        out = run_process("imported", f"torch,numpy,timm,sklearn,yaml,rich{light}", "help", *verb).stdout
        assert out.splitlines()[-1] == "[]", verb


def test_version_and_no_verb(say: Say) -> None:
    from keyhole import __version__

    assert say("--version") == (0, f"keyhole {__version__}\n", "")
    code, out, _ = say()
    assert (code, out.split()[0]) == (2, "usage:")


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "trian": ["there is no verb `trian` (did you mean `train`?)"],
    "--verison": ["there is no option `--verison` (did you mean `--version`?)"],
    "train x --patch.siz 3": ["unknown option `--patch.siz` (did you mean `--patch.size`?)"],
    "train x --size 3": ["unknown option `--size` (did you mean `--patch.size`?)"],
    "train x --qqqqq": ["unknown option `--qqqqq`", "keyhole train --help"],
    "train x -o y": ["unknown option `-o`"],
    "train x --patch.size 0": ["--patch.size: expected a number greater than 0, got 0"],
    "train x --patch.size=-3": ["--patch.size: expected a number greater than 0, got '-3'"],
    "train x --patch.size ten": ["--patch.size: expected a whole number, got 'ten'"],
    "train x --patch.size 1.5": ["--patch.size: expected a whole number, got '1.5'"],
    "train x --patch.size": ["--patch.size: a value is missing; see keyhole train --help"],
    "train x --patch.size --select.m 3": ["--patch.size: a value is missing"],
    "train x --patch.stride 0": ["--patch.stride: expected a number greater than 0"],
    "train x --data.val 1": ["--data.val: expected a number less than 1, got 1"],
    "train x --train.lr nan": ["--train.lr: expected a finite number, or 'auto', got 'nan'"],
    "train x --model.channels 2": ["--model.channels: expected 1 or 3, got 2"],
    "train x --select.rule gobal": [
        "--select.rule: expected 'global' or 'streaming', got 'gobal' (did you mean 'global'?)"
    ],
    "train x --run.log tensorbord": ["--run.log: expected 'tensorboard' or 'wandb', got 'tensorbord'"],
    "train x --augment.flip=yes": ["--augment.flip: takes no value, got 'yes'"],
    "train x --patch.level 1 --patch.mpp 1": ["--patch.level (=1) and --patch.mpp (=1.0) exclude each other"],
    "train x --data.val .5 --data.test .5": ["--data.val (=0.5) and --data.test (=0.5)"],
    "train x --run.device gpu": ["--run.device: expected auto, cpu, cuda"],
    "train x --recipe trafic": [
        "no recipe 'trafic' (did you mean `traffic`?)",
        "megapixel-mnist, slides, small, traffic",
    ],
    "train x --config nope.yaml": ["nope.yaml: no such configuration file"],
    "train x y": ["unexpected argument `y`"],
    "train": ["no data given: keyhole train DATA"],
    "check": ["no data given: keyhole check DATA"],
    "init": ["no data given: keyhole init DATA"],
    "train nowhere": ["nowhere: no such"],
    "resume": ["RUN is missing"],
    "resume nowhere": ["nowhere"],
    "evaluate nowhere": ["nowhere"],
    "evaluate nowhere --device gpu": ["--device: expected auto, cpu, cuda"],
    "evaluate nowhere --on-bad-image ignore": ["--on-bad-image: expected 'fail' or 'skip', got 'ignore'"],
    "predict": ["RUN is missing"],
    "predict nowhere": ["no images given"],
    "predict nowhere a.png": ["--out is missing"],
    "predict nowhere a.png --out o": ["a.png: no such file"],
    "demo --seed -1": ["--seed: expected a number greater than or equal to 0, got '-1'"],
    "doctor x": ["unexpected argument `x`"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(line: str, say: Say) -> None:
    code, out, err = say(*line.split())
    assert code == 2
    assert out == ""
    assert err.startswith("keyhole: error: ")
    assert err.count("\n") == 1
    for part in MISTAKES[line]:
        assert part in err


def test_a_mistake_in_a_process_of_its_own_prints_no_traceback_and_debug_does() -> None:
    plain = keyhole("train", "--patch.siz", "3")
    assert (plain.returncode, plain.stdout, plain.stderr.count("\n")) == (2, "", 1)
    for words in (["--debug", "train", "--patch.siz", "3"], ["train", "--patch.siz", "3", "--debug"]):
        shown = keyhole(*words)
        assert shown.returncode == 1
        assert "Traceback" in shown.stderr
        assert "ConfigError: unknown option `--patch.siz`" in shown.stderr


# --- errors of the work itself ---------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which the command line must know without importing torch."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            Interrupted("stopped; go on with: keyhole resume r", 15),
            143,
            "keyhole: stopped; go on with: keyhole resume r",
        ),
        (KeyboardInterrupt(), 130, "keyhole: interrupted"),
        (OSError(28, "No space left on device", "runs/a"), 2, "keyhole: error: runs/a: No space left on device"),
        (OSError(28, "No space left on device"), 2, "keyhole: error: No space left on device"),
        (OutOfMemoryError("tried 2 GB"), 2, "keyhole: error: out of memory (tried 2 GB): give a budget with --memory"),
        (MemoryError(), 2, "keyhole: error: out of memory: give a budget with --memory"),
        (ZeroDivisionError("by\nzero"), 70, "keyhole: internal error: ZeroDivisionError: by zero (--debug shows"),
        (AssertionError(), 70, "keyhole: internal error: AssertionError (--debug shows the traceback)"),
    ],
)
def test_every_kind_of_error_has_its_line_and_exit_code(
    error: BaseException, code: int, line: str, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("keyhole.cli.doctor.run", fail)
    got, _, err = say("doctor")
    assert got == code
    assert err.startswith(line)
    assert err.count("\n") == 1
    with pytest.raises(type(error)):
        main(["doctor", "--debug"])


def test_words_after_a_double_dash_are_file_names(say: Say) -> None:
    _, _, err = say("predict", "r", "--out", "o", "--", "--debug")
    assert "--debug: no such file" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    for words in ("--help", "train --help", "train --print-config"):
        command = f"{sys.executable} -m keyhole.cli.main {words} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, 141)  # 0 if the pipe took it all before it was closed
        assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_standard_output_on_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "keyhole.cli.main", "train", "--print-config"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "keyhole: error: No space left on device\n")


def test_a_file_that_does_not_fit_leaves_nothing_behind(images: Path, tmp_path: Path) -> None:
    words = f"init {images} --out {tmp_path / 'full.yaml'}"
    command = f"ulimit -f 1; exec {sys.executable} -m keyhole.cli.main {words}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "full.yaml: could not be written (File too large)" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- configuration ---------------------------------------------------------------------------------------------------


def printed(say: Say, *words: str | Path) -> dict[str, Any]:
    code, out, err = say(*words, "--print-config")
    assert (code, err) == (0, "")
    config: dict[str, Any] = yaml.safe_load(out)
    return config


def test_default_is_under_recipe_is_under_file_is_under_flags(say: Say) -> None:
    Path("c.yaml").write_text("select: {m: 7, chunk: 8}\nrun: {ahead: 9}\n")
    words = ["train", "data", "--select.m", "5", "--config", "c.yaml", "--recipe", "traffic"]
    config = printed(say, *words)
    assert config["select"] == {"m": 5, "chunk": 8, "rule": "streaming", "order": "shuffled"}  # flag, file, recipe
    assert (config["run"]["ahead"], config["run"]["stall"]) == (9, 120.0)  # file, default
    assert config["data"]["path"] == "data"
    assert printed(say, "train", "--select.m", "32", "--recipe", "traffic")["select"]["m"] == 32  # a default as a flag


def test_the_options_of_a_verb_are_printed_as_yaml_with_their_sections(say: Say) -> None:
    options = printed(say, "embed", "data", "--patch.size", "32", "--precision", "tf32", "--decode", "cpu")
    assert (options["patch"]["size"], options["patch"]["mpp"]) == (32, None)
    assert (options["data"], options["precision"], options["decode"]) == ("data", "tf32", "cpu")


def test_flags_of_every_type_arrive(say: Say) -> None:
    line = (
        "train d.csv --out r --data.tasks a b=binary --patch.stride None --patch.mpp 0.5 --augment.no-flip "
        "--data.on_bad_image skip --train.lr=1e-4 --model.channels 1 --run.log wandb tensorboard"
    )
    config = printed(say, *line.split())
    assert config["out"] == "r"
    assert config["data"] | {"path": "d.csv", "tasks": ["a", "b=binary"], "on_bad_image": "skip"} == config["data"]
    assert config["patch"] | {"stride": None, "mpp": 0.5, "level": None} == config["patch"]
    assert (config["augment"]["flip"], config["augment"]["rotate"]) == (False, True)
    assert (config["train"]["lr"], config["model"]["channels"]) == (1e-4, 1)
    assert config["run"]["log"] == ["wandb", "tensorboard"]


def test_what_is_printed_is_a_configuration_that_prints_the_same(say: Say) -> None:
    for recipe in recipes():
        _, first, _ = say("train", "data", "--recipe", recipe, "--out", "r", "--print-config")
        Path("c.yaml").write_text(first)
        _, again, _ = say("train", "--config", "c.yaml", "--print-config")
        assert again == first


def test_every_verb_prints_its_configuration(say: Say, images: Path, run: Path) -> None:
    assert printed(say, "check", images, "--select.m", "3")["select"]["m"] == 3
    assert printed(say, "doctor")["train"]["epochs"] == 1
    assert printed(say, "resume", run)["data"]["path"] == str(images)
    assert printed(say, "evaluate", run, "--split", "val") | {"run": str(run), "split": "val"} == printed(
        say, "evaluate", run, "--split", "val"
    )
    assert printed(say, "predict", run, "a.png", "b.png")["images"] == ["a.png", "b.png"]
    assert printed(say, "init", images)["data"]["path"] == str(images)


# --- verbs -----------------------------------------------------------------------------------------------------------


def test_check_reports_what_is_there_and_what_is_wrong(say: Say, images: Path, tmp_path: Path) -> None:
    code, out, _ = say("check", images, "--patch.size", "32", "--json", "report.json")
    assert code == 0
    assert "dark" in out
    assert "light" in out
    assert json.loads(Path("report.json").read_text())["ok"] is True

    bad = tmp_path / "bad"
    for label in ("dark", "light"):
        (bad / label).mkdir(parents=True)
        for source in (images / label).iterdir():
            (bad / label / source.name).write_bytes(source.read_bytes())
    (bad / "dark" / "0.png").write_bytes(b"")
    code, out, err = say("check", bad, "--patch.size", "32", "--json", "-")
    assert code == 1
    report = json.loads(out)
    assert report["ok"] is False
    assert "0.png" in err
    assert "fix: " in err


def test_init_writes_a_configuration_that_fits_and_never_overwrites(say: Say, images: Path) -> None:
    code, out, _ = say("init", images)
    assert code == 0
    assert "keyhole train --config keyhole.yaml" in out
    config = load_config("keyhole.yaml")
    assert config.data.path == images
    assert config.out is None
    assert (config.model.channels, config.train.balance) == (1, "loss")  # grey; 12 and 5 images
    assert config.patch.size <= 96
    text = Path("keyhole.yaml").read_text()
    assert "# -> all images are grey" in text
    assert "dark 12, light 5" in text
    code, _, err = say("init", images)
    assert code == 2
    assert "keyhole.yaml: is there already" in err
    assert Path("keyhole.yaml").read_text() == text
    assert say("check", "--config", "keyhole.yaml")[0] == 0


def test_what_the_user_says_goes_over_what_init_measures(say: Say, images: Path) -> None:
    Path("c.yaml").write_text("select: {chunk: 9}")
    assert say("init", images, "--out", "a.yaml", "--config", "c.yaml", "--patch.size", "48")[0] == 0
    config = load_config("a.yaml")
    assert (config.patch.size, config.select.chunk, config.model.channels) == (48, 9, 1)
    lines = Path("a.yaml").read_text().splitlines()
    assert "-> " not in lines[lines.index("  size: 48") - 1]  # the reason is the user's, not the data's


def test_train_writes_a_run_whose_configuration_is_the_one_given(run: Path, images: Path) -> None:
    config = load_config(run / "config.yaml")
    assert (config.patch.size, config.select.m, config.model.width, config.train.epochs) == (32, 2, 8, 1)
    assert config.data.path == images


def test_evaluate_prints_metrics_with_intervals(say: Say, run: Path) -> None:
    code, out, _ = say("evaluate", run, "--out", "e", "--device", "cpu")
    assert code == 0
    assert "accuracy" in out
    assert "[" in out
    assert any(Path("e").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(say: Say, run: Path, images: Path) -> None:
    Path("locked").mkdir(mode=0o500)
    code, _, err = say("predict", run, images / "dark", "--out", "locked/p", "--device", "cpu")
    assert code == 2
    assert "locked/p: cannot write here" in err


def test_demo_is_given_its_folder_and_seed(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("keyhole.tools.demo.demo", lambda out, seed: given.append((out, seed)))
    assert say("demo", "--seed", "2", "--out", "d")[0] == 0
    assert given == [(Path("d"), 2)]
