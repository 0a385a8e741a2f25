"""Ways to classify large images, compared on a real data set: IPS, the whole image made smaller, random patches.

    python benchmarks/real_images.py FOLDER EXAMPLE MANIFEST [--arms ips16 resized ...] [--seeds 0 1 2] [--images N]
        [--about "tested on RS290"]

EXAMPLE is a folder of `examples/`, whose `recipe.yaml` every arm changes, and MANIFEST what its `prepare.py` wrote.
Each arm and seed has a folder with `result.json`, which `results.py` collects; one that has it is not run again, and
one that was stopped goes on. `--images` cuts the training images, labels and groups in proportion.

The whole image is made so small that it costs the time of IPS with M = 16: N patches that are encoded and 16 that are
learned from, in patches learned from, have as many pixels as it has. As five are encoded in the time of one that is
learned from, its sides are never less than .45 of what they were, however large the image, but its memory grows with
it. At the memory of IPS it has the pixels of the 16. Frozen arms learn from features that `keyhole embed` stores once.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import result
from numpy.typing import NDArray
from real_data import image_side, mean_features, patch_counts, write_drawn, write_part
from resized import resized_side, whole_image
from training import going_on, train_and_evaluate

from keyhole.config.file import resolve
from keyhole.config.settings import Config, DataConfig
from keyhole.data.manifest import Manifest, read_manifest
from keyhole.tasks.evaluation import evaluate_task, point_metrics
from keyhole.tasks.kinds import Task
from keyhole.util.files import csv_text, write_atomic
from keyhole.util.platform import peak_memory

ROOT = Path(__file__).resolve().parent.parent
METRICS = dict.fromkeys(("surface_cracks", "potholes", "retinopathy", "circuit_boards"), "auroc")
"""What is compared, by example; of several labels the mean."""
ANNOTATED = {**dict.fromkeys(METRICS, "test"), "retinopathy": "val"}
"""Held-out split with annotations: of the retinas, three of the test and twelve of the validation split have some."""
M = 16
"""Patches of the random arms, and those that set the cost of the resized image."""
FROZEN = {"epochs": 30, "batch": 8}
"""Of the arms on stored features."""
DRAWS = 5
"""Random patches of a training image are drawn so often; there are fewer epochs for it."""
ARMS = {
    "mean": "mean over all patches, frozen encoder, logistic regression",
    "random": f"{M} random patches, frozen encoder, attention",
    "attention": "all patches, frozen encoder, attention",
    "resized": f"whole image resized to the cost of IPS, M = {M}",
    "resized-memory": f"whole image resized to the memory of IPS, M = {M}",
    "random-trained": f"{M} random patches, end to end, uniform attention",
    "ips4": "IPS, M = 4, end to end",
    "ips16": "IPS, M = 16, end to end",
    "all": "all patches, end to end, attention",
    "scratch": "IPS, M = 16, encoder small from random weights",
    "learned": "IPS, M = 16, end to end, batch norms learned",
    "full-rate": "IPS, M = 16, end to end, encoder at the full rate",
    "averaged": "IPS, M = 16, end to end, mean of the weights",
    "fast": "IPS, M = 16, end to end, attention and heads at a rate of 1e-3",
    "explored": "IPS, M = 16, end to end, exploring in the first third",
    "explored4": "IPS, M = 4, end to end, exploring in the first third",
    "started": "IPS, M = 16, end to end, started from attention over all frozen patches",
    "plain": "IPS, M = 16, end to end, no projector",
    "resized-plain": f"whole image resized to the cost of IPS, M = {M}, no projector",
}
"""What tables call the arms, in their order."""
CHANGED: dict[str, dict[str, dict[str, Any]]] = {
    "scratch": {"model": {"encoder": "small"}, "train": {"encoder_lr": 1.0}},
    "learned": {"model": {"batch_norm": "learned"}},
    "full-rate": {"train": {"encoder_lr": 1.0}},
    "averaged": {"train": {"average": 0.99}},
    "fast": {"train": {"lr": 1e-3, "encoder_lr": 0.03}},  # the encoder keeps its 3e-5
    "plain": {"model": {"projector": "none"}},
}
"""IPS with M = 16 and other settings than the recipe's."""
SPECIAL = ("all", *CHANGED, "explored", "explored4", "started", "resized-plain")
"""Arms that are run when they are asked for."""
SELECTING = ("ips4", "ips16", *CHANGED, "explored", "explored4", "started")
"""Arms of which it is told how many of the kept patches touch a defect."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for features, resized images and runs")
    parser.add_argument("example", choices=METRICS)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if arm not in SPECIAL])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, help="to learn from; default all")
    parser.add_argument("--val", type=int, help="to choose the best epoch by; default a third of --images")
    parser.add_argument("--test", type=int, help="default all")
    parser.add_argument("--about", help="what sets MANIFEST apart from the example's own, in the results")
    parser.add_argument("--epochs", type=int, help="of arms that train the encoder; default those of the recipe")
    options = parser.parse_args(arguments)
    comparison = Comparison.of(options)
    failed: list[str] = []
    for seed in options.seeds:
        for arm in options.arms:
            with going_on(failed):
                found = comparison.run(arm, seed)
                figures = (f"{name} {figure.value:.3f}" for name, figure in found.metrics.items())
                print(arm, seed, *figures, f"{found.epoch_seconds} s an epoch, {found.peak_gb} GB", flush=True)
    if failed:
        sys.exit(f"{len(failed)} of the runs failed")


@dataclass(frozen=True)
class Comparison:
    """The arms on one part of a data set.

    Attributes:
        folder: Of this part.
        example: Name in `METRICS`.
        base: The recipe, on this part.
        about: What sets the data apart from the example's own; empty if nothing does.
    """

    folder: Path
    example: str
    base: Config
    about: str = ""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Comparison:
        base = resolve(config_path=ROOT / "examples" / options.example / "recipe.yaml")
        if options.epochs is not None:
            base = base.replace(train={"epochs": options.epochs, "warmup": min(1, options.epochs)})
        val = options.val or (None if options.images is None else -(-options.images // 3))
        counts = {"train": options.images, "val": val, "test": options.test}
        folder = options.folder.resolve() / "-".join(
            [
                options.example,
                *re.findall(r"\w+", options.about or ""),
                *(f"{name}{n}" for name, n in counts.items() if n),
            ]
        )
        path = folder / "images.csv"
        if not path.exists():
            write_part(options.manifest, counts, path)
        return cls(folder, options.example, base.replace(data={"path": path}), options.about or "")

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.base.data)

    @cached_property
    def stored(self) -> Manifest:
        """The images as features of all patches."""
        folder, patch = self.folder / "features", self.base.patch
        if not (folder / "seconds.json").exists():
            began = time.monotonic()
            keyhole(
                "embed",
                self.path,
                "--encoder=lite0",
                f"--patch.size={patch.size}",
                "--precision=auto",
                f"--patch.foreground={patch.foreground}",
                "--dtype=float16",
                f"--out={folder}",
            )
            write_atomic(folder / "seconds.json", json.dumps(time.monotonic() - began))
        return read_manifest(DataConfig(path=self.path, features=folder))

    @property
    def path(self) -> Path:
        assert self.base.data.path is not None
        return self.base.data.path

    def run_folder(self, arm: str, seed: int) -> Path:
        return self.folder / f"{arm}-e{self.base.train.epochs}-{seed}"

    def run(self, arm: str, seed: int) -> result.Result:
        """Return the result of an arm, which is run if it has none."""
        folder = self.run_folder(arm, seed)
        if (folder / result.NAME).exists():
            return result.read(folder)
        folder.mkdir(parents=True, exist_ok=True)
        train = len(self.manifest.split("train"))
        about: dict[str, Any] = {
            "data": ", ".join(filter(None, [self.example, self.about, f"{train} training images"])),
            "kind": "real",
            "recipe": ARMS[arm],
        }
        if arm == "mean":
            found = self.mean(about, seed, folder / "run" / "predictions" / "test.csv")
        else:
            found = self.train(self.settings(arm, seed, folder), folder / "run", about, kept=arm in SELECTING)
        found.write(folder)
        return found

    def settings(self, arm: str, seed: int, folder: Path) -> Config:
        """The configuration of an arm that is a run of keyhole."""
        base = self.base.replace(train={"seed": seed}, select={"m": M})
        epochs = base.train.epochs
        match arm:
            case "ips4" | "ips16":
                return base.replace(select={"m": int(arm.removeprefix("ips"))})
            case "explored" | "explored4":
                m = 4 if arm == "explored4" else M
                return base.replace(select={"m": m}, train={"explore": epochs / 3})
            case "started":
                self.run("attention", seed)
                return base.replace(model={"start": self.run_folder("attention", seed) / "run"})
            case "resized-plain":
                return self.settings("resized", seed, folder).replace(**CHANGED["plain"])
            case "all":
                return base.replace(select={"m": 2 * max(self.counts)}, memory="8GB")
            case "random-trained":  # attention stays uniform, so that of all in random order the first are kept
                select = {"m": M, "chunk": 64, "rule": "streaming", "order": "shuffled"}
                return base.replace(select=select, train={"explore": 2.0 * epochs})
            case "resized" | "resized-memory":
                n = float(np.median(self.counts)) if arm == "resized" else 0.0
                side = resized_side(base.patch.size, M, n, image_side(self.path))
                return whole_image(base, self.path, side, self.folder)
            case "attention":
                return self.frozen(self.path, seed, FROZEN["epochs"], self.folder / "features")
            case "random":
                path = write_drawn(self.path, self.stored, M, DRAWS, seed, folder / "drawn")
                return self.frozen(path, seed, FROZEN["epochs"] // DRAWS)
        return base.replace(**CHANGED[arm])

    def frozen(self, path: Path, seed: int, epochs: int, features: Path | None = None) -> Config:
        """Attention over all stored features of an image."""
        return Config().replace(
            data={"path": path, "features": features},
            select={"m": max(self.counts)},
            train={"epochs": epochs, "batch": FROZEN["batch"], "seed": seed, "metric": self.base.train.metric},
        )

    @cached_property
    def counts(self) -> list[int]:
        """Patches of each image."""
        return patch_counts(self.stored.items)

    def train(self, config: Config, run: Path, about: dict[str, Any], kept: bool) -> result.Result:
        """Train or go on, in a process of its own, whose peak memory is that of the arm; then evaluate."""
        train_and_evaluate(config, run)
        annotated = run / "evaluation" / ANNOTATED[self.example] / "metrics.json"
        if kept and not annotated.exists():
            keyhole("evaluate", run, f"--split={ANNOTATED[self.example]}")
        also = {}
        if kept:
            lesions = json.loads(annotated.read_text()).get("lesions", {})
            names = {"kept patches on a defect": "", "of all patches": "_by_chance"}
            also = {
                name: result.figure(lesions[f"kept_touching_a_lesion{end}"]) for name, end in names.items() if lesions
            }
        return result.of_run(run, **about, metrics=[METRICS[self.example]], also=also)

    def mean(self, about: dict[str, Any], seed: int, answers: Path) -> result.Result:
        """Logistic regression on the mean feature; its penalty is chosen on the validation images."""
        stored, metric = self.stored, METRICS[self.example]
        parts = {split: stored.split(split) for split in ("train", "val", "test")}
        x = {split: mean_features(items) for split, items in parts.items()}
        y = {split: stored.targets(items) for split, items in parts.items()}
        began, metrics = time.monotonic(), {}
        columns = [
            ["image", *(item.name for item in parts["test"])],
            ["path", *(str(item.image) for item in parts["test"])],
        ]
        for task in stored.tasks:
            best = max(
                (regression(task, x, y["train"][task.name], penalty) for penalty in 10.0 ** np.arange(-5, 2)),
                key=lambda said: point_metrics(task, y["val"][task.name], said["val"])[metric],
            )
            groups = [item.group for item in parts["test"]]
            overall = evaluate_task(task, y["test"][task.name], best["test"], groups).overall[metric]
            metrics[f"{task.name}.{metric}"] = result.Figure(overall.value or float("nan"), overall.low, overall.high)
            columns.append([f"{task.name}.true", *(item.labels[task.name] for item in parts["test"])])
            for name, p in zip(task.classes, best["test"].T, strict=True):
                columns.append([f"{task.name}.probability.{name}", *map(str, p)])
        seconds = time.monotonic() - began
        answers.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(answers, csv_text(zip(*columns, strict=True)))
        return result.Result(
            **about,
            seed=seed,
            metrics=metrics,
            epochs=1,
            epoch_seconds=round(seconds, 2),
            peak_gb=round(peak_memory() / 1e9, 3),
        )


def regression(
    task: Task, x: dict[str, NDArray[np.float32]], y: NDArray[Any], penalty: float
) -> dict[str, NDArray[np.float64]]:
    """Return the probabilities by split of a logistic regression of each output, with a penalty C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    logits: dict[str, list[NDArray[np.float64]]] = {split: [] for split in x}
    for column in y.T:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000)).fit(x["train"], column)
        for split, rows in x.items():
            logits[split].append(model.decision_function(rows))
    return {split: task.probability(np.stack(each, axis=1)) for split, each in logits.items()}


def keyhole(*words: object) -> None:
    """Run a command of keyhole in a process of its own."""
    subprocess.run([sys.executable, "-m", "keyhole", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
