"""The validation figure that names the best model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from keyhole.errors import ConfigError
from keyhole.tasks.evaluation import defined_metrics
from keyhole.tasks.kinds import Task
from keyhole.tasks.metrics import higher_is_better, task_metrics
from keyhole.util.wording import listed


def choose_metric(name: str, tasks: Sequence[Task], val: Mapping[str, Tensor] | None) -> tuple[str, list[str]]:
    """Resolve `--train.metric` to `loss`, `METRIC` or `TASK.METRIC`; return it and lines for the log.

    `auto` is `auroc` if all tasks have classes and define it, `mae` for a single regression task, else `loss`, since
    figures of different kinds have no common mean. `val` are the encoded labels of the validation split; without one
    the name is empty, and the last epoch is the best. The mean leaves out tasks whose labels do not define the metric;
    if there is no other task, the name is `loss`.

    Raises:
        ConfigError: no task has such a metric.
    """
    known = {"loss", "auto"}
    for task in tasks:
        each = [metric.name for metric in task_metrics(task)]
        known |= set(each) | {f"{task.name}.{metric}" for metric in each}
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"--train.metric {name}: {hint}known here are {', '.join(sorted(known))}")
    if val is None:
        return "", []
    defined = {task.name: defined_metrics(task, val[task.name].cpu().numpy()) for task in tasks}
    if name == "auto":
        defaults = {task.default_metric for task in tasks}
        common = defaults.pop() if len(defaults) == 1 else "loss"
        fits = all(common in defined[task.name] for task in tasks)  # numbers of several tasks have different units
        return common if fits and (len(tasks) == 1 or all(task.classes for task in tasks)) else "loss", []
    if name == "loss":
        return name, []
    wanted = {
        task.name: metric.name
        for task in tasks
        for metric in task_metrics(task)
        if name in (metric.name, f"{task.name}.{metric.name}")
    }
    lacking = [task for task, metric in wanted.items() if metric not in defined[task]]
    if not lacking:
        return name, []
    said = f"train.metric {name} is not defined by the validation labels of {listed(lacking)}"
    if len(lacking) < len(wanted):
        return name, [f"{said}: the mean is over the other tasks"]
    return "loss", [f"{said}: the validation loss names the best model. More validation images, or --train.metric loss"]


def metric_value(name: str, row: Mapping[str, float], tasks: Sequence[Task]) -> float:
    """Return a metric from a row of metrics.csv; without a task in its name, the mean over the tasks that define it."""
    if name == "loss" or f"val.{name}" in row:
        return row.get(f"val.{name}", math.nan)
    values = [row.get(f"val.{task.name}.{name}", math.nan) for task in tasks]
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def is_better(name: str, value: float, loss: float, best: tuple[float, float] | None) -> bool:
    """Return True if (value, loss) beats the best pair; the lower loss decides between equal or undefined values.

    An epoch in which the metric is undefined (NaN) never beats one in which it is defined.
    """
    if best is None or not name:
        return True
    if math.isnan(value) != math.isnan(best[0]):
        return math.isnan(best[0])
    if math.isnan(value):
        return loss < best[1] or (math.isnan(best[1]) and not math.isnan(loss))
    sign = 1 if higher_is_better(name.rsplit(".", 1)[-1]) else -1
    return (sign * value, -loss) > (sign * best[0], -best[1])
