"""One part of a call in its process: `python part.py NAME --scratch DIR --seconds S [--mnist DIR] [--dry]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder is a package, its files are not modules

MODULES = {
    "facts": "facts",
    "decoder": "decoder",
    "encoder": "encoder",
    "memory-stream": "streams",
    "file-stream": "streams",
    "commands": "commands",
    "tests": "marked_tests",
    "recovery": "recovery",
    "plan": "recovery",
    "compile-traffic": "steps",
    "compile-digits": "steps",
    "compile-published": "digits",
    "compile-advised": "digits",
    "compile-slides": "slides",
    "draw": "draw",
    "draw-canvases": "draw",
    "digits-pace": "pace",
    "steps": "steps",
    "slides": "slides",
    "photographs": "photos",
    "digits": "digits",
    "digits-advised": "digits",
}
"""Where the function of a part is, under its name with `_` for `-`."""
LOOK = 1.0
"""Seconds between two looks at whether the call is still there."""


def end_with_call() -> None:
    """Ends this process group once the call that started it is gone, so that nothing computes beside the next one."""
    call = os.getppid()

    def watch() -> None:
        while os.getppid() == call:
            time.sleep(LOOK)
        os.killpg(0, signal.SIGKILL)

    if os.getpgrp() == os.getpid():  # as the call starts a part
        threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    end_with_call()
    if options.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first asks for a GPU

    import torch

    from on_gpu.bench import Bench

    device = torch.device("cpu" if options.dry else "cuda")
    if not options.dry and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --dry runs on a CPU")
    bench = Bench(options.name, device, options.dry, options.scratch, options.mnist, begun + options.seconds)
    check = getattr(import_module(f"on_gpu.{MODULES[options.name]}"), options.name.replace("-", "_"))
    check(bench)
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
