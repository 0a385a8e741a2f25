"""JPEG streams -> pixels on a device, many at once; tried on pictures of its own before it is trusted with any.

torchvision decodes them: on a GPU with nvJPEG. Whether that is there, and whether it obeys the marker that tells RGB
from YCbCr, differs with versions; what does not come out right here is decoded on the host.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.engine.device import with_index
from keyhole.images.jpeg import Colors, adobe_marker, segments
from keyhole.util.budget import out_of_memory

SIDE, SMOOTH = 256, 8
"""Side of a trial picture, that of most tiles, since nvJPEG may decode small ones in another way; and the most levels
that a device may differ from the host, since each upsamples colours in its own way."""

TRIED_DECODERS: dict[torch.device, tuple[frozenset[str], str]] = {}
"""What `decodes` has found, by device."""

_GREY, _RGB = 1, 3  # torchvision's ImageReadMode
_APP0, _SOF0, _APP14 = 0xE0, 0xC0, 0xEE


class Decoder:
    """Decodes JPEG on one device.

    torchvision's decoder for GPUs writes, on a stream of its own, into memory that it takes as the current stream's. It
    does not wait for what that stream has yet to do with it. So it has a stream to itself here, on which nothing is
    pending when it is called. Torch hands out 32 streams in turn: another one may be the same, and is waited for then.
    """

    def __init__(self, device: torch.device) -> None:
        importlib.import_module("torchvision.io")  # registers the operators, which are called without its warnings
        self.device = with_index(device)  # torchvision holds one decoder, and replaces it for a device of another name
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._done: torch.cuda.Event | None = None

    def __call__(self, streams: Sequence[bytes], channels: int) -> Tensor:
        """Pixels uint8 (k h w c) of JPEG streams of one size, for use on the current stream.

        Args:
            streams: k JPEG files.
            channels: 1 or 3, as they have.

        Raises:
            RuntimeError: one of them is damaged, or there is no decoder for this device.
        """
        blob = torch.frombuffer(bytearray().join(streams), dtype=torch.uint8)
        coded = list(torch.split(blob, [len(stream) for stream in streams]))
        mode = _GREY if channels == 1 else _RGB
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
    """The kinds of JPEG that a device decodes: none until `known` is set, once there is JPEG that asks for it.

    A decoder takes memory of the device beside torch's, and trying it takes up to a second. Most images and all stored
    features have nothing for it.

    Attributes:
        known: the kinds, of "grey", "rgb" and "ycbcr"; None before they are known.
        asked: whether a file had JPEG to give before they were known.
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
        """Whether asking helps: false while the first question has no answer yet, and where nothing is decoded."""
        return not self.asked if self.known is None else bool(self.known)


def decodes(device: torch.device) -> tuple[frozenset[str], str]:
    """The kinds of JPEG that come out right on a device, of "grey", "rgb" and "ycbcr"; why others do not, or "".

    A device is tried once, unless the trial ends with an error, which may be one of the moment.

    Raises:
        RuntimeError: the device has no memory left for the trial, which says nothing about its decoder.
    """
    device = with_index(device)
    if device in TRIED_DECODERS:
        return TRIED_DECODERS[device]
    colors: dict[Colors, bool] = {}
    wrong: dict[str, list[str]] = {}  # names of the trials by what is wrong with them
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
            expected = _on_host(stream)
            if found.shape != expected.shape or np.abs(found - expected).max() > SMOOTH:
                problem = f"the decoder of {device} gives wrong colours"
        colors[color] = colors.get(color, True) and not problem
        if problem:
            wrong.setdefault(problem, []).append(name)
    right = frozenset(color for color, good in colors.items() if good)
    note = ""
    if wrong:
        told = [f"{problem} for {', '.join(names)}" if right else problem for problem, names in wrong.items()]
        note = f"the CPU decodes JPEG tiles in {', '.join(sorted(colors.keys() - right))}: {'; '.join(told)}"
    if not failed:
        TRIED_DECODERS[device] = right, note
    return right, note


def _trials() -> Iterator[tuple[Colors, str, bytes]]:
    """Kind, name and stream of pictures as tiles are delivered, with every numbering of samples that scanners write.

    Decoders that do not obey the marker may tell colours by the numbers: Aperio's tiles in RGB have 0, 1, 2.
    """
    yield "grey", "grey", _delivered("grey", 0, b"\1")
    for numbers in (b"RGB", b"\0\1\2", b"\1\2\3"):
        named = "R, G, B" if numbers.isalpha() else ", ".join(map(str, numbers))
        yield "rgb", f"rgb with samples {named}", _delivered("rgb", 0, numbers)
    for subsampling, named in enumerate(("4:4:4", "4:2:2", "4:2:0")):
        yield "ycbcr", f"ycbcr {named}", _delivered("ycbcr", subsampling, b"\1\2\3")
    yield "ycbcr", "ycbcr with samples 0, 1, 2", _delivered("ycbcr", 2, b"\0\1\2")


def _delivered(color: Colors, subsampling: int, numbers: bytes) -> bytes:
    """A trial picture as `Image.jpeg_tiles` gives a tile: an Adobe marker names the colours, and nothing else does.

    Args:
        color: what is stored.
        subsampling: Pillow's number of 4:4:4, 4:2:2 or 4:2:0.
        numbers: of the samples, in the frame and in the scan.
    """
    data = io.BytesIO()
    options = {"keep_rgb": True} if color == "rgb" else {"subsampling": subsampling} if color == "ycbcr" else {}
    _picture(color).save(data, "JPEG", quality=95, **options)
    pieces = segments(data.getvalue())
    assert pieces is not None
    scan = bytearray(data.getvalue()[2 + sum(len(body) for _, body in pieces) :])
    scan[5 : 5 + 2 * len(numbers) : 2] = numbers
    kept = bytearray()
    for marker, body in pieces:
        if marker == _SOF0:
            body = body[:10] + b"".join(
                bytes([one]) + body[11 + 3 * at : 13 + 3 * at] for at, one in enumerate(numbers)
            )
        if marker not in (_APP0, _APP14):
            kept += body
    return b"\xff\xd8" + adobe_marker(color) + bytes(kept + scan)


def _on_host(stream: bytes) -> NDArray[np.int16]:
    pixels = np.asarray(PIL.Image.open(io.BytesIO(stream)), np.int16)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _picture(color: str) -> PIL.Image.Image:
    """Slow changes of all colours, so that what is off is not rounding."""
    across, down = np.meshgrid(np.linspace(40, 210, SIDE), np.linspace(60, 190, SIDE))
    planes = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    return PIL.Image.fromarray(planes[..., 0] if color == "grey" else planes)
