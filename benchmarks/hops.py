"""Files and functions of keyhole that one prediction and one training step run through, for each checkout given.

    python benchmarks/hops.py [--list] [CHECKOUT ...]

Counts what Python calls in all threads (`sys.setprofile`), without module bodies, lambdas and comprehensions; `--list`
names it. Each checkout trains on generated images for a few steps, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType

HERE = Path(__file__).resolve().parent.parent


class Hops:
    """Code objects of keyhole that were called since `begin`."""

    def __init__(self, package: Path) -> None:
        self.package, self.seen = str(package), set[CodeType]()

    def called(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(self.package):
            self.seen.add(frame.f_code)

    def begin(self) -> None:
        self.seen.clear()
        threading.setprofile(self.called)
        sys.setprofile(self.called)

    def end(self) -> list[tuple[str, str, str]]:
        """File, name and first line of each function, with the folders inside the package."""
        sys.setprofile(None)
        threading.setprofile(None)
        called = {
            (Path(code.co_filename).relative_to(self.package).as_posix(), code.co_firstlineno, code.co_qualname)
            for code in self.seen
            if not code.co_name.startswith("<")
        }
        return [(file, name, str(line)) for file, line, name in sorted(called)]


def measure(names: bool) -> None:
    """Measure the checkout that this process imports."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import keyhole
    from keyhole.cli.main import main

    torch.set_num_threads(1)
    package = Path(keyhole.__file__).parent
    hops = Hops(package)
    steps: list[list[tuple[str, str, str]]] = []

    def stepped(*_: object) -> None:
        steps.append(hops.end())
        hops.begin()

    register_optimizer_step_post_hook(stepped)
    with tempfile.TemporaryDirectory() as folder:
        images(Path(folder, "images"))
        Path(folder, "config.yaml").write_text(
            "model: {encoder: small, width: 8}\npatch: {size: 32}\nselect: {m: 4}\n"
            "train: {epochs: 1, batch: 4}\nrun: {threads: 1, device: cpu}\n"
        )
        hops.begin()
        code = main(["train", f"{folder}/images", "--config", f"{folder}/config.yaml", "--out", f"{folder}/run"])
        after = hops.end()
        assert code == 0, f"train ended with exit code {code}"
        predictor = keyhole.load(f"{folder}/run")
        image = next(Path(folder, "images").rglob("*.png"))
        hops.begin()
        predictor.predict(image)
        predicted = hops.end()
        hops.begin()
        code = main(["predict", f"{folder}/run", str(image), "--out", f"{folder}/said"])
        command = hops.end()
        assert code == 0, f"predict ended with exit code {code}"
    lines, files = 0, 0
    for file in package.rglob("*.py"):
        lines, files = lines + len(file.read_text(encoding="utf-8").splitlines()), files + 1
    for what, functions in {
        "`keyhole train` until its first optimizer step": steps[0],
        "one training step (the second)": steps[1],
        "the rest of the run: validation, saving, predictions of the splits": after,
        "`Predictor.predict` of one image": predicted,
        "`keyhole predict` of one image": command,
    }.items():
        print(f"| {what} | {len({file for file, *_ in functions})} | {len(functions)} |")
        if names:
            print("".join(f"|    {file}:{line} {name} | | |\n" for file, name, line in functions), end="")
    print(f"| all of `src/keyhole` ({lines:,} lines) | {files} | |")


def images(folder: Path) -> None:
    """Write eight noisy pictures of each of two classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for place in range(8):
            pixels = rng.integers(0, 128, (128, 160, 3)) + 100 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{place}.png")


def counted(checkout: Path, options: Sequence[str] = ()) -> list[str]:
    """A table of files and functions, as lines of Markdown."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--here", *options]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return ["| | files | functions |", "| --- | ---: | ---: |", *rows]


if __name__ == "__main__":
    listing = [option for option in sys.argv[1:] if option == "--list"]
    if "--here" in sys.argv:
        measure(names=bool(listing))
    else:
        checkouts = [Path(given).resolve() for given in sys.argv[1:] if given not in listing]
        for given in checkouts or [HERE]:
            print("\n".join([f"{given.name}:", "", *counted(given, listing), ""]), flush=True)
