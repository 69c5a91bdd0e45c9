"""Gradient clipping as a map g -> ĝ with its transposed derivative, so that the hypergradient passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class GradientTransform(Protocol):
    """A map that was applied to the gradient between backward and step."""

    def forward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ĝ as a differentiable function of g."""

    def transposed(self, clipped: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return ``(∂ĝ/∂g)ᵀ`` times ``vector``, given ĝ."""


class ClipByNorm:
    """``ĝ = g · min(1, c / (‖g‖ + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` does it.

    Args:
        max_norm: c.
        total_norm: ‖g‖, a scalar tensor, as that function returns it; only :meth:`transposed` needs it.
    """

    def __init__(self, max_norm: float, total_norm: Tensor | None = None) -> None:
        self.max_norm = max_norm
        self.total_norm = total_norm

    def forward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ĝ as a differentiable function of g."""
        norm = torch.stack([g.norm() for g in gradients]).norm()
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return [g * factor for g in gradients]

    def transposed(self, clipped: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return ``s (w - ĝ ⟨ĝ, w⟩ / (s² ‖g‖ (‖g‖ + 1e-6)))`` with ``s = c / (‖g‖ + 1e-6)``, or w."""
        if self.total_norm is None:
            raise ValueError("`total_norm` must be given, the norm that `clip_grad_norm_` returned.")
        norm = self.total_norm
        factor = self.max_norm / (norm + 1e-6)
        dot = torch.stack([torch.sum(g * w) for g, w in zip(clipped, vector)]).sum()
        slope = dot / (factor**2 * norm * (norm + 1e-6))
        active = factor < 1.0
        slope = torch.where(active, slope, torch.zeros_like(slope))
        factor = torch.where(active, factor, torch.ones_like(factor))
        return [torch.addcmul(w, g, slope.to(g.dtype), value=-1).mul_(factor) for g, w in zip(clipped, vector)]


class ClipByValue:
    """``ĝ = clamp(g, -c, c)`` element-wise; the derivative is one inside the bounds and zero where it was cut.

    Args:
        max_value: c.
    """

    def __init__(self, max_value: float) -> None:
        self.max_value = max_value

    def forward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ĝ as a differentiable function of g."""
        return [g.clamp(-self.max_value, self.max_value) for g in gradients]

    def transposed(self, clipped: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return ``vector`` with zeros where the gradient was cut."""
        return [w * (g.abs() < self.max_value) for g, w in zip(clipped, vector)]
