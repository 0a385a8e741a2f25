"""Megapixel MNIST is what its manifest says, recomputed from the canvases, and is drawn as published."""

from __future__ import annotations

import csv
import gzip
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import Say
from numpy.typing import NDArray

import keyhole
from keyhole.datasets.megapixel_mnist import MegapixelMnist, make_megapixel_mnist
from keyhole.datasets.mnist import SIDE, download_mnist, mnist_splits, read_mnist
from keyhole.errors import DataError
from keyhole.images.geometry import Box

SIZE, NOISE = 600, 20


@pytest.fixture(scope="module")
def mnist(shared: Path) -> Path:
    return shared / "data" / "mnist"


@pytest.fixture(scope="module")
def thin(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = MegapixelMnist(SIZE, train=6, val=2, test=4, noise=NOISE)
    return make_megapixel_mnist(tmp_path_factory.mktemp("thin"), data, mnist_splits(mnist, val=True)).parent


@pytest.fixture(scope="module")
def thick(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = MegapixelMnist(SIZE, train=6, val=2, test=4, noise=NOISE, noise_pen="thick")
    return make_megapixel_mnist(tmp_path_factory.mktemp("thick"), data, mnist_splits(mnist, val=True)).parent


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> NDArray[np.uint8]:
    with keyhole.open_image(path) as image:
        assert image.channels == 1
        return image.read(Box(0, 0, *image.size))[..., 0]


def corners(folder: Path) -> dict[str, list[tuple[int, int, int]]]:
    """Of each canvas: digit, x and y."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for row in table(folder / "digits.csv"):
        found.setdefault(row["image"], []).append((int(row["digit"]), int(row["x"]), int(row["y"])))
    return found


@pytest.mark.parametrize("pen", ["thin", "thick"])
def test_labels_follow_from_the_digits_that_a_canvas_shows(
    pen: str, mnist: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(pen)
    train, test = read_mnist(mnist, "train"), read_mnist(mnist, "t10k")
    classes = {
        split: {
            digit.tobytes(): int(label) for digit, label in zip(source.pixels[part], source.labels[part], strict=True)
        }
        for split, source, part in (
            ("train", train, slice(55_000)),
            ("val", train, slice(55_000, None)),
            ("test", test, slice(None)),
        )
    }
    places = corners(folder)
    for row in table(folder / "manifest.csv"):
        canvas = pixels(folder / row["image"])
        shown = []
        for _, x, y in places[row["image"]]:
            digit = canvas[y : y + SIDE, x : x + SIDE]
            assert digit.tobytes() in classes[row["split"]], "a digit of MNIST's part for this split, not covered"
            shown.append((y, classes[row["split"]][digit.tobytes()]))
        counts = Counter(label for _, label in shown)
        assert len(shown) == 5
        assert counts[int(row["majority"])] == 3
        assert int(row["max"]) == max(counts)
        assert int(row["top"]) in {label for y, label in shown if y == min(shown)[0]}
        assert row["multi"] == "|".join(map(str, sorted(counts)))


@pytest.mark.parametrize("pen", ["thin", "thick"])
def test_digits_do_not_overlap_and_all_else_is_noise_on_black(pen: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(pen)
    for name, places in corners(folder).items():
        canvas, taken = pixels(folder / name), np.zeros((SIZE, SIZE), int)
        for _, x, y in places:
            taken[y : y + SIDE, x : x + SIDE] += 1
        assert taken.max() == 1
        noise = np.where(taken == 0, canvas, 0)
        assert noise.any()
        if pen == "thin":
            bright = noise[noise > 0]
            assert bright.min() >= 0.8 * 255 - 1, "a line's pixels have 0.8 to 1.0 of white"
            assert len(bright) <= NOISE * 2 * 2 * SIDE, "two lines one pixel wide"
            inside = np.zeros_like(taken)
            inside[SIDE : SIZE - SIDE, SIDE : SIZE - SIDE] = 1
            assert not (noise * (1 - inside)).any(), "a margin of 28 px stays free of noise"


def test_thin_patterns_are_made_once_for_a_split_and_have_two_lines(mnist: Path) -> None:
    data = MegapixelMnist(SIZE, train=200, test=1, noise=50)
    patterns, digits = data.patterns("train"), mnist_splits(mnist, val=False)["train"]
    assert patterns.shape == (50, SIDE, SIDE)
    assert not np.array_equal(patterns, data.patterns("test"))
    lines = (patterns > 0).sum(axis=(1, 2))
    assert lines.min() >= 18, "a steep line leaves after nine columns, two samples each"
    assert lines.max() <= 2 * 2 * SIDE
    assert (patterns > 0)[:, 0, 0].all(), "one of the lines goes through the first corner"
    known = {pattern.tobytes() for pattern in patterns}
    canvases = [data.canvas("train", number, digits, patterns) for number in range(200)]
    assert {pattern.tobytes() for canvas in canvases for pattern in canvas.noise} == known
    majority = Counter(canvas.tasks()[0] for canvas in canvases)
    assert set(majority) == set(range(10))
    assert max(majority.values()) < 45, "the class of the majority is uniform: 20 of each are expected"


def test_the_same_seed_gives_the_same_bytes_and_a_canvas_does_not_depend_on_their_number(
    mnist: Path, tmp_path: Path
) -> None:
    digits = mnist_splits(mnist, val=False)
    folders = [
        make_megapixel_mnist(tmp_path / str(place), MegapixelMnist(SIZE, train=count, test=1, seed=seed), digits).parent
        for place, (count, seed) in enumerate(((2, 0), (2, 0), (3, 0), (2, 1)))
    ]
    files = [{path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} for folder in folders]
    assert files[0] == files[1]
    names = {"train-00000.tif", "train-00001.tif", "test-00000.tif"}
    assert all(files[0][name] == files[2][name] for name in names)
    assert all(files[0][name] != files[3][name] for name in names)


def test_a_canvas_is_drawn_in_bands_as_it_is_drawn_at_once(mnist: Path, tmp_path: Path) -> None:
    data, digits = MegapixelMnist(1100, train=1, test=0), mnist_splits(mnist, val=False)
    folder = make_megapixel_mnist(tmp_path / "one", data, digits).parent
    canvas = data.canvas("train", 0, digits["train"], data.patterns("train"))
    np.testing.assert_array_equal(pixels(folder / "images" / "train-00000.tif"), canvas.rows(0, 1100, 1100))


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serves a folder on this machine: its address, and the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=folder)) as each:
        thread = threading.Thread(target=each.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{each.server_port}/", folder
        each.shutdown()
        thread.join()


def test_a_download_is_checked_before_it_is_kept(mnist: Path, tmp_path: Path, server: tuple[str, Path]) -> None:
    url, served = server
    for path in mnist.glob("*.gz"):
        (served / path.name).write_bytes(path.read_bytes())
    download_mnist(tmp_path / "got", url)
    assert len(read_mnist(tmp_path / "got", "t10k").labels) == 10_000
    (served / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    (tmp_path / "got" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz: is not MNIST's published file"):
        download_mnist(tmp_path / "got", url)
    assert not (tmp_path / "got" / "t10k-labels-idx1-ubyte.gz").exists()
    (served / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"cannot be downloaded .*404.*--mnist FOLDER"):
        download_mnist(tmp_path / "got", url)


def test_the_command_draws_what_train_takes_and_says_what_is_wrong(mnist: Path, tmp_path: Path, say: Say) -> None:
    folder, short = tmp_path / "out", "--size 400 --train 60 --val 2 --test 2 --noise 3".split()
    code, out, err = say("data", "megapixel-mnist", folder, "--mnist", mnist, *short)
    assert code == 0, err
    manifest = folder / "manifest.csv"
    assert f"keyhole train {manifest} --recipe megapixel-mnist" in out
    code, out, err = say("check", manifest, "--patch.size", "50")
    assert code == 0, err
    assert "majority" in out
    for words, message in (
        (["--mnist", mnist, *short], f"{folder}: exists and is not empty"),
        (short, "--mnist: give the folder of MNIST's four files, or --download"),
        (["--mnist", tmp_path, *short], "train-images-idx3-ubyte.gz is not there"),
        (["--mnist", mnist, "--size", "300", "--noise-pen", "thick"], "At most"),
        (["--mnist", mnist, "--train", "0", "--test", "0"], "expected counts"),
    ):
        place = folder if "not empty" in message else tmp_path / "new"
        code, _, err = say("data", "megapixel-mnist", place, *words)
        assert code == 2
        assert message in err


def test_a_damaged_file_of_mnist_is_named(mnist: Path, tmp_path: Path) -> None:
    for path in mnist.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz: is damaged"):
        read_mnist(tmp_path, "t10k")
