"""MNIST's handwritten digits from its four files, which are checked, or downloaded when asked for."""

from __future__ import annotations

import gzip
import hashlib
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import DataError
from keyhole.util.files import writable_folder, write_atomic

Pixels = NDArray[np.uint8]
Part = Literal["train", "t10k"]
SIDE = 28
"""Side of a digit, in pixels."""
VAL = 5000
"""The last of the training digits, which are for validation alone where there is any."""
URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
"""Where the files are downloaded from; the address that torchvision uses."""
TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""Checksums of the unpacked files."""


class Digits(NamedTuple):
    """Digits (n, 28, 28) and their classes (n,)."""

    pixels: Pixels
    labels: NDArray[np.int64]


def read_mnist(folder: Path, part: Part) -> Digits:
    """Read MNIST's training digits (`train`, 60,000) or test digits (`t10k`, 10,000).

    Args:
        folder: holds the published files, packed (`.gz`) or unpacked.
        part: which of them.

    Raises:
        DataError: a file is missing or is not the published one.
    """
    images, labels = (_content(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, SIDE, SIDE)
    return Digits(pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def mnist_splits(folder: Path, val: bool) -> dict[str, Digits]:
    """Read the digits of each split: `test` has MNIST's test digits, `train` the others; with `val`, it has the last.

    Raises:
        DataError: as `read_mnist`.
    """
    train, test = read_mnist(folder, "train"), read_mnist(folder, "t10k")
    if not val:
        return {"train": train, "test": test}
    first, last = (Digits(train.pixels[part], train.labels[part]) for part in (slice(-VAL), slice(-VAL, None)))
    return {"train": first, "val": last, "test": test}


def download_mnist(folder: Path, url: str = URL) -> None:
    """Download those of MNIST's files (11 MB) that are not in `folder`; each is checked before it is kept.

    Raises:
        DataError: a file cannot be downloaded or is not the published one.
    """
    writable_folder(folder)
    for name in MD5:
        target = folder / f"{name}.gz"
        if target.exists():
            continue
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/{name}.gz", timeout=TIMEOUT) as answer:
                packed = answer.read()
        except OSError as error:
            raise DataError(
                f"{url}: {name}.gz cannot be downloaded ({error}). Fetch MNIST's four files where there is a network, "
                "and give their folder: --mnist FOLDER"
            ) from error
        _checked(name, packed, f"{url}{name}.gz")
        write_atomic(target, packed)


def _content(folder: Path, name: str) -> bytes:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return _checked(name, path.read_bytes(), str(path))
    raise DataError(
        f"{folder}: {name}.gz is not there. Give the folder of MNIST's four files, or download them: --download"
    )


def _checked(name: str, data: bytes, where: str) -> bytes:
    """Return the unpacked file, if it is the published one."""
    try:
        content = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise DataError(f"{where}: is damaged ({error}). Remove it, and fetch it again: --download") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[name]:
        raise DataError(f"{where}: is not MNIST's published file (its MD5 differs). Remove it, and fetch it again.")
    return content
