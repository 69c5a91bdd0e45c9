"""What is learned: ℓ_φ, its representations, and how predictions and targets become pairs."""

from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.network import LossNetwork
from lightning_adalfl.losses.smooth_leaky_relu import SmoothLeakyReLU
from lightning_adalfl.losses.taylor import TaylorLoss

__all__ = ["LearnedLoss", "LossNetwork", "SmoothLeakyReLU", "TaylorLoss"]
