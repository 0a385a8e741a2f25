"""What `keyhole check` finds in one image, or why it cannot be used; `worker` runs this in another process.

torch is not imported here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from keyhole.data.item import Item
from keyhole.errors import BitsUnknown, ConfigError, DataError, ImageError, OutputError
from keyhole.images.geometry import Size
from keyhole.util.wording import problem_and_fix

if TYPE_CHECKING:
    from keyhole.images import Image
    from keyhole.patches.grid import PatchGrid
    from keyhole.patches.opener import FileOpener

MAX_DARK_VALUE = 16  # a picture whose brightest value, of 255, is lower is nearly black
TIMED_PATCHES = 4
Trouble = Literal["image", "settings", "died", "stalled", "unexpected", "output"]


@dataclass(frozen=True)
class Probed:
    """What was found in an image."""

    size: Size  # at level 0; 0 x 0 for stored features
    levels: int
    mpp: float | None
    channels: int  # 1 or 3; the width of stored features
    patches: int  # after the foreground mask
    level_bytes: int  # of the decoded pixels at the level that is read
    file_mpp: float | None = None  # as the file states it, even if the CSV overrides it
    mpp_note: str = ""  # about an implausible resolution in the file
    preview_problem: str = ""  # why the requested preview is missing
    note: str = ""  # which parts of the file are not read
    annotation_problem: str = ""  # why the annotation cannot be used
    annotation_outside: str = ""  # where its regions lie if all are outside of the image
    darkest: int = field(default=0, compare=False)  # values of the patches that were read
    brightest: int = field(default=255, compare=False)
    image_seconds: float = field(default=0.0, compare=False)  # to open the file and decode what all patches share
    patch_seconds: float = field(default=0.0, compare=False)
    origin: dict[str, str | None] = field(default_factory=dict)  # of stored features, the fields of `Origin`


@dataclass(frozen=True)
class Failed:
    """Why an image cannot be used."""

    problem: str  # one line without the name of the image
    trouble: Trouble
    previewed: bool = False  # there is a preview nevertheless
    fix: str = ""  # if the error names one
    largest: int | None = None  # largest value of an image for which only the bits in use are unknown


class Request(NamedTuple):
    """An image or file of features to open."""

    item: Item
    patch: dict[str, Any]  # the fields of `PatchConfig`
    preview: Path | None = None  # PNG to write of the foreground and the grid


def probe_here(request: Request) -> Probed | Failed:
    """Open one image in this process and read its first and last patch."""
    path = request.item.source
    try:
        return _probe_image(request) if request.item.features is None else _probe_features(request.item)
    except BitsUnknown as error:
        return Failed(error.problem, "image", largest=error.largest)
    except ImageError as error:
        problem, fix = problem_and_fix(error.problem)
        return Failed(problem if error.path == str(path) else f"{error.path}: {problem}", "image", fix=fix)
    except ConfigError as error:
        problem, fix = problem_and_fix(str(error).removeprefix(f"{path}: "))
        return Failed(problem, "settings", fix=fix)
    except OutputError as error:
        return Failed(str(error), "output")
    except Exception as error:  # noqa: BLE001 - reported; a fault of one reader must not hide the other images
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())}", "unexpected")


def _probe_image(request: Request) -> Probed | Failed:
    from keyhole.images.image import open_image
    from keyhole.patches.grid import NoPatches
    from keyhole.patches.image_cache import decoded_bytes
    from keyhole.patches.opener import FileOpener

    item, path = request.item, request.item.image
    opener = FileOpener(path, str(path), mask=item.mask, image_mpp=item.mpp, **request.patch)
    began = time.perf_counter()
    with open_image(path, opener.bits) as image:
        file_mpp, problem = image.mpp, ""
        try:
            grid: PatchGrid | None = opener.grid(image)
        except NoPatches as error:
            grid, nothing = None, problem_and_fix(str(error).removeprefix(f"{path}: "))
        opening = time.perf_counter() - began
        if request.preview is not None:
            try:
                _preview(opener, image, grid, item.name or str(path), request.preview)
            except ImageError as error:  # damage at a level that a run does not read
                problem, _ = problem_and_fix(error.problem)
        if grid is None:
            return Failed(nothing[0], "settings", request.preview is not None and not problem, nothing[1])
        image_seconds, patch_seconds = _seconds(opening, grid.read, len(grid))
        darkest, brightest = _values(image, grid)
        annotation_problem, annotation_outside = _about_annotation(item.annotation, image)
        return Probed(
            size=image.size,
            levels=len(image.levels),
            mpp=image.mpp,
            channels=image.channels,
            patches=len(grid),
            level_bytes=decoded_bytes(image, grid.level),
            file_mpp=file_mpp,
            mpp_note=image.mpp_note,
            preview_problem=problem,
            note=image.note,
            annotation_problem=annotation_problem,
            annotation_outside=annotation_outside,
            darkest=darkest,
            brightest=brightest,
            image_seconds=image_seconds,
            patch_seconds=patch_seconds,
        )


def _probe_features(item: Item) -> Probed:
    from keyhole.patches.features import FeatureOpener

    began = time.perf_counter()
    source = FeatureOpener(item.source, item.name)()
    try:
        image, patch = _seconds(time.perf_counter() - began, source.read, len(source))
        probed = Probed(Size(0, 0), 1, None, source.patch_shape[0], len(source), level_bytes=0)
        return replace(probed, image_seconds=image, patch_seconds=patch, origin=asdict(source.origin))
    finally:
        source.close()


def _seconds(opening: float, read: Callable[[Sequence[int]], object], length: int) -> tuple[float, float]:
    """Read the first and last patch, then the first few; return the seconds of the image and of a patch."""
    began = time.perf_counter()
    read([0, length - 1])
    first = time.perf_counter()
    count = min(length, TIMED_PATCHES)
    read(range(count))
    again = time.perf_counter() - first
    return max(0.0, opening + first - began - again), again / count


def _values(image: Image, grid: PatchGrid) -> tuple[int, int]:
    """Return the smallest and largest value of up to nine patches, of one if that is neither dark nor uniform."""
    level = image.levels[grid.level]
    darkest, brightest = 255, 0
    for patch in sorted({round(k * (len(grid) - 1) / 8) for k in range(9)}):
        x, y, width, height = (round(side / level.downsample) for side in grid.boxes([patch])[0].tolist())
        box = x, y, min(width, level.size.width - x), min(height, level.size.height - y)
        if min(box[2:]) < 1:
            continue
        try:
            pixels = image.read(box, grid.level)
        except ImageError:  # a damaged patch, which a run leaves out
            continue
        darkest, brightest = min(darkest, int(pixels.min())), max(brightest, int(pixels.max()))
        if darkest < brightest >= MAX_DARK_VALUE:
            break
    return darkest, brightest


def _about_annotation(path: Path | None, image: Image) -> tuple[str, str]:
    """Return why an annotation cannot be read, and where its regions lie if that is outside of the image."""
    from keyhole.patches.foreground.annotations import PNG_SUFFIX, check_annotation, far_regions, read_annotation

    if path is None:
        return "", ""
    try:
        if path.suffix.lower() == PNG_SUFFIX:
            check_annotation(path, image.size)
            return "", ""
        return "", far_regions(read_annotation(path, image.size, image.qupath_origin), image.size)
    except DataError as error:
        return str(error), ""


def _preview(opener: FileOpener, image: Image, grid: PatchGrid | None, name: str, path: Path) -> None:
    from keyhole.patches.foreground.rules import FOREGROUND_RULES
    from keyhole.report.mask_preview import mask_preview

    full = replace(opener, foreground="all").grid(image)
    mpp = "unknown microns per pixel" if image.mpp is None else f"{image.mpp:.4g} microns per pixel"
    at = f"level {full.level}" if opener.mpp is None else f"{opener.mpp:g} microns per pixel"
    step = f", stride {full.stride}" if full.stride != full.size else ""
    patches = f"patches of {full.size} px{step} at {at}; foreground {opener.foreground}"
    if FOREGROUND_RULES[opener.foreground].uses_share:
        patches += f", at least {100 * opener.min_foreground:.3g} % of a patch"
    caption = [name, f"{image.size.width:,} x {image.size.height:,} pixels, {mpp}", patches]
    mask_preview(image, full, grid, opener.foreground_mask(), caption, path)
