"""PNG, JPEG, WebP, BMP and other single pictures, through Pillow: decoded whole, once, at the first read."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError, ImageLost
from keyhole.images.faults import faults_of, one_line
from keyhole.images.geometry import Box, Level, Size
from keyhole.images.image import ArrayImage, Image, Pixels
from keyhole.images.jpeg import why_no_jpeg
from keyhole.images.pixels import (
    DEEP,
    ValueTooLarge,
    make_upright,
    on_white,
    scaled,
    settled_bits,
    upright_size,
    valid_orientation,
)

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Pillow's remarks on odd metadata would appear between the lines of a progress bar; what matters is raised here.
warnings.filterwarnings("ignore", module=r"PIL\.")

_FORMATS = {
    # First bytes of the file -> the Pillow plugins that may read it, none of which starts another program.
    b"\x89PNG\r\n\x1a\n": ("PNG",),
    b"\xff\xd8\xff": ("JPEG",),  # opens MPO too
    b"RIFF": ("WEBP",),
    b"BM": ("BMP",),
    b"GIF8": ("GIF",),
    b"\x00\x00\x00\x0cjP  ": ("JPEG2000",),
    b"\xff\x4f\xff\x51": ("JPEG2000",),
    **{b"P%d" % kind: ("PPM",) for kind in range(1, 7)},
}
_GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_ORIENTATION = 0x0112
_JPEG_HEAD_BYTES = 2**18
"""Bytes in which the frame of a refused JPEG is searched: a colour profile and a preview come before it."""

_HEAD_BYTES = {"PNG": 32, "PPM": 2**12, "JPEG2000": 2**20}
"""Bytes in which the header is searched; a colour profile may come before."""
_SIZ = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream, with the marker of its size


def _plugins(head: bytes) -> tuple[str, ...]:
    for magic, plugins in _FORMATS.items():
        if head.startswith(magic) and (magic != b"RIFF" or head[8:12] == b"WEBP"):
            return plugins
    return ()


class PillowImage(Image):
    """A picture that Pillow reads: decoded whole at the first read, held until the image is closed (up to 268 MB).

    EXIF orientation is obeyed. Grey stays one channel, all else becomes RGB: palettes are applied, transparency is
    composited onto white, other bits than 8 are scaled to 8. CRC sums of a PNG are checked. `mpp` is None.
    """

    priority: ClassVar[int] = 0
    suffixes: ClassVar[frozenset[str]] = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

    def __init__(self, path: Path) -> None:
        import PIL.Image

        self.path = path
        with faults_of(path, "damaged, or not the picture that its first bytes promise"):
            with path.open("rb") as file:
                self._formats = _plugins(file.read(64))
            with self._open() as picture:
                size, limit = Size(*picture.size), PIL.Image.MAX_IMAGE_PIXELS
                if limit is not None and size.width * size.height > limit:
                    raise self._too_large(f"{size.width * size.height:,}")
                if getattr(picture, "is_animated", False) and picture.format != "MPO":
                    frames = getattr(picture, "n_frames", 2)
                    raise ImageError(
                        path, f"an animation of {frames} frames, not one picture. Save the frame you want."
                    )
                self._orientation = _orientation(picture, path)
                self._stored = _stored_as(path, picture)
        self.size = upright_size(size, self._orientation)
        self.levels = (Level(self.size, 1.0),)
        self.channels = self._stored.colors if self._stored is not None else 1 if picture.mode in _GREY else 3
        if self._stored is not None:
            self.bits, self._says_bits = self._stored.bits, self._stored.says_bits
        self._lock = threading.Lock()
        self._pixels: Pixels | None = None
        self._damage: str | None = None
        self._closed = False
        self.held_pixels = self.size.width * self.size.height

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return bool(_plugins(head))

    def _open(self) -> Picture:
        import PIL.Image

        try:
            return PIL.Image.open(self.path, formats=self._formats)
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
            pixels = "".join(str(error).split("(")[-1:]).split()[0]
            raise self._too_large(f"{int(pixels):,}" if pixels.isdigit() else "too many") from error
        except PIL.UnidentifiedImageError as error:
            kind, why = self._formats[0] if self._formats else "picture", "its header is damaged. Copy it again."
            if kind == "JPEG":
                with self.path.open("rb") as file:
                    why = why_no_jpeg(file.read(_JPEG_HEAD_BYTES))
            raise ImageError(self.path, f"starts like {kind} data but {why}") from error

    def _too_large(self, pixels: str) -> ImageError:
        import PIL.Image

        return ImageError(
            self.path,
            f"{pixels} pixels, over the limit of {PIL.Image.MAX_IMAGE_PIXELS:,} for a format that is decoded whole. "
            f"Convert it to a tiled pyramid: vips tiffsave {self.path.name} {self.path.stem}.tif "
            "--tile --pyramid --compression jpeg --bigtiff",
        )

    def _values(self) -> Iterator[NDArray[Any]]:
        assert self._stored is not None
        with faults_of(self.path, "damaged: it cannot be decoded"), self._open() as picture:
            yield _values_of(self.path, picture, self._stored)[..., : self._stored.colors]

    def _read(self, box: Box, level: int) -> Pixels:
        with self._lock:
            if self._closed:
                raise ImageError(self.path, "read after it was closed")
            if self._damage is not None:  # decoding it again for each of its patches would fail in the same way
                raise ImageError(self.path, self._damage)
            if self._pixels is None:
                try:
                    self._pixels = self._decode()
                except ImageError as error:
                    if not isinstance(error, ImageLost) and not isinstance(error.__cause__, MemoryError):
                        self._damage = error.problem
                    raise
            return self._pixels[box.y : box.y + box.height, box.x : box.x + box.width]

    def _decode(self) -> Pixels:
        with faults_of(self.path, "damaged: it cannot be decoded"):
            if self._formats == ("PNG",):
                with self._open() as picture:
                    picture.verify()  # the CRC of every chunk; decoding alone skips those of the pixels
            with self._open() as picture:
                if self._stored is None:
                    pixels = eight_bit_pixels(picture)
                else:
                    values = _values_of(self.path, picture, self._stored)
                    pixels = scaled(values, self.bits, self._stored.colors, self._stored.bits)
                pixels = make_upright(pixels, self._orientation)
        if pixels.shape != (self.size.height, self.size.width, self.channels):
            raise ImageError(self.path, f"decodes to {pixels.shape}, not to the {tuple(self.size)} of its header")
        pixels = np.ascontiguousarray(pixels)
        pixels.flags.writeable = False
        return pixels

    def close(self) -> None:
        with self._lock:
            self._pixels, self._closed = None, True


def eight_bit_pixels(picture: Picture) -> Pixels:
    """Return (h, w, 1 or 3) uint8 of a picture in any mode with 8 bits a value."""
    grey = picture.mode in _GREY
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"grey values of the kind {picture.mode}; save it with 8 bits, or as a 16-bit PNG or TIFF")
    if picture.has_transparency_data:
        return on_white(np.asarray(picture.convert("LA" if grey else "RGBA")))
    mode = "L" if grey else "RGB"
    plain = picture if picture.mode == mode else picture.convert(mode)  # `convert` would copy it
    return np.asarray(plain).reshape(picture.height, picture.width, -1)


def _orientation(picture: Picture, path: Path) -> int:
    if picture.format == "PNG" and "exif" not in picture.info:
        # Pillow would decode the whole picture to look for it behind the pixels
        with path.open("rb") as file:
            file.seek(8)
            while len(header := file.read(8)) == 8 and header[4:] not in (b"IEND", b"eXIf"):
                file.seek(int.from_bytes(header[:4], "big") + 4, 1)
        if header[4:] != b"eXIf":
            return 1
    return valid_orientation(picture.getexif().get(_ORIENTATION, 1))


def image_in_memory(picture: NDArray[Any] | Picture, bits: int | None = None) -> ArrayImage:
    """Return a Pillow picture or an array as `open_image` returns a file: upright, on white.

    Args:
        picture: a picture of 8 bits a value, a grey one of 16, or a uint8 array (h, w, 3), (h, w, 1) or (h, w).
        bits: bits in use of a value of 16 bits.

    Raises:
        BitsUnknown: a picture of 16 bits a value of which neither `bits` nor a value says how many are in use.
        ImageError: a picture or an array of another kind.
    """
    import PIL.Image

    if isinstance(picture, PIL.Image.Image):
        name = str(getattr(picture, "filename", "") or "picture")
        try:
            pixels = _deep_pixels(picture, name, bits) if _is_deep(picture) else eight_bit_pixels(picture)
            turned = make_upright(pixels, valid_orientation(picture.getexif().get(_ORIENTATION, 1)))
        except ValueTooLarge as error:
            raise ImageError(name, f"{error}. Correct --patch.bits, or convert it to 8 bits.") from error
        except (ValueError, OSError) as error:
            raise ImageError(name, f"cannot be used: {one_line(error)}") from error
        return ArrayImage(np.ascontiguousarray(turned), name)
    if not isinstance(picture, np.ndarray):
        raise ImageError("image", f"expected a path, a numpy array or a Pillow picture, not {type(picture)}.")
    if problem := _array_problem(picture):
        came = f"not {picture.dtype} {picture.shape}"
        raise ImageError("array", f"pixels must be uint8 of shape (h, w, 3) or (h, w), {came}. {problem}")
    return ArrayImage(picture)


def _is_deep(picture: Picture) -> bool:
    return picture.mode.startswith("I;16")


def _deep_pixels(picture: Picture, name: str, bits: int | None) -> Pixels:
    """Return (h, w, 1) uint8 of a grey picture of 16 bits a value, scaled as those of files are."""
    if picture.has_transparency_data:
        raise ValueError("grey of 16 bits with transparency; give the path of its file instead")
    values = np.asarray(picture).astype(np.uint16)[:, :, None]
    return scaled(values, settled_bits(Path(name), bits, [values]), colors=1)


def _array_problem(pixels: NDArray[Any]) -> str:
    """Return how to make an image of an array that is none; "" if it is one."""
    if pixels.dtype != np.uint8:
        one = pixels.dtype.kind == "f"
        return "Values of 0 ... 1: (255 * array).round().astype('uint8')." if one else "Scale the values to 0 ... 255."
    if pixels.ndim not in (2, 3) or min(pixels.shape, default=0) < 1:
        return "Give one image, with pixels."
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3):
        first = pixels.shape[0] in (1, 3)
        return "Put channels last: array.transpose(1, 2, 0)." if first else "Leave out channels other than RGB."
    return ""


# Pillow cuts or shifts other values to 8 bits: a JPEG 2000 of 12 bits in colour becomes black, and a PNG of 16 bits in
# colour loses the lower bits. So their stored values are decoded here.


class Stored(NamedTuple):
    """How a picture's values are stored: `bits` of a value, of 1 or 3 `colors` (alpha may follow)."""

    bits: int
    colors: int
    says_bits: bool = True


def _stored_as(path: Path, picture: Picture) -> Stored | None:
    """Return how a picture for `_values_of` is stored; None if Pillow decodes it, ValueError if it is not read."""
    if picture.format not in _HEAD_BYTES:
        return None
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES[picture.format])
    if picture.format == "PNG":
        depth, kind = head[24], head[25]
        odd = depth < 8 and kind == 0 and "transparency" in picture.info  # Pillow scales the grey and not its key
        return Stored(max(depth, 8), 1 if kind in (0, 4) else 3, depth != DEEP) if depth == DEEP or odd else None
    if picture.format == "JPEG2000":
        return _jpeg2000(head, picture.mode)
    says_bits = _maxval(head) != 2**DEEP - 1
    if picture.mode == "I":
        return Stored(DEEP, 1, says_bits)
    if picture.mode == "RGB" and not says_bits:
        if not head.startswith(b"P6"):
            raise ValueError("a PPM of 16 bits as text is not read; save it as PNG or TIFF")
        return Stored(DEEP, 3, says_bits)
    return None  # Pillow scales by the white that the header states


def _values_of(path: Path, picture: Picture, stored: Stored) -> NDArray[Any]:
    """Return values (h, w, samples) as they are stored, with alpha last if there is one."""
    import imagecodecs

    if picture.format == "PPM" and stored.colors == 3:
        data = path.read_bytes()  # the values are the end of the file
        values = np.frombuffer(data[len(data) - picture.height * picture.width * 6 :], ">u2").astype(np.uint16)
    elif picture.format == "PPM":
        values = np.asarray(picture).astype(np.uint16)
    else:
        decode = imagecodecs.png_decode if picture.format == "PNG" else imagecodecs.jpeg2k_decode
        values = np.asarray(decode(path.read_bytes()))
    values = values.reshape(picture.height, picture.width, -1)
    if values.dtype.kind != "u" or values.shape[2] - stored.colors not in (0, 1):
        raise ValueError(f"decodes to {values.dtype} of {values.shape[2]} samples")
    return values


def _jpeg2000(head: bytes, mode: str) -> Stored | None:
    at = head.find(_SIZ)
    samples = int.from_bytes(head[at + 40 : at + 42], "big")
    depth_bytes = head[at + 42 : at + 42 + 3 * samples : 3]
    if at < 0 or not depth_bytes or len(depth_bytes) < samples or mode in ("P", "PA", "CMYK"):
        return None
    if any(byte & 0x80 for byte in depth_bytes):
        raise ValueError("a JPEG 2000 of signed values is not read; save it with 8 bits")
    depths = sorted({byte + 1 for byte in depth_bytes})
    if depths == [8]:
        return None
    if len(depths) > 1 or depths[0] > DEEP:
        raise ValueError(f"a JPEG 2000 of {' and '.join(map(str, depths))} bits is not read; save it with 8 bits")
    return Stored(depths[0], 1 if samples < 3 else 3, depths[0] != DEEP)


def _maxval(head: bytes) -> int:
    """Return the largest value that the header of a PGM or PPM states; comments may separate its fields."""
    fields: list[bytes] = []
    for line in head.split(b"\n"):
        fields += line.partition(b"#")[0].split()
        if len(fields) > 3:
            break
    return int(fields[3]) if len(fields) > 3 and fields[3].isdigit() else 0
