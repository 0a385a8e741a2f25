"""Patches over an image's border: how often untrained models keep them under each rule, and what training reaches.

    python benchmarks/edge.py [--quick] [--no-write] [--images N] [--seeds N]

Photographs are the traffic scenes of ../shared/data/traffic/scenes where they are there, read in place, else generated
ones. An untrained model keeps a patch for how it differs from others, not for what it shows: where it keeps border
patches more often than their share of the grid, the filling draws it. Training: photographs with a small red or green
mark anywhere, also at the border; the class is its colour.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import get_args

import numpy as np
import PIL.Image
import torch
from machine import write_result

import keyhole
from keyhole.config.settings import Config, ModelConfig, PatchConfig, SelectConfig
from keyhole.inference.predictor import Predictor
from keyhole.nn import build_classifier
from keyhole.patches.edge import Edge
from keyhole.report.prediction import Prediction
from keyhole.tasks.kinds import Task

SCENES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traffic" / "scenes"
EDGES: tuple[Edge, ...] = get_args(Edge)
SIZES = (48, 100, 224)
TASK = Task("label", "multiclass", ("a", "b", "c"))
MARK, WIDTH, HEIGHT = 20, 310, 230


@dataclass(frozen=True)
class Shares:
    """Of the patches over the border: their share of the grid and of the kept, by seed, and the most of one image."""

    grid: float
    kept: tuple[float, ...]
    most: float


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two images, one seed, one epoch")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.seeds = 2, 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        photographs, kind = photographs_in(Path(scratch) / "generated", options.images)
        rows = [(size, edge, untrained(photographs, size, edge, options.seeds)) for size in SIZES for edge in EDGES]
        lines = [f"{len(photographs)} {kind}; the encoder `small` with random weights, seeds 0 to {options.seeds - 1};"]
        lines[0] += " an eighth of the patches is kept. A border patch is one of the last row or column where the side"
        lines[0] += " is not a multiple of the patch. `drop` has none."
        head = "| patch | rule | share of the grid | of the kept: mean | by seed | most in one image |"
        lines += ["", head, "|---|---|---|---|---|---|"]
        lines += [
            f"| {size} | {edge} | {share.grid:.1%} | {mean(share.kept):.1%} | "
            f"{', '.join(f'{each:.0%}' for each in share.kept)} | {share.most:.0%} |"
            for size, edge, share in rows
        ]
        count, epochs, seeds = (12, 1, 1) if options.quick else (120, 36, 4)
        marked_in(Path(scratch) / "marked", photographs, count)
        lines += ["", f"Training: {count} cuts of {WIDTH} x {HEIGHT} px with a mark of {MARK} px, patches of 48 px,"]
        lines[-1] += f" M = 4, {epochs} epochs, a third to test on; seeds 0 to {seeds - 1}; guessing gives 0.50."
        lines += ["", "| rule | test accuracy | mean |", "|---|---|---|"]
        for edge in EDGES:
            reached = [trained(Path(scratch) / "marked", edge, seed, epochs) for seed in range(seeds)]
            lines.append(f"| {edge} | {', '.join(f'{each:.3f}' for each in reached)} | {mean(reached):.3f} |")
            print(lines[-1], file=sys.stderr, flush=True)
        lines += ["", f"{(time.monotonic() - start) / 60:.1f} minutes on the clock of a shared machine."]
    print("\n".join(lines))
    if not options.no_write and not options.quick:
        write_result("edge", "Patches over the border", lines)
    return 0


def photographs_in(folder: Path, count: int) -> tuple[list[Path], str]:
    """Photographs to look at, and what they are."""
    scenes = [path for path in sorted(SCENES.glob("*.jpg")) if size_of(path) == (1280, 960)]
    if scenes:
        return scenes[:: max(1, len(scenes) // count)][:count], "traffic scenes of 1280 x 960 px"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(count)]
    for seed, path in enumerate(paths):
        random = np.random.default_rng(seed)
        coarse = PIL.Image.fromarray(random.integers(20, 190, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((1280, 960), PIL.Image.Resampling.BICUBIC)).astype(int)
        PIL.Image.fromarray((smooth + random.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)).save(path)
    return paths, "generated photographs of 1280 x 960 px"


def size_of(path: Path) -> tuple[int, int]:
    with PIL.Image.open(path) as picture:
        return picture.size


def untrained(photographs: Sequence[Path], size: int, edge: Edge, seeds: int) -> Shares:
    """What models of several seeds keep of each photograph."""
    columns, rows = 1280 // size + bool(1280 % size), 960 // size + bool(960 % size)
    select = SelectConfig(m=columns * rows // 8, chunk=64)
    grid: list[float] = []
    by_seed: list[float] = []
    most = 0.0
    for seed in range(seeds):
        kept = []
        torch.manual_seed(seed)
        config = Config(
            patch=PatchConfig(size=size, edge=edge), model=ModelConfig(encoder="small", width=16), select=select
        )
        predictor = Predictor(build_classifier(config.model, [TASK], size, pretrained=False), config, [TASK])
        with contextlib.redirect_stderr(io.StringIO()):
            predictions = list(predictor.predict_many(photographs))
        for prediction in predictions:
            scores = prediction.scores
            assert scores is not None
            over = at_border(prediction, size, scores.cells, scores.rows, scores.columns)
            grid.append(float(over.mean()))
            kept.append(float(over[prediction.kept.index].mean()))
        by_seed.append(mean(kept))
        most = max(most, *kept)
    return Shares(mean(grid), tuple(by_seed), most)


def at_border(prediction: Prediction, size: int, cells: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which patches lie in a last row or column that the image does not fill."""
    over = np.zeros(len(cells), bool)
    if prediction.patch["edge"] != "drop":
        over |= (cells[:, 0] == rows - 1) & bool(prediction.size.height % size)
        over |= (cells[:, 1] == columns - 1) & bool(prediction.size.width % size)
    return over


def marked_in(folder: Path, photographs: Sequence[Path], count: int) -> None:
    """A folder of two classes: cuts of photographs with a red or a green mark."""
    random = np.random.default_rng(0)
    for number in range(count):
        label, color = (("green", (40, 180, 60)), ("red", (190, 50, 50)))[number % 2]
        with PIL.Image.open(photographs[number % len(photographs)]) as picture:
            left, top = random.integers(0, picture.width - WIDTH), random.integers(0, picture.height - HEIGHT)
            pixels = np.array(picture.convert("RGB").crop((left, top, left + WIDTH, top + HEIGHT)))
        x, y = random.integers(0, WIDTH - MARK), random.integers(0, HEIGHT - MARK)
        pixels[y : y + MARK, x : x + MARK] = color
        (folder / label).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(folder / label / f"{number}.png")


def trained(data: Path, edge: Edge, seed: int, epochs: int) -> float:
    """Test accuracy after a short training."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        run = keyhole.train(
            {"path": str(data), "val": 0.15, "test": 0.35},
            Path(scratch) / "run",
            patch={"size": 48, "edge": edge},
            model={"encoder": "small", "width": 16, "dropout": 0.0, "attention_dropout": 0.0, "hidden": 64},
            select={"m": 4, "chunk": 64},
            train={"epochs": epochs, "batch": 8, "lr": 1e-3, "explore": epochs / 2, "seed": seed},
            augment={"color": 0.0},
        )
        return keyhole.evaluate(run.path).metrics[0].overall["accuracy"].value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
