"""`keyhole demo` for several seeds: accuracy with its interval, and time, into a dated Markdown file.

    python benchmarks/demo.py [--seeds 0 1 2]

The images are generated; the figures say that the whole path works on this machine, nothing about real data.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import cores as count_cores
from machine import processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    rows = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            out = Path(folder) / f"demo-{seed}"
            start = time.monotonic()
            command = [sys.executable, "-m", "keyhole", "demo", "--seed", str(seed), "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.monotonic() - start
            if done.returncode:
                sys.exit(f"seed {seed} ended with {done.returncode}: {done.stderr[-2000:]}")
            lines = done.stdout.splitlines()
            accuracy = next(line.removeprefix("accuracy ") for line in lines if line.startswith("accuracy "))
            hits = next(line for line in lines if "are on a digit" in line)
            with (out / "run" / "metrics.csv").open(newline="") as file:
                peak = max(float(row["peak_gb"]) for row in csv.DictReader(file))
            rows.append((seed, accuracy, f"{seconds:.0f} s", f"{peak:.1f} GB"))
            versions = json.loads((out / "run" / "environment.json").read_text())["versions"]
            print(seed, accuracy, f"{seconds:.0f} s", hits, sep="; ", flush=True)
    cores = count_cores()
    date = time.strftime("%Y-%m-%d")
    text = [
        f"# `keyhole demo`, {cores} CPU cores, {date}",
        "",
        "Generated images (digits among strokes): 240 to learn from, 40 to choose by, 200 never seen.",
        "Guessing gives 0.20.",
        "Time is that of the whole command: images written, trained, evaluated.",
        "",
        "| seed | accuracy on the 200 unseen [95 % interval] | time | peak memory |",
        "|---|---|---|---|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
        f"{processor()}, {cores} cores, {platform.system()}; Python {versions['python']}, torch {versions['torch']}.",
        "Made by `python benchmarks/demo.py`.",
        "",
    ]
    path = Path(__file__).parent / f"demo_{cores}cpu_{date}.md"
    path.write_text("\n".join(text))
    print(path)


if __name__ == "__main__":
    main()
