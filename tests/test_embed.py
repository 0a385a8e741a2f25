"""Embedding gives the encoder's own numbers, whole files or none, and archives that train, evaluate and predict."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
from conftest import csv_rows, small_files
from PIL import Image
from processes import run_process
from safetensors.torch import save_file

import keyhole
from keyhole.cli.main import main
from keyhole.config.settings import PatchConfig
from keyhole.data.listing import list_images
from keyhole.errors import ConfigError, DataError, ImageError, KeyholeError, OutputError
from keyhole.images import open_image
from keyhole.inference.embed import Embedded, embed
from keyhole.inference.evaluate import evaluate
from keyhole.nn import SmallEncoder
from keyhole.patches.features import FeatureOpener
from keyhole.patches.grid import PatchGrid

PATCH = PatchConfig(size=16)
FEATURES: dict[str, dict[str, Any]] = {
    "model": {"dim": 32, "heads": 2},
    "select": {"m": 4, "chunk": 16},
    "train": {"epochs": 4, "batch": 4, "lr": 3e-3},
    "run": {"threads": 2},
}


@pytest.fixture(scope="module")
def archive(toy: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    """The features of the toy images; do not change them."""
    return run(toy, tmp_path_factory.mktemp("archive") / "features", weights)


def run(data: Path, out: Path, weights: Path, **options: Any) -> Embedded:
    return embed(
        data, out, **{"encoder": "small", "width": 8, "weights": weights, "patch": PATCH, "quiet": True} | options
    )


def noise(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def damaged_tiff(path: Path, side: int = 320, tiles: Iterable[int] = (17,)) -> Path:
    """A TIFF of tiles of 32 px, 100 unless said, of which one no longer decodes, or those that are named."""
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(32, 32), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as tif:
        offsets = [tif.pages.first.dataoffsets[tile] for tile in tiles]
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b"\xff" * 64)
    return path


def left_out(done: Embedded) -> dict[str, str]:
    return {row["name"]: row["reason"] for row in csv_rows(done.path / "left_out.csv")}


# What is in a file


def test_features_are_the_encoders_own_in_the_order_of_the_grid(
    archive: Embedded, toy: Path, encoder: SmallEncoder
) -> None:
    assert (archive.made, len(archive.files), archive.left_out, archive.unreadable) == (24, 24, {}, {})
    assert list_images(archive.path)[1] == [], "left_out.csv beside the features is nothing that predict leaves out"
    for name, path in archive.files.items():
        with open_image(toy / name) as image:
            grid = PatchGrid(image, 16)
            patches = torch.from_numpy(grid.read(slice(None))).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                expected = encoder(patches).numpy()
            corners = grid.boxes(slice(None))[:, :2]
        with h5py.File(path) as file:
            np.testing.assert_allclose(file["features"][()], expected, atol=1e-5)
            np.testing.assert_array_equal(file["coords"][()], corners)
            assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int64)


def test_a_slide_at_a_wanted_resolution_says_so_in_the_words_of_clam_and_trident(weights: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (512, 768, 3), dtype=np.uint8)
    options = {"tile": (64, 64), "photometric": "rgb", "resolution": (40000, 40000), "resolutionunit": 3}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(pixels, **options)  # 0.25 microns per pixel
        writer.write(pixels[::4, ::4], subfiletype=1, **options)
    patch = PatchConfig(size=16, stride=12, mpp=1.0)
    done = run(tmp_path / "a.tif", tmp_path / "out", weights, patch=patch, dtype="float16")
    with h5py.File(done.files["a.tif"]) as file:
        coords, features = dict(file["coords"].attrs), dict(file["features"].attrs)
        assert file["features"].dtype == np.float16
    assert (coords["patch_size"], coords["patch_level"], coords["patch_size_level0"], coords["overlap"]) == (
        16,
        1,
        64,
        4,
    )
    assert (coords["level0_width"], coords["level0_height"], coords["name"]) == (768, 512, "a")
    assert coords["downsample"].tolist() == [4.0, 4.0]
    assert coords["mpp"] == pytest.approx(1.0)
    assert (features["encoder"], features["keyhole"], features["unreadable"]) == ("small", keyhole.__version__, 0)
    assert re.fullmatch("[0-9a-f]{64}", features["weights_sha256"])
    source = FeatureOpener(done.files["a.tif"], "a")()
    with open_image(tmp_path / "a.tif") as image:
        grid = PatchGrid(image, 16, 12, 1.0)
        for name in ("boxes", "cells", "centers"):
            np.testing.assert_array_equal(getattr(source.grid, name)(slice(None)), getattr(grid, name)(slice(None)))
        assert (source.grid.rows, source.grid.columns) == (grid.rows, grid.columns)
        assert (source.grid.size, source.grid.stride, source.grid.scale) == (16, 12, 4.0)
    source.close()


def test_names_are_as_short_as_they_can_be_and_training_finds_them(weights: Path, tmp_path: Path) -> None:
    names = ["a/1.png", "b/1.png", "a/2.png", "b/3.png", "b/3.bmp", "c/4.x.png"]
    for seed, name in enumerate(names):
        noise(tmp_path / "data" / name, 32, 32, seed)
    done = run(tmp_path / "data", tmp_path / "out", weights)
    assert {name: path.relative_to(done.path).as_posix() for name, path in done.files.items()} == {
        "a/1.png": "a/1.png.h5",
        "b/1.png": "b/1.png.h5",
        "a/2.png": "2.h5",
        "b/3.png": "3.png.h5",
        "b/3.bmp": "3.bmp.h5",
        "c/4.x.png": "4.x.h5",
    }
    from keyhole.config.settings import DataConfig
    from keyhole.data.manifest import read_manifest

    data = DataConfig(path=tmp_path / "data", features=done.path, val=0, test=0)
    assert {item.name: item.features for item in read_manifest(data).items} == done.files


def test_labels_are_not_needed_and_rows_of_one_image_make_one_file(weights: Path, tmp_path: Path) -> None:
    for number in range(3):
        noise(tmp_path / f"{number}.png", 32, 32)
    (tmp_path / "list.csv").write_text("image,mpp\n0.png,0.5\n1.png,\n0.png,0.5\n")
    done = run(tmp_path / "list.csv", tmp_path / "out", weights)
    assert sorted(path.name for path in done.files.values()) == ["0.h5", "1.h5"]
    with h5py.File(done.files["0.png"]) as file:
        assert file["coords"].attrs["mpp"] == 0.5


# Going on, and refusing to mix


def test_what_is_there_is_not_made_again_and_other_settings_are_refused(weights: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for number in range(3):
        noise(data / f"{number}.png", 64, 64, number)
    first = run(data, out, weights)
    before = {path: path.stat().st_mtime_ns for path in first.files.values()}
    noise(data / "3.png", 64, 64)
    again = run(data, out, weights)
    assert (again.made, len(again.files)) == (1, 4)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    torch.manual_seed(1)
    save_file(SmallEncoder(3, 8).state_dict(), tmp_path / "other.safetensors")
    for changed, message in [
        ({"patch": PatchConfig(size=32)}, r"0.h5: made with patch.size 16, now it is 32 \(2 settings differ\)"),
        ({"dtype": "float16"}, "made with dtype float32, now it is float16"),
        ({"weights": tmp_path / "other.safetensors"}, "made with weights [0-9a-f]{64}, now it is"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(data, out, **{"weights": weights} | changed)
    noise(data / "1.png", 80, 64)
    with pytest.raises(ConfigError, match=r"1.h5: made when its image had \d+ bytes, now it has"):
        run(data, out, weights)
    (out / "0.h5").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"0\.h5: not an HDF5 file.* It was there before this run"):
        run(data, out, weights)
    with h5py.File(out / "0.h5", "w") as file:
        file["features"] = np.zeros((2, 3), np.float32)
    with pytest.raises(ConfigError, match=r"0\.h5: is there already, but not by `keyhole embed`"):
        run(data, out, weights)


def test_a_killed_embedding_leaves_whole_files_alone_and_goes_on(weights: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for number in range(6):
        noise(data / f"{number}.png", 1024, 1024, number)
    words = ["embed", str(data), "--out", str(out), "--encoder", "small", "--width", "8", "--weights", str(weights)]
    words += ["--patch.size", "16", "--chunk", "16", "--threads", "1"]
    child = subprocess.Popen([sys.executable, "-m", "keyhole", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # once a file is whole and the next one has begun
    while not (list(out.glob("*.h5")) and list(out.glob(".*.h5.*"))):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    whole = sorted(path.name for path in out.glob("*.h5"))
    assert 0 < len(whole) < 6
    for name in whole:
        with h5py.File(out / name) as file:
            assert len(file["features"]) == len(file["coords"]) == 4096
    done = run(data, out, weights)
    assert (done.made, len(done.files)) == (6 - len(whole), 6)
    assert [path.name[:5] for path in done.unfinished] == [f".{len(whole)}.h5"]
    assert "unfinished files of runs that were killed" in "\n".join(done.lines())


def test_a_full_disk_is_one_line_and_leaves_nothing(weights: Path, tmp_path: Path) -> None:
    noise(tmp_path / "data" / "0.png", 512, 512)
    for limit in (1, 1000, 5000, 40_000, 250_000, 270_000):
        with small_files(limit), pytest.raises(OutputError, match=r"0\.h5: could not be written"):
            run(tmp_path / "data", tmp_path / "out", weights, chunk=16)
        assert list((tmp_path / "out").iterdir()) == []
    assert run(tmp_path / "data", tmp_path / "out", weights).made == 1


@pytest.mark.parametrize(
    "options", [{"chunk": 0}, {"chunk": -1}, {"chunk": True}, {"precision": "fp8"}, {"decode": "gpu"}], ids=str
)
def test_options_from_python_are_checked_as_those_of_the_command(
    options: dict[str, Any], weights: Path, tmp_path: Path
) -> None:
    noise(tmp_path / "data" / "0.png")
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected"):
        run(tmp_path / "data", tmp_path / "out", weights, **options)
    assert not (tmp_path / "out").exists()


# What cannot be read


def test_unreadable_patches_are_in_neither_features_nor_coords(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    damaged_tiff(tmp_path / "data" / "a.tif")
    with pytest.raises(KeyholeError, match="4 of 400 patches cannot be read"):
        run(tmp_path / "data", tmp_path / "out", weights, unreadable="0.5%")
    assert not list((tmp_path / "out").glob("*.h5"))
    done = run(tmp_path / "data", tmp_path / "out", weights)
    assert done.unreadable == {"a.tif": 4}
    assert "a.tif: 4 unreadable patches are not in its features" in done.lines()
    with h5py.File(done.files["a.tif"]) as file:
        assert file["features"].attrs["unreadable"] == 4
        assert file["features"].shape[0] == file["coords"].shape[0] == 396
        missing = {(x, y) for y in range(0, 320, 16) for x in range(0, 320, 16)} - set(
            map(tuple, file["coords"][()].tolist())
        )
    assert missing == {(224, 32), (240, 32), (224, 48), (240, 48)}


def test_bad_images_end_the_run_or_are_listed(weights: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(3):
        noise(data / f"{number}.png")
    whole = (data / "1.png").read_bytes()
    (data / "1.png").write_bytes(whole[: len(whole) // 2])
    noise(data / "small.png", 8, 8)
    with pytest.raises(ImageError, match=r"1\.png"):
        run(data, tmp_path / "out", weights)
    done = run(data, tmp_path / "out", weights, on_bad_image="skip")
    assert sorted(done.files) == ["0.png", "2.png"]
    assert set(left_out(done)) == set(done.left_out) == {"1.png", "small.png"}
    assert "larger than the image" in done.left_out["small.png"]
    (tmp_path / "list.csv").write_text("image\ndata/0.png\ndata/gone.png\n")
    with pytest.raises(DataError, match=r"1 of 2 image files are not there: .*gone\.png"):
        run(tmp_path / "list.csv", tmp_path / "out2", weights)
    assert run(tmp_path / "list.csv", tmp_path / "out2", weights, on_bad_image="skip").left_out == {
        "data/gone.png": "no such file"
    }


def test_mistakes_are_one_line(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(tmp_path / "data" / "0.png")
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    for words, message in [
        ([data], "--out is missing"),
        ([], "no data given: keyhole embed DATA"),
        ([data, "--out", out], "encoder resnet50: where are its weights? Give --weights FILE (safetensors), --pret"),
        ([data, "--out", out, "--encoder", "resnett"], "no model 'resnett'"),
        ([data, "--out", out, "--encoder", "small", "--pretrained"], "--pretrained: the encoder `small` has no"),
        ([data, "--out", out, "--encoder", "resnet5000", "--weights", str(weights)], "no model 'resnet5000'"),
        ([data, "--out", out, "--encoder", "small", "--weights", str(weights)], "do not fit the model"),
        (
            [data, "--out", out, "--unreadable", "2", "--weights", str(weights)],
            "--unreadable: expected a share such as 1%",
        ),
        ([str(tmp_path / "no"), "--out", out, "--encoder", "small", "--weights", str(weights)], "no such file"),
    ]:
        assert main(["embed", *words]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said
        assert said.count("\n") == 0


def test_help_needs_no_torch() -> None:
    out = run_process("imported", "torch", "help", "embed").stdout
    assert "--patch.foreground" in out
    assert out.splitlines()[-1] == "[]"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_patches(weights: Path, tmp_path: Path) -> None:
    peaks = []
    for side in (1024, 4096):
        shape = (side, side, 3)
        tiles = (np.full((64, 64, 3), number % 200, np.uint8) for number in range((side // 64) ** 2))
        tifffile.imwrite(
            tmp_path / f"{side}.tif",
            tiles,
            shape=shape,
            dtype=np.uint8,
            tile=(64, 64),
            photometric="rgb",
            compression="zlib",
        )
        peaks.append(int(run_process("embed_peak", tmp_path / f"{side}.tif", tmp_path / "out", weights).stdout))
    with h5py.File(tmp_path / "out" / "4096.h5") as file:
        assert file["features"].shape == (65_536, 64)
    assert peaks[1] - peaks[0] < 10 * 2**20, "the features alone are 16.8 MB"


# From images to predictions


@pytest.mark.parametrize("layout", ["keyhole", "clam", "trident"])
def test_an_archive_trains_evaluates_and_predicts(layout: str, archive: Embedded, toy: Path, tmp_path: Path) -> None:
    data, folder = toy, archive.path
    if layout != "keyhole":
        folder = tmp_path / "features"
        data = write_archive(archive, folder, layout)
    section = {"path": str(data), "features": str(folder)}
    done = keyhole.train(section, tmp_path / "run", **FEATURES)
    found = evaluate(done.path, split="val")
    assert np.isfinite(found.metrics[0].overall["auroc"].value)
    predictor = keyhole.load(done.path)
    assert predictor.config.model.feature_width == 64
    rows = csv_rows(done.path / "manifest.csv")
    assert len(rows) == 24
    assert all(Path(row["features"]).is_file() for row in rows)
    assert main(["predict", str(done.path), rows[0]["features"], "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / Path(rows[0]["features"]).name / "prediction.json").read_text())
    assert told["scores"]["patches"] == 16
    assert {tuple(patch["box"][2:]) for patch in told["kept"]["patches"]} == {(16, 16)}
    rerun = keyhole.train(section, tmp_path / "again", **FEATURES)
    name = "predictions/train.csv"
    assert (rerun.path / name).read_bytes() == (done.path / name).read_bytes(), "law 10"


def write_archive(archive: Embedded, folder: Path, layout: str) -> Path:
    """The same features as the other tools lay them out, with a list of labels; returns the list."""
    lines = ["case_id,slide_id,label"] if layout == "clam" else ["image,label"]
    for name, path in archive.files.items():
        slide = name.replace("/", "-").removesuffix(".png")
        with h5py.File(path) as file:
            rows, coords = file["features"][()], file["coords"][()]
        if layout == "clam":
            for part in ("h5_files", "pt_files"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            with h5py.File(folder / "h5_files" / f"{slide}.h5", "w") as file:
                file.create_dataset("features", data=rows, chunks=(1, 64), maxshape=(None, 64))
                file.create_dataset("coords", data=coords.astype(np.int32), chunks=(1, 2), maxshape=(None, 2))
            torch.save(torch.from_numpy(rows), folder / "pt_files" / f"{slide}.pt")
        else:
            folder.mkdir(exist_ok=True)
            with h5py.File(folder / f"{slide}.h5", "w") as file:
                file.create_dataset("features", data=rows[None].astype(np.float16), chunks=(1, 1, 64))
                file.create_dataset("coords", data=coords[None]).attrs.update(
                    {
                        "patch_size": 16, "patch_size_level0": 16, "level0_magnification": 20, "overlap": 0,
                        "target_magnification": 20, "name": slide, "level0_width": 64, "level0_height": 64,
                    }
                )  # fmt: skip
        lines.append(
            f"p{slide},{slide},{name.split('/')[0]}" if layout == "clam" else f"{slide}.svs,{name.split('/')[0]}"
        )
    listing = folder.with_suffix(".csv")
    listing.write_text("\n".join(lines) + "\n")
    return listing


def test_features_of_the_toy_images_tell_their_classes(archive: Embedded, toy: Path, tmp_path: Path) -> None:
    data = {"path": str(toy), "features": str(archive.path)}
    train = {**FEATURES, "train": {"epochs": 12, "batch": 4, "lr": 3e-3}}
    done = keyhole.train(data, tmp_path / "run", **train)
    assert evaluate(done.path, split="train").metrics[0].overall["auroc"].value > 0.95
