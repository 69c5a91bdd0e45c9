"""What a learned loss looks like at one base step: its values and its slope on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_adalfl.arguments import finite_number, positive_number, whole_number
from lightning_adalfl.losses.base import without_autocast

CLASSIFICATION_TASKS = ("multiclass", "binary", "multilabel")
TASKS = (*CLASSIFICATION_TASKS, "regression")

_END = 1e-3  # from an impossible or a certain prediction
_HEAT_POINTS = 41


class PairwiseLoss(Protocol):
    """What can be looked at: ℓ_φ element-wise over pairs of prediction and target, as `LearnedLoss` offers it."""

    task: str

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Returns ℓ_φ of each pair, in the shape of both."""
        ...


@dataclass(frozen=True, eq=False)
class LossShape:
    """ℓ_φ and its slope ∂ℓ_φ/∂f on a grid, at one base step.

    Attributes:
        task: "multiclass", "binary", "multilabel" or "regression".
        step: Base steps taken when the loss was evaluated.
        targets: Targets y that the loss was evaluated for, shape (T,). Classification: 1 and 0.
        grid: Shape (G,), ascending. Classification: predicted probability f in [0, 1]. Regression: error f - y.
        loss: ℓ_φ(y, f), shape (T, G).
        slope: ∂ℓ_φ/∂f, shape (T, G).
        heat_targets: Regression only: targets of the (prediction, target) grid, shape (Q,).
        heat_predictions: Regression only: predictions of that grid, shape (P,).
        heat_loss: Regression only: ℓ_φ on that grid, shape (Q, P).

    Raises:
        ValueError: If the task is unknown, the step is negative, or the shapes do not fit together.
    """

    task: str
    step: int
    targets: Tensor
    grid: Tensor
    loss: Tensor
    slope: Tensor
    heat_targets: Tensor | None = None
    heat_predictions: Tensor | None = None
    heat_loss: Tensor | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown; use one of {TASKS}.")
        if self.step < 0:
            raise ValueError(f"step={self.step} is negative; give the number of base steps taken.")
        if self.targets.ndim != 1 or self.grid.ndim != 1 or len(self.targets) < 1 or len(self.grid) < 2:
            raise ValueError(
                f"targets of shape {tuple(self.targets.shape)} and a grid of shape {tuple(self.grid.shape)} do not "
                "span a snapshot; give one target or more and two grid points or more, each as a vector."
            )
        for name in ("loss", "slope"):
            _expect_shape(name, getattr(self, name), (len(self.targets), len(self.grid)))
        heat = (self.heat_targets, self.heat_predictions, self.heat_loss)
        if any(part is None for part in heat) != all(part is None for part in heat):
            raise ValueError("heat_targets, heat_predictions and heat_loss belong together; give all three or none.")
        if self.heat_targets is not None and self.heat_predictions is not None and self.heat_loss is not None:
            _expect_shape("heat_loss", self.heat_loss, (len(self.heat_targets), len(self.heat_predictions)))

    @property
    def flatness(self) -> Tensor:
        """The part of the grid, in [0, 1], where the loss hardly pulls: below 1% of its mean slope (section 5.6).

        For classification it is that of the true class; a loss without any slope has 1.
        """
        slope = (self.slope[self.targets == 1] if self.task in CLASSIFICATION_TASKS else self.slope).abs()
        return (slope <= 0.01 * slope.mean()).float().mean()

    @property
    def turn_up(self) -> Tensor:
        """How far the loss of the true class rises again towards a certain prediction, as a part of its whole range.

        More than 0 is the label smoothing of section 5.7. Classification only.
        """
        loss = self.loss[self.targets == 1][0]
        span = (loss.max() - loss.min()).clamp_min(torch.finfo(loss.dtype).tiny)
        return (loss[-1] - loss.min()) / span


def _expect_shape(name: str, value: Tensor, shape: tuple[int, int]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; its targets and grid call for {shape}.")


def evaluate_loss_shape(
    loss: PairwiseLoss,
    step: int,
    *,
    resolution: int = 101,
    targets: Sequence[float] = (0.0, 0.5, 1.0),
    error_range: float = 1.0,
) -> LossShape:
    """Evaluates a learned loss and its slope on a grid, in φ's precision; changes no gradient, mode or random state.

    Args:
        loss: The learned loss ℓ_φ.
        step: Base steps taken so far.
        resolution: Number of grid points G.
        targets: Targets to look at for regression, in the units of the data. Classification always takes 1 and 0.
        error_range: For regression, errors f - y are taken from -error_range to error_range.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range, `loss.task` is unknown, or `loss.pairwise` does not keep the shape of its
            input.
    """
    if loss.task not in TASKS:
        raise ValueError(f"loss.task={loss.task!r} is unknown; use one of {TASKS}.")
    step, resolution = whole_number("step", step, 0), whole_number("resolution", resolution, 2)
    targets, error_range = checked_targets(targets), positive_number("error_range", error_range)
    parameter = next(iter(loss.parameters()), None) if isinstance(loss, torch.nn.Module) else None
    like = torch.empty(0) if parameter is None else parameter.detach()

    if loss.task in CLASSIFICATION_TASKS:
        target = torch.tensor([1.0, 0.0])
        # A logarithm has no value at the ends, and a learned loss may have one in it.
        grid = torch.linspace(0.0, 1.0, resolution).clamp(_END, 1.0 - _END)
        values, slope = _loss_and_slope(loss, grid.expand(2, -1), target[:, None].expand(-1, resolution), like)
        return LossShape(loss.task, step, target, grid, values, slope)

    target = torch.tensor(targets, dtype=torch.float32)
    grid = torch.linspace(-error_range, error_range, resolution)
    values, slope = _loss_and_slope(loss, target[:, None] + grid, target[:, None].expand(-1, resolution), like)
    low, high = float(target.min()), float(target.max())
    margin = error_range / 2
    heat_targets = torch.linspace(low - margin, high + margin, _HEAT_POINTS)
    heat_predictions = torch.linspace(low - 2 * margin, high + 2 * margin, _HEAT_POINTS)
    pairs = (heat_predictions.expand(_HEAT_POINTS, -1), heat_targets[:, None].expand(-1, _HEAT_POINTS))
    heat_loss, _ = _loss_and_slope(loss, *pairs, like)
    return LossShape("regression", step, target, grid, values, slope, heat_targets, heat_predictions, heat_loss)


def checked_targets(targets: Sequence[float]) -> tuple[float, ...]:
    """Return the targets to look at as finite numbers, one or more.

    Raises:
        TypeError: If they are no sequence of numbers.
        ValueError: If there is none, or one is not finite.
    """
    message = f"`targets` must be a sequence of numbers, such as (0.0, 0.5, 1.0); got {targets!r}."
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TypeError(message)
    if not targets:
        raise ValueError(message)
    return tuple(float(finite_number("targets", target)) for target in targets)


def _loss_and_slope(loss: PairwiseLoss, prediction: Tensor, target: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    # callbacks may run without gradients or under autocast; the slope needs the one and must not see the other
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(like.device):
        prediction = prediction.to(like).contiguous().clone().requires_grad_()
        values = loss.pairwise(prediction, target.to(like).contiguous().clone())
        if values.shape != prediction.shape:
            raise ValueError(
                f"loss.pairwise returned shape {tuple(values.shape)} for predictions of shape "
                f"{tuple(prediction.shape)}; it must return one value for each pair."
            )
        if values.requires_grad:
            (slope,) = torch.autograd.grad(values.sum(), prediction, allow_unused=True, materialize_grads=True)
        else:
            slope = torch.zeros_like(prediction)
    return values.detach().float().cpu(), slope.detach().float().cpu()
