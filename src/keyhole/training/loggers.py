"""TensorBoard and Weights & Biases, which `--run.log` turns on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from keyhole.errors import ConfigError

Send = Callable[[Mapping[str, float], int], None]
"""Sends the metrics of an epoch."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a logger is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"--run.log {name}: not installed; pip install {name}")


@contextmanager
def open_loggers(names: Sequence[str], run: Path) -> Iterator[Send]:
    """Open loggers; the function that this yields sends them the metrics of an epoch."""
    kinds = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        senders = [kinds[name](run, stack) for name in names]

        def log_row(row: Mapping[str, float], epoch: int) -> None:
            for send in senders:
                send(row, epoch)

        yield log_row


def _tensorboard(run: Path, stack: ExitStack) -> Send:
    """Write event files into RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run / "tensorboard"))
    stack.callback(writer.close)

    def send(row: Mapping[str, float], epoch: int) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, epoch)

    return send


def _wandb(run: Path, stack: ExitStack) -> Send:
    """Send metrics to Weights & Biases, under the account that its own tool is logged in with."""
    import wandb

    session: Any = wandb.init(project="keyhole", name=run.name, dir=str(run), id=run.name, resume="allow")
    stack.callback(session.finish)
    return lambda row, epoch: session.log(dict(row), step=epoch)
