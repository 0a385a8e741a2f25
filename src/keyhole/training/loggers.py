"""TensorBoard and Weights & Biases, only when asked for with `--run.log`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from keyhole.errors import ConfigError


class Logger(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardLogger:
    """Writes event files into RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Sends metrics to Weights & Biases, under the account its own tool is logged in with."""

    def __init__(self, run: Path) -> None:
        import wandb

        self._run: Any = wandb.init(project="keyhole", name=run.name, dir=str(run), id=run.name, resume="allow")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a logger is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"--run.log {name}: not installed; pip install {name}")


@contextmanager
def open_loggers(names: Sequence[str], run: Path) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """Open the loggers that were asked for; inside, a function sends them the metrics of an epoch."""
    kinds: dict[str, Callable[[Path], Logger]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}
    loggers = [kinds[name](run) for name in names]

    def log_row(row: Mapping[str, float], epoch: int) -> None:
        for logger in loggers:
            logger.log(row, epoch)

    try:
        yield log_row
    finally:
        for logger in loggers:
            logger.close()
