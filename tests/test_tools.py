"""What a user runs around a model: doctor, init and demo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keyhole.cli.main import main
from keyhole.config.file import load_config, resolve
from keyhole.config.settings import Config
from keyhole.datasets.slides import SlideSet, make_slides
from keyhole.errors import ImageError, OutputError
from keyhole.tools import doctor
from keyhole.tools.check.run import check
from keyhole.tools.demo import demo, demo_config, free_folder


def test_a_sound_machine_is_found_sound(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    for part in ("torch", "cores", "memory", "GPU", "reader tiff", "reader openslide", "reader pillow", "png colour"):
        assert part in out
    for part in ("webp", "bmp", "jpg", "lzw", "deflate", "zstd", "jpeg2000", "pyramid", "OME", "training, one epoch"):
        assert any(line.startswith("ok ") and part in line for line in out.splitlines()), part
    assert out.splitlines()[-1] == "all is well"
    assert list(tmp_path.glob("keyhole*")) == []  # nothing is left behind


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine", lambda: iter(()))
    monkeypatch.setattr(doctor, "training", lambda folder: doctor.Diagnosis("training", "ok", ""))


def test_a_reader_that_fails_is_named_and_the_others_are_still_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import keyhole.images

    real = keyhole.images.open_image

    def broken(path: Path) -> Any:
        if path.suffix == ".webp":
            raise ImageError(path, "this Pillow\nwas built without WebP")
        return real(path)

    quick(monkeypatch)
    monkeypatch.setattr(keyhole.images, "open_image", broken)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == 1
    assert "webp colour" in failed[0]
    assert "this Pillow was built without WebP" in failed[0]
    assert lines[-1] == "1 thing does not work"


def test_wrong_pixels_are_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from keyhole.images import ArrayImage, open_image

    right = open_image

    def wrong(path: Path) -> ArrayImage:
        with right(path) as image:
            return ArrayImage(255 - image.read((0, 0, *image.size)))

    quick(monkeypatch)
    monkeypatch.setattr("keyhole.images.open_image", wrong)
    assert main(["doctor"]) == 1
    assert "the pixels differ by" in capsys.readouterr().out


def test_training_that_fails_and_a_package_that_is_missing_are_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(config: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr("keyhole.training.loop.train_config", fail)
    found = doctor.training(tmp_path)
    assert (found.state, found.detail) == ("FAIL", "RuntimeError: no kernel for this device")

    monkeypatch.setattr("keyhole.runs.run.PACKAGES", ("no-such-package",))
    states = {finding.name: finding.state for finding in doctor.machine()}
    assert states["no-such-package"] == "FAIL"


def test_optional_parts_say_what_they_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"json": "x", "no_such_package": "curves"})
    there, missing = doctor.optional_parts()
    assert there.state == "ok"
    assert (missing.state, missing.detail) == ("info", "not installed; would give curves")


def test_its_training_run_is_a_valid_configuration(tmp_path: Path) -> None:
    doctor.training_config(tmp_path)


# init


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The list of four generated slides of 0.5 microns per pixel, of which a part is tissue."""
    return make_slides(tmp_path_factory.mktemp("slides") / "s", SlideSet(count=4, side=2048))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "keyhole.yaml"


def init(data: Path, out: Path, *flags: str) -> Config:
    assert main(["init", str(data), "--data.val=0", "--data.test=0", "--out", str(out), *flags]) == 0
    return load_config(out)


def test_the_folder_of_the_file_is_made_or_nothing_is_measured(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(slides, tmp_path / "new" / "folder" / "k.yaml").patch.mpp == 0.5
    (tmp_path / "file").touch()
    assert main(["init", str(slides), "--out", str(tmp_path / "file" / "k.yaml")]) == 2
    said = capsys.readouterr().err
    assert f"cannot be created, {tmp_path / 'file'} is not a folder that can be written" in said
    assert main(["init", str(tmp_path / "none"), "--out", str(tmp_path / "other" / "k.yaml")]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 1.0), (7, 1.0), (40, 4.0)])
def test_the_warmup_fits_the_epochs_that_the_user_gives(slides: Path, out: Path, epochs: int, warmup: float) -> None:
    config = init(slides, out, f"--train.epochs={epochs}", "--model.encoder=small")
    assert (config.train.epochs, config.train.warmup) == (epochs, warmup)


def test_slides_are_read_at_the_resolution_that_they_have_and_patches_are_those_of_the_foreground(
    slides: Path, out: Path
) -> None:
    config = init(slides, out)
    assert (config.patch.mpp, config.patch.foreground) == (0.5, "tissue")
    assert "# -> what the images have; later ones of another resolution are resampled to it" in out.read_text()
    report = check(config)
    patches = report.spreads["patches"].median
    assert f"about an eighth of the {patches:,.0f} patches with tissue, the median of 4 images" in out.read_text()
    every = (2048 // config.patch.size) ** 2
    assert patches < 0.8 * every
    assert patches < 16**2 / 2
    assert config.select.m == 16, "the least"


def test_slides_of_which_some_do_not_say_their_resolution_are_told(
    slides: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = out.parent / "fine.csv"
    rows = [line.split(",") for line in slides.read_text().splitlines()]
    place = rows[0].index("image")
    text = [f"{slides.parent / row[place]},{0.25},{row[rows[0].index('label')]}" for row in rows[1:]]
    other.write_text("\n".join(["image,mpp,label", *text]) + "\n")
    assert init(other, out).patch.mpp == 0.5  # finer than needed
    Image.new("RGB", (2048, 2048), "white").save(out.parent / "unknown.png")
    other.write_text(f"{other.read_text()}unknown.png,,positive\n")
    assert init(other, out.parent / "more.yaml").patch.mpp is None
    assert "patch.mpp stays none: not all state it" in capsys.readouterr().out


def test_masks_are_proposed_where_all_images_have_one_and_told_where_they_are_not_used(
    slides: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (64, 64), "white").save(out.parent / "mask.png")
    header, *rows = slides.read_text().splitlines()
    assert header.startswith("image,")
    masked, some = out.parent / "masked.csv", out.parent / "some.csv"
    text = [f"{slides.parent / row},{out.parent / 'mask.png'}" for row in rows]
    masked.write_text("\n".join([f"{header},mask", *text]) + "\n")
    assert init(masked, out).patch.foreground == "mask"
    some.write_text("\n".join([f"{header},mask", *text[1:], f"{slides.parent / rows[0]},"]) + "\n")
    config = init(some, out.parent / "some.yaml")
    assert config.patch.foreground == "tissue"
    told = "the masks of 3 images are not used, since patch.foreground is tissue; to use them: --patch.foreground mask"
    assert told in check(config).notes
    assert not any("not used" in note for note in check(load_config(out)).notes)
    tiny = [
        "--patch.size=512",
        "--patch.foreground=all",
        "--model.encoder=small",
        "--model.width=4",
        "--select.m=1",
        "--train.epochs=1",
        "--train.warmup=1",
    ]
    capsys.readouterr()
    assert main(["train", "--config", str(out), *tiny, "--out", str(out.parent / "run")]) == 0
    assert "the masks of 4 images are not used, since patch.foreground is all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "foreground"), [("mostly black", "non-empty"), ("noise", "all"), ("one black", "all")]
)
def test_patches_of_one_colour_are_left_out_where_they_are_many_and_every_image_has_others(
    out: Path, kind: str, foreground: str
) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (640, 640, 3), np.uint8) if kind == "noise" else np.zeros((640, 640, 3), np.uint8)
        if kind == "mostly black" or number:
            pixels[100:150, 100:150] = 200  # on four patches
        folder = out.parent / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    config = init(out.parent / "images", out)
    assert (config.patch.size, config.patch.foreground) == (64, foreground)
    said = "of the patches of 8 images are of one colour" in out.read_text()
    assert said == (foreground == "non-empty")
    assert config.select.m == (4 if foreground == "non-empty" else 16), "of the patches that are left"


@pytest.mark.parametrize(("side", "size", "m"), [(96, 16, 16), (400, 48, 16), (1536, 96, 32)])
def test_from_random_weights_small_pictures_have_patches_enough_to_choose_from(
    out: Path, capsys: pytest.CaptureFixture[str], side: int, size: int, m: int
) -> None:
    for number in range(8):
        folder = out.parent / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side), np.uint8)).save(
            folder / f"{number}.png"
        )
    config = init(out.parent / "images", out, "--model.encoder=small")
    assert (config.patch.size, config.select.m) == (size, m)
    assert "turn off augment.flip and augment.rotate" in capsys.readouterr().out
    init(out.parent / "images", out.with_name("upright.yaml"), "--augment.no-flip", "--augment.no-rotate")
    assert "augment.flip" not in capsys.readouterr().out


def test_from_random_weights_slides_have_large_patches_and_a_small_network_and_no_top(
    slides: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = init(slides, out, "--model.encoder=small")
    assert (config.patch.size, config.model.stages, config.model.width) == (384, 1, 64)
    assert config.train.explore == pytest.approx(0.7 * config.train.epochs)
    assert "augment.flip" not in capsys.readouterr().out
    config = init(slides, out.with_name("other.yaml"), "--model.encoder=resnet18")
    assert (config.model.stages, config.model.width) == (None, None)


# demo


def test_the_demo_trains_as_keyhole_train_with_its_recipe(tmp_path: Path) -> None:
    config = demo_config(tmp_path, seed=3)
    recipe = resolve("demo")
    assert (config.patch, config.model, config.select, config.augment) == (
        recipe.patch,
        recipe.model,
        recipe.select,
        recipe.augment,
    )
    assert config.train.seed == 3


def test_a_second_demo_does_not_lose_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_folder() == Path("demo")
    Path("demo").mkdir()
    assert free_folder() == Path("demo-2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(OutputError, match="exists and is not empty"):
        demo(tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_reaches_its_accuracy_without_a_network(tmp_path: Path, seed: int) -> None:
    """The whole command, as `make demo` runs it; a few minutes a seed."""
    command = [sys.executable, "-m", "keyhole", "demo", "--seed", str(seed), "--out", "out"]
    offline = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = re.fullmatch(r"accuracy (0\.\d{3}|1\.000) \[(\d\.\d{3}) (\d\.\d{3})\]", lines[-3])
    assert found, lines[-3:]
    assert float(found[1]) >= 0.90
    assert lines[-2].startswith("contact sheet: ")
    assert (tmp_path / lines[-2].removeprefix("contact sheet: ")).read_bytes().startswith(b"\x89PNG")
    assert "200 unseen images" in done.stdout
