"""Train and predict where the system lacks what Windows lacks: `python without_posix.py DATA OUT IMAGE`.

Modules, functions, signals and `/proc` are hidden before keyhole is imported. Prints the label of the prediction.
"""

from __future__ import annotations

import builtins
import ctypes
import io
import os
import pathlib
import signal
import sys
from typing import Any

import torch  # asks for the system by its name, which stays

for module in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[module] = None  # type: ignore[assignment]
for name in ("fork", "register_at_fork", "getuid", "sysconf", "sched_getaffinity", "pread", "pwrite", "preadv"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD", "pthread_kill"):
    if hasattr(signal, name):
        delattr(signal, name)


def hidden(path: object) -> bool:
    return isinstance(path, str | os.PathLike) and str(path).startswith(("/proc", "/sys"))


def hiding(function: Any) -> Any:
    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if hidden(path):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *arguments, **options)

    return call


def no_library(name: str | None, *arguments: Any, **options: Any) -> Any:
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return library(name, *arguments, **options)


library, ctypes.CDLL = ctypes.CDLL, no_library  # type: ignore[misc,assignment]
builtins.open = io.open = hiding(open)
for name in ("stat", "lstat", "readlink", "listdir", "scandir", "open"):
    setattr(os, name, hiding(getattr(os, name)))

import keyhole  # noqa: E402


def main(data: str, out: str, image: str) -> None:
    torch.set_num_threads(1)
    keyhole.train(
        data,
        out,
        memory="4GB",
        patch={"size": 16, "foreground": "all"},
        model={"encoder": "small", "width": 4, "heads": 2},
        select={"m": 4},
        train={"epochs": 1, "batch": 4},
        run={"device": "auto", "threads": 2},
    )
    assert not (pathlib.Path(out) / "lock").exists()
    print(keyhole.load(out).predict(image).label["label"])


if __name__ == "__main__":
    main(*sys.argv[1:])
