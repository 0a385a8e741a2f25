"""What has nothing to do with images or models: files, progress, timing, threads."""
