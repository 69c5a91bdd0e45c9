"""Adaptive loss functions for PyTorch Lightning: the loss is learned while the model trains (AdaLFL)."""

from lightning_adalfl.callbacks import AdaLFLInit, LossShapeLogger, TrajectoryRecorder, TrajectoryReplay
from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.hypergradient import BaseStep, Hypergradient, hypergradient
from lightning_adalfl.losses import LearnedLoss, LossNetwork, SmoothLeakyReLU, TaylorLoss
from lightning_adalfl.mixin import AdaLFLMixin
from lightning_adalfl.trajectory import LossTrajectory

__version__ = "0.1.0"

__all__ = [
    "AdaLFLConfig",
    "AdaLFLInit",
    "AdaLFLMixin",
    "BaseStep",
    "Hypergradient",
    "LearnedLoss",
    "LossNetwork",
    "LossShapeLogger",
    "LossTrajectory",
    "SmoothLeakyReLU",
    "TaylorLoss",
    "TrajectoryRecorder",
    "TrajectoryReplay",
    "hypergradient",
]
