"""Manifests, splits, checks and generated data sets."""
