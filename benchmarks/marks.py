"""Generated photographs of 96 px with clutter; three marks of the same size decide the class, rings or crosses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from keyhole.datasets.new_folder import NewFolder

SIDE, MARK = 96, 10


def write_marks(folder: Path, *, seed: int = 0, **counts: int) -> Path:
    """Write so many photographs of each split into a new folder; return the manifest."""
    rng = np.random.default_rng(seed)
    rows = []
    with NewFolder(folder, "images") as new:
        for split, count in counts.items():
            for number in range(count):
                kind = ("ring", "cross")[number % 2]
                name = f"images/{split}-{number}.png"
                draw(kind, rng).save(new.file(name))
                rows.append((name, kind, split))
        return new.write_csv("manifest.csv", ["image", "label", "split"], rows)


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """One photograph: grain, five lines and blobs in any colour, and three marks of the class."""
    image = Image.fromarray(rng.integers(110, 150, (SIDE, SIDE, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)

    def ink() -> tuple[int, int, int]:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        return red, green, blue

    for _ in range(5):
        x, y, dx, dy = rng.integers(0, SIDE - 24, 2).tolist() + rng.integers(6, 24, 2).tolist()
        shape = pen.line if rng.random() < 0.5 else pen.ellipse
        shape((x, y, x + dx, y + dy), fill=ink())
    for _ in range(3):
        x, y = rng.integers(0, SIDE - MARK, 2).tolist()
        if kind == "ring":
            pen.ellipse((x, y, x + MARK, y + MARK), outline=ink(), width=3)
        else:
            color, middle = ink(), MARK // 2
            pen.line((x, y + middle, x + MARK, y + middle), fill=color, width=3)
            pen.line((x + middle, y, x + middle, y + MARK), fill=color, width=3)
    return image
