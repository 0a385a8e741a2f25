"""Which images there are, their labels and splits."""
