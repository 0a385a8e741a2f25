"""Stored features are read as they are, from every layout, and a broken file ends in one line that says what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import run_process
from torch.nn import functional as F

import keyhole
from keyhole.config.settings import Config, DataConfig, ModelConfig, PatchConfig, SelectConfig
from keyhole.data.item import Item
from keyhole.errors import ConfigError, ImageError, ImageLost
from keyhole.images.geometry import Size
from keyhole.inference.predictor import Predictor
from keyhole.loading import Reader
from keyhole.nn import FeatureProjector, build_classifier
from keyhole.patches.features import (
    FeatureOpener,
    FeaturePatches,
    check_features_config,
    feature_width,
    idle_patch_settings,
)
from keyhole.patches.features.grid import FeatureGrid
from keyhole.report.contact_sheet import SheetEntry, contact_sheet
from keyhole.report.files import write_prediction
from keyhole.tasks.kinds import Task
from keyhole.tools.init import measure

N, D = 60, 5
ROWS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float16).astype(np.float32)
"""Numbers that float16 holds; for bfloat16 they are rounded."""
COORDS = np.stack([np.arange(N) % 10 * 512 + 100, np.arange(N) // 10 * 512 + 40], axis=1)
TASKS = (Task("label", "binary", ("no", "yes")),)


def write_h5(
    path: Path, rows: Any = ROWS, coords: Any = COORDS, attributes: dict[str, Any] | None = None, **options: Any
) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=rows, **options)
        if coords is not None:
            file.create_dataset("coords", data=coords).attrs.update(attributes or {})
    return path


def write_pt(path: Path, held: Any = None, legacy: bool = False) -> Path:
    held = torch.from_numpy(ROWS) if held is None else held
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    return path


def wide() -> torch.Tensor:
    """Columns of a wider tensor: rows do not follow each other in the file."""
    return torch.cat([torch.from_numpy(ROWS), torch.zeros(N, 3)], dim=1)[:, :D]


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "clam.h5": lambda path: write_h5(path, chunks=(1, D), maxshape=(None, D)),
    "trident.h5": lambda path: write_h5(path, chunks=(1, D), attributes={"patch_size": 256, "patch_size_level0": 512}),
    "batch.h5": lambda path: write_h5(path, ROWS[None], COORDS[None]),
    "contiguous.hdf5": lambda path: write_h5(path),
    "gzip.h5": lambda path: write_h5(path, chunks=(7, 2), compression="gzip", shuffle=True),
    "half.h5": lambda path: write_h5(path, ROWS.astype(np.float16)),
    "double-big-endian.h5": lambda path: write_h5(path, ROWS.astype(">f8"), COORDS.astype(np.float64)),
    "tensor.pt": write_pt,
    "half.pt": lambda path: write_pt(path, torch.from_numpy(ROWS).half()),
    "dict.pt": lambda path: write_pt(path, {"features": torch.from_numpy(ROWS)[None], "coords": torch.tensor(COORDS)}),
    "wide.pt": lambda path: write_pt(path, wide()),
    "old.pt": lambda path: write_pt(path, legacy=True),
}


def opened(path: Path) -> FeaturePatches:
    return FeatureOpener(path, path.name)()


@pytest.fixture(scope="module", params=list(LAYOUTS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = opened(LAYOUTS[request.param](tmp_path_factory.mktemp("layouts") / request.param))
    yield source
    source.close()


# Reading


@settings(deadline=None, max_examples=15)
@given(index=st.lists(st.integers(0, N - 1), max_size=40))
def test_every_layout_gives_the_rows_asked_for_in_their_order(source: FeaturePatches, index: list[int]) -> None:
    found = source.read(index)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, ROWS[np.array(index, np.int64)])
    out = np.full((len(index), D), 7, np.float32)
    assert source.read(np.array(index, np.int64), out=out) is out
    np.testing.assert_array_equal(out, found)


def test_a_source_of_features_keeps_the_contract(source: FeaturePatches) -> None:
    assert (len(source), source.patch_shape, source.dtype) == (N, (D,), np.float32)
    parts = [source.read(slice(start, start + 17)) for start in range(0, N, 17)]
    np.testing.assert_array_equal(np.concatenate(parts), ROWS)
    assert source.positions_1d([3, 1]).tolist() == [3, 1]
    assert feature_width(source.file.path) == D
    with pytest.raises(IndexError, match="60 outside"):
        source.read([N])
    if source.file.coords is None:
        with pytest.raises(ConfigError, match="2d needs the dataset `coords`"):
            source.positions_2d([0])
    else:
        np.testing.assert_array_equal(source.grid.boxes([0, 11]), [[100, 40, 512, 512], [612, 552, 512, 512]])
        np.testing.assert_array_equal(source.positions_2d([11]), [[612 + 256, 552 + 256]])


def test_brain_floats_are_widened(tmp_path: Path) -> None:
    tensor = torch.from_numpy(ROWS).bfloat16()
    with closing(opened(write_pt(tmp_path / "a.pt", tensor))) as source:
        np.testing.assert_array_equal(source.read(slice(None)), tensor.float().numpy())


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(3000, 16)).astype(np.float32)
    paths = [
        write_h5(tmp_path / "a.h5", rows, None, chunks=(1, 16)),
        write_pt(tmp_path / "a.pt", torch.from_numpy(rows)),
    ]
    for source in map(opened, paths):
        index = np.random.default_rng(2).integers(0, 3000, (160, 32))
        with closing(source), ThreadPoolExecutor(4) as pool:
            np.testing.assert_array_equal(list(pool.map(source.read, index)), rows[index])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_hundred_times_the_features_take_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for n in (200, 20_000):
        rows = np.random.default_rng(0).normal(size=(n, 128)).astype(np.float32)
        coords = np.stack(np.divmod(np.arange(n), 200), axis=1) * 256
        paths = []
        for copy in range(3):
            with h5py.File(tmp_path / f"{n}-{copy}.h5", "w") as file:
                options = {"chunks": (1, 128)} if copy else {"chunks": (200, 16), "compression": "lzf"}
                file.create_dataset("features", data=rows, **options)
                file.create_dataset("coords", data=coords)
            paths.append(tmp_path / f"{n}-{copy}.h5")
        paths.append(write_pt(tmp_path / f"{n}.pt", torch.from_numpy(rows)))
        peaks.append(int(run_process("features_peak", *paths).stdout))
        for path in paths:
            path.unlink()
    # HDF5 keeps some 15 MB of its own for the process, however many such files are open
    assert peaks[1] - peaks[0] < 24 * 2**20, "the four files hold 41 MB"


# Where features are from


def test_the_side_of_a_patch_is_what_each_tool_says() -> None:
    coords = np.array([[0, 0], [1024, 0], [0, 1024]], np.int32)
    for attributes, side, scale, step in [
        ({"patch_size": 256, "patch_size_level0": 1024, "overlap": 0}, 1024, 4.0, 1024),
        ({"patch_size": 512, "patch_size_level0": 2048, "overlap": 256, "target_magnification": 10}, 2048, 4.0, 1024),
        ({"patch_size": 256, "level0_magnification": 40, "target_magnification": 10}, 1024, 4.0, 1024),
        ({"patch_size": 256, "patch_level": 1, "downsample": np.array([4.0, 4.0])}, 1024, 4.0, 1024),
        ({"patch_size": 256, "patch_level": 0, "downsample": [1.0, 1.0], "custom_downsample": 2}, 512, 2.0, 1024),
        ({"patch_size": 224, "patch_level": 0}, 224, 1.0, 1024),
    ]:
        grid = FeatureGrid(3, coords, attributes)
        assert grid.known
        assert grid.scale == scale
        assert grid.boxes([1]).tolist() == [[1024, 0, side, side]]
        assert (grid.size, grid.stride) == (side / scale, step / scale)
        assert grid.cells([0, 1, 2]).tolist() == [[0, 0], [0, 1], [1, 0]]
        assert (grid.rows, grid.columns) == (2, 2)


@pytest.mark.parametrize(
    "attributes",
    [{}, {"patch_size": 256}, {"patch_size": 256, "patch_level": 2}, {"patch_size": "None", "patch_level": b"?"}],
)
def test_a_side_that_is_not_said_is_the_step_between_neighbours(attributes: dict[str, Any]) -> None:
    # two contours, the second off the grid of the first by a few pixels; CLAM goes down columns
    first = [(x, y) for x in range(0, 3000, 512) for y in range(0, 2000, 512)]
    second = [(x, y) for x in range(5003, 7000, 512) for y in range(77, 1500, 512)]
    coords = np.array(first + second, np.int32)
    grid = FeatureGrid(len(coords), coords, attributes)
    assert not grid.known
    assert set(grid.boxes(slice(None))[:, 2].tolist()) == {512}
    cells = grid.cells(slice(None))
    assert len(np.unique(cells, axis=0)) == len(coords), "no two in one cell"
    assert (cells.max(axis=0) < [grid.rows, grid.columns]).all()
    assert grid.extent == Size(*(coords.max(axis=0) + 512))


def test_coordinates_that_are_on_no_grid_or_absent_give_one_row() -> None:
    coords = np.array([[0, 0], [1, 0], [2**30, 2**30]], np.int32)
    for grid in (FeatureGrid(3, coords, {}), FeatureGrid(3, None, {"patch_size_level0": 256})):
        assert (grid.rows, grid.columns) == (1, 3)
        assert grid.cells([2, 0]).tolist() == [[0, 2], [0, 0]]
    assert grid.boxes([1]).tolist() == [[0, 0, 0, 0]]
    assert not grid.known


# Broken files


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path.with_name("attacked")),)


def unwritten(path: Path, **options: Any) -> Path:
    """As a writer leaves it that was killed: rows declared, and some never written."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("features", (N, D), "f4", chunks=(4, D), **options)
        dataset[:20] = ROWS[:20]
        file.create_dataset("coords", data=COORDS)
    return path


def linked(path: Path) -> Path:
    write_h5(path.with_name("other.h5"))
    with h5py.File(path, "w") as file:
        file["features"] = h5py.ExternalLink("other.h5", "features")
    return path


def virtual(path: Path) -> Path:
    layout = h5py.VirtualLayout((N, D), "f4")
    layout[:] = h5py.VirtualSource(write_h5(path.with_name("source.h5")), "features", (N, D))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("features", layout)
    return path


def cut(path: Path, whole: Path, share: float = 0.5) -> Path:
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    return path


def repacked(path: Path) -> Path:
    """A `.pt` file whose parts are compressed: reading it could blow it up."""
    whole = write_pt(path.with_name("whole.pt"), torch.zeros(20_000, 8))
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return path


def with_nan(row: int) -> np.ndarray:
    rows = ROWS.copy()
    rows[row, 2] = np.nan
    return rows


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty.h5": (lambda path: raw(path, b""), r"the file is empty \(0 bytes\)"),
    "empty.pt": (lambda path: raw(path, b""), r"the file is empty \(0 bytes\)"),
    "text.h5": (lambda path: raw(path, b"version https://git-lfs\n"), "not an HDF5 file"),
    "text.pt": (lambda path: raw(path, b"version https://git-lfs\n"), "cannot be read as tensors"),
    "folder.h5": (lambda path: path.mkdir() or path, "not a regular file"),
    "cut.h5": (lambda path: cut(path, write_h5(path.with_name("w.h5"))), "not an HDF5 file, or damaged"),
    "cut.pt": (lambda path: cut(path, write_pt(path.with_name("w.pt"))), "cannot be read as tensors"),
    "cut-old.pt": (lambda path: cut(path, write_pt(path.with_name("o.pt"), legacy=True)), "cannot be read as tensors"),
    "no-features.h5": (lambda path: raw_group(path, "rows", ROWS), "no dataset `features`.* there is 'rows'"),
    "group.h5": (lambda path: raw_group(path, "features/inner", ROWS), "no dataset `features`"),
    "flat.h5": (lambda path: write_h5(path, ROWS[:, 0]), r"`features` is of shape \(60,\), expected \(n, width\)"),
    "three.h5": (lambda path: write_h5(path, np.stack([ROWS, ROWS])), r"of shape \(2, 60, 5\)"),
    "whole-numbers.h5": (lambda path: write_h5(path, COORDS), "of type int64, expected floating-point numbers"),
    "text-rows.h5": (lambda path: write_h5(path, np.full((3, 2), b"x"), None), "expected floating-point numbers"),
    "no-rows.h5": (lambda path: write_h5(path, ROWS[:0], COORDS[:0]), "`features` has no rows"),
    "no-rows.pt": (lambda path: write_pt(path, torch.zeros(0, 4)), "the features have no rows"),
    "other-coords.h5": (lambda path: write_h5(path, coords=COORDS[1:]), r"shape \(59, 2\), expected \(60, 2\)"),
    "far-coords.h5": (lambda path: write_h5(path, coords=COORDS * 2**40), "coords are not pixels of a slide"),
    "nan-coords.h5": (lambda path: write_h5(path, coords=COORDS * np.nan), "coords are not pixels of a slide"),
    "nan.h5": (lambda path: write_h5(path, with_nan(41)), "feature 41 holds NaN or infinity"),
    "nan.pt": (lambda path: write_pt(path, torch.from_numpy(with_nan(7))), "feature 7 holds NaN or infinity"),
    "unwritten.h5": (unwritten, r"not all there: 400 of 1200 bytes"),
    "unwritten-gzip.h5": (lambda path: unwritten(path, compression="gzip"), "5 of 15 compressed chunks"),
    "linked.h5": (linked, "`features` is a link to another file"),
    "virtual.h5": (virtual, "`features` is in other files"),
    "large-chunk.h5": (
        lambda path: write_h5(path, np.zeros((2**21, 9), np.float32), None, chunks=(2**21, 9), compression="lzf"),
        "75 MB have to be decoded for one row, at most 67 MB",
    ),
    "attack.pt": (lambda path: write_pt(path, Attack(path)), "cannot be read as tensors"),
    "pickle.pt": (lambda path: raw(path, pickle.dumps(Attack(path))), "cannot be read as tensors"),
    "model.pt": (
        lambda path: write_pt(path, {"weight": torch.zeros(3)}),
        "holds a dict of 'weight', expected a tensor",
    ),
    "list.pt": (lambda path: write_pt(path, [1, 2]), "holds list, expected a tensor"),
    "vector.pt": (lambda path: write_pt(path, torch.zeros(5)), r"of shape \(5,\), expected \(n, width\)"),
    "whole-numbers.pt": (lambda path: write_pt(path, torch.zeros(3, 4).long()), "of type torch.int64"),
    "repeated.pt": (lambda path: write_pt(path, torch.zeros(1, 4).expand(10**7, 4)), "do not lie row by row"),
    "turned.pt": (lambda path: write_pt(path, torch.zeros(4, 30).T), "do not lie row by row"),
    "compressed.pt": (repacked, "is compressed or cut short"),
}


def raw_group(path: Path, name: str, data: Any) -> Path:
    with h5py.File(path, "w") as file:
        file[name] = data
    return path


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_file_is_one_line_that_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    write, message = BROKEN[name]
    path = write(tmp_path / name)
    with pytest.raises(ImageError, match=message) as raised, closing(opened(path)) as source:
        source.read(slice(None))
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
    assert not isinstance(raised.value, ImageLost)
    assert not (tmp_path / "attacked").exists()


def test_every_cut_and_every_flipped_byte_is_an_image_error_or_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for whole in (write_h5(tmp_path / "w.h5", chunks=(1, D)), write_pt(tmp_path / "w.pt")):
        data = whole.read_bytes()
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 3):
                damaged[place] ^= 1 << int(rng.integers(8))
            path = raw(tmp_path / f"damaged{whole.suffix}", bytes(damaged[: int(rng.integers(1, len(data) + 1))]))
            with suppress(ImageError), closing(opened(path)) as source:
                source.read(np.arange(min(len(source), 100)))


def test_a_file_that_is_not_there_is_lost(tmp_path: Path) -> None:
    for name in ("a.h5", "a.pt"):
        with pytest.raises(ImageLost, match=f"{name}: no such file"):
            opened(tmp_path / name)


def test_features_of_another_encoder_are_told_before_the_model_meets_them(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5")
    with closing(FeatureOpener(path, "a", D)()) as source:
        assert len(source) == N
    with pytest.raises(ImageError, match="features of 5 numbers, but the model takes 7"):
        FeatureOpener(path, "a", 7)()


def test_a_row_that_is_no_number_is_left_out_alone(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", with_nan(41), chunks=(1, D))
    with Reader(threads=2) as reader:
        for batch in reader.stream([[FeatureOpener(path, "a")]], 16, "mask"):
            index = np.concatenate([part.index[: part.count].copy() for part in batch.chunks()])
            assert sorted(index.tolist()) == [row for row in range(N) if row != 41]
            assert list(batch.unreadable[0]) == [41]


# The model


def test_the_projector_is_the_published_one(tmp_path: Path) -> None:
    model = build_classifier(ModelConfig(dim=16, heads=2, feature_width=D, position="2d"), TASKS, 256).eval()
    assert isinstance(model.encoder, FeatureProjector)
    rows = torch.from_numpy(ROWS)
    norm, linear = model.encoder.norm, model.encoder.linear
    scaled = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(model.encoder(rows), F.relu(norm(linear(scaled))))
    assert model.position.unit == 256


def test_settings_of_an_encoder_are_refused_for_features() -> None:
    check_features_config(Config(model=ModelConfig(dim=64, heads=4, position="1d")))
    for changed in (
        {"encoder": "resnet18"},
        {"encoder": "resnet18", "pretrained": True},
        {"weights": Path("w")},
        {"stages": 2},
        {"channels": 1},
    ):
        with pytest.raises(ConfigError, match=f"model.{next(iter(changed))} .* is for images"):
            check_features_config(Config(model=ModelConfig(**changed)))


def test_settings_of_patches_without_effect_are_named_but_for_the_unit_of_positions() -> None:
    assert idle_patch_settings(Config()) == []
    assert idle_patch_settings(Config(model=ModelConfig(position="2d"), patch=PatchConfig(size=256))) == []
    (line,) = idle_patch_settings(Config(patch=PatchConfig(size=256, foreground="tissue")))
    assert line.startswith("patch.size, patch.foreground: no effect on stored features")


# Prediction


def predictor(m: int = 6, **model: Any) -> Predictor:
    chosen = ModelConfig(dim=16, heads=2, feature_width=D, **model)
    torch.manual_seed(0)
    classifier = build_classifier(chosen, TASKS, 224)
    with torch.no_grad():
        classifier.pool.query.mul_(50)
    return Predictor(classifier, Config(model=chosen, select=SelectConfig(m=m)), TASKS)


@pytest.mark.parametrize("position", ["none", "1d", "2d"])
def test_a_prediction_from_features_says_where_on_the_slide(position: Any, tmp_path: Path) -> None:
    about = {"patch_size": 256, "patch_size_level0": 512, "level0_width": 6000, "level0_height": 4000, "overlap": 0}
    path = write_h5(tmp_path / "a.h5", attributes=about)
    prediction = predictor(position=position).predict(path)
    np.testing.assert_array_equal(prediction.kept.boxes[:, :2], COORDS[prediction.kept.index])
    assert (prediction.kept.boxes[:, 2:] == 512).all()
    assert prediction.size == (6000, 4000)
    assert prediction.patch == {
        "size": 256, "stride": 256, "level": None, "mpp": None, "scale": 2.0, "features": str(path), "size_known": True
    }  # fmt: skip
    files = write_prediction(prediction, tmp_path / "out")
    rings = [
        np.array(each["geometry"]["coordinates"][0])
        for each in json.loads(files["kept.geojson"].read_text())["features"]
    ]
    assert [ring.min(axis=0).tolist() for ring in rings] == prediction.kept.boxes[:, :2].tolist()
    with np.load(files["scores.npz"]) as stored:
        assert stored["map"].shape == (6, 10)
        np.testing.assert_array_equal(stored["map"].ravel(), stored["score"])
        assert stored["score"].sum() == pytest.approx(1, abs=1e-5)


def test_a_prediction_without_coordinates_has_scores_and_no_places(tmp_path: Path) -> None:
    prediction = predictor().predict(write_pt(tmp_path / "a.pt"))
    assert not prediction.kept.boxes.any()
    files = write_prediction(prediction, tmp_path / "out")
    assert json.loads(files["kept.geojson"].read_text())["features"] == []
    with np.load(files["scores.npz"]) as stored:
        assert stored["map"].shape == (1, N)
    with pytest.raises(ConfigError, match="2d needs the dataset `coords`"):
        predictor(position="2d").predict(tmp_path / "a.pt")


def test_a_prediction_lists_what_could_not_be_read(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "a.h5", with_nan(41))
    with pytest.raises(keyhole.errors.KeyholeError, match="1 of 60 patches cannot be read"):
        predictor().predict(path)
    lenient = predictor()
    lenient.config = Config(**{**vars(lenient.config), "unreadable": "5%"})
    prediction = lenient.predict(path)
    assert prediction.unreadable is not None
    assert prediction.unreadable.tolist() == [[*COORDS[41].tolist(), 512, 512]]
    assert prediction.scores is not None
    assert prediction.scores.score[41] == 0
    assert np.isnan(prediction.scores.map()).sum() == 1
    assert 41 not in prediction.kept.index
    told = json.loads(write_prediction(prediction, tmp_path / "out")["prediction.json"].read_text())
    assert told["unreadable"] == prediction.unreadable.tolist()


def test_images_and_features_do_not_mix_with_the_other_kind_of_model(tmp_path: Path, toy_run: Path, toy: Path) -> None:
    path = write_h5(tmp_path / "a.h5")
    with pytest.raises(ConfigError, match="is of images, not of stored features"):
        keyhole.load(toy_run).predict(path)
    with pytest.raises(ConfigError, match="is of stored features of 5 numbers, not of images"):
        predictor().predict(toy / "red" / "0.png")


def test_the_sheet_shows_the_slide_where_it_is_and_the_scores_where_it_is_not(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (800, 1325, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", compress_level=0)
    path = write_h5(tmp_path / "a.h5", coords=COORDS // 4)
    item = Item("a", tmp_path / "a.png", {}, features=path)

    def shown(of: Item) -> SheetEntry:
        ((_, prediction),) = predictor().predict_items([of], description=None, pictures=lambda _item, _prediction: True)
        return SheetEntry(prediction)

    entry = shown(item)
    prediction = entry.prediction
    assert prediction.size == (1325, 800), "as the slide says"
    assert entry.pictures.note == "stored features: pixels of the image"
    x, y, width, height = prediction.kept.boxes[0]
    expected = np.asarray(
        Image.fromarray(pixels[y : y + height, x : x + width]).resize((142, 142), Image.Resampling.BICUBIC)
    )
    np.testing.assert_array_equal(entry.pictures.patches[0], expected)
    (tmp_path / "a.png").unlink()
    bare = shown(item)
    assert len(bare.pictures.patches) == 0
    assert bare.pictures.note == "stored features: scores, no pixels"
    assert bare.pictures.thumbnail.shape[0] * bare.pictures.downsample == pytest.approx(768, rel=0.05)
    Image.fromarray(pixels[:300, :400]).save(tmp_path / "a.png")
    assert shown(item).pictures.note == "stored features: scores, no pixels", "a picture of something else"
    nowhere = SheetEntry(predictor().predict(write_pt(tmp_path / "b.pt")))
    assert contact_sheet([entry, bare, nowhere], tmp_path / "sheet.png").stat().st_size > 10_000


def test_init_says_that_features_have_nothing_to_measure(tmp_path: Path) -> None:
    for name in "ab":
        for number in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            with h5py.File(tmp_path / name / f"{number}.h5", "w") as file:
                file["features"] = np.zeros((4, 8), np.float32)
    with pytest.raises(ConfigError, match=r"stored features.*--recipe camelyon16-features"):
        measure(Config(data=DataConfig(path=tmp_path)))


def test_a_process_ends_while_threads_still_read_features(tmp_path: Path) -> None:
    """HDF5's lock, held by a thread that Python has stopped, is what the main thread would wait for, for ever."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=np.ones((4, 8), np.float32))
        file.create_dataset("coords", data=np.zeros((4, 2), np.int64))
        file["features"].attrs["encoder"] = "small"
    assert run_process("ends_while_reading_features", tmp_path / "a.h5", timeout=60).stderr == ""
