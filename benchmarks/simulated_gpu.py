"""A simulation: how reading threads and a GPU share the work, with sleeping in the place of both.

    python benchmarks/simulated_gpu.py [--quick] [--no-write]

The real `Reader` plans, reads ahead and hands over; decoding, copying and encoding are sleeps of the lengths that were
measured on a GPU machine of 16 cores. So it shows what the order of the work allows, on a machine of any size. It does
not show threads that take the interpreter from each other, nor a decoder that takes time from the encoder: expect less
on a device.

Slides: patches that are JPEG tiles, which a thread decodes or hands to the device's decoder as they are.
Photographs: pictures that are decoded whole at their first read.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from machine import cores, write_result
from PIL import Image as Pictures

from keyhole.images.image import ArrayImage
from keyhole.images.pillow import PillowImage
from keyhole.images.pixels import Pixels
from keyhole.loading import Chunk, Delivery, FetchOnly, Reader
from keyhole.patches.grid import PatchGrid
from keyhole.patches.sources import FilePatches

HOST, DECODER, ENCODER = 23_600 / 16, 40_000.0, 50_400.0
"""Patches of 256 px a second: decoded by one thread of sixteen, by the device's decoder, and encoded (ResNet-18)."""
UNDECODED = 19e-6
"""Seconds of a thread to take a tile from its file as it is."""
BAR = 0.55
"""Share of the encoder that a stream from a JPEG TIFF is to reach."""
PICTURE = 0.015
"""Seconds to decode a photograph of 1600 x 1200 px; of single ones, a third less to a third more."""
PATCHES, BATCH, KEPT = 192, 16, 10
"""Of 100 px in such a photograph, photographs of a step, and patches that are kept of one."""
POLICIES: dict[str, Delivery | None] = {
    "host only": None,
    "as built": Delivery(frozenset(["ycbcr"])),
    "always the device": Delivery(frozenset(["ycbcr"]), always=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer settings and less of each; nothing is written")
    parser.add_argument("--no-write", action="store_true", help="print the result and write no file")
    options = parser.parse_args()
    threads, seconds = ([16], 0.7) if options.quick else ([4, 8, 15, 16], 1.5)
    lines = [
        "**A simulation, not a measurement of a device.** The real `Reader` hands over patches whose decoding, copying "
        f"and encoding are sleeps: a thread decodes {HOST:,.0f} tiles/s, or takes one undecoded from the file in "
        f"{UNDECODED * 1e6:.0f} us; the device's decoder makes {DECODER:,.0f}/s, for which the launching thread waits, "
        f"while the encoder takes {ENCODER:,.0f} patches/s. Nothing here contends for the interpreter or for the "
        "device: expect less on one. The faster of two runs each, since other work on the machine only slows them. "
        f"Load average at the start (1, 5, 15 minutes): {', '.join(f'{load:.1f}' for load in os.getloadavg())}; above "
        f"{cores()} others were at work.",
        "",
        f"Slides, patches that are JPEG tiles. The bar is {BAR} of the encoder.",
        "",
        *slides_table(threads, [256] if options.quick else [256, 512, 1024], seconds),
        "",
        f"Photographs of {PATCHES} patches, each decoded whole in 10 to 20 ms, {PICTURE * 1e3:.0f} on average; "
        f"steps of {BATCH}. Streamed: all patches. Fetched: {KEPT} patches of each, of photographs that have "
        "not been read yet. "
        "Chunks of 256 hold 8 photographs in the ring, those of 1,024 hold 32.",
        "",
        *photographs_table(threads, [1024] if options.quick else [256, 1024], seconds),
    ]
    if not (options.quick or options.no_write):
        print(write_result("simulated_gpu", "Reading beside a GPU, simulated", lines))


def slides_table(threads: Sequence[int], sizes: Sequence[int], seconds: float) -> list[str]:
    table = [
        "| threads | patches a chunk | policy | patches/s | share decoded by the device | of the encoder |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    for count, size, (name, deliver) in itertools.product(threads, sizes, POLICIES.items()):
        rate, share = max(slides(count, size, deliver, seconds) for _ in range(2))
        table.append(f"| {count} | {size:,} | {name} | {rate:,.0f} | {share:.2f} | {rate / ENCODER:.2f} |")
        print(table[-1], flush=True)
    return table


def photographs_table(threads: Sequence[int], sizes: Sequence[int], seconds: float) -> list[str]:
    table = [
        "| threads | patches a chunk | read | images/s | of what the threads can | most decodes at once | on average |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(table), flush=True)
    for count, size in itertools.product(threads, [*sizes, None]):
        rate, most, mean = max(photographs(count, size or sizes[-1], size is None, seconds) for _ in range(2))
        what = " | fetched" if size is None else f"{size:,} | streamed"
        table.append(f"| {count} | {what} | {rate:,.0f} | {rate * PICTURE / count:.2f} | {most} | {mean:.1f} |")
        print(table[-1], flush=True)
    return table


# --- slides ----------------------------------------------------------------------------------------------------------


class Slide(FilePatches):
    """Patches that are JPEG tiles, of which only the time to read them is there."""

    def __init__(self, patches: int) -> None:
        image = ArrayImage(np.zeros((2, 2 * patches, 1), np.uint8), "slide")
        super().__init__(image, PatchGrid(image, 2))
        self.in_memory = False  # it stands for a file

    def read(self, index: Any, out: Pixels | None = None) -> Pixels:
        assert out is not None
        time.sleep(len(out) / HOST)
        return out

    def encoded(self, index: Any, colors: frozenset[str]) -> list[bytes | None]:
        time.sleep(len(index) * UNDECODED)
        return [b"JPEG"] * len(index)


class Device:
    """What the launching thread does for a chunk: it waits for the decoder, and never for the encoder of the last two.

    The encoder is a time at which it will have done what it was given.
    """

    def __init__(self) -> None:
        self.ends = [0.0, 0.0]

    def __call__(self, chunk: Chunk) -> None:
        before, last = self.ends
        pause(before - time.perf_counter())  # the buffer is in use until then
        pause(len(chunk.encoded) / DECODER)
        self.ends = [last, max(last, time.perf_counter()) + chunk.count / ENCODER]

    def wait(self) -> None:
        pause(self.ends[1] - time.perf_counter())


def pause(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)


def slides(threads: int, chunk: int, deliver: Delivery | None, seconds: float) -> tuple[float, float]:
    """Patches a second through reader and device, and the share that the device decoded, once the ring is full."""
    device, warm = Device(), 8 * chunk
    patches = warm + int(seconds * min(1.0, threads / 16 if deliver is None else 1.0) * HOST * 16)
    slide = Opener("slide", lambda: Slide(patches))
    with Reader(threads) as reader:
        for batch in reader.stream([[slide]], chunk, deliver=deliver):
            start, begun, encoded = 0.0, 0, 0
            for each in batch.chunks():
                device(each)
                if start == 0.0 and reader.read_patches >= warm:
                    start, begun, encoded = time.perf_counter(), reader.read_patches, reader.encoded_patches
            device.wait()
    passed, done = time.perf_counter() - start, reader.read_patches - begun
    return done / passed, (reader.encoded_patches - encoded) / done


class Opener:
    """A source by name, made when called."""

    def __init__(self, name: str, make: Callable[[], FilePatches]) -> None:
        self.name = name
        self._make = make

    def __call__(self) -> FilePatches:
        return self._make()


# --- photographs -----------------------------------------------------------------------------------------------------


class Decodes:
    """How many decodes are in hand at once: the most, and the seconds of all of them."""

    def __init__(self) -> None:
        self.most = self.count = self._now = 0
        self.seconds = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.count += 1
            self.most = max(self.most, self._now)
        start = time.perf_counter()
        yield
        with self._lock:
            self._now -= 1
            self.seconds += time.perf_counter() - start


class Photograph(PillowImage):
    """A picture whose decoding is a sleep: the keeping of what is decoded, and the waiting for it, are real."""

    def __init__(self, path: Path, number: int, decodes: Decodes) -> None:
        super().__init__(path)
        self.seconds = PICTURE * (2 + number % 7 / 3) / 3  # 10 to 20 ms
        self.decodes = decodes

    def _decode(self) -> Pixels:
        with self.decodes.one():
            time.sleep(self.seconds)
        return np.zeros((self.size.height, self.size.width, self.channels), np.uint8)


class Cut(FilePatches):
    """Patches that are taken from the decoded picture at once: one access for many, so that cutting costs nothing."""

    def read(self, index: Any, out: Pixels | None = None) -> Pixels:
        assert out is not None
        self.image.read((0, 0, 1, 1))
        return out


def photographs(threads: int, chunk: int, fetched: bool, seconds: float) -> tuple[float, int, float]:
    """Photographs a second, and how many decodes were in hand at once: the most, and on average."""
    decodes = Decodes()
    count = max(1, round(seconds * threads / PICTURE / BATCH)) * BATCH
    with tempfile.TemporaryDirectory() as folder, Reader(threads) as reader:
        path = Path(folder) / "photograph.png"
        Pictures.new("L", (16, 12)).save(path)

        def opener(number: int) -> Any:
            def opened() -> FilePatches:
                image = Photograph(path, number, decodes)
                return Cut(image, PatchGrid(image, 1))

            one = Opener("photograph", opened)
            return FetchOnly(one) if fetched else one

        batches = [[opener(first + k) for k in range(BATCH)] for first in range(0, count, BATCH)]
        start = time.perf_counter()
        for batch in reader.stream(batches, chunk):
            assert fetched or sum(each.count for each in batch.chunks()) == BATCH * PATCHES
            batch.fetch([np.arange(KEPT)] * BATCH)
        passed = time.perf_counter() - start
    assert decodes.count == count, "each is decoded once"
    return count / passed, decodes.most, decodes.seconds / passed


if __name__ == "__main__":
    main()
