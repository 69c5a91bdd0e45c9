"""Which way to the slope of a learned loss is the fastest."""

from __future__ import annotations

from torch import Tensor

from lightning_adalfl.hypergradient.bounded_slope import BoundedSlope
from lightning_adalfl.hypergradient.loss_slope import AutogradSlope, LossSlope, Objective
from lightning_adalfl.hypergradient.network_slope import NetworkSlope
from lightning_adalfl.losses.bounded import BoundedLoss
from lightning_adalfl.losses.network import LossNetwork


def loss_slope(loss: Objective, predictions: Tensor, target: Tensor) -> LossSlope:
    """Return M_φ and its slope at ``predictions``, in the fastest way that there is for ``loss``."""
    if predictions.is_floating_point():
        # Exact types, since a subclass may compute something else.
        if type(loss) is BoundedLoss:
            # The bounds are computed in the precision of φ.
            learned = loss_slope(loss.loss, predictions.detach().to(loss.loss.dtype), target)
            return BoundedSlope(loss, predictions, target, learned)
        if type(loss) is LossNetwork and loss.activation == "smooth_leaky_relu" and loss.output_activation is None:
            return NetworkSlope(loss, predictions, target)
    return AutogradSlope(loss, predictions, target)
