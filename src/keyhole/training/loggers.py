"""TensorBoard and Weights & Biases, which `--run.log` turns on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from keyhole.errors import ConfigError

TENSORBOARD = "tensorboard"
"""Folder of the event files in the run folder."""

Send = Callable[[Mapping[str, float], int, Mapping[str, Path]], None]
"""Sends the metrics of an epoch, and its pictures by name."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a logger is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"--run.log {name}: not installed; pip install {name}")


@contextmanager
def open_loggers(names: Sequence[str], run: Path) -> Iterator[Send]:
    """Open loggers; the function that this yields sends them the metrics and pictures of an epoch."""
    kinds = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        senders = [kinds[name](run, stack) for name in names]

        def log_row(row: Mapping[str, float], epoch: int, pictures: Mapping[str, Path]) -> None:
            for send in senders:
                send(row, epoch, pictures)

        yield log_row


def _tensorboard(run: Path, stack: ExitStack) -> Send:
    """Write event files into RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run / TENSORBOARD))
    stack.callback(writer.close)

    def send(row: Mapping[str, float], epoch: int, pictures: Mapping[str, Path]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, epoch)
        for name, path in pictures.items():
            with Picture.open(path) as picture:
                writer.add_image(name, np.asarray(picture), epoch, dataformats="HWC")

    return send


def _wandb(run: Path, stack: ExitStack) -> Send:
    """Send metrics to Weights & Biases, under the account that its own tool is logged in with."""
    import wandb

    session: Any = wandb.init(project="keyhole", name=run.name, dir=str(run), id=run.name, resume="allow")
    stack.callback(session.finish)

    def send(row: Mapping[str, float], epoch: int, pictures: Mapping[str, Path]) -> None:
        images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
        session.log({**row, **images}, step=epoch)

    return send
