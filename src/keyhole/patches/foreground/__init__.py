"""Which part of an image has patches: tissue, masks and outlines."""
