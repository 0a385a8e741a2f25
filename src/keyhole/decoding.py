"""JPEG streams -> pixels on a device, many at once; tried on pictures of its own before it is trusted with any.

torchvision decodes them: on a GPU with nvJPEG. Whether that is there, and whether it obeys the marker that tells RGB
from YCbCr, differs with versions; what does not come out right here is decoded on the host.
"""

from __future__ import annotations

import functools
import importlib
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from keyhole.memory.budget import out_of_memory

SIDE, SMOOTH = 64, 8
"""Side of the trial picture, and by how many levels its values may be off: decoders upsample colours differently."""

_GREY, _RGB = 1, 3  # torchvision's ImageReadMode


class Decoder:
    """Decodes JPEG on one device.

    torchvision's decoder for GPUs writes, on a stream of its own, into memory that it takes as the current stream's. It
    does not wait for what that stream has yet to do with it. So it has a stream to itself here, on which nothing is
    pending when it is called.
    """

    def __init__(self, device: torch.device) -> None:
        importlib.import_module("torchvision.io")  # registers the operators, which are called without its warnings
        self.device = device
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
        with torch.cuda.stream(self._stream):
            pixels = torch.stack(torch.ops.image.decode_jpegs_cuda(coded, mode, self.device)).permute(0, 2, 3, 1)
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._done.record(self._stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._done)
        pixels.record_stream(current)
        return pixels


@functools.cache
def decodes(device: torch.device) -> tuple[frozenset[str], str]:
    """The kinds of JPEG that come out right on a device, of "grey", "rgb" and "ycbcr"; why others do not, or ""."""
    right, wrong = set(), []
    for color in ("grey", "rgb", "ycbcr"):
        picture = _picture(color)
        channels = 1 if color == "grey" else 3
        expected = np.asarray(picture).reshape(SIDE, SIDE, channels).astype(np.int16)
        try:
            decoder = Decoder(device)
            streams = [_jpeg(picture, color, subsampling) for subsampling in ((0, 1, 2) if color == "ycbcr" else (0,))]
            found = decoder(streams, channels).cpu().numpy()
        except (ImportError, RuntimeError, AttributeError) as error:
            if out_of_memory(error):  # says nothing of the decoder
                raise
            return frozenset(), " ".join(str(error).split())[:200]
        if found.shape == (len(streams), *expected.shape) and np.abs(found - expected).max() <= SMOOTH:
            right.add(color)
        else:
            wrong.append(color)
    return frozenset(right), f"the decoder of {device} gives wrong colours for {', '.join(wrong)}" if wrong else ""


def _picture(color: str) -> PIL.Image.Image:
    """Slow changes of all colours, so that what is off is not rounding."""
    across, down = np.meshgrid(np.linspace(40, 210, SIDE), np.linspace(60, 190, SIDE))
    planes = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    return PIL.Image.fromarray(planes[..., 0] if color == "grey" else planes)


def _jpeg(picture: PIL.Image.Image, color: str, subsampling: int) -> bytes:
    data = io.BytesIO()
    options = {"keep_rgb": True} if color == "rgb" else {"subsampling": subsampling} if color == "ycbcr" else {}
    picture.save(data, "JPEG", quality=95, **options)
    return data.getvalue()
