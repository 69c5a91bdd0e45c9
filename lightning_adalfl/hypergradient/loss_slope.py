"""``m = ∂M_φ/∂f``, where the base backward starts, and what the hypergradient differentiates by φ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Objective = Callable[[Tensor, Tensor], Tensor]


class LossSlope(ABC):
    """M_φ and its slope at one forward's predictions, which are held fixed.

    Args:
        loss: M_φ.
        predictions: f_θ(x).
        phi: φ, if it is known.

    Attributes:
        phi: φ.
        value: M_φ, a scalar.
        slope: m, of the shape of the predictions.
    """

    value: Tensor
    slope: Tensor

    def __init__(self, loss: Objective, predictions: Tensor, phi: list[Tensor] | None = None) -> None:
        _map_constants(predictions)
        self.loss = loss
        self.phi = phi_of(loss) if phi is None else phi
        self._versions = [p._version for p in self.phi]

    def at(self, predictions: Tensor) -> Tensor:
        """Return M_φ as a function of these very predictions; its backward starts from the slope and leaves φ alone."""
        return _KnownSlope.apply(predictions, self.value, self.slope.detach())

    def holds_for(self, loss: Objective, phi: list[Tensor]) -> bool:
        """Whether this is the slope of ``loss`` as it is now."""
        return loss is self.loss and self._versions == [p._version for p in phi]

    @abstractmethod
    def contracted(self, phi: list[Tensor], h: Tensor) -> list[Tensor]:
        """Return ``∂/∂φ ⟨m(φ), h⟩``: second order in the loss alone."""


class AutogradSlope(LossSlope):
    """For any loss: the slope with its graph, which leads to φ.

    Args:
        loss: M_φ.
        predictions: f_θ(x).
        target: y.
    """

    def __init__(self, loss: Objective, predictions: Tensor, target: Tensor) -> None:
        super().__init__(loss, predictions)
        with torch.enable_grad():
            leaf = predictions.detach().requires_grad_()
            value = loss(leaf, target)
            (self.slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        self.value = value.detach()

    def contracted(self, phi: list[Tensor], h: Tensor) -> list[Tensor]:
        """Return ``∂/∂φ ⟨m(φ), h⟩`` by a second backward."""
        weight = h.to(self.slope.dtype)
        if not self.slope.requires_grad:  # a loss that is linear in f has a slope without φ
            return [torch.zeros_like(p) for p in phi]
        gradients = torch.autograd.grad(self.slope, phi, weight, retain_graph=True, allow_unused=True)
        # A bias of the last layer moves the loss and not its slope.
        return [torch.zeros_like(p) if g is None else g for p, g in zip(phi, gradients)]


def phi_of(loss: Objective) -> list[Tensor]:
    """Return φ: the parameters of a loss that is a module and learns."""
    return [p for p in loss.parameters() if p.requires_grad] if isinstance(loss, nn.Module) else []


class _KnownSlope(torch.autograd.Function):
    """A scalar whose value and derivative have been computed already."""

    @staticmethod
    def forward(ctx: Any, predictions: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None


def _map_constants(example: Tensor) -> None:
    # Vectorised log1p reads its result for -0 under a mask. While that page of torch's constants has not been touched
    # each such read costs a microcode assist, and log1p, expm1 and softplus take up to ten times as long.
    if example.device.type == "cpu":
        torch.log1p(_MINUS_ZEROS)


_MINUS_ZEROS = torch.full((16,), -0.0)
