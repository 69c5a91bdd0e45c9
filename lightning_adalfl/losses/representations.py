"""Build a learned loss from its name in the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.network import LossNetwork
from lightning_adalfl.losses.taylor import TaylorLoss

if TYPE_CHECKING:
    from lightning_adalfl.config import AdaLFLConfig


def build_loss(config: AdaLFLConfig) -> LearnedLoss:
    """Return a freshly drawn learned loss of ``config.representation``."""
    name, task, reduction = config.representation, config.task, config.reduction
    if name == "network":
        return LossNetwork(
            task,
            output_activation=config.output_activation,
            bias=config.bias,
            weight_init=config.weight_init,
            reduction=reduction,
        )
    if name == "ml3":
        return LossNetwork.ml3(task, reduction)
    order = "cubic" if "cubic" in name else "quadratic"
    form = "target_powers" if name.endswith("target_powers") else "prediction_powers"
    return TaylorLoss(task, order, form, reduction)
