"""Create a run folder, and remove unfinished files that a killed process left in it or beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from keyhole.config.file import dump_config
from keyhole.config.settings import Config
from keyhole.data.hashes import FileHash
from keyhole.data.manifest import Manifest
from keyhole.errors import OutputError
from keyhole.runs.checkpoint import save_state
from keyhole.runs.lock import DEAD, NAME, RunLock, is_held
from keyhole.runs.run import environment
from keyhole.runs.seal import State, file_digest
from keyhole.util.budget import memory_text
from keyhole.util.files import TEMPORARY, is_abandoned, umask, writable_folder, write_atomic

FIRST = {"config.yaml", "manifest.csv", "left_out.csv", "environment.json", "last.safetensors", NAME}
"""Names of the files in a new run folder."""


def create_folder(
    config: Config,
    manifest: Manifest,
    hashes: Mapping[str, FileHash],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    device: torch.device,
) -> RunLock:
    """Create a run folder, which gets its name last so that every run folder can be resumed; return its lock."""
    assert config.out is not None
    out = config.out
    writable_folder(out.parent)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    lock: RunLock | None = None
    try:
        lock = RunLock(folder)
        # without `out`, so that the file as a --config makes another run
        state.config = dump_config(config.replace(out=None))
        write_atomic(folder / "config.yaml", state.config)
        state.manifest = file_digest(manifest.write(folder / "manifest.csv", hashes))
        state.run = hashlib.sha256(f"{state.manifest}\n{state.config}".encode()).hexdigest()
        manifest.write_left_out(folder / "left_out.csv")
        write_atomic(folder / "environment.json", json.dumps(environment(str(device)), indent=2) + "\n")
        save_state(folder / "last.safetensors", model, optimizer, state.to_json())
        folder.chmod(0o777 & ~umask())
        try:
            folder.rename(out)
        except OSError as error:
            raise OutputError(f"{out}: cannot be created ({error.strerror}). Choose another --out.") from error
    except BaseException as error:
        if lock is not None:
            lock.release()
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OutputError):
            raise OutputError(str(error).replace(str(folder), str(out))) from error
        raise
    lock.folder = out
    return lock


def sweep(run: Path, say: Callable[[str], None]) -> None:
    """Remove unfinished files of killed processes from a run folder that this process owns, and say so.

    Other processes may write predictions at the same time; their files stay.
    """
    now = time.time()
    found = [path for folder in (run, run / "best") for path in _temporary(folder)]
    answers = _temporary(run / "predictions")
    found += [path for path in answers if is_abandoned(path) or now - path.stat().st_mtime > DEAD]
    size = 0
    for path in found:
        size += path.stat().st_size
        path.unlink(missing_ok=True)
    if found:
        say(f"removed {len(found)} unfinished files ({memory_text(size)}) that a killed process left in {run}")


def _temporary(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if TEMPORARY.fullmatch(path.name) and path.is_file())


def sweep_beside(out: Path, say: Callable[[str], None]) -> None:
    """Remove unfinished run folders of killed processes beside `out`, and say so."""
    if not out.parent.is_dir():
        return
    for folder in sorted(out.parent.iterdir()):
        if not (folder.name.startswith(f".{out.name}.") and TEMPORARY.fullmatch(folder.name) and folder.is_dir()):
            continue
        if not all(path.name in FIRST or TEMPORARY.fullmatch(path.name) for path in folder.iterdir()):
            continue
        locked = (folder / NAME).exists()
        if is_held(folder) if locked else time.time() - folder.stat().st_mtime < DEAD:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        say(f"removed {folder}, the beginning of a run whose process was killed")
