"""Build a learned loss from its name in the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.network import LossNetwork
from lightning_adalfl.losses.taylor import TaylorLoss

if TYPE_CHECKING:
    from lightning_adalfl.config import AdaLFLConfig


def build_loss(config: AdaLFLConfig) -> LearnedLoss:
    """Return ``config.initial_loss``, or a freshly drawn learned loss of ``config.representation``."""
    if config.initial_loss is not None:
        return LearnedLoss.load(config.initial_loss)
    name, task, reduction = config.representation, config.task, config.reduction
    if name == "network":
        return LossNetwork(
            task,
            output_activation=config.output_activation,
            bias=config.bias,
            weight_init=config.weight_init,
            reduction=reduction,
            residual=config.residual,
        )
    if name == "ml3":
        return LossNetwork.ml3(task, reduction)
    order = "cubic" if "cubic" in name else "quadratic"
    form = "target_powers" if name.endswith("target_powers") else "prediction_powers"
    return TaylorLoss(task, order, form, reduction)


def representation_of(loss: LearnedLoss) -> dict[str, Any]:
    """Return the fields of the configuration for which :func:`build_loss` builds a loss of this structure.

    Raises:
        ValueError: If no configuration does.
    """
    if type(loss) is TaylorLoss:
        suffix = "_target_powers" if loss.form == "target_powers" else ""
        return {"representation": f"taylor_{loss.order}{suffix}", "reduction": loss.reduction}
    if type(loss) is LossNetwork and loss.hidden == (40, 40):
        options = {name: getattr(loss, name) for name in ("output_activation", "bias", "weight_init", "residual")}
        if loss.activation == "smooth_leaky_relu":
            return {"representation": "network", "reduction": loss.reduction, **options}
        if (loss.activation, *options.values()) == ("relu", "softplus", False, "xavier_uniform", False):
            return {"representation": "ml3", "reduction": loss.reduction}
    raise ValueError(
        f"no `representation` has the structure of its {type(loss).__name__}; save a loss that one of them built, or "
        "train with this one in a loop of your own"
    )
