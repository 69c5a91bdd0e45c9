"""How the loss learns: v, u, h and ∇_φ; pure torch."""

from lightning_adalfl.learning.base_step import BaseStep
from lightning_adalfl.learning.forward_mode import ForwardMode, ForwardModeError
from lightning_adalfl.learning.hypergradient import Hypergradient, hypergradient
from lightning_adalfl.learning.jvp import DoubleBackward, FiniteDifference, JacobianProduct

__all__ = [
    "BaseStep",
    "DoubleBackward",
    "FiniteDifference",
    "ForwardMode",
    "ForwardModeError",
    "Hypergradient",
    "JacobianProduct",
    "hypergradient",
]
