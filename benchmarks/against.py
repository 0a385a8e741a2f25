"""Speed and memory of two checkouts of keyhole side by side, into a dated Markdown file.

    python benchmarks/against.py OLD NEW [--rounds 7] [--no-write]

The checkouts take turns, each time in a new process: `keyhole --help`, a training run on generated pictures (seconds
between optimizer steps, and the peak of the process), prediction of a large picture, embedding of a generated slide
with a narrow encoder, where reading dominates. A figure is the median over the rounds, with the lowest and highest.
The files and functions that each runs through follow, see `hops.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hops import counted
from machine import write_result

CONFIG = """
model: {encoder: small, width: 8}
patch: {size: 32}
select: {m: 16}
train: {epochs: 2, batch: 4}
run: {threads: 1, device: cpu}
"""
NAMES = {
    "help": "`keyhole --help`, s",
    "step": "seconds between optimizer steps",
    "train": "`keyhole train`, whole, CPU s",
    "peak": "peak of its process, MB",
    "predict": "`Predictor.predict`, 2,500 patches, s",
    "read": "`keyhole embed` of a slide, CPU s",
    "startup": "import of what predicts, s",
}


def prepare(folder: Path) -> None:
    """Write the pictures and the slide, with the checkout that this process imports."""
    import numpy as np
    from PIL import Image

    from keyhole.cli.main import main

    rng = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (folder / "images" / name).mkdir(parents=True)
        for place in range(24):
            pixels = rng.integers(0, 128, (384, 512, 3)) + 100 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"{place}.png")
    Image.fromarray(rng.integers(0, 255, (1600, 1600, 3)).astype(np.uint8)).save(folder / "large.png")
    (folder / "config.yaml").write_text(CONFIG)
    assert main(["data", "slides", str(folder / "slides"), "--count", "1", "--side", "4096"]) == 0


def measure(folder: Path, out: Path) -> dict[str, float]:
    """One turn of the checkout that this process imports."""
    import resource

    begin = time.perf_counter()
    import keyhole

    load = keyhole.load
    found = {"startup": time.perf_counter() - begin}
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from keyhole.cli.main import main

    torch.set_num_threads(1)
    moments: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: moments.append(time.perf_counter()))
    begin = time.process_time()
    said = main(["train", f"{folder}/images", "--config", f"{folder}/config.yaml", "--out", f"{out}/run"])
    assert said == 0, f"train ended with exit code {said}"
    found["train"] = time.process_time() - begin
    hook.remove()
    found["step"] = statistics.median(b - a for a, b in itertools.pairwise(moments))
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    predictor = load(f"{out}/run", device="cpu")
    predictor.predict(folder / "large.png")
    times = []
    for _ in range(15):  # one alone varies by a half
        begin = time.perf_counter()
        predictor.predict(folder / "large.png")
        times.append(time.perf_counter() - begin)
    found["predict"] = statistics.median(times)
    slide = next((folder / "slides").rglob("*.tif*"))
    begin = time.process_time()
    options = ["--run", f"{out}/run", "--out", f"{out}/features", "--device", "cpu"]
    said = main(["embed", str(slide), *options])
    assert said == 0, f"embed ended with exit code {said}"
    found["read"] = time.process_time() - begin
    return found


def turn(checkout: Path, *arguments: str) -> str:
    """What a new process of a checkout prints last."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr}")
    return done.stdout.splitlines()[-1]


def seconds_of_help(checkout: Path) -> float:
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "keyhole", "--help"], env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    checkouts = [path.resolve() for path in given.checkouts]
    found: list[dict[str, list[float]]] = [{name: [] for name in NAMES} for _ in checkouts]
    with tempfile.TemporaryDirectory() as folder:
        turn(checkouts[0], "--prepare", folder)
        for number in range(given.rounds + 1):  # the first turn fills the caches and does not count
            for side, checkout in enumerate(checkouts):
                one = json.loads(turn(checkout, "--measure", folder, f"{folder}/{number}-{side}"))
                one["help"] = seconds_of_help(checkout)
                for name, value in one.items() if number else ():
                    found[side][name].append(value)
    lines = ["| | before | after | ratio |", "| --- | ---: | ---: | ---: |"]
    for name, text in NAMES.items():
        sides = [side[name] for side in found]
        shown = [f"{statistics.median(one):.4g} ({min(one):.4g} to {max(one):.4g})" for one in sides]
        ratio = statistics.median(sides[1]) / statistics.median(sides[0])
        lines.append(f"| {text} | {shown[0]} | {shown[1]} | {ratio:.2f} |")
    commits = [
        subprocess.check_output(["git", "-C", str(one), "rev-parse", "--short", "HEAD"], text=True).strip()
        for one in checkouts
    ]
    told = f"Before is commit {commits[0]}, after is {commits[1]}; median, lowest and highest of {given.rounds} turns."
    for commit, checkout in zip(commits, checkouts, strict=True):
        lines += ["", f"Files and functions that {commit} runs through:", "", *counted(checkout)]
    print("\n".join([told, "", *lines]))
    if not given.no_write:
        write_result("against", "Two checkouts side by side", [told, "", *lines])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--measure"]:
        Path(sys.argv[3]).mkdir()
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
