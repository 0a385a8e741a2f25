"""Write a generated slide or a pyramid: `slide|pyramid OUT SIDE`; print the peak of memory."""

import sys
from pathlib import Path

import numpy as np
from usage import memory

from keyhole.datasets.slides import draw_scene
from keyhole.datasets.tiff_pyramid import write_pyramid
from keyhole.images.geometry import Size

what, out, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if what == "slide":
    draw_scene(size, 0, tissue=0.3, positive=True).write(out, threads=2)
else:
    tile = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    write_pyramid(
        out,
        Size(size, 1100),
        lambda column, row: tile if column % 4 == 0 else None,
        mpp=0.5,
        background=tile,
        threads=2,
    )
print(memory("VmHWM"))
