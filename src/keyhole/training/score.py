"""Which validation figure names the best model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from keyhole.errors import ConfigError
from keyhole.tasks import Task

LOWER_IS_BETTER = ("loss", "mae", "ece")
OF_CLASSES = ("accuracy", "balanced_accuracy", "auroc", "average_precision", "f1", "ece")
OF_NUMBERS = ("mae", "r2")


def choose_metric(name: str, tasks: Sequence[Task], val: Mapping[str, Tensor] | None) -> str:
    """Resolves `--train.metric` to `loss`, `METRIC` or `TASK.METRIC`.

    Args:
        name: as configured; `auto` is auroc, or mae for one regression task, or the loss where neither is defined.
        tasks: of the run.
        val: encoded labels of the validation split, or None without one.

    Returns:
        The name, empty without a validation split: then the last epoch is the best.

    Raises:
        ConfigError: no task has such a metric.
    """
    known = {"loss", "auto"}
    for task in tasks:
        each = OF_NUMBERS if task.kind == "regression" else OF_CLASSES
        known |= set(each) | {f"{task.name}.{metric}" for metric in each}
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"--train.metric {name}: {hint}known here are {', '.join(sorted(known))}")
    if val is None:
        return ""
    if name != "auto":
        return name
    kinds = {task.kind for task in tasks}
    if kinds == {"regression"} and len(tasks) == 1:
        return "mae"
    if "regression" not in kinds and all(_both_sides(val[task.name]) for task in tasks):
        return "auroc"
    return "loss"


def _both_sides(target: Tensor) -> bool:
    """Whether AUROC is defined: every label column has at least two values."""
    known = target[~target.isnan().any(dim=1)]
    return bool(len(known)) and all(len(column.unique()) > 1 for column in known.T)


def metric_value(name: str, row: Mapping[str, float], tasks: Sequence[Task]) -> float:
    """The figure in a row of metrics.csv; a metric without a task is the mean over the tasks that have it."""
    if name == "loss" or "." in name:
        return row.get(f"val.{name}", math.nan)
    values = [row[f"val.{task.name}.{name}"] for task in tasks if f"val.{task.name}.{name}" in row]
    return sum(values) / len(values) if values else math.nan


def is_better(name: str, value: float, loss: float, best: tuple[float, float] | None) -> bool:
    """Whether (value, loss) beats the best pair; equal values are decided by the lower loss."""
    if best is None or not name:
        return True
    if math.isnan(value):
        return False
    sign = -1 if name.rsplit(".", 1)[-1] in LOWER_IS_BETTER else 1
    return math.isnan(best[0]) or (sign * value, -loss) > (sign * best[0], -best[1])
