"""The pass without gradients over patches from device memory, host memory and a JPEG TIFF, as shares of the encoder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from alternate import wait
from machine import cores
from repeated_slide import write_repeated

from keyhole.config.settings import RunConfig, SelectConfig
from keyhole.engine.memory.plan import Plan
from keyhole.engine.opening import open_reader
from keyhole.engine.to_device import Stager
from keyhole.loading import Reader
from keyhole.nn import Selection
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import PatchSource, TensorPatches
from on_gpu.bench import Bench, floor, new_engine, rate

if TYPE_CHECKING:
    from keyhole.engine import Engine

SECONDS = 2.0
"""Of a stream, if it were as fast as the encoder alone."""
CHUNK, OTHERS = 512, (256, 1024)
"""Patches of 256 px that a memory plan takes at a time where nothing is scarce, and others to compare with."""
SELECT = SelectConfig(m=64)


@dataclass(frozen=True)
class InMemory:
    """Opens patches that lie in host memory."""

    patches: np.ndarray[Any, np.dtype[np.uint8]]
    name: str = "patches"

    def __call__(self) -> PatchSource:
        return TensorPatches(self.patches, self.name)


@dataclass(frozen=True)
class Stream:
    """One way to bring patches to the encoder.

    Attributes:
        title: for the reader.
        opener: of one image.
        patches: that it has.
        chunk: patches that are encoded together.
        threads: that read; None is the default.
        deliver: which tiles the device decodes: "as built", those that come while it waits; "all" or "none".
    """

    title: str
    opener: Callable[[], PatchSource]
    patches: int
    chunk: int
    threads: int | None = None
    deliver: str = "as built"


def memory_stream(bench: Bench) -> None:
    """Patches of 256 px that all differ from their neighbours, from the device's memory and from the host's."""
    some = np.random.default_rng(0).integers(0, 256, (64 if bench.dry else 1024, bench.side, bench.side, 3), np.uint8)
    patches = some if bench.dry else np.concatenate([some] * 8)
    for chunk in (16,) if bench.dry else (CHUNK, OTHERS[-1]):
        engine = new_engine(bench, compiled=True)
        alone = floor(bench, engine, chunk)
        bench.say(f"encoder alone, chunk {chunk}: {alone:,.0f} patches/s")
        measured = Stream(f"host memory, chunk {chunk}", InMemory(patches), len(patches), chunk)
        share, _ = stream(bench, measured, engine, alone)
        if bench.dry or chunk == CHUNK:
            bench.figure("stream.host", share, f"{share:.3f}: {share * alone:,.0f} of {alone:,.0f} patches/s")
        found = on_device(bench, engine, patches, chunk)
        shown = f"{found / alone:.3f}: {found:,.0f} of {alone:,.0f} patches/s"
        bench.say(f"device memory, chunk {chunk}: {shown}")
        if bench.dry or chunk == CHUNK:
            bench.figure("stream.device", found / alone, shown)


def on_device(bench: Bench, engine: Engine, patches: np.ndarray[Any, Any], chunk: int) -> float:
    """Patches a second of `IPSClassifier.select` with the fast encoder, on patches that lie on the device."""
    there = torch.from_numpy(patches).to(bench.device)
    images = there.permute(0, 3, 1, 2)[None]  # (b n c h w), as it takes pixels; the bytes stay as they are

    def select() -> Selection:
        with engine.encoders.inference():
            return engine.model.select(images, SELECT.m, chunk, encode=engine.encoders.embed)

    return rate(bench, select, len(patches))


def file_stream(bench: Bench) -> None:
    """Tiles of a JPEG TIFF on an aligned grid: as built first, then who decodes, how many threads, how large chunks."""
    side = 512 if bench.dry else 32_768
    path = write_repeated(Path(bench.scratch) / f"tiles-{side}.tif", side, source=2048 if bench.dry else 8192)
    opener, patches = FileOpener(path, "tiles", 256), (side // 256) ** 2
    chunk, others = (8, (4,)) if bench.dry else (CHUNK, OTHERS)
    engine = new_engine(bench, compiled=True)
    alone = floor(bench, engine, chunk)
    bench.say(f"encoder alone, chunk {chunk}: {alone:,.0f} patches/s")
    built = Stream("as built", opener, patches, chunk)
    share, threads = stream(bench, built, engine, alone)
    bench.figure("stream.jpeg", share, f"{share:.3f}: {share * alone:,.0f} of {alone:,.0f} patches/s, as built")
    for title, deliver in (("the host decodes all", "none"), ("the device decodes all", "all")):
        changed = dataclasses.replace(built, title=title, deliver=deliver)
        bench.attempt(title, lambda changed=changed: stream(bench, changed, engine, alone))  # type: ignore[misc]
    for count in (2,) if bench.dry else (8, 12, 15, 16):
        if count != threads and (bench.dry or count <= cores()):
            changed = dataclasses.replace(built, title="other threads", threads=count)
            bench.attempt(changed.title, lambda changed=changed: stream(bench, changed, engine, alone))  # type: ignore[misc]
    for chunk in others:
        engine = new_engine(bench, compiled=True)
        alone = floor(bench, engine, chunk)
        bench.say(f"encoder alone, chunk {chunk}: {alone:,.0f} patches/s")
        stream(bench, dataclasses.replace(built, title=f"chunk {chunk}", chunk=chunk), engine, alone)


def stream(bench: Bench, what: Stream, engine: Engine, alone: float) -> tuple[float, int]:
    """Selects from the same image again and again: the share of the encoder alone that is reached, reading threads."""
    stager = Stager(bench.device, encoded=True if bench.dry else None)  # a CPU can decode as a device does
    deliver = None if what.deliver == "none" else stager.deliver
    if deliver is not None and what.deliver == "all":
        deliver = dataclasses.replace(deliver, always=True)
    engine.settings, engine.plan, engine.stager = SELECT, Plan(chunk=what.chunk), stager
    images = 1 if bench.dry else max(2, round(SECONDS * alone / what.patches))
    with open_reader(RunConfig(threads=what.threads), bench.device) as reader:
        start = _counts(reader)
        for number, batch in enumerate(reader.stream([[what.opener]] * (images + 1), what.chunk, deliver=deliver)):
            engine.select(batch)
            if number == 0:  # opens the file, compiles and fills buffers
                wait(bench.device)
                start = _counts(reader)
        wait(bench.device)
        now = _counts(reader)
        threads = reader.threads.count
    seconds, patches, encoded, waited = (there - here for here, there in zip(start, now, strict=True))
    found = patches / seconds
    bench.say(
        f"{what.title} ({threads} threads): {found:9,.0f} patches/s = {found / alone:.3f} of the encoder; "
        f"{encoded / patches:.0%} came as JPEG, the consumer waited {waited / seconds:.0%} of the time, "
        f"{stager.refused} chunks refused"
    )
    return found / alone, threads


def _counts(reader: Reader) -> tuple[float, int, int, float]:
    """Time, patches handed over, those of them as JPEG, and seconds that the consumer has waited."""
    return time.perf_counter(), reader.read_patches, reader.encoded_patches, reader.waited
