"""The activation of Eq. 4, with the derivatives that a hypergradient needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl.checks import finite_number, positive_number


class SmoothLeakyReLU(nn.Module):
    """The smooth leaky ReLU of Eq. 4, ``φ(x) = (1 - γ) log(1 + exp(βx)) / β + γx``.

    Smooth, and linear towards both ends, so that a loss built from it has no flat region.

    Args:
        gamma: The leak γ, the slope towards minus infinity.
        beta: The smoothness β; the larger, the nearer to the leaky ReLU.

    Raises:
        TypeError: For an argument that is no number.
        ValueError: For one out of range.
    """

    def __init__(self, gamma: float = 0.01, beta: float = 10.0) -> None:
        super().__init__()
        self.beta = positive_number("beta", beta)
        finite_number("gamma", gamma)
        self.gamma = gamma if gamma == 0 else positive_number("gamma", gamma)
        if not gamma < 1.0:
            raise ValueError(f"`gamma` must lie in [0, 1), the slope of the leak; got {gamma}.")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation element-wise."""
        return F.softplus(x, beta=self.beta) * (1.0 - self.gamma) + self.gamma * x

    def slope(self, x: Tensor) -> Tensor:
        """Return the derivative at ``x``, between γ and 1."""
        return torch.sigmoid(x * self.beta).mul_(1.0 - self.gamma).add_(self.gamma)

    def curvature(self, slope: Tensor) -> Tensor:
        """Return the second derivative where the first is ``slope``: ``β u (1 - u / (1 - γ))`` with u = s' - γ."""
        u = slope - self.gamma
        return torch.addcmul(u, u, u, value=-1.0 / (1.0 - self.gamma)).mul_(self.beta)

    def extra_repr(self) -> str:
        """Show γ and β in the module's representation."""
        return f"gamma={self.gamma}, beta={self.beta}"
