"""The machine: what is installed and what is missing, and how fast it copies and multiplies."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from alternate import peaks

from on_gpu.bench import Bench, rate


def facts(bench: Bench) -> None:
    requirements(bench)
    _foreach(bench)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = shutil.disk_usage(bench.scratch).free
    bench.say(f"host memory {memory / 1e9:.0f} GB, free on the disk {disk / 1e9:.0f} GB, triton {_found('triton')}")
    if bench.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        bench.say(
            f"device memory {free / 1e9:.1f} GB free of {total / 1e9:.1f}; cuDNN {torch.backends.cudnn.version()}"
        )
        bench.say(
            f"TF32: convolutions {torch.backends.cudnn.allow_tf32}, products {torch.backends.cuda.matmul.allow_tf32}"
        )
    bench.attempt("copies", lambda: copies(bench))
    bench.attempt("products", lambda: products(bench))


def requirements(bench: Bench) -> None:
    """What keyhole asks for and this machine has not, or not new enough."""
    from packaging.requirements import Requirement

    for line in requires("keyhole") or ():
        asked = Requirement(line)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        found = _found(asked.name)
        if found == "missing" or not asked.specifier.contains(found, prereleases=True):
            bench.say(f"requirement {asked}: {found}")


def _found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _foreach(bench: Bench) -> None:
    """torch 2.8 to 2.10 copy wrongly into tensors of different types at once (pytorch pull request 173531)."""
    kinds = (torch.bfloat16, torch.float32, torch.bfloat16)
    targets = [torch.zeros(1000, dtype=kind, device=bench.device) for kind in kinds]
    torch._foreach_copy_(targets, [torch.ones(1000, device=bench.device)] * 3)
    right = all(bool((target == 1).all()) for target in targets)
    bench.figure("foreach", right, "right" if right else "wrong")


def copies(bench: Bench) -> None:
    """From pinned and pageable memory."""
    size = 2**20 if bench.dry else 2**29
    target = torch.empty(size, dtype=torch.uint8, device=bench.device)
    for pinned in (True, False) if bench.device.type == "cuda" else (False,):
        source = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).zero_()
        found = rate(bench, lambda source=source: target.copy_(source, non_blocking=True), size, 0.5)  # type: ignore[misc]
        bench.say(f"copies from {'pinned' if pinned else 'pageable'} memory: {found / 1e9:.1f} GB/s")


def products(bench: Bench) -> None:
    for kind, found in peaks(bench.device, 256 if bench.dry else None).items():
        bench.say(f"matrix products in {str(kind).removeprefix('torch.')}: {found / 1e3:,.1f} TFLOP/s")
