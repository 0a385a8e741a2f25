"""JPEG streams -> pixels on a device, many at once, by torchvision (nvJPEG on a GPU).

Versions differ in whether they obey the marker that tells RGB from YCbCr, so each decoder is first tried on generated
pictures. The host decodes the kinds that a device decodes wrongly.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from keyhole.engine.device import with_index
from keyhole.images.geometry import Size
from keyhole.images.jpeg import SOF0, Colors, merged_head
from keyhole.util.budget import out_of_memory

TRIAL_SIDE, MAX_DIFFERENCE = 256, 8
"""Side of a trial picture in pixels, as most tiles have, and the largest difference from the host's pixels, since
decoders differ in how they upsample colours."""

TRIED_DECODERS: dict[torch.device, tuple[frozenset[str], str]] = {}
"""Results of `decodes` by device."""


class Decoder:
    """Decodes JPEG on one device.

    torchvision writes, on a stream of its own, into memory of the current stream, and does not wait for work pending
    there. So this class calls it on a stream without pending work; torch may share that stream with others.
    """

    def __init__(self, device: torch.device) -> None:
        importlib.import_module("torchvision.io")  # registers the operators, which are called without its warnings
        self.device = with_index(device)  # torchvision has one decoder, and replaces it for a device of another name
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._done: torch.cuda.Event | None = None

    def __call__(self, streams: Sequence[bytes], channels: int) -> Tensor:
        """Return pixels uint8 (k h w c) of k JPEG files of one size, for use on the current stream.

        Raises:
            RuntimeError: a file is damaged, or there is no decoder for this device.
        """
        blob = torch.frombuffer(bytearray().join(streams), dtype=torch.uint8)
        coded = list(torch.split(blob, [len(stream) for stream in streams]))
        mode = 1 if channels == 1 else 3  # torchvision's ImageReadMode
        if self._stream is None:
            pictures = [torch.ops.image.decode_jpeg(one, mode, False) for one in coded]
            return torch.stack(pictures).permute(0, 2, 3, 1)
        if self._done is not None:
            self._done.synchronize()
        if not self._stream.query():
            self._stream.synchronize()
        with torch.cuda.stream(self._stream):
            pixels = torch.stack(torch.ops.image.decode_jpegs_cuda(coded, mode, self.device)).permute(0, 2, 3, 1)
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._done.record(self._stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._done)
        pixels.record_stream(current)
        return pixels


class Kinds:
    """The kinds of JPEG that a device decodes: none until `known` is set, after `in` was used for a file with JPEG.

    Trying a decoder takes up to a second and memory of the device, which most images do not need.
    """

    def __init__(self) -> None:
        self.known: frozenset[str] | None = None
        self.asked = False

    def __contains__(self, kind: object) -> bool:
        if self.known is None:
            self.asked = True
            return False
        return kind in self.known

    def __bool__(self) -> bool:
        """Return whether to look for JPEG: not while the decoder is to be tried, nor if it decodes nothing."""
        return not self.asked if self.known is None else bool(self.known)


def decodes(device: torch.device) -> tuple[frozenset[str], str]:
    """Return which of "grey", "rgb" and "ycbcr" a device decodes correctly, and why it does not decode others, or "".

    A device is tried once, unless the trial ends with an error, which may be temporary.

    Raises:
        RuntimeError: the device has no memory left for the trial, which says nothing about its decoder.
    """
    device = with_index(device)
    if device in TRIED_DECODERS:
        return TRIED_DECODERS[device]
    wrong: dict[str, list[str]] = {}  # names of the trials by what is wrong with them
    tried, bad = set[str](), set[str]()
    decoder, failed = None, False
    for color, name, stream in _trials():
        problem = ""
        try:
            decoder = decoder or Decoder(device)
            found = decoder([stream], 1 if color == "grey" else 3).cpu().numpy()[0]
        except (ImportError, RuntimeError, AttributeError) as error:
            if out_of_memory(error):
                raise
            problem, failed = " ".join(str(error).split())[:200], True
        else:
            expected = np.asarray(PIL.Image.open(io.BytesIO(stream)), np.int16).reshape(TRIAL_SIDE, TRIAL_SIDE, -1)
            if found.shape != expected.shape or np.abs(found - expected).max() > MAX_DIFFERENCE:
                problem = f"the decoder of {device} gives wrong colours"
        tried.add(color)
        if problem:
            bad.add(color)
            wrong.setdefault(problem, []).append(name)
    right = frozenset(tried - bad)
    note = ""
    if wrong:
        told = [f"{problem} for {', '.join(names)}" if right else problem for problem, names in wrong.items()]
        note = f"the CPU decodes JPEG tiles in {', '.join(sorted(bad))}: {'; '.join(told)}"
    if not failed:
        TRIED_DECODERS[device] = right, note
    return right, note


def _trials() -> Iterator[tuple[Colors, str, bytes]]:
    """Yield kind, name and stream of trial pictures, with all numberings of samples that scanners use.

    Decoders that ignore the marker may guess the colours from the numbers: Aperio's tiles in RGB have 0, 1, 2.
    """
    yield "grey", "grey", _delivered("grey", 0, b"\1")
    for numbers in (b"RGB", b"\0\1\2", b"\1\2\3"):
        named = "R, G, B" if numbers.isalpha() else ", ".join(map(str, numbers))
        yield "rgb", f"rgb with samples {named}", _delivered("rgb", 0, numbers)
    for subsampling, named in enumerate(("4:4:4", "4:2:2", "4:2:0")):
        yield "ycbcr", f"ycbcr {named}", _delivered("ycbcr", subsampling, b"\1\2\3")
    yield "ycbcr", "ycbcr with samples 0, 1, 2", _delivered("ycbcr", 2, b"\0\1\2")


def _delivered(color: Colors, subsampling: int, numbers: bytes) -> bytes:
    """Return a trial picture as `Image.jpeg_tiles` returns a tile: only an Adobe marker names the colours.

    Args:
        color: what is stored.
        subsampling: Pillow's number of 4:4:4, 4:2:2 or 4:2:0.
        numbers: of the samples, in the frame and in the scan.
    """
    across, down = np.meshgrid(np.linspace(40, 210, TRIAL_SIDE), np.linspace(60, 190, TRIAL_SIDE))  # no rounding shows
    planes = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    options = {"keep_rgb": True} if color == "rgb" else {"subsampling": subsampling} if color == "ycbcr" else {}
    file = io.BytesIO()
    PIL.Image.fromarray(planes[..., 0] if color == "grey" else planes).save(file, "JPEG", quality=95, **options)
    data = file.getvalue()
    head = merged_head(b"", data, Size(TRIAL_SIDE, TRIAL_SIDE), len(numbers), rgb=color == "rgb")
    assert head is not None
    start, scan = bytearray(head.data), bytearray(data[len(head.stored) :])
    frame = start.index(bytes((0xFF, SOF0))) + 10
    start[frame : frame + 3 * len(numbers) : 3] = numbers
    scan[5 : 5 + 2 * len(numbers) : 2] = numbers
    return bytes(start + scan)
