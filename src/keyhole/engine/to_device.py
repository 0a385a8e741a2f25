"""Chunks from the reader -> pixels on the device, of one static shape, while the chunk before is encoded.

    stager = Stager(device)
    for batch in reader.stream(batches, pace.plan.chunk, deliver=stager.deliver):
        for chunk, pixels in prefetched(batch.chunks(), stager, pace):
            ...                                   # pixels: all rows of the buffer; `chunk.count` of them are in use

On a GPU copies have a stream of their own and two buffers. The device orders copies and encoder by events. The host
waits only for the copy of two chunks ago. The thread that plans the reading waits until a buffer has been copied before
the buffer is filled again.

The device decodes the JPEG tiles of a chunk in one call. If it refuses one, the host decodes all of the chunk and names
what is wrong. Decoders differ in the last bit, more where colours are upsampled, and which tiles the device decodes
depends on timing. On a CPU and under `run.decode cpu` the host decodes all, and both passes see the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from keyhole.engine.jpeg import Decoder, Kinds, decodes
from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import Plan
from keyhole.loading.chunks import Chunk, Delivery
from keyhole.patches.sources import View
from keyhole.util.budget import out_of_memory
from keyhole.util.timing import NO_TIMER, Timer

T = TypeVar("T")


class Stager:
    """Copies one chunk after the other to a device. A run has one stager, since it holds two buffers.

    Args:
        device: of the encoder.
        timer: measures the time of copies and decoding as "copying".
        encoded: whether chunks may bring JPEG, with the decoder tried at once. By default they may on a GPU, whose
            decoder is tried when a file first has JPEG.

    Attributes:
        deliver: the argument of `Reader.stream`: what may come as JPEG; None where nothing may.
        note: why the host decodes some or all kinds of JPEG, or "".
        tell: called with the `note`, if set.
        refused: chunks whose encoded rows went back to the host.
    """

    def __init__(self, device: torch.device, timer: Timer = NO_TIMER, encoded: bool | None = None) -> None:
        self.device, self.timer = device, timer
        self.tell: Callable[[str], None] | None = None
        self.note, self.refused = "", 0
        self._kinds = Kinds()
        may = may_decode(device) if encoded is None else encoded
        self.deliver: Delivery | None = Delivery(self._kinds) if may else None
        if encoded:
            self._try_decoder()
        self._slots = slots_for(device)

    def __call__(self, chunk: Chunk, rows: int | None = None) -> Tensor:
        """Return the first `rows` of a chunk's buffer on the device, default all: uint8 (size h w c), float32 (size f).

        Rows from `count` on are zeros. On a GPU, launch the work that uses the result on the current stream before the
        next call. `chunk` may lose rows, see `Chunk.decode_on_host`. If the device runs out of memory, the chunk does
        not change, so that the caller can try fewer rows of it.

        Raises:
            KeyholeError: a patch that came encoded could not be read, and failures are raised.
        """
        if self._kinds.asked and self._kinds.known is None:
            self._try_decoder()
        rows = len(chunk.pixels) if rows is None else rows
        if self._slots is not None:
            try:
                return self._copied(chunk, rows, self._slots)
            except BaseException:
                self._slots.clear()  # a buffer may hold half of a chunk, and its memory may be what is missing
                raise
        decoded = self._decoded(chunk, rows)
        with self.timer.part("copying"):
            pixels = _tensor(chunk, rows)
            for places, block in decoded:
                pixels[places] = block
            return pixels if pixels.dtype == torch.uint8 else pixels.float()

    def _try_decoder(self) -> None:
        self._kinds.known, self.note = decodes(self.device)
        if self._kinds.known:
            self._decode = Decoder(self.device)
        else:
            self.deliver = None
        if self.note and self.tell is not None:
            self.tell(self.note)

    def _copied(self, chunk: Chunk, rows: int, slots: Slots) -> Tensor:
        source = _tensor(chunk, rows)
        pixels = slots.next(source)
        with slots.filling(), self.timer.part("copying"):
            decoded = self._decoded(chunk, rows)
            for start, stop in _without(len(source), [row for row in sorted(chunk.encoded) if row < rows]):
                pixels[start:stop].copy_(source[start:stop], non_blocking=True)
            for places, block in decoded:
                pixels.index_copy_(0, slots.moved(places), block)
            result = pixels if pixels.dtype == torch.uint8 else pixels.float()
        chunk.copied = slots.copied(result)
        return result

    def _decoded(self, chunk: Chunk, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Return places in the first rows of a chunk and their pixels, for each view; none if the host decoded them."""
        by_view: dict[View, list[int]] = {}
        for row, coded in chunk.encoded.items():
            if row < rows:
                by_view.setdefault(coded.view, []).append(row)
        found = []
        try:
            for view, places in by_view.items():
                pixels = self._decode([chunk.encoded[row].data for row in places], chunk.pixels.shape[-1])
                found.append((torch.tensor(places), _turned(pixels, view)))
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self.refused += 1
            chunk.decode_on_host()
            return []
        return found


def may_decode(device: torch.device) -> bool:
    """Return whether a device may have a JPEG decoder of its own."""
    return device.type == "cuda"


def slots_for(device: torch.device) -> Slots | None:
    """Return the buffers that chunks are copied to; None on a CPU, where the reader's own are used."""
    return Slots(device) if device.type == "cuda" else None


class Slots:
    """Two buffers on a GPU and the stream that fills them.

    A buffer is filled again two calls later. The call between has launched what reads it, and the copy waits for the
    event of that call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []
        self._used: list[torch.cuda.Event] = []  # of the last two calls: all that was launched before them
        self._copies: list[torch.cuda.Event] = []

    def filling(self) -> AbstractContextManager[object]:
        """Launch work of the device on the stream that fills the buffers."""
        return torch.cuda.stream(self.stream)

    def moved(self, rows: Tensor) -> Tensor:
        """Return a small tensor of the host on the device, without waiting for the device."""
        return rows.pin_memory().to(self.device, non_blocking=True)

    def clear(self) -> None:
        """Free the buffers; torch uses their memory again when copies to and from them have ended."""
        self._buffers = []

    def next(self, like: Tensor) -> Tensor:
        """Return the buffer to fill, after the copy of two calls ago; `stream` waits until nothing reads it."""
        if len(self._copies) == 2:
            self._copies.pop(0).synchronize()
        now = torch.cuda.Event()  # type: ignore[no-untyped-call]
        now.record(torch.cuda.current_stream(self.device))
        fresh = not self._buffers or self._buffers[0].shape != like.shape or self._buffers[0].dtype != like.dtype
        if fresh:
            self.clear()
            self._buffers = [torch.empty_like(like, device=self.device, pin_memory=False) for _ in range(2)]
            for buffer in self._buffers:
                buffer.record_stream(self.stream)
            self._used = [now]  # new memory may still be in use by what was launched before it was freed
        self._used = [*self._used[-1:], now]
        self.stream.wait_event(self._used[0])
        self._buffers.reverse()
        return self._buffers[0]

    def copied(self, result: Tensor) -> Callable[[], None]:
        """Let the current stream wait for `stream`; return a function that makes the host wait for it."""
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self.stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        result.record_stream(current)
        self._copies.append(done)
        return done.synchronize


def prefetched(chunks: Iterable[Chunk], stage: Callable[[Chunk, int], T], pace: Pace) -> Iterator[tuple[Chunk, T]]:
    """Yield chunks and what `stage` (a `Stager`) makes of them; chunks that have lost all rows are left out.

    The next chunk is staged when the consumer asks for it, after launching its work on this one. On a GPU the copy runs
    beside that work, unless the consumer waits for the device in between. A chunk of more rows than the plan has comes
    in parts, and the plan is halved when staging runs out of memory.
    """
    for chunk in chunks:
        rest = chunk
        while rest.count:
            part, staged, behind = pace.run("select", partial(_first, rest, stage))
            chunk.copied = rest.copied  # copies end in the order in which they begin
            if part.count:
                yield part, staged
            rest = behind


def _first(rest: Chunk, stage: Callable[[Chunk, int], T], plan: Plan) -> tuple[Chunk, T, Chunk]:
    """Return as many rows as a plan has, what `stage` makes of them, and the rows behind them."""
    size = len(rest.pixels)
    if plan.chunk >= size:
        return rest, stage(rest, size), rest.part(size, size)
    staged = stage(rest, plan.chunk)
    return rest.part(0, plan.chunk), staged, rest.part(plan.chunk, size)  # cut when `rest` may have lost rows


def _tensor(chunk: Chunk, rows: int) -> Tensor:
    return torch.from_numpy(np.require(chunk.pixels, requirements=["C", "W"]))[:rows]


def _turned(pixels: Tensor, view: View) -> Tensor:
    """Return patches (k h w c) turned as `View.pixels` turns them, with one copy at most."""
    turns = view.turns % 4  # a quarter turn is a flip and a transposition, which copies nothing
    axes = [axis for axis, flip, of in ((1, view.flip_y, (2, 3)), (2, view.flip_x, (1, 2))) if flip != (turns in of)]
    flipped = pixels.flip(axes) if axes else pixels
    return flipped.transpose(1, 2) if turns % 2 else flipped


def _without(size: int, rows: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of 0 ... size - 1 between `rows` (sorted)."""
    start = 0
    for row in [*rows, size]:
        if row > start:
            yield start, row
        start = row + 1
