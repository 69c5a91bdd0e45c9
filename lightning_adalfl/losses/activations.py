"""The activations of the loss network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SmoothLeakyReLU(nn.Module):
    """The smooth leaky ReLU of Eq. 4, ``φ(x) = (1 - γ) log(1 + exp(βx)) / β + γx``.

    Smooth, and linear towards both ends, so that a loss built from it has no flat region.

    Args:
        gamma: The leak γ, the slope towards minus infinity.
        beta: The smoothness β; the larger, the nearer to the leaky ReLU.
    """

    def __init__(self, gamma: float = 0.01, beta: float = 10.0) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("beta", beta)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` must be a number; got {value!r}.")
        if not 0.0 <= gamma < 1.0:
            raise ValueError(f"`gamma` must lie in [0, 1), the slope of the leak; got {gamma}.")
        if not 0.0 < beta < float("inf"):
            raise ValueError(f"`beta` must be positive and finite; got {beta}.")
        self.gamma = gamma
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation element-wise."""
        return F.softplus(x, beta=self.beta) * (1.0 - self.gamma) + self.gamma * x

    def extra_repr(self) -> str:
        """Show γ and β in the module's representation."""
        return f"gamma={self.gamma}, beta={self.beta}"


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "smooth_leaky_relu": SmoothLeakyReLU,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
}
