"""Logits and labels -> loss, one term per task (`Task.loss`), missing labels left out.

Letters: b image, o outputs of a task, w width of an encoded label.

Missing labels are removed on the host, so that the logits never have to reach it; labels on a GPU are copied there.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from keyhole.nn.tensors import to_device
from keyhole.tasks.kinds import Task


def task_loss(
    task: Task,
    logits: Float[Tensor, "b o"],
    target: Float[Tensor, "b w"],
    weight: Float[Tensor, " k"] | None = None,
) -> Tensor:
    """Cross-entropy (multiclass), binary cross-entropy (binary, multilabel) or squared error (regression).

    A regression target is standardised with the task's mean and deviation.

    Args:
        task: What the columns mean.
        logits: Output of the task's head.
        target: Encoded labels, on the host; NaN where missing.
        weight: Weights of the classes, as `Task.class_weights` returns them.

    Returns:
        The mean over the known labels; 0 with a gradient of 0 where none is known.

    Example:
        >>> task = Task("tumor", "binary", ("no", "yes"))
        >>> task_loss(task, torch.zeros(2, 1), torch.tensor([[1.0], [float("nan")]]))
        tensor(0.6931)
    """
    target, device = target.cpu(), logits.device
    known = ~target.isnan().any(dim=1)
    if not bool(known.any()):
        return logits.sum() * 0
    if not bool(known.all()):
        rows = to_device(known.nonzero()[:, 0], device)
        logits, target = logits.index_select(0, rows), target[known]
    weight = None if weight is None else to_device(weight, device)
    return task.loss(logits.float(), to_device(task.loss_target(target), device), weight)


def guessing_loss(
    tasks: Sequence[Task], targets: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
) -> float:
    """Loss of the best constant answer: the frequencies of the classes, or the mean; arguments as for `total_loss`.

    Example:
        >>> round(guessing_loss([Task("tumor", "binary", ("no", "yes"))], {"tumor": torch.tensor([[0.0], [1.0]])}), 4)
        0.6931
    """
    answer = {task.name: torch.zeros(1, task.outputs, requires_grad=True) for task in tasks}
    search = torch.optim.LBFGS(answer.values(), max_iter=100, line_search_fn="strong_wolfe")
    weights = {name: weight.cpu() for name, weight in (weights or {}).items()}

    def loss() -> Tensor:
        said = {name: values.expand(len(targets[name]), -1) for name, values in answer.items()}
        return total_loss(tasks, said, targets, weights)

    def closure() -> float:
        search.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    search.step(closure)
    return loss().item()


def total_loss(
    tasks: Sequence[Task],
    logits: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Mean of the tasks' losses; a task without a label in the batch does not count.

    Args:
        tasks: What the columns mean.
        logits: (b, o) of every task.
        targets: Encoded labels (b, w) of every task, on the host; see `task_loss`.
        weights: Weights of the classes, by task.

    Returns:
        The loss; 0 with a gradient of 0 where no task has a label.
    """
    labels = {task.name: targets[task.name].cpu() for task in tasks}
    known = [task for task in tasks if not bool(labels[task.name].isnan().any(dim=1).all())]
    terms = [
        task_loss(task, logits[task.name], labels[task.name], (weights or {}).get(task.name)) for task in known or tasks
    ]
    return torch.stack(terms).mean()
