"""`keyhole init` on slides: the resolution that they have is written, and patches are counted with its own foreground."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from keyhole.cli.main import main
from keyhole.config.file import load_config
from keyhole.config.settings import Config
from keyhole.datasets.slides import SlideSet, make_slides
from keyhole.tools.check.run import check


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
    assert patches / 16 < config.select.m <= patches / 8


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
        "--model.width=4",
        "--select.m=1",
        "--train.epochs=1",
        "--train.warmup=1",
    ]
    capsys.readouterr()
    assert main(["train", "--config", str(out), *tiny, "--out", str(out.parent / "run")]) == 0
    assert "the masks of 4 images are not used, since patch.foreground is all" in capsys.readouterr().err
