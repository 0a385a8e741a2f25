"""What every dated result names: the machine, the versions, the file it goes to."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def describe(device: str = "cpu") -> str:
    """Processor, cores, accelerator where one is used, and versions."""
    import torch

    packages = ", ".join(f"{name} {version(name)}" for name in ("timm", "tifffile", "imagecodecs"))
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    many = f"{cores()} core{'' if cores() == 1 else 's'}"
    return (
        f"{processor()}, {many}{gpu}, {platform.system()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, {packages}."
    )


def hardware(device: str = "cpu") -> str:
    """Of a result's file name: `2cpu`, `h200`."""
    if not device.startswith("cuda"):
        return f"{cores()}cpu"
    import torch

    return card(torch.cuda.get_device_name(device))


def card(name: str) -> str:
    """Return a GPU's short name from its full one: "NVIDIA H100 80GB HBM3" gives `h100`, "GeForce RTX 4090" `4090`."""
    found = re.search(r"\b[A-Z]+\d+\w*", name) or re.search(r"\d+\w*", name)
    return (found[0] if found else name.split()[-1]).lower()


def write_result(
    theme: str, title: str, lines: Sequence[str], device: str = "cpu", words: Sequence[str] | None = None
) -> Path:
    """Write `theme_hardware_date.md` beside this file, with the command that made it.

    Its arguments are those of this call, in which paths become PATH, unless `words` are given.
    """
    date, script = time.strftime("%Y-%m-%d"), Path(sys.argv[0]).name
    if not Path(__file__).with_name(script).is_file():
        script = f"{theme}.py"
    given = ("PATH" if "/" in word else word for word in sys.argv[1:])
    command = shlex.join(["python", f"benchmarks/{script}", *(given if words is None else words)])
    text = [f"# {title}, {date}", "", *lines, "", describe(device), f"Made by `{command}`.", ""]
    path = Path(__file__).parent / f"{theme}_{hardware(device)}_{date}.md"
    path.write_text("\n".join(text))
    return path
