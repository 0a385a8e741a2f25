"""`benchmarks/on_gpu`: every part runs (dry, on a CPU), whatever one does the others run, and the result is written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BENCHMARKS, script
from processes import command

from keyhole.cli.main import main
from keyhole.engine.memory.plan import largest_chunk
from keyhole.patches.opener import FileOpener

ON_GPU = BENCHMARKS / "on_gpu"
MODULES = (
    "on_gpu.aims",
    "on_gpu.calls",
    "on_gpu.harness",
    "on_gpu.result",
    "machine",
    "repeated_slide",
)
ONLY_ON_A_GPU = {"slides.reserved", "slides.allocated", "slides.ratio"}


@pytest.fixture(scope="module")
def bench(benchmark: Callable[[str], Any]) -> Any:
    """The modules of the scripts."""
    found = {name.split(".")[-1]: benchmark(name) for name in MODULES}
    return SimpleNamespace(**found, run=script(ON_GPU / "run"), collect=script(ON_GPU / "collect"))


@pytest.fixture
def signals() -> Iterator[None]:
    """Handlers as they were, after a command that sets them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ends(text: str) -> dict[str, str]:
    """How each part ended, as the result says it."""
    return dict(re.findall(r"^\| ([a-z-]+) \| (.+?) \| \d+ \| \d+ \|$", text, re.MULTILINE))


@pytest.mark.parametrize("call", ["works", "measures", "learns"])
def test_a_dry_run_runs_every_part_and_has_every_figure_of_a_cpu(call: str, bench: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(ON_GPU / "run"), call, "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (path,) = tmp_path.glob("*.md")
    text = path.read_text()
    assert path.name.startswith(f"on_gpu_{call}_dry_")
    assert set(ends(text)) == {part.name for part in bench.calls.CALLS[call].parts}
    assert set(ends(text).values()) == {"done"}, done.stdout[-4000:]
    assert done.returncode == 0
    measured = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]*\| [^|]*\|$", text, re.MULTILINE))
    missing = {aim.key for aim in bench.aims.AIMS[call] if measured[aim.what] == "-"}
    assert missing <= ONLY_ON_A_GPU
    assert "no figure means anything" in text
    assert (tmp_path / f"on_gpu_{call}.log").read_text().count("== done") == len(ends(text))


def test_a_part_runs_in_a_process_of_its_own_as_it_does_on_a_gpu(tmp_path: Path) -> None:
    """A dry run starts its parts in another way."""
    command = [sys.executable, "-u", str(ON_GPU / "part.py"), "facts", "--dry", "--seconds", "60"]
    done = subprocess.run([*command, "--scratch", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '["foreach", 1.0, "right"]' in (tmp_path / "figures" / "facts.jsonl").read_text()


def stand_in(*words: object) -> tuple[str, ...]:
    """A part of a call that is a file of the tests."""
    return tuple(command("benchmark_part", *words))


def parts_that_go_wrong(bench: Any, kept: Path) -> Any:
    """A part that fails, one that hangs and has started another process, one that is killed, and sound ones."""
    part = bench.calls.Part
    return bench.calls.Call(
        "wrong",
        "what goes wrong",
        60,
        (
            (part("fails", "exits with 3", command=stand_in("fails")),),
            (
                part("hangs", "never ends", limit=1, command=stand_in("hangs")),
                part("beside", "runs at the same time", command=stand_in("prints", "beside")),
            ),
            (part("dies", "kills itself", command=stand_in("dies")),),
            (part("sound", "runs", command=stand_in("writes", kept)),),
        ),
    )


def test_a_part_that_fails_hangs_or_dies_leaves_the_others_and_the_result_alone(
    bench: Any, tmp_path: Path, signals: None, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = {"wrong": parts_that_go_wrong(bench, tmp_path / "kept")}
    assert bench.run.main(["wrong", "--dry", "--out", str(tmp_path)], calls) == 1
    (path,) = tmp_path.glob("*.md")
    text = path.read_text()
    assert ends(text) == {
        "fails": "failed with exit code 3",
        "hangs": "stopped at its limit of 1 s",
        "beside": "done",
        "dies": "killed by signal 9",
        "sound": "done",
    }
    assert "before" in text
    assert "sound at last" in text
    assert (tmp_path / "kept").exists()
    (left,) = re.findall(r"^hangs: (\d+)$", capfd.readouterr().out, re.MULTILINE)
    assert not running(int(left)), "the process that it had started has ended"


def test_a_call_that_is_cut_leaves_what_it_had_found(bench: Any, tmp_path: Path, signals: None) -> None:
    part = bench.calls.Part
    stages = (
        (part("first", "runs", command=stand_in("prints", "found")),),
        (part("cuts", "ends the call", command=stand_in("cuts")),),
        (part("never", "does not run", command=stand_in("prints")),),
    )
    calls = {"cut": bench.calls.Call("cut", "is cut", 60, stages)}
    with pytest.raises(SystemExit) as stop:
        bench.run.main(["cut", "--dry", "--out", str(tmp_path)], calls)
    assert stop.value.code == 128 + signal.SIGTERM
    (path,) = tmp_path.glob("*.md")
    assert ends(path.read_text()) == {"first": "done", "cuts": "cut with the call", "never": "not begun"}
    assert "found" in path.read_text()
    assert "cut before its end" in path.read_text()


def test_a_call_ends_in_time_and_says_what_did_not_run(
    bench: Any, tmp_path: Path, signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.harness, "LEAST", 0.3)
    part, sleeps = bench.calls.Part, stand_in("sleeps")
    stages = ((part("long", "takes all", command=sleeps),), (part("late", "comes too late", command=sleeps),))
    calls = {"short": bench.calls.Call("short", "ends", 12, stages)}
    assert bench.run.main(["short", "--dry", "--minutes", "0.06", "--out", str(tmp_path)], calls) == 1
    (path,) = tmp_path.glob("*.md")
    assert ends(path.read_text()) == {"long": "stopped at its limit of 1 s", "late": "not run: no time was left"}


def test_the_parts_fit_into_the_minutes_of_their_calls(bench: Any) -> None:
    calls = bench.calls.CALLS
    assert calls["works"].seconds + calls["measures"].seconds <= 12 * 60
    for call in calls.values():
        assert call.seconds <= 10 * 60
        names = [part.name for part in call.parts]
        assert len(set(names)) == len(names)
        assert all(part.expected < part.limit for part in call.parts)
        assert sum(max(part.expected for part in stage) for stage in call.stages) <= call.seconds
        limits = sum(max(part.limit for part in stage) for stage in call.stages[:-1])
        assert limits + 45 <= call.seconds, "no part can take all the time of those in the last stage"


def test_a_part_ends_when_its_call_was_killed(tmp_path: Path) -> None:
    """What it has started ends too: nothing computes beside the next call."""
    part = [sys.executable, str(ON_GPU / "part.py"), "commands", "--dry", "--seconds", "60", "--scratch", str(tmp_path)]
    with subprocess.Popen(stand_in("starts", *part), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        group = int(process.stdout.readline())
        try:
            time.sleep(1)  # Python has begun
            process.kill()
            end = time.monotonic() + 30
            while running(group) and time.monotonic() < end:
                time.sleep(0.05)
            assert not running(group)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def running(pid: int) -> bool:
    """Whether a process does anything."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().split(") ")[1][0] != "Z"


def test_a_wheel_that_cannot_be_installed_leaves_the_others_alone(
    bench: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    carried = tmp_path / "carried"
    carried.mkdir()
    with zipfile.ZipFile(carried / "sound-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sound.py", "")
        wheel.writestr("sound-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: sound\nVersion: 1\n")
        wheel.writestr("sound-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("sound-1.dist-info/RECORD", "")
    (carried / "other-1-cp27-cp27m-linux_x86_64.whl").write_bytes(b"of another Python")
    assert (bench.run.install(carried, tmp_path / "site") / "sound.py").exists()
    assert "installed 1 of 2 wheels" in capfd.readouterr().out


def test_the_code_of_the_checkout_is_known_from_that_of_the_wheel(bench: Any, tmp_path: Path) -> None:
    sources, site = tmp_path / "src", tmp_path / "site"
    for folder in (sources, site):
        (folder / "keyhole" / "nn").mkdir(parents=True)
        (folder / "keyhole" / "nn" / "a.py").write_text("x = 1\n")
    assert not bench.run.differs(sources, site)
    (sources / "keyhole" / "nn" / "a.py").write_text("x = 2\n")
    assert bench.run.differs(sources, site)


def test_a_folder_that_takes_no_result_is_refused_before_anything_runs(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        bench.run.main(["works", "--dry", "--out", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert f"--out: nothing can be written to {tmp_path / 'file'}" in capsys.readouterr().err


def test_tests_that_were_cut_do_not_reach_their_aim(bench: Any, tmp_path: Path) -> None:
    from on_gpu.marked_tests import counted

    report = tmp_path / "tests.xml"
    report.write_text('<testsuites><testsuite tests="3" failures="0" errors="0" skipped="1"/></testsuites>')
    aim = next(each for each in bench.aims.AIMS["works"] if each.key == "tests")
    verdicts = [aim.verdict(bench.aims.Figure(*counted(report, code))) for code in (0, 2, 5)]
    assert verdicts == ["reached", "**not reached**", "**not reached**"]
    assert counted(report, 2)[1] == "0 of 3, 1 skipped, the others have not run (exit code 2)"


def test_figures_are_judged_by_their_aims_and_a_half_written_one_is_left_out(bench: Any, tmp_path: Path) -> None:
    aims, figure = bench.aims, bench.aims.Figure
    aim = aims.Aim("share", "a share", least=0.55, better=0.7)
    told = [aim.verdict(each if each is None else figure(each, "")) for each in (None, 0.5, 0.55, 0.7, float("nan"))]
    assert told == ["not measured", "**not reached**", "reached", "reached, the better aim too", "**not reached**"]
    result = bench.result.Result(bench.calls.WORKS, tmp_path, tmp_path, dry=True)
    (tmp_path / "part.jsonl").write_text('["breaks", 3, "3 breaks"]\n["breaks", 0, "0 breaks"]\n["folding", 1, "all')
    assert result.figures() == {"breaks": figure(0, "0 breaks")}, "the later one counts"
    assert "| 0 breaks | at most 0 | reached |" in result.write().read_text()


def test_cards_have_short_names(bench: Any) -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "4090",
        "NVIDIA L4": "l4",
    }
    assert {name: bench.machine.card(name) for name in names} == names


def test_what_is_collected_is_refused_beyond_its_size(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "small.whl").open("wb") as file:
        file.truncate(2**20)
    assert bench.collect.report(tmp_path) == 0
    with (tmp_path / "large.whl").open("wb") as file:
        file.truncate(bench.collect.MOST)
    assert bench.collect.report(tmp_path) == 1
    assert "60.00 MiB  large.whl" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds other files"):
        bench.collect.main(["--to", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"there is no .*train-images-idx3-ubyte\.gz"):
        bench.collect.main(["--to", str(tmp_path / "new"), "--mnist", str(tmp_path)])


def test_a_repeated_slide_has_all_its_patches_and_hands_them_over_as_jpeg(bench: Any, tmp_path: Path) -> None:
    source = FileOpener(bench.repeated_slide.write_repeated(tmp_path / "a.tif", 5120, source=2048), "a", 256)()
    assert len(source) == 400
    patches = source.read(np.array([0, 1, 64, 399]))
    assert (patches[0] == patches[2]).all()
    assert (patches[0] != patches[1]).any()
    encoded = source.encoded(slice(None), frozenset(("ycbcr",)))
    assert encoded is not None
    assert all(encoded)
    source.close()


def test_what_a_gpu_is_asked_for_is_valid(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes and settings that a dry run replaces by small ones."""
    from on_gpu import commands, digits, slides, steps, streams
    from on_gpu.bench import Bench

    gpu = Bench("any", torch.device("cuda"), dry=False, scratch=tmp_path, mnist=None, end=0.0)
    config = digits.settings(gpu, tmp_path / "manifest.csv")
    assert (config.train.epochs, config.train.batch, config.select.m, config.model.stages) == (24, 16, 100, 2)
    assert not config.out.exists()
    published = {name: steps.chosen(name, dry=False) for name in steps.SETTINGS}
    assert {(each.b, each.m, each.step) for each in published.values()} == {(16, 10, True), (16, 100, True)}
    whole = slides.settings("cuda", tmp_path / "slides.csv", slides.BATCH, slides.MEMORY, "on")
    assert (whole.memory, whole.train.batch, whole.select.m, whole.patch.size) == (3 * 10**9, 16, 64, 256)
    assert (slides.SIDE // whole.patch.size) ** 2 == 250_000
    assert [slides.images_in_time(rate, 115) for rate in (100, 25_000, 40_000, 80_000)] == [1, 8, 13, 16]
    assert {whole.augment.shift, whole.augment.flip, whole.augment.rotate} == {False}, "tiles stay tiles"
    assert largest_chunk(gpu.device, (256, 256, 3)) == streams.CHUNK
    assert main(["train", "slides.csv", *commands.flags(dry=False), "--print-config"]) == 0
    assert "encoder: resnet18" in capsys.readouterr().out


# The simulated GPU: its decoder gets tiles through the real reader, with as many threads and as small chunks as runs have


@pytest.fixture
def simulated(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("simulated_gpu")


def test_the_device_decodes_a_share_of_the_tiles(simulated: Any) -> None:
    shares = {name: simulated.slides(16, 256, deliver, 0.4)[1] for name, deliver in simulated.POLICIES.items()}
    assert shares["as built"] > 0
    assert shares["host only"] == 0
    assert shares["always the device"] == 1


@pytest.mark.parametrize("fetched", [False, True])
def test_each_photograph_is_decoded_once(simulated: Any, fetched: bool) -> None:
    _, most, mean = simulated.photographs(16, 1024, fetched, 0.1)
    assert 0 < mean <= most <= 16
