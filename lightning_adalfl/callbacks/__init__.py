"""The callbacks: the offline phase, what people look at, and the losses of another run."""

from lightning_adalfl.callbacks.adalfl_init import AdaLFLInit
from lightning_adalfl.callbacks.influence_logger import InfluenceLogger
from lightning_adalfl.callbacks.loss_shape_logger import LossShapeLogger
from lightning_adalfl.callbacks.replay import LossReplay

__all__ = ["AdaLFLInit", "InfluenceLogger", "LossReplay", "LossShapeLogger"]
