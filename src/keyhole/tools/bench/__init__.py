"""Measures how fast a model learns on this machine, compared with its encoder alone."""
