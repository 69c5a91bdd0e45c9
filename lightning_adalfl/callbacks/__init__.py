"""The callbacks: the offline phase, and what people look at."""

from lightning_adalfl.callbacks.initialisation import AdaLFLInit

__all__ = ["AdaLFLInit"]
