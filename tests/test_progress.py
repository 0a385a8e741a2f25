"""Progress: plain lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import command, environment, run_process

from keyhole.util.budget import memory_text
from keyhole.util.platform import peak_memory
from keyhole.util.progress import Progress, shares_text
from keyhole.util.timing import PARTS, Timer


def test_without_a_terminal_it_prints_a_line_per_interval_and_one_at_the_end() -> None:
    stream = io.StringIO()
    with Progress(10, "epoch 1/2", stream, interval=0) as progress:
        for _ in range(5):
            progress.update(images=2, patches=100)
    lines = stream.getvalue().splitlines()
    assert [re.search(r"(\d+)/10 images", line).group(1) for line in lines] == ["2", "4", "6", "8", "10"]  # type: ignore[union-attr]
    assert all(line.startswith("epoch 1/2: ") for line in lines)
    assert all("left" in line for line in lines[:4])
    assert lines[-1].endswith("taken")


def test_within_an_interval_only_the_end_is_printed() -> None:
    stream = io.StringIO()
    with Progress(10, "epoch 1/2", stream, interval=1e6) as progress:
        for _ in range(10):
            progress.update(images=1)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_line_says_rate_waiting_memory_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("keyhole.util.progress.time.monotonic", lambda: now[0])
    progress = Progress(40, "reading", io.StringIO(), device_bytes=lambda: 3_200_000_000)
    with progress:
        now[0] = 110.0
        progress.update(images=10, patches=20_000, waited=2.5, text="loss 0.31")
        assert progress.status() == (
            "reading: 10/40 images, 2,000 patches/s, 25% waiting for reading, "
            f"peak {memory_text(peak_memory())} and 3.2 GB on the device, loss 0.31, 0:00:30 left"
        )


def test_a_line_says_where_the_time_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("keyhole.util.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("keyhole.util.timing.time.perf_counter", lambda: now[0])
    timer = Timer(torch.device("cpu"))
    stream = io.StringIO()
    with Progress(40, "epoch 1/30", stream, interval=0) as progress:
        for name, seconds in (("encoding", 8.0), ("reading", 0.3), ("copying", 0.02), ("learning", 1.5)):
            with timer.part(name):  # type: ignore[arg-type]
                now[0] += seconds
        now[0] = 110.0
        progress.update(images=10, patches=20_000, waited=2.5, text="loss 0.31", timer=timer)
    first = stream.getvalue().splitlines()[0]
    assert first == (
        "epoch 1/30: 10/40 images, 2,000 patches/s, reading 3% encoding 80% learning 15%, "
        f"peak {memory_text(peak_memory())}, loss 0.31, 0:00:30 left"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(io.StringIO(), 3), (Terminal(), 103)], ids=["lines", "bar"])
def test_the_device_is_asked_only_for_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, shown: int
) -> None:
    """25 s of chunks, then two images: a line each 10 s and at the end; a bar each quarter, with each image and then."""
    now, asked = [100.0], []
    monkeypatch.setattr("keyhole.util.progress.time.monotonic", lambda: now[0])
    with Progress(2, "epoch 1/1", stream, interval=10, device_bytes=lambda: asked.append(1)) as progress:
        for _ in range(800):
            now[0] += 1 / 32
            progress.update(patches=64)
        progress.update(images=1)
        progress.update(images=1)
    assert len(asked) == shown


def test_the_shares_take_no_more_than_64_columns() -> None:
    said = shares_text(dict.fromkeys(PARTS, 10.0), 50)
    assert said == "reading 20% copying 20% encoding 20% scoring 20% learning 20%"
    assert len(said) <= 64


def test_an_error_is_not_followed_by_a_line_that_says_done() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress(2, "epoch", stream):
        raise ZeroDivisionError
    assert stream.getvalue() == ""


def test_a_permanent_line_is_printed_as_it_is() -> None:
    stream = io.StringIO()
    with Progress(2, "epoch", stream) as progress:
        progress.line("[bold]kept 3 of 4[/bold]")
    assert stream.getvalue().splitlines()[0] == "[bold]kept 3 of 4[/bold]"


def test_updates_of_several_threads_are_all_counted() -> None:
    progress = Progress(4000, "reading", io.StringIO())

    def work() -> None:
        for _ in range(1000):
            progress.update(images=1, patches=2, waited=0.5)

    with progress, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    assert (progress.images, progress.patches, progress.waited) == (4000, 8000, 2000.0)


def test_on_a_terminal_it_shows_a_bar() -> None:
    ours, theirs = pty.openpty()
    shown_on = environment(TERM="xterm", COLUMNS="160")
    with subprocess.Popen(command("shows_progress"), stderr=theirs, env=shown_on) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux: the other side is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(60) == 0
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "4/4" in text
    assert "patches/s" in text
    assert "waiting for reading" in text
    assert "loss 0.5" in text
    assert "a line that stays" in text
    assert b"\x1b[" in shown  # it redraws


def test_a_bar_does_not_take_what_is_printed_into_a_pipe() -> None:
    ours, theirs = pty.openpty()
    done = run_process("shows_progress", "print", stderr=theirs, timeout=60)
    os.close(theirs)
    os.close(ours)
    assert done.stdout == "a line that stays\n"


def test_into_a_file_it_leaves_no_control_characters(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with file.open("w") as stream:
        run_process("shows_progress", stderr=stream, timeout=60)
    lines = file.read_text().splitlines()
    assert lines[0] == "a line that stays"
    assert lines[1].startswith("epoch 1/2: 4/4 images")
    assert "\x1b" not in file.read_text()


def test_the_log_of_a_run_tells_the_measured_peak_beside_the_predicted(toy_run: Path) -> None:
    assert re.search(r"peak memory \d.* \wB, predicted \d.* \wB$", (toy_run / "log.txt").read_text(), re.MULTILINE)
