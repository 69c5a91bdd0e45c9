"""What is learned: ℓ_φ, its representations, and how predictions and targets become pairs."""

from lightning_adalfl.losses.activations import SmoothLeakyReLU
from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.network import LossNetwork
from lightning_adalfl.losses.taylor import TaylorLoss

__all__ = ["LearnedLoss", "LossNetwork", "SmoothLeakyReLU", "TaylorLoss"]
