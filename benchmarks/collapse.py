"""Why selection collapses from random weights: which patches are kept, by which scores, and what they teach the scorer.

    python benchmarks/collapse.py [FOLDER] [--seeds 10] [--epochs 20] [--no-write]

Black canvases of 5 x 5 patches, one of which has a shape that is the class; M = 2. Runs with the published rule alone,
with `train.explore`, and with `patch.foreground: non-empty`. The runs stay in FOLDER and are not made again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from health import SETTINGS, canvases, trained
from machine import write_result
from torch import Tensor

import keyhole
from keyhole.config.settings import Config
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest, read_manifest
from keyhole.images import open_image
from keyhole.images.geometry import Box
from keyhole.inference.predictor import Predictor
from keyhole.nn.classifier import IPSClassifier
from keyhole.training.setup import new_model

SIDE, BATCH = SETTINGS["patch"]["size"], SETTINGS["train"]["batch"]
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "`train.explore`, half of the epochs": {"explore": 0.5},
    "`patch.foreground: non-empty`": {"foreground": "non-empty"},
}
"""What is done against it; `explore` is a share of the epochs."""
COLUMNS = (
    "against it",
    "seed",
    "shape kept, start",
    "end",
    "encoder's gradient, start",
    "end",
    "validation loss",
)


class Found(NamedTuple):
    """A model on canvases.

    Attributes:
        kept: Share of the canvases whose shape is kept.
        gradient: Norm of the loss's gradient in the encoder's weights, from a batch of the kept patches.
    """

    kept: float
    gradient: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/collapse"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    path = options.folder / "canvases" / "labels.csv"
    path = path if path.is_file() else canvases(path.parent)
    lines, ends = [], []
    for name, changes in VARIANTS.items():
        learned = 0
        for seed in range(options.seeds):
            explore = changes.get("explore", 0) * options.epochs
            run = trained(options.folder, "canvases", seed, options.epochs, explore, changes.get("foreground", "all"))
            manifest = read_manifest(run.config.data, seed)
            start = found(new_model(run.config, manifest.tasks, torch.device("cpu")), manifest, run.config)
            end = found(keyhole.load(run.path, device="cpu").model, manifest, run.config)
            loss = run.metrics[-1]["val.loss"]
            learned += loss < 1
            cells = [f"{start.kept:.2f}", f"{end.kept:.2f}", f"{start.gradient:.2g}", f"{end.gradient:.2g}"]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} | {loss:.3f} |")
            print(lines[-1], flush=True)
        ends.append(f"{name} {learned} of {options.seeds}")
    said = f"Runs that end below a validation loss of 1 (guessing: 2.303): {'; '.join(ends)}."
    print(said)
    if not options.no_write:
        about = [
            "Black canvases of 5 x 5 patches of 16 px; one patch has a shape, which is the class (ten). M = 2, an",
            f"encoder 4 channels wide, {options.epochs} epochs on 80 canvases. *Shape kept*: share of the 20",
            "validation canvases of which the model keeps the shape. *Encoder's gradient*: norm of the gradient in its",
            "weights, of a batch of the patches that the model itself keeps. Generated data.",
        ]
        table = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *lines]
        print(write_result("collapse", "Why selection collapses", [*about, "", *table, "", said]))


def found(model: IPSClassifier, manifest: Manifest, config: Config) -> Found:
    predictor = Predictor(model, config, manifest.tasks)
    predictor.silent = True
    shapes = [kept_patches(predictor, item).flatten(1).amax(dim=1).max() > 0 for item in manifest.split("val")]
    items = manifest.split("train")[:BATCH]
    bags = [kept_patches(predictor, item) for item in items]
    patches = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(bag)) for bag in bags], batch_first=True).bool()
    labels = torch.as_tensor(manifest.targets(items)["label"][:, 0]).long()
    model.train().zero_grad()
    torch.nn.functional.cross_entropy(model(patches, mask=mask)["label"], labels).backward()
    gradients = [weight.grad.norm() for weight in model.encoder.parameters() if weight.grad is not None]
    return Found(statistics.mean(map(float, shapes)), float(torch.stack(gradients).norm()))


def kept_patches(predictor: Predictor, item: Item) -> Tensor:
    """The patches that a model keeps of a canvas (m c h w), scaled to 0 ... 1."""
    with open_image(item.image) as image:
        boxes = predictor.predict(item.image, pictures=False).kept.boxes.tolist()
        pixels = torch.stack([torch.from_numpy(image.read(Box(*box))) for box in boxes])
    return pixels.permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    main()
