"""Data sets that are generated, and published ones."""
