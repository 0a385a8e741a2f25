"""Tests of this machine: every reader on generated images, and a training run of a few seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.config.settings import Config
from keyhole.errors import Interrupted
from keyhole.util.budget import memory_text
from keyhole.util.platform import cores, total_memory

Pixels = NDArray[np.uint8]

OPTIONAL = {
    "tensorboard": "curves in TensorBoard with --run.log tensorboard; pip install tensorboard",
    "wandb": "curves in Weights & Biases with --run.log wandb; pip install wandb",
}
SIDE = 96
"""Side of a test image in pixels."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of one test: FAIL if something that is needed does not work."""

    name: str
    state: Literal["ok", "FAIL", "info"]
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<5} {self.name:<34} {self.detail}".rstrip()


def examine() -> Iterator[Diagnosis]:
    yield from machine()
    with tempfile.TemporaryDirectory(prefix="keyhole-doctor-") as folder:
        yield from readers(Path(folder))
        yield training(Path(folder))
    yield from optional_parts()


def machine() -> Iterator[Diagnosis]:
    """Yield versions, cores, memory, temporary space and GPU."""
    import torch

    from keyhole.runs.run import PACKAGES

    yield Diagnosis("python", "info", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Diagnosis(package, "info", version(package))
        except PackageNotFoundError:
            yield Diagnosis(package, "FAIL", "not installed; install keyhole again")
    yield Diagnosis("cores", "info", str(cores()))
    total = total_memory()
    memory, limit = memory_text(total), Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (given := limit.read_text().strip()).isdigit() and int(given) < total:
        memory += f", of which this container may use {memory_text(int(given))}"
    yield Diagnosis("memory", "info", memory)
    for place in (Path(tempfile.gettempdir()), Path("/dev/shm")):
        if place.is_dir():
            usage = shutil.disk_usage(place)
            yield Diagnosis(str(place), "info", f"{memory_text(usage.free)} of {memory_text(usage.total)} free")
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = ", ".join(f"{gpu.name} with {memory_text(gpu.total_memory)}" for gpu in gpus)
    missing = f"none that torch {torch.__version__} can use; training runs on the CPU"
    yield Diagnosis("GPU", "info", names if torch.cuda.is_available() else missing)


def readers(folder: Path) -> Iterator[Diagnosis]:
    """Write a picture in every format and read it back: lossless formats exactly, lossy ones closely."""
    for entry in entry_points(group="keyhole.images"):
        yield attempt(f"reader {entry.name}", partial(_load, entry))
    for name, suffix, write, tolerance in _formats():
        path = folder / f"image-{name.replace(' ', '-')}.{suffix}"
        yield attempt(f"{suffix} {name}", partial(_read_back, path, write, tolerance))
    yield attempt("whole-slide file by OpenSlide", partial(_read_by_openslide, folder / "slide.tiff"))


def _load(entry: EntryPoint) -> str:
    return str(entry.load().__name__)


Writer = Callable[[Path, Pixels], None]


def _formats() -> Iterator[tuple[str, str, Writer, float]]:
    """Yield name, suffix, writer and largest mean difference of every format."""
    import tifffile

    yield "colour", "png", _pillow, 0.0
    yield "colour", "bmp", _pillow, 0.0
    yield "colour", "webp", partial(_pillow, lossless=True), 0.0
    yield "colour", "jpg", partial(_pillow, quality=95, subsampling=0), 4.0
    yield "grey", "png", lambda path, pixels: _pillow(path, pixels[:, :, 0]), 0.0
    tile: dict[str, Any] = {"tile": (32, 32), "photometric": "rgb"}
    deflate = tile | {"compression": "deflate"}
    yield "strips", "tif", partial(tifffile.imwrite, photometric="rgb", rowsperstrip=16), 0.0
    for compression in ("lzw", "deflate", "zstd"):
        yield f"tiles {compression}", "tif", partial(tifffile.imwrite, **tile, compression=compression), 0.0
    yield "tiles jpeg", "tif", partial(tifffile.imwrite, **tile, compression="jpeg", compressionargs={"level": 95}), 6.0
    yield "tiles jpeg2000", "tif", partial(tifffile.imwrite, **tile, compression="jpeg2000"), 4.0
    yield "big", "tif", partial(tifffile.imwrite, **tile, bigtiff=True), 0.0
    yield "OME", "ome.tif", partial(tifffile.imwrite, **tile), 0.0
    yield "pyramid", "tif", partial(_pyramid, subifds=1, **deflate), 0.0


def _pillow(path: Path, pixels: Pixels, **options: Any) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, **options)


def _pyramid(path: Path, pixels: Pixels, subifds: int = 0, **options: Any) -> None:
    import tifffile

    with tifffile.TiffWriter(path) as file:
        file.write(pixels, subifds=subifds, **options)
        file.write(np.ascontiguousarray(pixels[::2, ::2]), subfiletype=1, **options)


def _picture() -> Pixels:
    """Return a smooth picture, so that lossy formats stay close; it differs in every channel and corner."""
    down, right = np.mgrid[0:SIDE, 0:SIDE] * (255 / SIDE)
    return np.stack([down, right, 255 - (down + right) / 2], axis=2).astype(np.uint8)


def _read_back(path: Path, write: Writer, tolerance: float) -> str:
    from keyhole.images import open_image

    pixels = _picture()
    write(path, pixels)
    with open_image(path) as image:
        read = image.read((0, 0, SIDE, SIDE), 0)
        reader = type(image).__name__
    wanted = pixels[:, :, :1] if read.shape[2] == 1 else pixels
    difference = float(np.abs(read.astype(int) - wanted).mean())
    if difference > tolerance:
        raise ValueError(f"the pixels differ by {difference:.1f} of 255 on average")
    return reader


def _read_by_openslide(path: Path) -> str:
    from keyhole.images.openslide import OpenSlideImage

    pixels = np.tile(_picture(), (4, 4, 1))
    _pyramid(path, pixels, tile=(256, 256), photometric="rgb", compression="deflate")
    with OpenSlideImage(path) as image:
        if not np.array_equal(image.read((100, 100, 200, 200), 0), pixels[100:300, 100:300]):
            raise ValueError("the pixels differ from those written")
        return f"OpenSlide, {len(image.levels)} levels"


def training_config(folder: Path) -> Config:
    return Config().replace(
        out=folder / "run",
        data={"path": folder / "data", "val": 0.25, "test": 0.25},
        patch={"size": 32},
        model={"encoder": "small", "width": 8},
        select={"m": 2, "chunk": 8},
        train={"epochs": 1, "batch": 2},
        run={"stall": 60},
    )


def training(folder: Path) -> Diagnosis:
    """Train one epoch on eight images of 64 px as `keyhole train` does, on the device that it would choose."""

    def learn() -> str:
        from keyhole.training.loop import train_config

        random = np.random.default_rng(0)
        for label, brightness in (("dark", 40), ("light", 210)):
            for number in range(4):
                path = folder / "data" / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = random.integers(-30, 30, (64, 64, 3))
                _pillow(path, (brightness + noise).astype(np.uint8))
        start = time.monotonic()
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                train_config(training_config(folder))
        except Interrupted as stop:  # its run folder is removed, so that nothing can be resumed
            raise Interrupted("interrupted", stop.signal_number) from stop
        return f"{time.monotonic() - start:.1f} s"

    return attempt("training, one epoch", learn)


def optional_parts() -> Iterator[Diagnosis]:
    """Yield optional packages and what they are for."""
    for package, gives in OPTIONAL.items():
        there = importlib.util.find_spec(package) is not None
        yield Diagnosis(package, "ok" if there else "info", "" if there else f"not installed; would give {gives}")


def attempt(name: str, work: Callable[[], str]) -> Diagnosis:
    try:
        return Diagnosis(name, "ok", work())
    except Interrupted:
        raise
    except Exception as error:
        if _interrupted(error):
            raise KeyboardInterrupt from error
        problem = " ".join(str(error).split()) or "no message"
        return Diagnosis(name, "FAIL", f"{type(error).__name__}: {problem}")


def _interrupted(error: BaseException | None) -> bool:
    """True if Ctrl-C caused the error: an import that it interrupts may raise another error."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
