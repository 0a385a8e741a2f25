"""Data sets of files that nobody looks into, and what reading them gives."""

from __future__ import annotations

from pathlib import Path

from keyhole.config.settings import DataConfig
from keyhole.data.manifest import Manifest, read_manifest


def touch(folder: Path, *names: str) -> None:
    """Files that stand for images; each holds its name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def read(path: Path, **settings: object) -> Manifest:
    return read_manifest(DataConfig(path=path, **settings))  # type: ignore[arg-type]


def left(manifest: Manifest) -> dict[str, str]:
    """What is left out, with the reasons."""
    return {item.name: item.reason for item in manifest.left_out}
