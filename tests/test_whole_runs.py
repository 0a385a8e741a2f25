"""Damage and interruption in the middle of a run on slides: what is lost is masked, counted and listed, and a killed
pass loses at most one image."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import settings
from processes import command, environment, kill, wait_for
from safetensors.torch import load_file

import keyhole
from keyhole.errors import KeyholeError
from keyhole.loading.unreadable import TooMuchUnreadable
from keyhole.runs.checkpoint import read_info
from keyhole.training.loop import resume
from keyhole.util.tables import read_rows

TILE = 32
QUICK = settings(train={"epochs": 1}, augment={"shift": False, "flip": False, "rotate": False})


def write_slides(folder: Path, count: int, side: int, seed: int = 0) -> Path:
    """Tiled TIFF files of noise, one class with a bright square, and their CSV: half to learn from, half to choose by."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = ["image,label,split"]
    for number in range(count):
        pixels = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
        if number % 2:
            pixels[16:48, 16:48] = 250
        tifffile.imwrite(folder / f"{number}.tif", pixels, tile=(TILE, TILE), photometric="rgb", compression="zlib")
        rows.append(f"{number}.tif,{'ab'[number % 2]},{'train' if number < count // 2 else 'val'}")
    (folder / "slides.csv").write_text("\n".join(rows) + "\n")
    return folder / "slides.csv"


def destroy(path: Path, tiles: list[int]) -> None:
    """Overwrites tiles of level 0."""
    with tifffile.TiffFile(path) as tif:
        places = [(tif.pages[0].dataoffsets[tile], tif.pages[0].databytecounts[tile]) for tile in tiles]
    with path.open("r+b") as file:
        for offset, size in places:
            file.seek(offset)
            file.write(b"\xff" * size)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Eight slides of 256 px (256 patches of 16 px); one tile of a training slide, two of a validation slide are gone."""
    data = write_slides(tmp_path / "slides", 8, 256)
    destroy(data.parent / "1.tif", [9])  # column 1, row 1 of 8 x 8 tiles
    destroy(data.parent / "6.tif", [0, 63])
    return data


def test_unreadable_regions_are_masked_counted_and_listed_and_the_run_goes_on(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = keyhole.train(damaged, tmp_path / "run", unreadable="1%", **QUICK)
    rows = read_rows(run.path / "unreadable.csv")
    expected = {("1.tif", x, y) for x in (32, 48) for y in (32, 48)}
    expected |= {("6.tif", x + corner, y + corner) for corner in (0, 224) for x in (0, 16) for y in (0, 16)}
    assert {(row["image"], int(row["x"]), int(row["y"])) for row in rows} == expected
    assert {row["epoch"] for row in rows} == {"1"}
    assert "unreadable: 1.tif: 4 patches" in (run.path / "log.txt").read_text()
    told = capsys.readouterr().err
    assert told.count("warning: 1.tif: patches cannot be read: damaged") == 1
    assert "patches of 2 images could not be read; they are listed in unreadable.csv" in told
    assert len(run.metrics) == 1
    assert {row["image"] for row in read_rows(run.path / "predictions" / "val.csv")} >= {"4.tif", "5.tif", "7.tif"}


def test_more_than_the_stated_share_ends_the_run_with_the_places(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(TooMuchUnreadable, match=r"4 of 2,048 patches.*--unreadable allows 0.1 %.*1\.tif"):
        keyhole.train(damaged, tmp_path / "run", unreadable="0.1%", **QUICK)
    assert len(read_rows(tmp_path / "run" / "unreadable.csv")) == 4


def test_each_epoch_tries_again_and_counts_for_itself(damaged: Path, tmp_path: Path) -> None:
    """12 of 2,048 patches are lost in each epoch: 0.6 %, which must not add up to more than 1 %."""
    twice = {**QUICK, "train": {**QUICK["train"], "epochs": 3}}
    run = keyhole.train(damaged, tmp_path / "run", unreadable="1%", **twice)
    rows = read_rows(run.path / "unreadable.csv")
    assert [sum(row["epoch"] == str(epoch) for row in rows) for epoch in (1, 2, 3)] == [12, 12, 12]


def test_a_slide_that_disappears_in_mid_run_is_tried_again_then_counted(tmp_path: Path) -> None:
    data = write_slides(tmp_path / "slides", 8, 128)
    gone = data.parent / "2.tif"
    run = start(tmp_path / "run", data, "--train.epochs", "400", "--run.retries", "0", "--unreadable", "20%")
    wait_for(run, lambda: (tmp_path / "run" / "metrics.csv").exists())
    gone.rename(gone.with_suffix(".away"))
    wait_for(run, lambda: (tmp_path / "run" / "unreadable.csv").exists())
    kill(run)
    rows = read_rows(tmp_path / "run" / "unreadable.csv")
    assert {row["image"] for row in rows} == {"2.tif"}
    assert rows[0]["patches"] == "64"
    assert "no such file" in rows[0]["reason"]


# --- killed in the middle of a selection -----------------------------------------------------------------------------

FLAGS = (
    "--patch.size 16 --model.encoder small --model.width 8 --model.heads 2 --select.m 4 --select.chunk 16 --train.epochs 1 --train.batch 4 --train.explore 0 "
    "--run.threads 2 --data.cache 0"
).split()


def start(run: Path, data: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("eager_journal", "train", data, "--out", run, *FLAGS, *flags),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_selection_does_again_only_the_image_it_was_at_and_ends_the_same(tmp_path: Path) -> None:
    data = write_slides(tmp_path / "slides", 8, 512)  # 1,024 patches each; one batch of four is one epoch
    whole = start(tmp_path / "whole", data)
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output
    run, journal = tmp_path / "run", tmp_path / "run" / "selection.safetensors"
    process = start(run, data)

    def known() -> list[int]:
        try:
            return list(read_info(journal)["rows"])
        except KeyholeError:  # not there yet, or not any more
            return []

    wait_for(process, lambda: len(known()) >= 2)
    kill(process)
    assert read_info(run / "last.safetensors")["step"] == 0
    before = known()
    assert 2 <= len(before) < 4
    assert images_streamed(run) == 4 - len(before)
    for name in ("last.safetensors", "best/model.safetensors"):
        expected, found = load_file(tmp_path / "whole" / name), load_file(run / name)
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert not journal.exists()


def images_streamed(run: Path) -> int:
    """Resumes here, and counts the images of which every patch is looked at for learning."""
    from keyhole.engine import Engine

    counted = 0
    select = Engine.select

    def counting(engine: Engine, batch: Any, **options: Any) -> Any:
        nonlocal counted
        if options.get("on_image") is not None:  # a step of training, not a validation
            counted += sum(length > 0 for length in batch.lengths())
        return select(engine, batch, **options)

    Engine.select = counting  # type: ignore[method-assign]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes before: sums of another number of threads differ in the last bit
    try:
        resume(run)
    finally:
        Engine.select = select  # type: ignore[method-assign]
        torch.set_num_threads(threads)
    return counted


def test_a_damaged_tile_in_the_level_that_shows_the_foreground_loses_only_its_patches(tmp_path: Path) -> None:
    data = write_slides(tmp_path / "slides", 8, 256)
    destroy(data.parent / "1.tif", [9])
    masked = {**QUICK, "patch": {**QUICK["patch"], "foreground": "non-empty"}}
    run = keyhole.train(data, tmp_path / "run", **masked)
    places = {(row["image"], row["x"], row["y"]) for row in read_rows(run.path / "unreadable.csv")}
    assert places == {("1.tif", str(x), str(y)) for x in (32, 48) for y in (32, 48)}


def test_after_too_much_damage_and_a_repair_the_run_goes_on(damaged: Path, tmp_path: Path) -> None:
    whole = write_slides(tmp_path / "whole", 8, 256)
    with pytest.raises(TooMuchUnreadable):
        keyhole.train(damaged, tmp_path / "run", unreadable="0.1%", **QUICK)
    for number in range(8):
        (damaged.parent / f"{number}.tif").write_bytes((whole.parent / f"{number}.tif").read_bytes())
    assert len(resume(tmp_path / "run").metrics) == 1
