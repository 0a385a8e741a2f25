"""Traffic composites with the place of every sign known: what learning from whole images can hope to reach.

    python benchmarks/traffic_reading.py [--sides 80 160] [--epochs 20] [--seed 0] [--train 747] [--test 684] [--quick]

Composes the scenes of `traffic.py` again and notes all signs in them, also those that annotations.txt leaves out. Then
EfficientNet-Lite0 with its ImageNet weights, whose batch norms keep their statistics, learns end to end from a patch
around each sign of the training scenes, every one labelled, and from patches of road. A test scene is what its most
certain sign says. Patches have the 80 px of `traffic.py`; `--sides` enlarges them for the encoder.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import write_result
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from traffic import COLUMNS, SCENES, TARGET, WIDTH

from keyhole.datasets.traffic_signs import CLASSES, EMPTY, LIMITS
from keyhole.nn.packaged import Lite0Encoder
from keyhole.tasks.intervals import NORMAL, wilson

PATCH = WIDTH // COLUMNS
BATCH, RATE, DECAY, WARMUP = 32, 3e-4, 0.1, 0.1
MARGIN = 6
"""Pixels by which a sign may reach over the border of its patch when it is learned from."""
ROAD = 200
"""Patches of road in an epoch."""
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A composite: its pixels (h w 3), and the box (left, top, right, bottom) and class of each sign in it."""

    pixels: Tensor
    signs: Sequence[tuple[Box, str]]

    @property
    def label(self) -> str:
        return next((name for _, name in self.signs if name != EMPTY), EMPTY)

    def patch(self, x: float, y: float) -> Tensor:
        """Cut the patch (h w 3) around a point, moved to lie inside."""
        height, width = self.pixels.shape[:2]
        left = min(max(round(x - PATCH / 2), 0), width - PATCH)
        top = min(max(round(y - PATCH / 2), 0), height - PATCH)
        return self.pixels[top : top + PATCH, left : left + PATCH]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", nargs="+", type=int, default=[PATCH, 2 * PATCH])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=747)
    parser.add_argument("--test", type=int, default=684)
    parser.add_argument("--quick", action="store_true", help="one epoch on few scenes; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.sides, options.epochs, options.train, options.test = [PATCH], 1, 30, 10
    train, test = compose("train", options.train), compose("test", options.test)
    rows = []
    for side in options.sides:
        rows.append([f"{side} px", *cells(test, learn(train, side, options.epochs, options.seed), side)])
        print(*rows[-1], flush=True)
    print(
        write_result(
            "traffic_reading",
            "Traffic composites with the place of every sign known",
            report(train, rows, options.epochs),
        )
    )


def compose(part: str, count: int) -> list[Scene]:
    """Compose scenes as `SCENES` writes them, and note what it pastes into each."""
    spec = importlib.util.spec_from_file_location("make_traffic_scenes", SCENES)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    signs: list[list[tuple[Box, str]]] = [[] for _ in range(count)]
    paste = tool.paste
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)

        def note(scene: Any, sign: Path, rng: random.Random, taken: list[Box]) -> Box | None:
            box: Box | None = paste(scene, sign, rng, taken)
            if box is not None:  # into the scene that comes after those that are written
                signs[len(list(out.glob("*.jpg")))].append((box, LIMITS.get(sign.parent.name, EMPTY)))
            return box

        vars(tool)["paste"] = note
        tool.compose(part, count, out, 0)
        return [
            Scene(torch.from_numpy(np.array(Image.open(file))), each)
            for file, each in zip(sorted(out.glob("*.jpg")), signs, strict=True)
        ]


def learn(scenes: Sequence[Scene], side: int, epochs: int, seed: int) -> nn.Module:
    """Train on the signs of the scenes and on patches of road, and return what maps patches (b 3 s s) to logits."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = nn.Sequential(Lite0Encoder(), nn.Linear(1280, len(CLASSES)))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY, fused=True)
    signs = [(scene, box, name) for scene in scenes for box, name in scene.signs]
    steps = epochs * ((len(signs) + ROAD) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=WARMUP)
    for _ in range(epochs):
        drawn = [around(*sign, draw) for sign in signs] + [road(draw.choice(scenes), draw) for _ in range(ROAD)]
        draw.shuffle(drawn)
        set_training(model)
        for start in range(0, len(drawn) - BATCH + 1, BATCH):
            part = drawn[start : start + BATCH]
            patches = prepared([patch for patch, _ in part], side)
            patches = (patches * torch.empty(BATCH, 1, 1, 1).uniform_(0.8, 1.2)).clamp_(0, 1)
            loss = F.cross_entropy(model(patches), torch.tensor([CLASSES.index(name) for _, name in part]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def set_training(model: nn.Module) -> None:
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def around(scene: Scene, box: Box, name: str, draw: random.Random) -> tuple[Tensor, str]:
    """Cut a patch with a sign anywhere in it."""
    left, top, right, bottom = box
    room = max(MARGIN, (PATCH - max(right - left, bottom - top)) / 2 + MARGIN)
    x, y = ((a + b) / 2 + draw.uniform(-room, room) for a, b in ((left, right), (top, bottom)))
    return scene.patch(x, y), name


def road(scene: Scene, draw: random.Random) -> tuple[Tensor, str]:
    height, width = scene.pixels.shape[:2]
    return scene.patch(draw.uniform(0, width), draw.uniform(0, height)), EMPTY


def prepared(patches: Sequence[Tensor], side: int) -> Tensor:
    """Return patches as (b 3 s s), 0 to 1."""
    pixels = torch.stack([*patches]).permute(0, 3, 1, 2).float().div_(255)
    return pixels if side == PATCH else F.interpolate(pixels, size=(side, side), mode="bicubic").clamp_(0, 1)


@torch.no_grad()
def told(scene: Scene, model: nn.Module, side: int) -> str:
    """Return the class of a scene, whose signs are given: that of the one most certain to be among those told apart."""
    if not scene.signs:
        return EMPTY
    centres = [((left + right) / 2, (top + bottom) / 2) for (left, top, right, bottom), _ in scene.signs]
    p = model(prepared([scene.patch(*centre) for centre in centres], side)).softmax(dim=1)
    most = p[:, CLASSES.index(EMPTY)].argmin()
    return CLASSES[int(p[most].argmax())]


def cells(scenes: Sequence[Scene], model: nn.Module, side: int) -> list[str]:
    """Return the accuracy on the scenes, and the share of those with a sign to be told apart that is told right."""
    right = [(told(scene, model, side) == scene.label, scene.label) for scene in scenes]
    shown = [each for each, label in right if label != EMPTY]
    return [share([each for each, _ in right]), share(shown), share([each for each, label in right if label == EMPTY])]


def share(right: Sequence[bool]) -> str:
    low, high = wilson(sum(right) / len(right), len(right), NORMAL)
    return f"{sum(right) / len(right):.3f} [{low:.3f} {high:.3f}]"


def report(train: Sequence[Scene], rows: Sequence[Sequence[str]], epochs: int) -> list[str]:
    signs = [name for scene in train for _, name in scene.signs]
    counts = ", ".join(f"{signs.count(name)} of {name}" for name in CLASSES if name != EMPTY)
    return [
        f"*Composites*, see `traffic.py`. Learned from all {len(signs)} signs of {len(train)} training scenes, each "
        f"with its place and its name ({counts} km/h, the rest others), in {epochs} epochs; patches of {PATCH} px "
        "around them, EfficientNet-Lite0 with ImageNet weights, end to end. A test scene is what its most certain sign "
        "says, whose place is given too. Learning from whole images is told neither: the target of M = 10 there is "
        f"{TARGET}.",
        "",
        "| patch enlarged to | accuracy | of scenes with 50, 70 or 80 | of the others |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


if __name__ == "__main__":
    main()
