"""Logits and labels -> loss, one term per task, missing labels left out.

Letters: b image, o outputs of a task, w width of an encoded label.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from keyhole.tasks import Task


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
        target: encoded labels; NaN is missing.
        weight: per class (multiclass, binary: negative and positive) or of the positive (multilabel).

    Returns:
        Mean over the labels that are there; 0 if none is, with a gradient of 0.
    """
    known = ~target.isnan().any(dim=1)
    if not bool(known.any()):
        return logits.sum() * 0
    logits, target = logits[known].float(), target[known]
    if task.kind == "multiclass":
        return F.cross_entropy(logits, target[:, 0].long(), weight)
    if task.kind == "binary":
        each = None if weight is None else weight[target[:, 0].long()]
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], target[:, 0], reduction="none")
        return loss.mean() if each is None else (loss * each).sum() / each.sum()
    if task.kind == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    standardised = (target[:, 0].double() - task.mean) / task.std  # in float32 the mean would cancel the differences
    return F.mse_loss(logits[:, 0], standardised.float())


def total_loss(
    tasks: Sequence[Task],
    logits: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Mean of the tasks' losses; a task without a label in the batch does not count."""
    terms = []
    for task in tasks:
        if not bool(targets[task.name].isnan().any(dim=1).all()):
            weight = (weights or {}).get(task.name)
            terms.append(task_loss(task, logits[task.name], targets[task.name], weight))
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
