"""Adaptive loss functions for PyTorch Lightning: the loss is learned while the model trains (AdaLFL)."""

from lightning_adalfl.adapter.mixin import AdaLFLMixin
from lightning_adalfl.callbacks import AdaLFLInit, InfluenceLogger, LossReplay, LossShapeLogger
from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.inspection import LossHistory
from lightning_adalfl.learning import BaseStep, Hypergradient, JacobianProduct, hypergradient
from lightning_adalfl.learning.meta_learner import MetaLearner
from lightning_adalfl.losses import LearnedLoss, LossNetwork, SmoothLeakyReLU, TaylorLoss

__version__ = "0.2.0"

__all__ = [
    "AdaLFLConfig",
    "AdaLFLInit",
    "AdaLFLMixin",
    "BaseStep",
    "Hypergradient",
    "InfluenceLogger",
    "JacobianProduct",
    "LearnedLoss",
    "LossHistory",
    "LossNetwork",
    "LossReplay",
    "LossShapeLogger",
    "MetaLearner",
    "SmoothLeakyReLU",
    "TaylorLoss",
    "hypergradient",
]
