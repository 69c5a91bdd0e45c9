"""Bounds on what a learned loss may do to the base step, so that it cannot be much worse than the task loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.task_losses import TaskLoss


class BoundedLoss(nn.Module):
    """M_φ as the base learner meets it: its slope by the predictions bounded around that of the task loss.

    With m = ∂M_φ/∂f and τ = ∂L_T/∂f over a batch, m is split into ``s (τ + p)``, where p is orthogonal to τ. What
    trains the base model is ``e^γ (τ + p')``. p' is p, shortened where the angle between m and τ has a cosine below
    ``min_cosine``; so φ is the loss's shape. The gain ``e^γ`` is the factor of the implied learning rate (section 5.5);
    it is learned along with φ, faster, and stays in [1, ``max_gain``]. Where m points away from τ (s ≤ 0) or is not
    finite, p' is zero.

    The hypergradient goes through all of this, and so is that of the step that was taken.

    Args:
        loss: M_φ.
        task_loss: L_T.
        max_gain: The largest gain, more than 1.
        min_cosine: In (0, 1); near 1 the gain is all that is learned.

    Attributes:
        log_gain: γ.
    """

    def __init__(self, loss: LearnedLoss, task_loss: TaskLoss, max_gain: float, min_cosine: float) -> None:
        super().__init__()
        self.loss = loss
        self.task_loss = task_loss
        self.max_gain = max_gain
        self.min_cosine = min_cosine
        self.log_gain = nn.Parameter(torch.zeros(()))

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Return M_φ, a scalar whose derivative by the predictions is the bounded slope."""
        if not (torch.is_grad_enabled() and predictions.requires_grad):
            return self.loss(predictions, target)
        value, slope = self.value_and_slope(predictions, target)
        return _WithSlope.apply(predictions, value.detach(), slope.to(predictions.dtype))

    def value_and_slope(self, predictions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return M_φ and ``e^γ (τ + p')``, of the predictions' shape and with the graph to them, φ and γ."""
        leaf = predictions.to(self.loss.dtype)
        (tau,) = torch.autograd.grad(self.task_loss(leaf, target), leaf, create_graph=True)
        value = self.loss(leaf, target)
        (learned,) = torch.autograd.grad(value, leaf, create_graph=True)
        return value, self.bounded(learned, tau)

    def bounded(self, learned: Tensor, tau: Tensor) -> Tensor:
        """Return ``e^γ (τ + p')`` of the slopes m and τ, which have the same shape."""
        size = tau.square().sum().clamp_min(torch.finfo(tau.dtype).tiny)
        along = (learned * tau).sum() / size
        aligned = along > 0
        across = learned / torch.where(aligned, along, 1.0) - tau
        length = across.square().sum()
        limit = (1 / self.min_cosine**2 - 1) * size
        across = across * (limit / torch.maximum(length, limit)).sqrt()
        across = torch.where(aligned & torch.isfinite(length), across, 0.0)
        return self.log_gain.exp() * (tau + across)

    @property
    def task(self) -> str:
        """The task of the learned loss."""
        return self.loss.task

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ``e^γ ℓ_φ(y_i, f_i)`` element-wise: the loss with its gain, for pictures."""
        return self.log_gain.exp() * self.loss.pairwise(prediction, target)

    @torch.no_grad()
    def clamp_gain(self) -> None:
        """Bring the gain back into [1, ``max_gain``]."""
        self.log_gain.clamp_(0.0, math.log(self.max_gain))


class _WithSlope(torch.autograd.Function):
    """A value with the derivative that it is given, which can itself be differentiated."""

    @staticmethod
    def forward(ctx: Any, predictions: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None
