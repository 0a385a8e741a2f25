"""Training steps of the published settings, beside the published code, in the same process and in turns."""

from __future__ import annotations

import argparse
import dataclasses
import gc

import torch
from selection import settled, timed
from selection_settings import CUDA, Setting

from on_gpu.bench import Bench

SETTINGS = ("traffic-step-host", "traffic-step", "mnist-step")
TINY = {"b": 1, "n": 18, "m": 4, "i": 9, "chunk": 9, "size": 32, "stages": 1, "hidden": 16, "steps": 1}


def steps(bench: Bench) -> None:
    for name in SETTINGS:
        bench.attempt(name, lambda name=name: beside_published(bench, name))  # type: ignore[misc]


def beside_published(bench: Bench, name: str) -> None:
    """Medians of five rounds; what both sides keep is compared by `benchmarks/selection.py`, not here."""
    setting = chosen(name, bench.dry)
    inputs, model = settled(setting, bench.device)
    parts = setting.position  # of Megapixel MNIST, where the loss is the largest share
    found = timed(setting, model, inputs, bench.device, options(bench, 1 if bench.dry else 5), parts)
    seconds, (low, high) = found.seconds, found.spread
    shown = (
        f"{found.ratio:.2f} ({low:.2f} ... {high:.2f}): {1e3 * seconds['published']:.1f} ms published, "
        f"{1e3 * seconds['keyhole']:.1f} ms keyhole"
    )
    bench.figure(f"steps.{name}", found.ratio, shown)
    compiled = "compiled" if found.choice.compile else "not compiled"
    bench.say(f"{setting.title}: {found.precision}, {compiled}; the first call took {found.first:.1f} s more")
    if parts:
        learning, own = seconds["learning"], seconds["own encoder"]
        shown = f"{learning / own:.2f}: {1e3 * learning:.1f} ms, its encoder alone {1e3 * own:.1f} ms"
        bench.figure("steps.learning", learning / own, shown)
    del inputs, model
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def chosen(name: str, dry: bool) -> Setting:
    """A setting of `benchmarks/selection.py`."""
    setting = next(each for each in CUDA if each.name == name)
    return dataclasses.replace(setting, inputs="noise", **TINY) if dry else setting  # type: ignore[arg-type]


def options(bench: Bench, rounds: int) -> argparse.Namespace:
    """As on the command line of `benchmarks/selection.py`."""
    compiled = "off" if bench.dry else "on"
    return argparse.Namespace(rounds=rounds, precision="auto", compile=compiled, quick=bench.dry)


def compile_traffic(bench: Bench) -> None:
    _fill_cache(bench, "traffic-step-host")


def compile_digits(bench: Bench) -> None:
    _fill_cache(bench, "mnist-step")


def _fill_cache(bench: Bench, name: str) -> None:
    """Takes a step of a setting: what it compiles lies in torch's cache on disk afterwards."""
    setting = chosen(name, bench.dry)
    inputs, model = settled(setting, bench.device)
    found = timed(setting, model, inputs, bench.device, options(bench, 1), setting.position)
    bench.say(f"{setting.title}: the first call took {found.first:.1f} s more than a later one")
