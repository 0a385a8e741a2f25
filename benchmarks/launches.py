"""Operations that a batch gives to its device, counted on a CPU, into a dated Markdown file.

    python benchmarks/launches.py [--only CASE ...] [--no-write]

On a GPU the host gives orders and does not compute; some 5 us each. Where a batch has thousands of them and little
work for each, the host is the limit. `operations.py` says what is counted. Recipes are run as `keyhole train` runs
them, with the numbers of images, patches and kept patches of the published settings; patches are smaller, and features
narrower, which changes no count. Of stored features, of which the gradient step is as of patches, only the selection is
counted.

To add a case, write a function that returns what was counted by part, and name it in `CASES`.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from machine import write_result
from operations import Count, CountingTimer, Operations
from PIL import Image
from torch import Tensor, nn

from keyhole.config.file import configuration
from keyhole.config.settings import RunConfig, SelectConfig
from keyhole.engine import Engine
from keyhole.engine.encoders import Encoders
from keyhole.engine.memory.plan import Plan, largest_chunk
from keyhole.engine.to_device import Stager
from keyhole.loading.chunks import Chunk
from keyhole.nn import CrossAttentionPool, FeatureProjector, IPSClassifier
from keyhole.patches.features import FeatureOpener
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import Job, start_job
from keyhole.training.loop import Loop

SIDE = 32
"""Pixels of a patch here."""
SLIDES, FEATURES, KEPT = 16, 250_000, 5000
NARROW = 8
"""Numbers of a feature here."""


@dataclass(frozen=True)
class Case:
    """A table of the result.

    Attributes:
        what: is counted.
        run: counts it, by part, with an empty folder to write into.
        before: what was counted at commit 8c6dbb4, with a foreach optimizer, which is what torch takes on a GPU.
    """

    what: str
    run: Callable[[Path], Mapping[str, Count]]
    before: Count | None = None


def traffic(folder: Path) -> Mapping[str, Count]:
    """16 images of 12 x 16 patches; 1,024 patches are encoded at once, as on a GPU."""
    return training_batch(folder, "traffic", columns=16, rows=12, channels=3)


def traffic_global(folder: Path) -> Mapping[str, Count]:
    """The same under the rule that keyhole takes by default."""
    return training_batch(folder, "traffic", columns=16, rows=12, channels=3, rule="global")


def megapixel_mnist(folder: Path) -> Mapping[str, Count]:
    """16 images of 30 x 30 patches, four tasks."""
    return training_batch(folder, "megapixel-mnist", columns=30, rows=30, channels=1, tasks=4)


def features(_folder: Path) -> Mapping[str, Count]:
    """16 bags of 250,000 features on the device, a quarter of a bag at a time, as `selection.py` selects from them."""
    encoders = feature_encoders()
    bags = torch.randn(SLIDES, FEATURES, NARROW)
    with encoders.inference():
        encoders.model.select(bags[:, :8], 4, 8, encode=encoders.embed)  # builds things
    with Operations([*tensors_of(encoders.model), bags]) as operations, encoders.inference():
        encoders.model.select(bags, KEPT, FEATURES // 4, encode=encoders.embed)
    return operations.parts


def features_files(folder: Path) -> Mapping[str, Count]:
    """The same from files, as `keyhole train` reads them, as many at a time as a GPU's plan takes of 2,048 numbers."""
    path = folder / "features.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(0).standard_normal((FEATURES, NARROW), np.float32)
    model = feature_encoders().model
    openers = [FeatureOpener(path, str(number)) for number in range(SLIDES)]
    operations = Operations(tensors_of(model))
    timer = CountingTimer(operations)
    plan = Plan(largest_chunk(torch.device("cuda"), (2048,)))
    engine = Engine(model, SelectConfig(m=KEPT), RunConfig(threads=1), plan=plan, timer=timer)
    engine.stager = CopyingStager(timer)
    engine.encoders.fast(torch.randn(2, NARROW))
    with closing(engine):
        for batch in engine.stream([openers]):
            with operations:
                engine.select(batch)
    return operations.parts


class CopyingStager(Stager):
    """Copies chunks as for a GPU: what it copies is on the device."""

    def __init__(self, shares: CountingTimer) -> None:
        super().__init__(torch.device("cpu"), shares)

    def __call__(self, chunk: Chunk, rows: int | None = None) -> Tensor:
        return Operations.put(super().__call__(chunk, rows).clone())


def feature_encoders() -> Encoders:
    """The published model of stored features, narrower, with its fast copy."""
    model = IPSClassifier(FeatureProjector(NARROW, 16), CrossAttentionPool(16, 8), {"label": nn.Linear(16, 1)})
    encoders = Encoders(model)
    encoders.fast(torch.randn(2, NARROW))
    return encoders


def tensors_of(model: IPSClassifier) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


CASES: Mapping[str, Case] = {
    "traffic": Case(
        "recipe `traffic` (rule `streaming`): 16 images, N = 192, M = 10, I = 32", traffic, Count(1360, 637, 23)
    ),
    "traffic-global": Case("the same under the rule `global`", traffic_global, Count(722, 349, 23)),
    "megapixel-mnist": Case(
        "recipe `megapixel-mnist` (rule `streaming`): 16 images, N = 900, M = 100, I = 100, four tasks",
        megapixel_mnist,
        Count(1875, 1015, 29),
    ),
    "features": Case(
        "selection from 16 bags of 250,000 features on the device, M = 5,000, 62,500 at a time (16,000 before, beside "
        "some 3,000 operations of the host on indices of all patches)",
        features,
        Count(2151, 5296, 0),
    ),
    "features-files": Case(
        "the same from files of stored features, 16,384 at a time (8,192 before; what each image keeps stayed on the "
        "device)",
        features_files,
        Count(4057, 11425, 0),
    ),
}


class Counted(Loop):
    """The loop of `keyhole train`, counted from the end of its first step, which builds things, to the next end."""

    def __init__(self, job: Job, interrupt: Interrupt) -> None:
        super().__init__(job, interrupt)
        self.operations = Operations([*job.model.parameters(), *job.model.buffers()])
        job.engine.timer = job.engine.stager.timer = CountingTimer(self.operations)
        self.steps = 0
        for group in job.optimizer.param_groups:
            group["fused"] = True  # as on a GPU

    def after_step(self, patches: int) -> None:
        """Called at the end of each step."""
        self.steps += 1
        if self.steps == 1:
            self.operations.__enter__()
        else:
            self.operations.__exit__()
            raise Enough


class Enough(Exception):  # noqa: N818 - an event, not an error
    """A whole step has been counted."""


def training_batch(
    folder: Path, recipe: str, columns: int, rows: int, channels: int, tasks: int = 1, rule: str | None = None
) -> Mapping[str, Count]:
    """Counts one training step of a recipe over images of `columns` x `rows` patches."""
    sections: dict[str, object] = {
        "recipe": recipe,
        "patch": {"size": SIDE, "stride": SIDE, "edge": "drop"},
        "model": {"pretrained": False},
        "run": {"device": "cpu", "threads": 1, "compile": "off"},
        "train": {"metric": "auto", "watch": "val"},
    }
    if rule is not None:
        sections["select"] = {"rule": rule}
    manifest = write_images(folder, columns * SIDE, rows * SIDE, channels, tasks)
    data = {"path": manifest, "val": 0.0, "tasks": tuple(f"task{number}" for number in range(tasks))}
    config = configuration(data, sections).replace(out=folder / "run")
    with Interrupt() as interrupt, closing(start_job(config, lambda _: None)) as job:
        job.engine.plan = replace(job.engine.plan, chunk=1024)
        loop = Counted(job, interrupt)
        with suppress(Enough):
            loop.learn()
        return loop.operations.parts


def write_images(folder: Path, width: int, height: int, channels: int, tasks: int, count: int = 32) -> Path:
    """Noise, as PNG, and a CSV with `tasks` columns; returns the CSV."""
    draw = np.random.default_rng(0)
    for number in range(count):
        pixels = draw.integers(0, 256, (height, width, channels), np.uint8)
        Image.fromarray(pixels.squeeze()).save(folder / f"{number}.png")
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "split", *(f"task{task}" for task in range(tasks))])
        for number in range(count):
            table.writerow([f"{number}.png", "train", *("abc"[(number + task) % 3] for task in range(tasks))])
    return path


def table(parts: Mapping[str, Count], before: Count | None) -> list[str]:
    """A row for each part of the batch, and their sum."""
    rows = [*parts.items(), ("whole batch", sum(parts.values(), Count()))]
    rows += [] if before is None else [("whole batch at 8c6dbb4", before)]
    lines = ["| part | launched | views | waits of the host |", "|---|---|---|---|"]
    for name, count in rows:
        lines.append(f"| {name} | {count.launched:,} | {count.views:,} | {count.waits:,} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--no-write", action="store_true", help="print only, as --only does")
    options = parser.parse_args()
    if unknown := set(options.only or CASES) - set(CASES):
        sys.exit(f"--only {' '.join(sorted(unknown))}: not one of {', '.join(CASES)}")
    text = [
        "Operations that one batch gives to its device, counted while it runs on a CPU. 'launched' compute",
        "or copy; 'views' only describe a tensor anew. A wait is a result that the host needs before it goes on. The",
        "part `other` is the folded copy of the encoder taking over the weights, and what was selected coming to the",
        "host; `scoring` is the selection and what is scored for it.",
    ]
    for name in options.only or CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as scratch:
            lines = ["", f"## {name}", "", f"{case.what}.", "", *table(case.run(Path(scratch)), case.before)]
        print("\n".join(lines), flush=True)
        text += lines
    if not (options.no_write or options.only):
        print(write_result("launches", "Operations of a batch", text))


if __name__ == "__main__":
    main()
