"""The slope of a learned loss within its bounds, from that of the loss itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_adalfl.hypergradient.loss_slope import LossSlope
from lightning_adalfl.losses.bounded import BoundedLoss


class BoundedSlope(LossSlope):
    """``e^γ (τ + p')`` as a function of m and γ: autograd passes the bounds, and m has a slope of its own.

    Args:
        loss: The loss with its bounds.
        predictions: f_θ(x).
        target: y.
        learned: M_φ and m, in the precision of φ.
    """

    def __init__(self, loss: BoundedLoss, predictions: Tensor, target: Tensor, learned: LossSlope) -> None:
        self._log_gain = loss.log_gain
        super().__init__(loss, predictions, [p for p in (self._log_gain, *learned.phi) if p.requires_grad])
        self.value = learned.value
        self._learned = learned
        with torch.enable_grad():
            leaf = predictions.detach().to(loss.loss.dtype).requires_grad_()
            (tau,) = torch.autograd.grad(loss.task_loss(leaf, target), leaf)
            self._m = learned.slope.detach().requires_grad_()
            self._bounded = loss.bounded(self._m, tau)
        self.slope = self._bounded.detach().to(predictions.dtype)

    def contracted(self, phi: list[Tensor], h: Tensor) -> list[Tensor]:
        """Return ``∂/∂φ ⟨m(φ), h⟩``, for the gain as well."""
        by = [self._m, self._log_gain] if self._log_gain.requires_grad else [self._m]
        by_m, *by_gain = torch.autograd.grad(self._bounded, by, h.to(self._bounded.dtype), retain_graph=True)
        learned = self._learned
        found = dict(zip(map(id, learned.phi), learned.contracted(learned.phi, by_m)))
        found.update(zip([id(self._log_gain)], by_gain))
        return [found[id(p)] for p in phi]
