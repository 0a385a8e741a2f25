"""Print by how much memory grows while images are opened and read: `KIND READER COUNT PATH ...`.

`rounds` opens `COUNT` images one after the other; `held` keeps `COUNT` handles of the second image open, compared with
one of the first; `whole` reads every pixel of all images, compared with the first two.
"""

import gc
import sys
from pathlib import Path
from typing import Any

from usage import memory

from keyhole.images import open_image
from keyhole.images.openslide import OpenSlideImage

READERS: dict[str, Any] = {"open_image": open_image, "OpenSlideImage": OpenSlideImage}


def now(what: str) -> int:
    gc.collect()
    return memory(what)


def look(opening: Any, path: str) -> None:
    """Read the middle and a part outside of each level."""
    with opening(Path(path)) as image:
        for level, (size, _) in enumerate(image.levels):
            image.read((size.width // 2, size.height // 2, 64, 64), level)
            image.read((-8, -8, 40, 40), level)


def rounds(opening: Any, count: int, *paths: str) -> int:
    for k in range(count // 5):
        look(opening, paths[k % len(paths)])
    before = now("VmRSS")
    for k in range(count):
        look(opening, paths[k % len(paths)])
    return now("VmRSS") - before


def held(opening: Any, count: int, small: str, large: str) -> int:
    look(opening, small)
    before = now("VmHWM")
    images = [opening(Path(large)) for _ in range(count)]
    for image in images:
        size = image.size
        for x in range(0, size.width - 64, size.width // 50):
            image.read((x, x % (size.height - 64), 64, 64))
    return now("VmHWM") - before


def whole(opening: Any, _: int, *paths: str) -> int:
    images, before = [], 0
    for path in paths:
        images.append(opening(Path(path)))
        size = images[-1].size
        for y in range(0, size.height, 200):
            for x in range(0, size.width, 200):
                images[-1].read((x, y, 200, 200))
        before = before if len(images) > 2 else now("VmHWM")
    return now("VmHWM") - before


kind, reader, count, *paths = sys.argv[1:]
print({"rounds": rounds, "held": held, "whole": whole}[kind](READERS[reader], int(count), *paths))
