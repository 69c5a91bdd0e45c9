"""The handcrafted task loss L_T of each task: what the meta-objective measures, and what the baseline trains with."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lightning_adalfl.losses.pairing import check_task

TaskLoss = Callable[[Tensor, Tensor], Tensor]


def default_task_loss(task: str) -> TaskLoss:
    """Return the task loss of ``task``: cross-entropy on logits, or the mean squared error for regression."""
    check_task(task)
    losses: dict[str, TaskLoss] = {
        "multiclass": F.cross_entropy,
        "binary": binary_cross_entropy,
        "multilabel": binary_cross_entropy,
        "regression": squared_error,
    }
    return losses[task]


def binary_cross_entropy(predictions: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits against 0/1 targets of the same shape, integers allowed."""
    return F.binary_cross_entropy_with_logits(predictions, target.to(predictions.dtype))


def squared_error(predictions: Tensor, target: Tensor) -> Tensor:
    """Mean squared error against targets of the same shape, integers allowed."""
    return F.mse_loss(predictions, target.to(predictions.dtype))
