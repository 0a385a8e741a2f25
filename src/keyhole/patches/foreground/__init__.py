"""Which part of an image is looked at: tissue, masks and outlines."""
