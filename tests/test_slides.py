"""Generated slides: what they promise of size, memory, seed and label holds for the files that are written."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import Say, csv_rows, small_files
from processes import run_process
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keyhole.config.settings import DataConfig
from keyhole.data.manifest import read_manifest
from keyhole.datasets import tiff_pyramid
from keyhole.datasets.slide_nests import NO_NESTS
from keyhole.datasets.slide_tissue import REACH
from keyhole.datasets.slides import (
    MAX_NEST_SHARE,
    MAX_SIDE,
    MIN_SIDE,
    SlideSet,
    draw_scene,
    make_slide,
    make_slides,
)
from keyhole.datasets.tiff_pyramid import TILE, level_sizes, smaller, write_pyramid
from keyhole.errors import ConfigError, OutputError
from keyhole.images import Box, open_image
from keyhole.images.geometry import Size
from keyhole.images.resample import thumbnail

SIDE = 2048
GLASS = np.full((TILE, TILE, 3), 240, np.uint8)
MIB = 2**20


def ramp(column: int, row: int) -> np.ndarray | None:
    """A smooth picture of the whole slide, which JPEG keeps to a few grey values; a third of it is background."""
    if (column + row) % 3 == 0:
        return None
    y, x = np.mgrid[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
    return np.stack([x // 16 % 256, y // 16 % 256, (x + y) // 32 % 256], axis=-1).astype(np.uint8)


def whole(size: Size) -> np.ndarray:
    columns, ramps = range(-(-size.width // TILE)), range(-(-size.height // TILE))
    tiles = [[ramp(column, row) if ramp(column, row) is not None else GLASS for column in columns] for row in ramps]
    return np.concatenate([np.concatenate(line, axis=1) for line in tiles])[: size.height, : size.width]


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [Size(256, 256), Size(1300, 700), Size(2500, 2049), Size(100, 3000)])
def test_every_level_of_a_pyramid_is_the_picture_at_its_scale(tmp_path: Path, size: Size) -> None:
    path = tmp_path / "a.tif"
    assert write_pyramid(path, size, ramp, mpp=0.25, background=GLASS) == level_sizes(size)
    expected = whole(size)
    with open_image(path) as image:
        assert image.size == size
        assert image.mpp == pytest.approx(0.25)
        assert [level.size for level in image.levels] == level_sizes(size)
        assert max(image.levels[-1].size) <= 512
        for number, level in enumerate(image.levels):
            pixels = image.read(Box(0, 0, *level.size), number)
            step = 4**number
            high, wide = size.height // step, size.width // step
            means = expected[: high * step, : wide * step].reshape(high, step, wide, step, 3).mean(axis=(1, 3))
            assert np.abs(pixels[:high, :wide].astype(float) - means).mean() < 3


def test_other_readers_see_the_same_levels_and_scale(tmp_path: Path) -> None:
    import openslide

    path = tmp_path / "a.tif"
    sizes = write_pyramid(path, Size(2500, 2100), ramp, mpp=0.5, background=GLASS)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == tuple(map(tuple, sizes))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
    with tifffile.TiffFile(path) as tif, open_image(path) as image:
        assert not tif.is_bigtiff
        assert [page.shape[:2] for page in tif.pages] == [(height, width) for width, height in sizes]
        assert (tif.pages[0].asarray() == image.read(Box(0, 0, 2500, 2100), 0)).all()


def test_a_file_too_large_for_a_classic_tiff_is_a_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pyramid(tmp_path / "classic.tif", Size(1300, 700), ramp, mpp=0.5, background=GLASS)
    monkeypatch.setattr(tiff_pyramid, "_CLASSIC_END", 1000)
    write_pyramid(tmp_path / "big.tif", Size(1300, 700), ramp, mpp=0.5, background=GLASS)
    with tifffile.TiffFile(tmp_path / "big.tif") as tif:
        assert tif.is_bigtiff
    with open_image(tmp_path / "classic.tif") as classic, open_image(tmp_path / "big.tif") as big:
        assert (classic.levels, classic.mpp) == (big.levels, big.mpp)
        for number, level in enumerate(big.levels):
            box = Box(0, 0, *level.size)
            assert (classic.read(box, number) == big.read(box, number)).all()


def test_background_is_stored_once_a_level(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", Size(5000, 5000), lambda column, row: None, mpp=0.5, background=GLASS)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert [len(set(page.dataoffsets)) for page in tif.pages] == [1, 1, 1]
        assert (tif.pages[0].asarray() == 240).all()
    assert (tmp_path / "a.tif").stat().st_size < 20_000


def test_a_smaller_tile_holds_the_means() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (TILE, TILE, 3), dtype=np.uint8)
    means = tile.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert (smaller(tile) == np.floor(means + 0.5)).all()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_text("precious")
    with small_files(10_000), pytest.raises(OutputError, match=r"a\.tif: could not be written"):
        write_pyramid(path, Size(2000, 2000), ramp, mpp=0.5, background=GLASS)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


# --- memory ----------------------------------------------------------------------------------------------------------


def peak(tmp_path: Path, what: str, size: int) -> int:
    return int(run_process("slide_peak", what, tmp_path / f"{size}.tif", size).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("what", "small", "large"), [("slide", 2048, 16_384), ("pyramid", 2048, MAX_SIDE)])
def test_memory_does_not_grow_with_the_slide(tmp_path: Path, what: str, small: int, large: int) -> None:
    """But for a row of tiles of the smaller levels: 50 MB at the largest side, where the slide has 120 GB of pixels."""
    assert peak(tmp_path, what, large) - peak(tmp_path, what, small) < 64 * MIB


# --- one slide -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same slide without and with nests."""
    folder = tmp_path_factory.mktemp("pair")
    return make_slide(folder / "without.tif", 4096, 3), make_slide(folder / "with.tif", 4096, 3, positive=True)


def test_a_slide_is_tissue_on_glass_of_the_size_and_scale_asked_for(pair: tuple[Any, Any]) -> None:
    _, slide = pair
    with open_image(slide.path) as image:
        assert image.size == (4096, 4096)
        assert [level.downsample for level in image.levels] == [1, 4, 16]
        assert image.mpp == pytest.approx(0.5)
        small, _ = thumbnail(image, 512)
    colored = (small.max(axis=-1).astype(int) - small.min(axis=-1)) > 25
    assert 0.25 < colored.mean() < 0.65
    assert abs(colored.mean() - slide.tissue / 4096**2) < 0.15  # fat is tissue and has no colour
    assert small[:8].min() > 230


def test_nests_cover_under_a_thousandth_of_the_tissue_and_lie_on_it(pair: tuple[Any, Any]) -> None:
    without, slide = pair
    assert len(without.nests) == 0
    assert len(slide.nests) > 1
    with open_image(slide.path) as image:
        small, _ = thumbnail(image, 1024)
        tissue = ((small.max(axis=-1).astype(int) - small.min(axis=-1)) > 25).mean() * 4096**2
        for x, y, width, height in slide.nests.tolist():
            assert max(width, height) < 50
            assert image.read(Box(x, y, width, height), 0).mean() < 215
    assert MAX_NEST_SHARE / 2 < slide.nest_pixels.sum() / tissue < MAX_NEST_SHARE


def test_only_the_nests_differ_between_the_classes(pair: tuple[Any, Any]) -> None:
    """All pixels that change lie in the boxes, but for what JPEG spreads within its blocks of 16."""
    without, slide = pair
    in_boxes = np.zeros((4096, 4096), bool)
    for x, y, width, height in slide.nests.tolist():
        in_boxes[(y // 16) * 16 : -(-(y + height) // 16) * 16, (x // 16) * 16 : -(-(x + width) // 16) * 16] = True
    with open_image(without.path) as one, open_image(slide.path) as other:
        box = Box(0, 0, 4096, 4096)
        change = np.abs(one.read(box, 0).astype(np.int16) - other.read(box, 0)).max(axis=-1)
        afar = [thumbnail(image, 512)[0].astype(float) for image in (one, other)]
    # 18 and not 0: smooth upsampling of colour looks one block further
    assert change[~in_boxes].max() <= 18
    for x, y, width, height in slide.nests.tolist():
        assert change[y : y + height, x : x + width].max() > 50
    assert 0.3 * slide.nest_pixels.sum() < (change > 20).sum() < MAX_NEST_SHARE * slide.tissue
    difference = np.abs(afar[0] - afar[1])
    assert difference.mean() < 0.01
    assert difference.max() < 40
    texture = np.abs(np.diff(afar[0], axis=1)).mean()
    assert difference.mean() < 0.01 * texture


def test_hollow_nuclei_take_as_much_light_as_filled_ones_in_every_colour() -> None:
    for seed in range(3):
        texture = draw_scene(SIDE, seed).texture
        filled, hollow = (picture.reshape(-1, 3).mean(axis=0) for picture in (texture.nuclei, texture.hollow))
        assert np.abs(filled - hollow).max() < 1.5
        assert np.abs(255 - hollow).min() > 8


def test_same_arguments_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    contents = []
    for number, threads in enumerate((1, 2, 5)):
        slide = draw_scene(SIDE, 7, positive=True).write(tmp_path / f"{number}.tif", threads=threads)
        contents.append(slide.path.read_bytes())
    assert contents[0] == contents[1] == contents[2]
    other = make_slide(tmp_path / "other.tif", SIDE, 8, positive=True)
    assert other.path.read_bytes() != contents[0]


def test_a_slide_can_be_all_tissue(tmp_path: Path) -> None:
    slide = make_slide(tmp_path / "a.tif", SIDE, 0, tissue=1.0, positive=True)
    assert slide.tissue == SIDE**2
    with open_image(slide.path) as image:
        small, _ = thumbnail(image, 256)
    assert ((small.max(axis=-1).astype(int) - small.min(axis=-1)) > 25).all()
    assert 0 < slide.nest_pixels.sum() < MAX_NEST_SHARE * SIDE**2


def test_a_nest_is_three_hollow_nuclei_drawn_whole_across_tiles() -> None:
    """Both tiles show a nest on their border."""
    scene = draw_scene(6144, 0, tissue=1.0, positive=True)
    plain = draw_scene(6144, 0, tissue=1.0)
    tiles = {tile: nests for tile, nests in scene.nests.by_tile.items() if len(nests) == 1}
    split = [nest for nest in range(len(scene.nests.boxes)) if sum(nests == [nest] for nests in tiles.values()) == 2]
    assert split
    for nest in split[:3]:
        changed = []
        for column, row in (tile for tile, nests in tiles.items() if nests == [nest]):
            one, other = scene.tile(column, row), plain.tile(column, row)
            assert one is not None
            assert other is not None
            y, x = np.nonzero((one != other).any(axis=-1))
            changed.append(np.stack([x + column * TILE, y + row * TILE], axis=-1))
        pixels = np.concatenate(changed)
        away = np.linalg.norm(pixels[:, None] - scene.nests.nuclei[nest][None], axis=-1)
        assert (away.min(axis=1) < REACH).all()
        assert [(away[:, nucleus] < REACH).sum() > 40 for nucleus in range(3)] == [True] * 3


# --- the set ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slides") / "set"
    return make_slides(out, SlideSet(count=6, side=SIDE, seed=2, val=2, test=2))


def test_the_manifest_is_what_training_reads(written: Path) -> None:
    manifest = read_manifest(DataConfig(path=written))
    assert [(task.name, task.kind, task.classes) for task in manifest.tasks] == [
        ("label", "binary", ("negative", "positive"))
    ]
    assert {split: len(manifest.split(split)) for split in ("train", "val", "test")} == {
        "train": 2,
        "val": 2,
        "test": 2,
    }
    for split in ("train", "val", "test"):
        assert {item.labels["label"] for item in manifest.split(split)} == {"negative", "positive"}


def test_positive_slides_and_only_they_have_nests(written: Path) -> None:
    positive = {row["image"] for row in csv_rows(written) if row["label"] == "positive"}
    nests = csv_rows(written.with_name("nests.csv"))
    assert {row["slide"] for row in nests} == positive
    for row in nests:
        x, y, width, height = (int(row[name]) for name in ("x", "y", "width", "height"))
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= SIDE


def test_a_slide_does_not_change_when_there_are_more(written: Path, tmp_path: Path) -> None:
    few = make_slides(tmp_path / "few", SlideSet(count=2, side=SIDE, seed=2))
    assert [row["image"] for row in csv_rows(few)] == [row["image"] for row in csv_rows(written)[:2]]
    assert [row["label"] for row in csv_rows(few)] == [row["label"] for row in csv_rows(written)[:2]]
    assert "split" not in csv_rows(few)[0]
    for row in csv_rows(few):
        assert (few.parent / row["image"]).read_bytes() == (written.parent / row["image"]).read_bytes()


@pytest.mark.parametrize("positive", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_positive_slides_is_the_one_asked_for_at_every_count(positive: float) -> None:
    labels = np.array([SlideSet(positive=positive).has_nests(number) for number in range(40)])
    count = np.arange(1, 41)
    assert (np.abs(labels.cumsum() - positive * count) <= 0.5).all()


def test_neither_thumbnail_nor_colour_nor_amount_of_tissue_tells_the_class_but_the_nests_do(tmp_path: Path) -> None:
    """Of 64 slides, chance gives an AUROC over 0.72 once in a thousand times; a look at the nests' places tells all."""
    count = 64
    labels = np.arange(count) % 2

    def look(number: int) -> tuple[np.ndarray, np.ndarray, float]:
        scene = draw_scene(SIDE, (11, number), positive=True)
        nuclei = scene.nests.nuclei.reshape(-1, 2)
        if not labels[number]:
            scene = dataclasses.replace(scene, nests=NO_NESTS)
        path = scene.write(tmp_path / f"{number}.tif", threads=1).path
        with open_image(path) as image:
            small, _ = thumbnail(image, 512)
            closely = np.mean([_hollow(image.read(Box(int(x) - 8, int(y) - 8, 17, 17), 0)) for x, y in nuclei])
        path.unlink()
        return small, _statistics(small), float(closely)

    with ThreadPoolExecutor(2) as pool:
        looks = list(pool.map(look, range(count)))
    raw = np.stack([small.ravel() for small, _, _ in looks]).astype(np.float32)
    raw -= raw.mean(axis=0)
    # a linear model of all 786,432 values, in the 63 directions in which 64 thumbnails can differ
    scores, scale, _ = np.linalg.svd(raw @ raw.T)
    pixels = scores[:, : count - 1] * np.sqrt(scale[: count - 1])
    statistics = np.stack([values for _, values, _ in looks])
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    forest = RandomForestClassifier(100, random_state=0)
    for model, features in ((linear, pixels), (linear, statistics), (forest, statistics)):
        guess = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")[:, 1]
        assert roc_auc_score(labels, guess) < 0.72
    assert roc_auc_score(labels, [closely for _, _, closely in looks]) > 0.98


def _hollow(nucleus: np.ndarray) -> float:
    """How much lighter its middle is than what lies three pixels out, in green."""
    away = np.hypot(*np.mgrid[-8:9, -8:9])
    green = nucleus[..., 1].astype(float)
    return float(green[away < 1.5].mean() - green[np.abs(away - 3.5) < 0.8].mean())


def _statistics(small: np.ndarray) -> np.ndarray:
    """Colour and amount of tissue, and how rough it is: of 512 px thumbnails."""
    colored = (small.max(axis=-1).astype(int) - small.min(axis=-1)) > 25
    tissue = small[colored].astype(float)
    steps = np.abs(np.diff(small.astype(float), axis=1))[colored[:, 1:] & colored[:, :-1]]
    quantiles = [0, 0.01, 0.1, 0.5, 0.9, 0.99, 1]
    return np.concatenate(
        [
            [colored.mean()],
            tissue.mean(axis=0),
            tissue.std(axis=0),
            np.quantile(tissue, quantiles, axis=0).ravel(),
            np.quantile(steps, quantiles, axis=0).ravel(),
        ]
    )


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for out, said in ((tmp_path, "not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(OutputError, match=said):
            make_slides(out, SlideSet(count=1, side=SIDE))
    assert (tmp_path / "file").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty"):
        with small_files(100_000), pytest.raises(OutputError, match=r"slide-0000\.tif: could not be written"):
            make_slides(out, SlideSet(count=2, side=SIDE))
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"side": MIN_SIDE - 1}, "side"),
        ({"side": MAX_SIDE + 1}, "side"),
        ({"count": 0}, "count"),
        ({"positive": 1.5}, "positive"),
        ({"positive": -0.1}, "positive"),
        ({"seed": -1}, "seed"),
        ({"val": -1}, "val"),
        ({"val": 2, "test": 2}, "val"),
        ({"mpp": 0.0}, "mpp"),
    ],
)
def test_an_argument_out_of_range_is_named_in_one_line(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        make_slides(tmp_path / "set", SlideSet(**{"count": 4, "side": SIDE} | options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_a_share_of_tissue_out_of_range_is_named(tmp_path: Path) -> None:
    for tissue in (0.0, 0.7, 1.1):
        with pytest.raises(ConfigError, match="tissue"):
            make_slide(tmp_path / "a.tif", SIDE, 0, tissue=tissue)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_set_that_can_be_checked(say: Say) -> None:
    code, out, _ = say("data", "slides", "set", "--count", "2", "--side", str(SIDE), "--positive", "1", "--seed", "5")
    assert code == 0
    assert "keyhole train set/manifest.csv --recipe slides" in out
    assert [row["label"] for row in csv_rows(Path("set/manifest.csv"))] == ["positive", "positive"]
    same = make_slides(Path("same"), SlideSet(count=2, side=SIDE, positive=1, seed=5))
    for row in csv_rows(same):
        assert (Path("same") / row["image"]).read_bytes() == (Path("set") / row["image"]).read_bytes()


def test_options_are_shown_and_printed(say: Say) -> None:
    code, out, _ = say("data", "slides", "--help")
    assert code == 0
    for option in ("--count", "--side", "--positive", "--seed", "--val", "--test", "--mpp"):
        assert option in out
    code, out, _ = say("data", "slides", "set", "--side", "4096", "--print-config")
    assert code == 0
    assert "side: 4096" in out
    assert not Path("set").exists()


MISTAKES = {
    "data": "there is no verb `data` (did you mean `data slides`?)",
    "data slids": "there is no verb `data slids` (did you mean `data slides`?)",
    "data --hlp": "did you mean `data --help`?",
    "data slides": "OUT is missing",
    "data slides out --sied 4096": "unknown option `--sied` (did you mean `--side`?)",
    "data slides out --side 10": "--side: expected a number greater than or equal to 2048",
    "data slides out --positive 2": "--positive: expected",
    "data slides out --count 3 --test 3": "val, test",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line: str, say: Say) -> None:
    code, out, err = say(*line.split())
    assert (code, out) == (2, "")
    assert MISTAKES[line] in err
    assert err.count("\n") == 1
    assert not Path("out").exists()
