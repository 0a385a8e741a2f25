"""File -> pixels of a box. Knows nothing of torch.

`open_image(path)` finds the reader; every reader is an `Image`.
"""

from keyhole.images.geometry import Box, Level, Size
from keyhole.images.image import ArrayImage, Image, open_image

__all__ = ["ArrayImage", "Box", "Image", "Level", "Size", "open_image"]
