"""How the loss learns: v, u, h and ∇_φ; pure torch."""

from lightning_adalfl.hypergradient.base_step import BaseStep
from lightning_adalfl.hypergradient.directional_derivative import ForwardModeError
from lightning_adalfl.hypergradient.gradient_clipping import ClipByNorm, ClipByValue
from lightning_adalfl.hypergradient.hypergradient import Hypergradient, hypergradient
from lightning_adalfl.hypergradient.implicit import implicit_hypergradient
from lightning_adalfl.hypergradient.shadow_optimizer import OptimizerError

__all__ = [
    "BaseStep",
    "ClipByNorm",
    "ClipByValue",
    "ForwardModeError",
    "Hypergradient",
    "OptimizerError",
    "hypergradient",
    "implicit_hypergradient",
]
