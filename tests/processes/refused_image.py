"""Print the refusals of an image by `open_image` and by OpenSlideImage, under limits of memory and time."""

import resource
import sys
from pathlib import Path

resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

from keyhole.errors import ImageError  # noqa: E402
from keyhole.images import open_image  # noqa: E402
from keyhole.images.openslide import OpenSlideImage  # noqa: E402

for opening in (open_image, OpenSlideImage):
    try:
        image = opening(Path(sys.argv[1]))
        image.read((0, 0, 64, 64))
    except ImageError as error:
        print(error)
    else:
        raise SystemExit("it was read")
