"""The comparison on real images: parts of a data set, what each arm reads, and the tables in the examples' pages."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import PIL.Image
import pytest
from conftest import BENCHMARKS, csv_rows

from keyhole.config.settings import Config
from keyhole.data.manifest import read_manifest

Benchmark = Callable[[str], Any]
COUNTS = {"train": 24, "val": 12, "test": 12}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Images of 48 x 32 px of two classes, a third of them `yes`, from four places."""
    rows = [["name", "image", "pothole", "group", "split", "annotation"]]
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            name, label = f"{split}/{number}", "yes" if number % 3 == 0 else "no"
            PIL.Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(tmp_path / f"{split}-{number}.png")
            mask = np.zeros((32, 48), np.uint8)
            mask[:16, :16] = 255
            PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
            rows.append([name, f"{split}-{number}.png", label, f"{split}{number % 4}", split, "mask.png"])
    with (tmp_path / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "all.csv"


@pytest.fixture
def comparison(manifest: Path, tmp_path: Path, benchmark: Benchmark) -> Any:
    """As of the example `potholes`, with features that are already stored: six an image, one of which has the label."""
    part = benchmark("real_data").write_part(manifest, dict.fromkeys(COUNTS), tmp_path / "part" / "images.csv")
    features, rng = tmp_path / "part" / "features", np.random.default_rng(0)
    features.mkdir()
    for row in csv_rows(part):
        values = rng.normal(0, 0.02, (6, 8)).astype(np.float32)
        values[rng.integers(6), 0] += row["pothole"] == "yes"
        with h5py.File(features / f"{Path(row['image']).stem}.h5", "w") as file:
            file["features"] = values
            file["coords"] = np.array([[x, y] for y in (0, 16) for x in (0, 16, 32)])
            file["coords"].attrs.update({"patch_size": 16, "patch_level": 0})
    (features / "seconds.json").write_text("1.0")
    base = Config(data={"path": part}, patch={"size": 16}, model={"encoder": "small", "width": 8}, train={"epochs": 2})
    return benchmark("real_images").Comparison(tmp_path / "part", "potholes", base)


def test_a_part_keeps_the_proportions_of_labels_and_groups(
    manifest: Path, tmp_path: Path, benchmark: Benchmark
) -> None:
    write = benchmark("real_data").write_part

    rows = csv_rows(write(manifest, {"train": 12, "val": 6, "test": None}, tmp_path / "part.csv"))

    assert Counter(row["split"] for row in rows) == {"train": 12, "val": 6, "test": 12}
    assert Counter(row["pothole"] for row in rows if row["split"] == "train") == {"yes": 4, "no": 8}
    whole = {row["name"]: row["group"] for row in csv_rows(manifest)}
    assert {whole[row["name"]] for row in rows if row["split"] == "train"} == {f"train{i}" for i in range(4)}
    assert "group" not in rows[0]
    assert all(Path(row[name]).is_file() for row in rows for name in ("image", "annotation"))
    assert rows == csv_rows(write(manifest, {"train": 12, "val": 6, "test": None}, tmp_path / "again.csv"))


def test_the_resized_image_is_not_larger_than_the_image(comparison: Any, benchmark: Benchmark) -> None:
    side = benchmark("resized").resized_side
    assert side(64, 16, 100) == 384, "64 px times the root of 16 + 100 / 5"
    assert side(64, 16, 100, most=350) == 352
    assert side(96, 16, 0) == 384, "the pixels of 16 patches"

    config = comparison.settings("resized", 0, comparison.folder)

    rows = csv_rows(config.data.path)
    assert len(rows) == sum(COUNTS.values())
    assert (config.patch.size, config.patch.stride, config.select.m) == (32, 2, 1)
    with PIL.Image.open(config.data.path.parent / rows[0]["image"]) as image:
        assert image.size == (33, 33), "a margin of the stride but one to shift into"
    assert "annotation" not in rows[0]


def test_random_patches_are_drawn_anew_for_training_alone(comparison: Any, benchmark: Benchmark) -> None:
    write = benchmark("real_data").write_drawn
    stored = comparison.stored

    path = write(comparison.path, stored, 4, 3, 0, comparison.folder / "drawn")

    rows = csv_rows(path)
    assert Counter(row["split"] for row in rows) == {**COUNTS, "train": 3 * COUNTS["train"]}
    drawn = []
    for row in rows[:3]:
        with h5py.File(row["image"]) as file, h5py.File(stored.items[0].features) as whole:
            drawn.append([whole["features"][:].tolist().index(each) for each in file["features"][:].tolist()])
            assert file["coords"].attrs["patch_size"] == 16
            np.testing.assert_array_equal(file["coords"][:], whole["coords"][:][drawn[-1]])
    assert all(len(set(each)) == 4 for each in drawn)
    assert len(set(map(tuple, drawn))) > 1
    assert read_manifest(comparison.base.data.replace(path=path)).items[0].features is not None


def test_every_arm_is_a_configuration_but_the_regression(comparison: Any, benchmark: Benchmark) -> None:
    for arm in benchmark("real_images").ARMS:
        if arm != "mean":
            config = comparison.settings(arm, 3, comparison.folder / arm)
            assert config.train.seed == 3
            assert config.data.path.is_file()


def test_arms_on_stored_features_find_what_a_patch_shows(
    comparison: Any, benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark("real_images").FROZEN, "epochs", 5)
    found = {arm: comparison.run(arm, 0) for arm in ("mean", "attention")}

    for arm, each in found.items():
        figure = each.metrics["pothole.auroc"]
        assert figure.low <= figure.value <= figure.high
        assert comparison.run(arm, 0) == each, "it is not run again"
        assert each.data == "potholes, 24 training images"
    assert found["mean"].metrics["pothole.auroc"].value > 0.9, "regression needs no more images than these"
    assert found["attention"].epochs == 5


def test_what_sets_the_data_apart_is_part_of_their_name(
    manifest: Path, tmp_path: Path, benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, result = benchmark("real_images"), benchmark("result")
    monkeypatch.setattr(
        real.Comparison,
        "train",
        lambda self, config, run, about, kept: result.Result(
            **about, seed=0, metrics={}, epochs=1, epoch_seconds=1.0, peak_gb=1.0
        ),
    )
    monkeypatch.setattr(real.Comparison, "settings", lambda *_: None)

    for about in ([], ["--about", "tested on RS290"]):
        real.main([str(tmp_path / "compared"), "potholes", str(manifest), "--arms", "ips16", *about])

    found = {path.parts[-3]: result.read(path.parent).data for path in tmp_path.rglob("result.json")}
    assert found == {
        "potholes": "potholes, 24 training images",
        "potholes-tested-on-RS290": "potholes, tested on RS290, 24 training images",
    }


def test_roads_are_judged_by_what_other_roads_and_their_own_teach(tmp_path: Path, benchmark: Benchmark) -> None:
    """A mark of potholes that all roads share, and one that means the opposite on the second."""
    rows, rng = [["name", "image", "pothole", "group", "annotation"]], np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    PIL.Image.fromarray(np.eye(10, dtype=np.uint8)).save(tmp_path / "mask.png")
    for road, sign in (("RS1", 1), ("RS2", -1), ("RS3", 1), ("RS4", 1)):
        for number in range(60 if road != "RS4" else 6):
            name, yes = f"{number}_RS_{road[2]}_A_{number:05}", number % 3 == 0
            rows.append([name, f"{name}.jpg", "yes" if yes else "no", road, "mask.png" if yes else ""])
            values = rng.normal(0, 0.02, (6, 8)).astype(np.float32)
            values[:, 0] += sign * yes
            PIL.Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / f"{name}.jpg")
            with h5py.File(tmp_path / "features" / f"{name}.h5", "w") as file:
                file["features"] = values
                file["coords"] = np.array([[x, y] for y in (0, 16) for x in (0, 16, 32)])
                file["coords"].attrs.update({"patch_size": 16, "patch_level": 0})
    with (tmp_path / "potholes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    config = Config(data={"path": tmp_path / "potholes.csv", "features": tmp_path / "features"})

    lines = benchmark("potholes_by_road").report(read_manifest(config.data))

    found = {cells[1]: cells[2:-1] for line in lines if (cells := [each.strip() for each in line.split("|")])[1:2]}
    assert "RS4" not in found, "too few potholes to judge it"
    assert found["RS1"][:3] == ["60", "20", "10.00%"]
    aurocs = {road: [float(each.split()[0]) for each in found[road][3:5]] for road in ("RS1", "RS2")}
    assert min(each[1] for each in aurocs.values()) > 0.95, "learned from the same road"
    assert aurocs["RS2"][0] < 0.05, "learned from others, where the mark means the opposite"


def test_parts_of_the_test_images_are_judged_apart(tmp_path: Path, benchmark: Benchmark) -> None:
    """Answers that are right on boards of one panel and wrong on another, and on the first fifth of a road only."""
    real, result, by_part = benchmark("real_images"), benchmark("result"), benchmark("by_part")
    boards = [
        ["name", "image", "defects", "split"],
        *([n, f"panel1/{n}.jpg", "open|short", n] for n in ("train", "val")),
    ]
    said = [
        ["image", "path", "defects.true", "defects.predicted", *(f"defects.probability.{n}" for n in ("open", "short"))]
    ]
    for panel, right in (("panel1", True), ("panel2", False)):
        for number in range(20):
            name, found = f"{panel}-{number}", number % 2 == 0
            text = "open|short" if found else "|"
            boards.append([name, f"{panel}/{name}.jpg", text, "test"])
            said.append([name, "", text, "", *[str(0.9 if found == right else 0.1)] * 2])
    write_answers(tmp_path / "circuit_boards", boards, said, real, result)
    road = [["name", "image", "pothole", "split"], ["a", "a.jpg", "no", "train"]]
    road += [["b", "b.jpg", "yes", "train"], ["c", "c.jpg", "no", "val"]]
    answers = [
        ["image", "path", "pothole.true", "pothole.predicted", *(f"pothole.probability.{n}" for n in ("no", "yes"))]
    ]
    for number in reversed(range(100)):
        name, yes = f"{number}_RS_290_A_{1000 + number:05}", number % 2 == 0
        road.append([name, f"{name}.jpg", "yes" if yes else "no", "test"])
        p = 0.9 if yes == (number < 20) else 0.1
        answers.append([f"{name}-0", "", "yes" if yes else "no", "", str(1 - p), str(p)])  # as the drawn ones are named
    for seed in (0, 1):
        write_answers(tmp_path / "potholes-on-RS290", road, answers, real, result, seed)

    lines = by_part.report(tmp_path / "circuit_boards", "circuit_boards")
    potholes = by_part.report(tmp_path / "potholes-on-RS290", "potholes", "on RS290")

    assert f"1 to learn from. Test images: 20 in {by_part.KNOWN}, 20 in {by_part.NEW}." in lines[0]
    (cells,) = cells_of(lines, real.ARMS["ips16"])
    assert cells[1:3] == ["0", "6"]
    assert [each.split()[0] for each in cells[4:]] == ["1.00", "0.00", "0.50"]
    assert "on RS290: 2 to learn from. Test images: 20 in fifth 1 (10 with one)" in potholes[0]
    *seeds, mean = cells_of(potholes, real.ARMS["ips16"])
    assert [each[1] for each in seeds] == ["0", "1"]
    assert [each.split()[0] for each in mean[4:]] == ["1.00", *["0.00"] * 4, "0.20"]


def cells_of(lines: list[str], arm: str) -> list[list[str]]:
    return [[each.strip() for each in line.split("|")][1:-1] for line in lines if arm in line]


def write_answers(
    folder: Path, images: list[list[str]], answers: list[list[str]], real: ModuleType, result: ModuleType, seed: int = 0
) -> None:
    """What `real_images.py` leaves of an arm."""
    run = folder / f"ips16-e6-{seed}"
    for path, rows in ((folder / "images.csv", images), (run / "run" / "predictions" / "test.csv", answers)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    for row in images[1:]:
        (folder / row[1]).parent.mkdir(exist_ok=True)
        (folder / row[1]).touch()
    result.Result(folder.name, "real", real.ARMS["ips16"], seed, {}, 6, 1.0, 1.0).write(run)


def test_results_are_written_into_the_page_of_an_example(tmp_path: Path, benchmark: Benchmark) -> None:
    result, tables, real = benchmark("result"), benchmark("example_tables"), benchmark("real_images")
    page, records = tmp_path / "potholes" / "README.md", tmp_path / "results"
    page.parent.mkdir()
    page.write_text(f"Before.\n{tables.BEGIN}\nold\n{tables.END}\nAfter.\n")
    kept = {tables.KEPT: result.Figure(0.5), tables.CHANCE: result.Figure(0.04)}
    runs = [
        result.Result(
            *("potholes, 300 training images", "real", real.ARMS[arm], seed),
            *({"pothole.auroc": result.Figure(value, value - 0.1, value + 0.05), **also}, 6, 30.0, 1.5),
        )
        for arm, seed, value, also in [("ips16", 0, 0.9, kept), ("ips16", 1, 0.8, kept), ("mean", 0, 0.7, {})]
    ]
    benchmark("results").add(runs, records)

    for _ in range(2):  # a second time replaces what the first wrote
        tables.main(tmp_path, records)

    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    assert rows[2].startswith(f"| {real.ARMS['mean']} | 0.700 [0.600 0.750] | 1 | 30 | 1.5 |")
    assert rows[3] == f"| {real.ARMS['ips16']} | 0.850 ± 0.071 [0.750 0.900] | 2 | 30 | 1.5 | 50% (4%) |"


def test_every_example_of_the_comparison_has_its_recipe_and_page(benchmark: Benchmark) -> None:
    from keyhole.config.file import load_config

    tables = benchmark("example_tables")
    for name in benchmark("real_images").METRICS:
        folder = BENCHMARKS.parent / "examples" / name
        assert load_config(folder / "recipe.yaml").model.encoder == "lite0"
        text = (folder / "README.md").read_text()
        assert text.index(tables.BEGIN) < text.index(tables.END)
        assert (folder / "prepare.py").is_file()


def test_pages_of_the_examples_are_made_from_the_recorded_runs(tmp_path: Path, benchmark: Benchmark) -> None:
    pages = {name: BENCHMARKS.parent / "examples" / name / "README.md" for name in benchmark("real_images").METRICS}
    for name, page in pages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(page.read_text())

    benchmark("example_tables").main(tmp_path)

    for name, page in pages.items():
        assert (tmp_path / name / "README.md").read_text() == page.read_text(), "python benchmarks/example_tables.py"
