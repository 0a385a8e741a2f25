"""Pixels that are already in memory, as an image: numpy arrays and Pillow pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.image import ArrayImage
from keyhole.images.pillow import ORIENTATION, eight_bit_pixels
from keyhole.images.pixels import make_upright, valid_orientation

CHANNELS = (1, 3)


def image_in_memory(picture: NDArray[Any] | PIL.Image.Image) -> ArrayImage:
    """The picture as `open_image` gives one from a file: upright, on white where it is transparent.

    Args:
        picture: uint8 (h, w, 3), (h, w, 1) or (h, w); or a picture of Pillow, of any mode with 8 bits a value.

    Raises:
        ImageError: anything else; the message says what was expected and what came.
    """
    if isinstance(picture, PIL.Image.Image):
        name = str(getattr(picture, "filename", "") or "picture")
        try:
            pixels = eight_bit_pixels(picture)
            turned = make_upright(pixels, valid_orientation(picture.getexif().get(ORIENTATION, 1)))
        except (ValueError, OSError) as error:
            raise ImageError(name, f"cannot be used: {' '.join(str(error).split())}") from error
        return ArrayImage(np.ascontiguousarray(turned), name)
    if not isinstance(picture, np.ndarray):
        raise ImageError("image", f"expected a path, a numpy array or a picture of Pillow, not {type(picture)}.")
    if problem := _problem(picture):
        came = f"{picture.dtype} {picture.shape}"
        raise ImageError("array", f"pixels must be uint8 of shape (h, w, 3) or (h, w), not {came}. {problem}")
    return ArrayImage(picture)


def _problem(pixels: NDArray[Any]) -> str:
    """What to do about an array that is not an image; "" where it is one."""
    if pixels.dtype != np.uint8:
        float_ = pixels.dtype.kind == "f"
        return (
            "Values of 0 ... 1: (255 * array).round().astype('uint8')." if float_ else "Scale the values to 0 ... 255."
        )
    if pixels.ndim not in (2, 3) or min(pixels.shape, default=0) < 1:
        return "Give one image, with pixels."
    if pixels.ndim == 3 and pixels.shape[2] not in CHANNELS:
        first = pixels.shape[0] in CHANNELS
        return (
            "Put channels last: array.transpose(1, 2, 0)." if first else "Leave out channels beyond red, green, blue."
        )
    return ""
