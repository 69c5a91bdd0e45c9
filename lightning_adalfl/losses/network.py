"""The representation of the paper: a small feed-forward network on the pair (y_i, f_i)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_adalfl.losses.activations import ACTIVATIONS
from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.handcrafted import handcrafted_pairwise

WEIGHT_INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
}


class LossNetwork(LearnedLoss):
    """ℓ_φ as a feed-forward network on (y_i, f_i): by default two hidden layers of 40 smooth leaky ReLUs (section 2.2).

    Args:
        task: See :class:`LearnedLoss`.
        hidden: The widths of the hidden layers.
        activation: Of the hidden layers, ``"smooth_leaky_relu"`` (Eq. 4), ``"relu"`` or ``"softplus"``.
        output_activation: Of the output, one of the same names, or ``None``. Any that is bounded on one side lets
            the base model run away, so the default is none.
        bias: Whether the linear layers have biases.
        weight_init: ``"kaiming_normal"`` or ``"xavier_uniform"``.
        reduction: See :class:`LearnedLoss`.
        residual: Whether ℓ_φ is the task's handcrafted loss plus the network, whose output weights then begin at zero,
            so that training starts from the handcrafted loss.

    Raises:
        ValueError: For an unknown name, or a width that is not positive.
    """

    def __init__(
        self,
        task: str,
        hidden: Sequence[int] = (40, 40),
        activation: str = "smooth_leaky_relu",
        output_activation: str | None = None,
        bias: bool = False,
        weight_init: str = "kaiming_normal",
        reduction: str = "mean",
        residual: bool = False,
    ) -> None:
        super().__init__(task, reduction)
        widths = hidden if isinstance(hidden, Sequence) and not isinstance(hidden, str) else ()
        if not widths or not all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in widths):
            raise ValueError(f"`hidden` must name at least one positive layer width, such as (40, 40); got {hidden}.")
        for argument, name in (("activation", activation), ("output_activation", output_activation)):
            if argument == "output_activation" and name is None:
                continue
            if not isinstance(name, str) or name not in ACTIVATIONS:
                raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, ACTIVATIONS))}; got {name!r}.")
        if not isinstance(weight_init, str) or weight_init not in WEIGHT_INITS:
            raise ValueError(f"`weight_init` must be one of {', '.join(map(repr, WEIGHT_INITS))}; got {weight_init!r}.")
        if not isinstance(bias, bool):
            raise TypeError(f"`bias` must be True or False; got {bias!r}.")
        self.hidden = tuple(hidden)
        self.activation = activation
        self.output_activation = output_activation
        self.bias = bias
        self.weight_init = weight_init
        self.residual = residual
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip((2, *hidden[:-1]), hidden):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), ACTIVATIONS[activation]()]
        layers.append(nn.Linear(hidden[-1], 1, bias=bias))
        if output_activation is not None:
            layers.append(ACTIVATIONS[output_activation]())
        self.layers = nn.Sequential(*layers)
        self.reset_parameters()

    @classmethod
    def ml3(cls, task: str, reduction: str = "mean") -> LossNetwork:
        """Return ML³'s network (Bechtle et al., 2021): ReLU inside, Softplus at the output, Xavier-uniform weights."""
        return cls(task, (40, 40), "relu", "softplus", weight_init="xavier_uniform", reduction=reduction)

    def reset_parameters(self) -> None:
        """Draw φ afresh: weights by ``weight_init``, biases zero, and those of a residual's output zero too."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer in linear:
            WEIGHT_INITS[self.weight_init](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.residual:
            nn.init.zeros_(linear[-1].weight)

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ℓ_φ(y_i, f_i) element-wise, in one call of the network."""
        value = self.layers(torch.stack((target, prediction), dim=-1)).squeeze(-1)
        return value + handcrafted_pairwise(self.task, prediction, target) if self.residual else value
