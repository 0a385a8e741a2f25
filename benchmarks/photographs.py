"""Whole epochs from photographs on disk, decoding and augmentation included, beside the published pipeline.

    python benchmarks/photographs.py [--device auto] [--images N] [--batch B] [--rounds 5] [--workers W]
                                     [--compile auto] [--stages S] [--folder DIR] [--quick] [--no-write]

Traffic scenes of 1280 x 960 px as JPEG files, composed by ../shared/tools/make_traffic_scenes.py where that is there
and generated otherwise. The published pipeline decodes, enlarges to 1600 x 1200, jitters, shifts and unfolds image
after image in worker processes (`photographs_published.py`), then selects and learns (`published.py`). keyhole trains
through the code of `keyhole train` with `--recipe traffic`, and reads every image from its file in every epoch. Two
settings: patches of 80 px of the file as it is, which see what 100 px of the enlarged image do, and 100 px of images
that were enlarged on disk, which is equal work for the encoder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternate import alternate, as_keyhole, as_plain, medians
from epochs import Epochs, run_passive, write_csv
from machine import cores, write_result
from photographs_published import PATCH, PATCHES, SIZE, load, most_workers
from published import published_from

from keyhole.engine.to_device import prefetched
from keyhole.nn import TimmEncoder
from keyhole.nn.tensors import prepare
from keyhole.training.augment import draw, stack_colors
from keyhole.training.epoch import epoch_items

SCENES = Path(__file__).resolve().parents[2] / "shared" / "tools" / "make_traffic_scenes.py"
STORED = (1280, 960)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, help="of an epoch; default 512 on a GPU, 16 on a CPU")
    parser.add_argument("--batch", type=int, help="images a step; default 16 on a GPU, 4 on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each, alternating")
    parser.add_argument("--workers", type=int, default=min(16, cores()), help="processes of the published pipeline")
    parser.add_argument("--compile", choices=("auto", "on", "off"), help="as --run.compile; default auto, off if quick")
    parser.add_argument("--stages", type=int, help="of ResNet-18; default all")
    parser.add_argument("--folder", type=Path, help="where the scenes are written, or lie already")
    parser.add_argument("--quick", action="store_true", help="a run of half a minute; its figures are rough")
    parser.add_argument("--no-write", action="store_true", help="print only, as --quick does")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    options.device = "cpu" if not cuda else "cuda" if options.device == "auto" else options.device
    options.images = options.images or (4 if options.quick else 512 if cuda else 16)
    options.batch = options.batch or (16 if cuda else 4)
    options.compile = options.compile or ("off" if options.quick else "auto")
    options.rounds = 1 if options.quick else options.rounds
    options.no_write = options.no_write or options.quick
    options.workers = min(options.workers, most_workers(options.batch))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "scenes"
        kind = write_scenes(folder, options.images)
        compare(options, folder, kind, Path(scratch))


def write_scenes(folder: Path, count: int) -> str:
    """`stored/` at 1280 x 960 and `enlarged/` at 1600 x 1200, each with `images.csv`; says what they show."""
    stored, enlarged = folder / "stored", folder / "enlarged"
    if SCENES.exists():
        kind = "composite traffic scenes"
        if len(list(stored.glob("*.jpg"))) < count:
            command = [sys.executable, SCENES, folder / "composed", "--train", str(count), "--test", "0"]
            subprocess.run([*map(str, command)], check=True)
            (folder / "composed" / "Set2").rename(stored)
    else:
        kind = "generated pictures"
        stored.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(partial(store_made, stored), range(count)))
    enlarged.mkdir(parents=True, exist_ok=True)
    files = sorted(stored.glob("*.jpg"))[:count]
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(partial(store_enlarged, enlarged), files))
    for each in (stored, enlarged):
        write_csv(each, [each / path.name for path in files])
    return kind


def store_made(folder: Path, number: int) -> None:
    made_picture(number).save(folder / f"{number:05d}.jpg", quality=88)


def store_enlarged(folder: Path, path: Path) -> None:
    from PIL import Image

    if not (folder / path.name).exists():
        with Image.open(path) as image:
            image.resize(SIZE, Image.Resampling.BILINEAR).save(folder / path.name, quality=88)


def made_picture(seed: int) -> Any:
    """Soft shapes with grain: about as many bytes as a photograph."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(STORED, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (STORED[1], STORED[0], 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def compare(options: argparse.Namespace, folder: Path, kind: str, scratch: Path) -> dict[str, dict[str, float]]:
    """Data part (`read`) and whole epochs (`learn`) of all three, in turns: seconds by part and side."""
    device = torch.device(options.device)
    small = Ours(options, folder / "stored", PATCH * STORED[0] // SIZE[0], scratch / "small")
    equal = Ours(options, folder / "enlarged", PATCH, scratch / "equal")
    theirs = Theirs(options, folder, equal)
    names = {"published": theirs, "keyhole, 80 px": small, "keyhole, enlarged, 100 px": equal}
    seconds = {}
    for part in ("read", "learn"):
        pieces: dict[str, Callable[[], object]] = {
            name: (as_plain if one is theirs else as_keyhole)(getattr(one, part)) for name, one in names.items()
        }
        for warm_up in pieces.values():
            warm_up()
        seconds[part] = medians(alternate(pieces, device, options.rounds))
    lines = [*describe(options, kind, small, equal), ""]
    lines += ["| | data part, images/s | times published | whole epochs, images/s | times published |"]
    lines += ["|---|---|---|---|---|"]
    for name in names:
        cells = [name]
        for part in ("read", "learn"):
            found = seconds[part]
            cells += [f"{options.images / found[name]:,.1f}", f"{found['published'] / found[name]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))
    small.job.close()
    equal.job.close()
    if not options.no_write:
        print(write_result("photographs", "Photographs from JPEG files", lines, options.device))
    return seconds


def describe(options: argparse.Namespace, kind: str, small: Ours, equal: Ours) -> list[str]:
    """What was compared."""
    config = small.job.config
    return [
        f"{options.images} {kind} of {STORED[0]} x {STORED[1]} px, JPEG, read and decoded in every epoch; batches of "
        f"{options.batch}; ResNet-18 from random weights, M = {config.select.m}, I = {config.select.chunk}, the rule "
        f"`{config.select.rule}`; medians of {options.rounds} epochs each, in turns, after one of each.",
        "",
        f"published: on the host image after image in {options.workers} worker processes that stay between epochs "
        f"(decode, enlarge to {SIZE[0]} x {SIZE[1]}, colour jitter, shift up to {PATCH} px, float32, normalise, "
        f"unfold into {PATCHES} patches of {PATCH} px), float32 eager. keyhole: its training code, recipe `traffic`, "
        f"{small.job.engine.reader.threads.count} reading threads, {small.job.engine.encoders.arithmetic}, "
        f"{small.encoder} (80 px), {equal.encoder} (100 px); "
        f"{small.patches} patches an image, as the shift of the grid falls: of 80 px, which see what 100 px of the "
        f"enlarged image do at 0.64 of the encoder's work, or of 100 px ({equal.patches}) of images enlarged on disk. "
        "Data part: until all patches of an epoch are on the device as the encoder takes them. Both sides draw other "
        "shifts and colours, so what they keep is not compared here; `selection.py` does that.",
    ]


class Ours(Epochs):
    """A job of `keyhole train` over a folder of scenes."""

    def __init__(self, options: argparse.Namespace, folder: Path, patch: int, out: Path) -> None:
        super().__init__(
            {
                "out": str(out),
                "data": {
                    "path": str(folder / "images.csv"),
                    "tasks": ["label=multiclass"],
                    "val": 0.0,
                    "test": 0.0,
                    "cache": 0.0,
                },
                "patch": {"size": patch, "stride": patch},
                "model": {"pretrained": False, "stages": options.stages},
                "train": {"batch": options.batch, "watch": "val"},
                "run": {"device": options.device, "compile": options.compile},
            },
            recipe="traffic",
        )

    def read(self) -> None:
        """Brings every patch of an epoch to where the encoder takes it, in its changed colours."""
        job, config = self.job, self.job.config
        items, size = epoch_items(job), config.train.batch
        draws = [draw(config.augment, 0, job.state.epoch, item.name, config.patch.size, 3) for item in items]
        openers = [job.images.opener(item, one.view, one.offset) for item, one in zip(items, draws, strict=True)]
        batches = [openers[first : first + size] for first in range(0, len(items), size)]
        for number, batch in enumerate(job.engine.stream(batches, hold=0)):
            colors = stack_colors(draws[number * size : (number + 1) * size])
            assert colors is not None
            for chunk, pixels in prefetched(batch.chunks(), job.engine.stager, job.engine.pace):
                image = torch.from_numpy(chunk.image[: chunk.count])
                prepare(pixels[: chunk.count], torch.from_numpy(colors)[image].to(job.device))
        job.state.epoch += 1

    @property
    def encoder(self) -> str:
        """Whether it is compiled, and why."""
        return next(line for line in self.notes if line.startswith("encoder "))

    @property
    def patches(self) -> str:
        """Of an image, as the shift falls."""
        patch = self.job.config.patch.size
        columns, rows = (side // patch for side in (SIZE if patch == PATCH else STORED))
        return f"{columns * rows} to {(columns + 1) * (rows + 1)}"


class Theirs:
    """The published pipeline, selection and step, of which single epochs are run."""

    def __init__(self, options: argparse.Namespace, folder: Path, ours: Ours) -> None:
        files = sorted((folder / "stored").glob("*.jpg"))[: options.images]
        labels = [number % 2 for number in range(len(files))]
        self.device = torch.device(options.device)
        self.loader = load(files, labels, options.batch, options.workers, pinned=self.device.type == "cuda")
        config = ours.job.config.select
        self.network = published_from(ours.job.model, config.m, config.chunk or 32)
        assert isinstance(self.network.encoder, TimmEncoder)
        self.network.encoder.normalize = False  # done on the host
        self.network.train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-4, weight_decay=0.1)

    def learn(self) -> None:
        """Learns from every image once; the whole batch goes to the device first, as published."""
        for patches, labels in self.loader:
            self.network.step(patches.to(self.device), {"label": labels.to(self.device)}, self.optimizer)

    def read(self) -> None:
        """Brings every patch of an epoch to the device."""
        for patches, _ in self.loader:
            patches.to(self.device)


if __name__ == "__main__":
    run_passive()
    main()
