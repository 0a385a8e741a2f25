"""Modules: encoder, attention pool, selection, classifier. Knows nothing of files."""
