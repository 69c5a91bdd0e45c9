"""The callbacks: the offline phase, and what people look at."""

from lightning_adalfl.callbacks.initialisation import AdaLFLInit
from lightning_adalfl.callbacks.loss_shape import LossShapeLogger
from lightning_adalfl.callbacks.trajectory import TrajectoryRecorder, TrajectoryReplay

__all__ = ["AdaLFLInit", "LossShapeLogger", "TrajectoryRecorder", "TrajectoryReplay"]
