"""The representation of the paper: a small feed-forward network on the pair (y_i, f_i), with its gradient by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl.checks import finite_number, one_of, positive_number
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.output_gradient import EMBEDDING, NetworkGradient, OutputGradient, Pairs, pairs_of, rows_of

WEIGHT_INITS = ("kaiming_normal", "xavier_uniform")  # as torch.nn.init has them
MAX_CLASSES = 100


class SmoothLeakyReLU(nn.Module):
    """The smooth leaky ReLU of Eq. 4, ``φ(x) = (1 - γ) log(1 + exp(βx)) / β + γx``.

    Smooth, and linear towards both ends, so that a loss built from it has no flat region.

    Args:
        gamma: The leak γ, the slope towards minus infinity.
        beta: The smoothness β; the larger, the nearer to the leaky ReLU.

    Raises:
        TypeError: For an argument that is no number.
        ValueError: For one out of range.
    """

    def __init__(self, gamma: float = 0.01, beta: float = 10.0) -> None:
        super().__init__()
        self.beta = positive_number("beta", beta)
        self.gamma = finite_number("gamma", gamma)
        if not 0.0 <= gamma < 1.0:
            raise ValueError(f"`gamma` must lie in [0, 1), the slope of the leak; got {gamma}.")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation element-wise."""
        if not torch.is_grad_enabled():
            return self.with_slope(x)[0]
        return F.softplus(x, beta=self.beta) * (1.0 - self.gamma) + self.gamma * x

    def slope(self, x: Tensor) -> Tensor:
        """Return the derivative at ``x``, between γ and 1."""
        return torch.sigmoid(x * self.beta).mul_(1.0 - self.gamma).add_(self.gamma)

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation and its derivative, in a fifth of the time that the activation takes alone."""
        slope = torch.sigmoid(x * self.beta)
        # softplus(x) = max(x, 0) - log(sigmoid(|x|)); torch's own calls log1p element by element on a processor.
        log = torch.maximum(slope, 1.0 - slope).log_()
        value = x.clamp_min(0.0).add_(log, alpha=-1.0 / self.beta).mul_(1.0 - self.gamma).add_(x, alpha=self.gamma)
        return value, slope.mul_(1.0 - self.gamma).add_(self.gamma)

    def curvature(self, slope: Tensor) -> Tensor:
        """Return the second derivative where the first is ``slope``: ``β u (1 - u / (1 - γ))`` with u = s' - γ."""
        u = slope - self.gamma
        return torch.addcmul(u, u, u, value=-1.0 / (1.0 - self.gamma)).mul_(self.beta)

    def extra_repr(self) -> str:
        """Show γ and β in the module's representation."""
        return f"gamma={self.gamma}, beta={self.beta}"


ACTIVATIONS = {"smooth_leaky_relu": SmoothLeakyReLU, "relu": nn.ReLU, "softplus": nn.Softplus}


class LossNetwork(LearnedLoss):
    """ℓ_φ as a feed-forward network on (y_i, f_i): by default two hidden layers of 40 smooth leaky ReLUs (section 2.2).

    Args:
        task: See :class:`LearnedLoss`.
        hidden: The widths of the hidden layers.
        activation: Of the hidden layers, ``"smooth_leaky_relu"`` (Eq. 4), ``"relu"`` or ``"softplus"``.
        output_activation: Of the output, one of the same names, or ``None``.
        bias: Whether the linear layers have biases.
        weight_init: ``"kaiming_normal"`` or ``"xavier_uniform"``.
        reduction: See :class:`LearnedLoss`.
        sees_classes: For ``"multiclass"``: whether a 4-dimensional embedding of the label's class and one of the
            output's class stand beside (y_i, f_i): fixed codes, and learned changes to them that begin at zero. They
            have no part beyond 100 classes.
        sees_error: For ``"regression"``: whether ``|f_i - y_i|`` and its square stand beside (y_i, f_i). A robust
            loss is then near the start, and few trusted rows can find it.

    Raises:
        TypeError: For a switch that is not a bool.
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
        sees_classes: bool = False,
        sees_error: bool = False,
    ) -> None:
        super().__init__(task, reduction)
        widths = hidden if isinstance(hidden, Sequence) and not isinstance(hidden, str) else ()
        if not widths or not all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in widths):
            raise ValueError(f"`hidden` must name at least one positive layer width, such as (40, 40); got {hidden}.")
        for name, switch in (("bias", bias), ("sees_classes", sees_classes), ("sees_error", sees_error)):
            if not isinstance(switch, bool):
                raise TypeError(f"`{name}` must be True or False; got {switch!r}.")
        if sees_classes and task != "multiclass":
            raise ValueError(f"`sees_classes` is for task 'multiclass', where an instance has a class; got {task!r}.")
        if sees_error and task != "regression":
            raise ValueError(f"`sees_error` is for task 'regression', where targets are values; got {task!r}.")
        self.hidden = tuple(hidden)
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.output_activation = output_activation
        self.bias = bias
        self.weight_init = one_of("weight_init", weight_init, WEIGHT_INITS)
        self.sees_classes = sees_classes
        self.sees_error = sees_error
        widths = (2 + 2 * sees_error + 2 * EMBEDDING * sees_classes, *hidden, 1)
        self.linear = nn.ModuleList(nn.Linear(*fans, bias=bias) for fans in itertools.pairwise(widths))
        self.between = ACTIVATIONS[activation]()
        one_of("output_activation", activation if output_activation is None else output_activation, ACTIVATIONS)
        self.last = nn.Identity() if output_activation is None else ACTIVATIONS[output_activation]()
        if sees_classes:
            self.label_embedding = nn.Parameter(torch.zeros(MAX_CLASSES, EMBEDDING))
            self.output_embedding = nn.Parameter(torch.zeros(MAX_CLASSES, EMBEDDING))
            self._codes: Tensor
            self.register_buffer("_codes", _class_codes(), persistent=False)
            self.held_out_classes: Tensor  # 1: held-out targets have been of that class; 0: none has; -1: no such class
            self.register_buffer("held_out_classes", torch.full((MAX_CLASSES,), -1.0))
        # Targets, and the slope of the user's loss, in the units of the project; see `take_units`.
        self.center: Tensor
        self.spread: Tensor
        self.unit: Tensor
        for name, value in (("center", 0.0), ("spread", 1.0), ("unit", 1.0)):
            self.register_buffer(name, torch.tensor(value))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw φ afresh: weights by ``weight_init``, biases and embeddings zero."""
        for name, parameter in self.named_parameters():
            fill = f"{self.weight_init}_" if name.endswith("weight") else "zeros_"
            getattr(nn.init, fill)(parameter)

    def inputs(self, p: Tensor, y: Tensor) -> Tensor:
        """Return what the first layer sees of pairs (R, C), of shape (R, C, inputs): target and prediction first."""
        if self.task == "regression":
            p, y = (p - self.center) / self.spread, (y - self.center) / self.spread
        return torch.stack([y, p, (p - y).abs(), (p - y).square()] if self.sees_error else [y, p], dim=-1)

    def inputs_by_prediction(self, inputs: Tensor) -> Tensor:
        """Return the derivative of what :meth:`inputs` returned by p, times the spread."""
        y, p = inputs[..., 0], inputs[..., 1]
        zero, one = torch.zeros_like(p), torch.ones_like(p)
        return torch.stack([zero, one, (p - y).sign(), 2 * (p - y)] if self.sees_error else [zero, one], dim=-1)

    @torch.no_grad()
    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the output's weights."""
        for parameter in self.linear[-1].parameters():
            parameter.mul_(factor)

    @torch.no_grad()
    def take_units(self, center: Tensor, spread: Tensor, slope: Tensor) -> None:
        """Take in the unit of the slope, and for regression that of the targets."""
        self.unit.copy_(torch.where(torch.isfinite(slope) & (slope > 0), slope, 1.0))
        if self.task == "regression":
            is_known = torch.isfinite(spread) & (spread > 0)
            self.center.copy_(torch.where(is_known, center, 0.0))
            self.spread.copy_(torch.where(is_known, spread, 1.0))

    @torch.no_grad()
    def take_classes(self, held_out: Sequence[Tensor], all_reduce: Callable[[list[Tensor]], Any] | None) -> None:
        """Take them in where there are embeddings for them."""
        if self.sees_classes and self.tells_apart(held_out[0].shape[1]):
            weights = self.pairing.pairs(held_out[0].detach(), *held_out[1:]).class_weights()
            if all_reduce is not None:
                all_reduce([weights])
            known = self.held_out_classes[: len(weights)]
            known.copy_(torch.maximum(known, (weights > 0).to(known)))

    def known_pairs(self, pairs: Pairs) -> Tensor | float:
        """Leave out the instances and the outputs of classes of which there are no held-out instances.

        These would have every prediction of such a class lowered, and it would be lost.
        """
        f = pairs.prediction
        if not self.sees_classes or not self.tells_apart(f.shape[1]):
            return 1.0
        known = (self.held_out_classes[: f.shape[1]] > 0).to(f)
        known = known.maximum((~known.any()).to(f))  # before any has been seen, nothing is left out
        return pairs.by_class(known) * known.view(-1, *[1] * (f.ndim - 2))

    def tells_apart(self, outputs: int) -> bool:
        """Return whether there are embeddings for so many classes."""
        return self.sees_classes and outputs <= MAX_CLASSES

    def is_smooth(self) -> bool:
        """Return whether no activation has a corner; a subclass with a loss of its own has to say so itself."""
        return self._is_own and "relu" not in (self.activation, self.output_activation)

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ℓ_φ(y_i, f_i) element-wise; where the loss sees classes they are dimension 1."""
        p, y = rows_of(prediction), rows_of(target)
        value = self.first(self.inputs(p, y), y)
        for layer in self.linear[1:]:
            value = layer(self.between(value))
        return pairs_of(self.last(value).view_as(p), prediction) * (self.unit * self.spread)

    def first(self, inputs: Tensor, y: Tensor) -> Tensor:
        """Return the first layer's sums for what it sees of pairs with targets (R, C), of shape (R · C, width)."""
        layer: nn.Linear = self.linear[0]  # type: ignore[assignment]
        z = inputs @ layer.weight[:, : inputs.shape[-1]].T
        if self.bias:
            z = z + layer.bias
        classes = y.shape[1]
        if self.tells_apart(classes):
            of_label, of_output = layer.weight[:, 2:].split(EMBEDDING, dim=1)
            of_labels, of_outputs = self.embeddings(classes)
            z = z + (y @ (of_labels @ of_label.T)).unsqueeze(1) + of_outputs @ of_output.T
        return z.view(-1, z.shape[-1])

    def embeddings(self, classes: int) -> tuple[Tensor, Tensor]:
        """Return those of labels and of outputs, each (classes, 4)."""
        of_labels, of_outputs = self._codes[:, :classes].to(self.dtype)
        return self.label_embedding[:classes] + of_labels, self.output_embedding[:classes] + of_outputs

    @property
    def _is_own(self) -> bool:
        return type(self).pairwise is LossNetwork.pairwise  # and not that of a subclass

    def pair_gradient(self, prediction: Tensor, target: Tensor) -> OutputGradient:
        """Return it by hand, for the paper's activation; autograd takes three times as long for so small a network."""
        if self._is_own and self.activation == "smooth_leaky_relu" and self.output_activation is None:
            return NetworkGradient(self, prediction, target)
        return super().pair_gradient(prediction, target)


LossNetwork.presets = {
    "network": lambda task: LossNetwork(
        task, bias=True, sees_classes=task == "multiclass", sees_error=task == "regression"
    ),
    "paper": partial(LossNetwork, weight_init="xavier_uniform"),
    "ml3": partial(LossNetwork, activation="relu", output_activation="softplus", weight_init="xavier_uniform"),
}


def _class_codes() -> Tensor:
    """Return a code of each class as a label and as an output, (2, 100, 4), with entries of size 0.3."""
    # By a formula, so that a saved φ means the same wherever it is loaded; no two classes are alike.
    turns = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19]).double().sqrt().view(2, 1, EMBEDDING)
    classes = torch.arange(1, MAX_CLASSES + 1).double().view(1, -1, 1)
    return (0.3 * 2**0.5 * torch.cos(2 * torch.pi * turns * classes)).float()
