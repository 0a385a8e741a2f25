"""Logits and labels -> loss, one term per task, missing labels left out.

Letters: b image, o outputs of a task, w width of an encoded label.

Labels are made on the host, so what is missing is sorted out there: the logits never have to reach the host. Labels
that are on a GPU are copied to the host first, which waits for it.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from keyhole.nn.to_device import to_device
from keyhole.tasks.kinds import Task


def task_loss(
    task: Task,
    logits: Float[Tensor, "b o"],
    target: Float[Tensor, "b w"],
    weight: Float[Tensor, " k"] | None = None,
) -> Tensor:
    """Cross-entropy (multiclass), binary cross-entropy (binary, multilabel) or squared error (regression).

    Computed from logits, so that a confident error keeps its gradient. A regression target is standardised with the
    task's mean and deviation.

    Args:
        task: what the columns mean.
        logits: of the task's head.
        target: encoded labels, on the host; NaN is missing.
        weight: per class (multiclass, binary: negative and positive) or of the positive (multilabel).

    Returns:
        Mean over the labels that are there; 0 if none is, with a gradient of 0.
    """
    target, device = target.cpu(), logits.device
    known = ~target.isnan().any(dim=1)
    if not bool(known.any()):
        return logits.sum() * 0
    if not bool(known.all()):
        rows = to_device(known.nonzero()[:, 0], device)
        logits, target = logits.index_select(0, rows), target[known]
    logits, weight = logits.float(), None if weight is None else to_device(weight, device)
    if task.kind == "multiclass":
        return F.cross_entropy(logits, to_device(target[:, 0].long(), device), weight)
    if task.kind == "binary":
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], to_device(target[:, 0], device), reduction="none")
        if weight is None:
            return loss.mean()
        each = weight[to_device(target[:, 0].long(), device)]
        return (loss * each).sum() / each.sum()
    if task.kind == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, to_device(target, device), pos_weight=weight)
    standardised = (target[:, 0].double() - task.mean) / task.std  # in float32 the mean would cancel the differences
    return F.mse_loss(logits[:, 0], to_device(standardised.float(), device))


def total_loss(
    tasks: Sequence[Task],
    logits: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Mean of the tasks' losses; a task without a label in the batch does not count.

    Args:
        tasks: what the columns mean.
        logits: of every task (b o).
        targets: encoded labels (b w) of every task, on the host; see `task_loss`.
        weights: of the classes, by task.
    """
    terms = []
    for task in tasks:
        target = targets[task.name].cpu()
        if not bool(target.isnan().any(dim=1).all()):
            weight = (weights or {}).get(task.name)
            terms.append(task_loss(task, logits[task.name], target, weight))
    if not terms:
        return torch.stack([logits[task.name].sum() * 0 for task in tasks]).sum()
    return torch.stack(terms).mean()


def class_weights(task: Task, targets: Float[Tensor, "n w"]) -> Tensor | None:
    """Inverse class frequencies in the training labels, mean 1 over the images; None for regression.

    For multilabel the ratio of negatives to positives, per class.
    """
    known = targets[~targets.isnan().any(dim=1)]
    if task.kind == "regression" or not len(known):
        return None
    if task.kind == "multilabel":
        positive = known.sum(dim=0).clamp(min=1)
        return (len(known) - positive).clamp(min=1) / positive
    classes = max(2, len(task.classes))
    counts = torch.bincount(known[:, 0].long(), minlength=classes).clamp(min=1)
    return len(known) / (classes * counts.float())
