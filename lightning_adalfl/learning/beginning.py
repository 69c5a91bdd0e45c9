"""How learning begins: what a configuration trains with, and what a first batch must be."""

from __future__ import annotations

import copy
import os

import torch
from torch import Tensor

from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.predicted import Predicted
from lightning_adalfl.losses.tasks import Task
from lightning_adalfl.losses.training_objective import BatchLoss, BentLoss, LearnedAlone, OwnLoss, TrainingObjective


def initial_objective(config: AdaLFLConfig, task: Task) -> tuple[TrainingObjective, bool]:
    """Return what trains the base model, and whether its φ was learned before.

    Raises:
        ValueError: If the file of ``config.loss`` cannot be read, or holds a loss for another task.
        TypeError: If a loss of a user's own could not be written into a checkpoint.
    """
    if not config.learns_loss:
        return OwnLoss(), False
    # φ has random numbers of its own, so that everything else is drawn as without it.
    with torch.random.fork_rng(devices=[]):
        loss, is_learned = _loss_of(config)
    loss.describe()
    loss.pairing = task  # which knows what is to be left out
    if not config.own_loss:
        return LearnedAlone(loss), is_learned
    is_zero = not is_learned and not isinstance(config.loss, LearnedLoss)  # an instance is used as it is
    if is_zero:
        loss.start_at_zero()
    return BentLoss(loss, is_zero), is_learned


def _loss_of(config: AdaLFLConfig) -> tuple[LearnedLoss, bool]:
    given, task = config.loss, config.task
    if isinstance(given, LearnedLoss):
        return copy.deepcopy(given), False  # the configuration's may serve another learner
    path = os.fspath(given)
    if "." not in os.path.basename(path):
        return LearnedLoss.named(path, task), False
    try:
        loss = LearnedLoss.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`loss` {path!r} cannot be used: {error}") from error
    if loss.task != task:
        raise ValueError(
            f"`loss` {path!r} is for task {loss.task!r} and `task` is {task!r}: its predictions are of another kind. "
            "Give a loss that was learned on the same kind of task."
        )
    return loss, True


def check_pairs(task: Task, predicted: Predicted) -> None:
    """Raise a ``ValueError`` unless a first batch makes pairs of the task."""
    predictions = predicted.predictions.detach()
    task.check_values(predictions, predicted.target)
    task.pairs(predictions, predicted.target, predicted.weight)


def check_task_loss(task_loss: BatchLoss, predicted: Predicted) -> None:
    """Raise a ``ValueError`` unless the task loss of a first batch is a scalar that can be differentiated."""
    leaf = predicted.predictions.detach().requires_grad_()
    weight = [] if predicted.weight is None else [predicted.weight]
    with torch.enable_grad():
        value = task_loss(leaf, predicted.target, *weight)
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`task_loss` must return a scalar, the mean over the batch; got {kind}.")
    if not value.requires_grad:
        raise ValueError(
            "`task_loss` cannot be differentiated: its value does not depend on the predictions by operations that "
            "torch differentiates. Leave out `argmax`, rounding, `detach` and NumPy."
        )
