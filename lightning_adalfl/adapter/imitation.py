"""A warm start: fit the learned loss's gradient to the task loss's, without a base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_adalfl.adapter.meta_batches import EndlessBatches, moved_to_device
from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.task_losses import TaskLoss

if TYPE_CHECKING:
    from lightning_adalfl.mixin import AdaLFLMixin


def imitate_task_loss(module: AdaLFLMixin, batches: EndlessBatches, steps: int, lr: float = 3e-3) -> None:
    """Fit ``∂M_φ/∂f`` to ``∂L_T/∂f`` on the data's targets and predictions drawn over the range of training.

    Args:
        module: The user's module.
        batches: Where targets come from.
        steps: Steps of Adam, with a cosine schedule.
        lr: Its learning rate.
    """
    loss, task_loss = module.adalfl.loss, module.adalfl.task_loss
    if loss is None:
        return
    optimizer = torch.optim.Adam(loss.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    predictions, target = _example(module, batches)
    for step in range(steps):
        if step % 20 == 19:
            predictions, target = _example(module, batches)
        optimizer.zero_grad()
        mismatch(loss, task_loss, _drawn_like(predictions, target, loss.task), target).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def mismatch(loss: LearnedLoss, task_loss: TaskLoss, predictions: Tensor, target: Tensor) -> Tensor:
    """Return ``‖∂M_φ/∂f - ∂L_T/∂f‖² / ‖∂L_T/∂f‖²``, zero for a loss that trains like the task loss."""
    leaf = predictions.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(task_loss(leaf, target), leaf)
    (given,) = torch.autograd.grad(loss(leaf, target), leaf, create_graph=True)
    return (given - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)


def _example(module: AdaLFLMixin, batches: EndlessBatches) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        predictions, target = module.adalfl_predict(moved_to_device(module, next(batches)))
    return predictions.float(), target


def _drawn_like(predictions: Tensor, target: Tensor, task: str) -> Tensor:
    """Draw predictions from undecided to confident, right and wrong."""
    noise = torch.randn_like(predictions)
    shape = [predictions.shape[0], *[1] * (predictions.ndim - 1)]
    if task == "regression":
        spread = target.float().std().clamp_min(1e-3)
        return target + noise * spread * 2 * torch.rand(shape, device=noise.device)
    return noise * 4 * torch.rand(shape, device=noise.device)
