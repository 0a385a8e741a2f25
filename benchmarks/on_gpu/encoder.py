"""The encoder that looks: whether batch norm folds, whether its graph breaks, and patches a second alone."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from on_gpu.bench import Bench, floor, new_engine
from on_gpu.streams import CHUNK, OTHERS

if TYPE_CHECKING:
    from keyhole.engine import Engine

NETWORKS = ("resnet18", "tf_efficientnet_lite0", "mobilenetv3_large_100")


def encoder(bench: Bench) -> None:
    bench.attempt("compiled", lambda: compiled(bench))
    bench.attempt("folding", lambda: folding(bench))
    for chunk in (8,) if bench.dry else (CHUNK, OTHERS[-1]):
        bench.attempt("eager", lambda chunk=chunk: alone(bench, chunk, False))  # type: ignore[misc]


def compiled(bench: Bench) -> None:
    """One graph without a break, then rates; what is compiled here lies in torch's cache for the parts that follow."""
    from torch._dynamo.utils import counters

    for chunk in (8,) if bench.dry else (CHUNK, *OTHERS):
        counters.clear()
        found = alone(bench, chunk, True)
        breaks = sorted(counters["graph_break"])
        graphs = counters["stats"]["unique_graphs"]
        if bench.dry or chunk == CHUNK:
            bench.figure("floor", found, f"{found:,.0f} (chunks of {chunk})")
            bench.figure("breaks", len(breaks), f"{len(breaks)} breaks, {graphs} graphs")
        for each in breaks:
            bench.say(f"graph break: {' '.join(str(each).split())[:300]}")


def alone(bench: Bench, chunk: int, compile_it: bool) -> float:
    """Patches a second of ResNet-18 in bf16."""
    engine, start = new_engine(bench, compile_it), time.perf_counter()
    pixels = torch.zeros(chunk, bench.side, bench.side, 3, dtype=torch.uint8, device=bench.device)
    with engine.encoders.inference():
        engine.encoders.embed(pixels)
    first = time.perf_counter() - start
    found, refresh = floor(bench, engine, chunk), refreshing(bench, engine)
    how = "compiled" if compile_it else "eager"
    bench.say(f"{how}, chunk {chunk}: {found:9,.0f} patches/s; first call {first:.1f} s; new weights {refresh:.1f} ms")
    return found


def refreshing(bench: Bench, engine: Engine) -> float:
    """Milliseconds that the copy takes to follow weights that have changed."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        with torch.no_grad():
            for weight in engine.model.parameters():
                weight.mul_(1.0)
        with engine.encoders.inference():
            pass
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / 3


def folding(bench: Bench) -> None:
    """Whatever precision convolutions have, as many batch norms are folded."""
    same, said = True, []
    for name in NETWORKS[:1] if bench.dry else NETWORKS:
        folded = []
        for tf32 in (True, False):
            with _tf32(bench, tf32):
                encoders = new_engine(bench, encoder=name).encoders
                with encoders.inference():
                    encoders.embed(torch.zeros(4, 64, 64, 3, dtype=torch.uint8, device=bench.device))
            folded.append(encoders.fast.folded)
        same = same and folded[0] == folded[1] > 0
        said.append(f"{name} {folded[0]} with TF32, {folded[1]} without")
    bench.figure("folding", same, "; ".join(said))


def _tf32(bench: Bench, on: bool) -> AbstractContextManager[object]:
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=on) if bench.device.type == "cuda" else nullcontext()
