"""The doctor finds a sound machine sound, and says which part of another one is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keyhole.cli.main import main
from keyhole.errors import ImageError
from keyhole.tools import doctor


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
