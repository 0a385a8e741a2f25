"""Print the refusal of an image's first chunk, which must come with 128 MiB more memory than the second took."""

import resource
import sys
from pathlib import Path

from keyhole.errors import ImageError
from keyhole.images import open_image

image = open_image(sys.argv[1])
image.read((64, 0, 64, 64))
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**27, now + 2**27))
try:
    image.read((0, 0, 64, 64))
except ImageError as error:
    print(error)
