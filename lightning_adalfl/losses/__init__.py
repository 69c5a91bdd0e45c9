"""What is learned: ℓ_φ and its representations, and what a base step descends; either may be of your own."""

from lightning_adalfl.losses.descent import Descent, Predicted
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.network import LossNetwork, SmoothLeakyReLU
from lightning_adalfl.losses.taylor import TaylorLoss
from lightning_adalfl.losses.training_objective import BatchLoss, TrainingObjective

__all__ = [
    "BatchLoss",
    "Descent",
    "LearnedLoss",
    "LossNetwork",
    "Predicted",
    "SmoothLeakyReLU",
    "TaylorLoss",
    "TrainingObjective",
]
