"""A format of the user's own works wherever a format of keyhole's does: the reader of the docs, installed as a package."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_images import picture

from keyhole.cli.main import main
from keyhole.data.listing import expand_images
from keyhole.errors import ImageError
from keyhole.images import ArrayImage, Box, open_image
from keyhole.images.image import folder_suffixes, image_suffixes, readers
from keyhole.images.pixels import Pixels

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


@pytest.mark.parametrize("box", [(0, 0, 20, 10), (-3, -3, 20, 10)])
@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (lambda pixels: pixels / 255, "float64 "),
        (lambda pixels: pixels.astype(np.int64), "int64 "),
        (lambda pixels: pixels[:, :, 0], r"uint8 \(\d+, \d+\) "),
        (lambda pixels: pixels[:1], r"uint8 \(1, \d+, 3\) "),
        (lambda pixels: pixels.transpose(2, 0, 1), r"uint8 \(3, \d+, \d+\) "),
        (lambda pixels: pixels.tolist(), "<class 'list'> "),
    ],
)
def test_a_reader_that_returns_other_pixels_is_named_with_what_it_returned(
    wrong: Callable[[Pixels], Any], came: str, box: tuple[int, int, int, int]
) -> None:
    class WrongImage(ArrayImage):
        def _read(self, box: Box, level: int) -> Pixels:
            return wrong(super()._read(box, level))  # type: ignore[no-any-return]

    image = WrongImage(picture(3, 64, 64), "own.npy")
    line = rf"^`_read` of the reader WrongImage returned {came}.* expected uint8 \(\d+, \d+, 3\)\. Correct the reader"
    with pytest.raises(TypeError, match=line) as caught:
        image.read(box)
    assert caught.value.__notes__ == ["The image is own.npy."]


def test_check_says_that_the_reader_is_at_fault_and_not_the_file(
    installed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "site" / "your_package.py"
    module.write_text(module.read_text().replace("return np.array(", "return 1 / 255 * np.array("))
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            np.save(tmp_path / "data" / name / f"{i}.npy", picture(3, 64, 64, seed=i))
    assert main(["check", str(tmp_path / "data"), "--patch.size", "16", "--select.m", "3", "--run.threads", "1"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("reader NpyImage returned float64 (16, 16, 3)") == 1, "once for all images"
    assert out.count("This is a fault of the reader, not of the file") == 1
