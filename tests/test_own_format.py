"""A format of the user's own works wherever a format of keyhole's does: the reader of the docs, installed as a package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from make_images import picture

from keyhole.cli.main import main
from keyhole.data.listing import expand_images
from keyhole.errors import ImageError
from keyhole.images import open_image
from keyhole.images.image import folder_suffixes, image_suffixes, readers

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "adding-a-reader.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example of the docs as an installed package, for this process and for those that it starts."""
    site = tmp_path / "site"
    (about := site / "your_package-1.0.dist-info").mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[keyhole.images]\nnpy = your_package:NpyImage\n")
    (site / "your_package.py").write_text(DOCUMENT.read_text().split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    importlib.invalidate_caches()
    readers.cache_clear()
    yield
    monkeypatch.undo()
    readers.cache_clear()


def test_a_registered_format_works_in_a_folder_of_classes_in_check_and_in_predict(
    installed: None, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for k, name in enumerate(("cat", "dog")):
        (data / name).mkdir(parents=True)
        for i in range(4):
            np.save(data / name / f"{i}.npy", picture(3, 64, 64, seed=4 * k + i))
        (data / name / "notes.rtf").write_text("{}")
    assert ".npy" in image_suffixes()
    with open_image(data / "cat" / "0.npy") as image:
        np.testing.assert_array_equal(image.read((0, 0, 64, 64)), picture(3, 64, 64))
        assert (image.read((60, 60, 8, 8))[4:] == image.background).all()
    np.save(tmp_path / "b.npy", np.zeros((4, 4), np.float64))
    with pytest.raises(ImageError, match=r"b\.npy: .*float64"):
        open_image(tmp_path / "b.npy")
    options = ["--patch.size", "16", "--select.m", "3", "--run.threads", "1"]
    assert main(["check", str(data), *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "8 images can be used" in out
    images, others = expand_images([data])
    assert [image.suffix for image in images] == [".npy"] * 8
    assert [other.reason for other in others] == ["not an image (suffix .rtf)"] * 2
    assert main(["predict", str(toy_run), str(data), "--out", str(tmp_path / "answers")]) == 0
    assert "predicted: 8, left out: 2" in capsys.readouterr().out


def test_the_readers_declare_what_a_folder_is_searched_for() -> None:
    photos = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
    slides = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm", ".svslide", ".czi"}
    assert folder_suffixes() == {".zarr"}
    assert image_suffixes() == photos | slides | {".zarr"}
