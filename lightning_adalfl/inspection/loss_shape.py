"""A learned loss and its slope along paths of predictions, at one base step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_adalfl.checks import finite_number, positive_number, whole_number
from lightning_adalfl.losses.learned_loss import LearnedLoss, without_autocast
from lightning_adalfl.losses.network import LossNetwork
from lightning_adalfl.losses.tasks import task_named

Values = NDArray[np.float64]

FLAT = 0.1  # of the size of the whole slope
_END = 1e-3  # from an impossible or a certain prediction, where a logarithm has no value
_HEAT_POINTS = 41
_LABELS = 10  # looked at, evenly spaced, where there are more classes


@dataclass(frozen=True, eq=False)
class LossPath:
    """A loss along a path of predictions, such as those between two classes.

    Attributes:
        name: What the path is.
        variable: What x is.
        correct: The x of the right prediction.
        x: Ascending, (G,).
        each_loss: The loss of an instance, (K, G): a row for each pair of classes, or one.
        each_slope: Its gradient by the raw output, a logit or a value, (K, G).
        own_loss: The task's handcrafted loss, (G,).
        own_slope: Its gradient by the raw output, (G,).
    """

    name: str
    variable: str
    correct: float
    x: Values
    each_loss: Values
    each_slope: Values
    own_loss: Values
    own_slope: Values

    @cached_property
    def loss(self) -> Values:
        """The mean over the rows, (G,)."""
        return self.each_loss.mean(axis=0)

    @cached_property
    def slope(self) -> Values:
        """The mean over the rows, (G,)."""
        return self.each_slope.mean(axis=0)

    @cached_property
    def rate(self) -> Values:
        """How many times as hard it pulls as the handcrafted loss, (G,); below 0 it pulls away from the target."""
        return np.divide(self.slope, self.own_slope, out=np.full_like(self.x, np.nan), where=self.own_slope != 0)


@dataclass(frozen=True, eq=False)
class LossShape:
    """What a learned loss does to predictions, at one base step.

    Attributes:
        task: As in the configuration.
        step: Base steps taken.
        is_added: Whether the paths show the handcrafted loss with the learned one added, or the learned one alone.
        classes: For ``"multiclass"``, their number; ``None`` where neither the loss nor the caller knows it.
        pairs: Where a loss tells classes apart, the (label, other class) of each row of the first path.
        paths: One for each target; for ``"multiclass"`` one, or two where the number of classes is known.
        heat: For regression, (targets (Q,), predictions (P,), the loss of each pair (Q, P)).
    """

    task: str
    step: int
    is_added: bool
    classes: int | None
    pairs: tuple[tuple[int, int], ...]
    paths: tuple[LossPath, ...]
    heat: tuple[Values, Values, Values] | None = None

    @property
    def own(self) -> str:
        """The name of the handcrafted loss."""
        return task_named(self.task).handcrafted

    @cached_property
    def size(self) -> float:
        """How many times as long its slope is as the handcrafted one, over all paths (root mean square)."""
        own = np.mean([np.mean(path.own_slope**2) for path in self.paths])
        return float(np.sqrt(np.mean([np.mean(path.each_slope**2) for path in self.paths]) / own))

    @property
    def shortening(self) -> float:
        """The factor that keeps an added slope from being longer than the user's own; 1 for a loss alone."""
        return 1 / self.size if self.is_added and self.size > 1 else 1.0

    @property
    def flatness(self) -> float:
        """The part of the paths, in [0, 1], where it pulls less than a tenth as hard as all in all (section 5.6)."""
        if self.size == 0:
            return 1.0
        return float(np.mean([np.mean(np.abs(path.rate) < FLAT * self.size) for path in self.paths]))

    @property
    def turn_up(self) -> float:
        """How far it rises again towards a certain right prediction, as a part of its whole range (section 5.7)."""
        loss = self.paths[0].loss
        extent = float(np.ptp(loss))
        return float(loss[-1] - loss[len(loss) // 2 :].min()) / extent if extent else 0.0


def loss_shape(
    loss: LearnedLoss,
    step: int = 0,
    *,
    is_added: bool = False,
    classes: int | None = None,
    resolution: int = 101,
    targets: Sequence[float] | None = None,
    error_range: float | None = None,
) -> LossShape:
    """Look at a learned loss; its gradients and all random states stay as they are.

    Binary and multilabel: the probability from 0 to 1, for a target of 1 and of 0. Regression: errors of both signs,
    for each of ``targets``. Multiclass: the label has probability x. On the first path the rest is on one other class;
    where the number of classes is known there is a second, on which the others share it. What is shown is the loss of
    an instance, the sum over its outputs, since ℓ(1, f) and ℓ(0, f) by themselves tell nothing: the softmax takes no
    notice of a tilt that both have. Where classes are told apart it is a mean over labels and other classes.

    Args:
        loss: ℓ_φ.
        step: Base steps taken.
        is_added: Whether to add the handcrafted loss of the task: what ``own_loss=True`` trains with, as far as the
            user's own loss is known as a function of predictions.
        classes: For ``"multiclass"``, their number; by default that which the loss has met.
        resolution: Points of a path.
        targets: For regression, in the units of the data; by default the mean of those trained on and a standard
            deviation to either side; of a loss that has seen none -1, 0 and 1.
        error_range: For regression, the largest error; by default that standard deviation, or 1.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For one out of range, or a loss that does not give one value for each pair.
    """
    step, resolution = whole_number("step", step, 0), whole_number("resolution", resolution, 3)
    usual = usual_look(loss)
    targets = checked_targets(usual["targets"] if targets is None else targets)
    error_range = positive_number("error_range", usual["error_range"] if error_range is None else error_range)
    x = torch.linspace(0.0, 1.0, resolution).clamp(_END, 1.0 - _END)
    if loss.task == "multiclass":
        classes = classes_met(loss) if classes is None else whole_number("classes", classes, 2)
        pairs, paths = _between_classes(loss, is_added, x, classes)
        return LossShape(loss.task, step, is_added, classes, pairs, paths)
    heat = None
    if loss.task == "regression":
        variable, correct = "error f − y", (0.0,) * len(targets)
        x, y = torch.linspace(-error_range, error_range, resolution), torch.tensor(targets).unsqueeze(1)
        heat = _heat(loss, is_added, min(targets), max(targets), error_range)
        rows = _evaluated(loss, is_added, y + x, y.expand(-1, resolution))
    else:
        variable, correct = "predicted probability", (1.0, 0.0)
        targets, y = correct, torch.tensor([[1.0], [0.0]])
        rows = _evaluated(loss, is_added, x.expand(2, -1), y.expand(-1, resolution))
    each = zip(targets, correct, rows.transpose(1, 0, 2))
    paths = tuple(_path(f"target {target:g}", variable, c, x, row[None]) for target, c, row in each)
    return LossShape(loss.task, step, is_added, None, (), paths, heat)


def usual_look(loss: LearnedLoss) -> dict[str, Any]:
    """Return the targets and the largest error to look at by default: in the units of the data if known."""
    center, spread = (float(loss.center), float(loss.spread)) if isinstance(loss, LossNetwork) else (0.0, 1.0)
    return {"targets": (center - spread, center, center + spread), "error_range": spread}


def classes_met(loss: LearnedLoss) -> int | None:
    """Return the number of classes that a loss has been trained to tell apart; ``None`` where there are none as yet."""
    if not isinstance(loss, LossNetwork) or not loss.sees_classes:
        return None
    moved = ((loss.label_embedding != 0) | (loss.output_embedding != 0)).any(dim=1)
    met = (moved | (loss.held_out_classes >= 0)).nonzero()
    return int(met.max()) + 1 if len(met) else None


def checked_targets(targets: Sequence[float]) -> tuple[float, ...]:
    """Return the targets to look at; raise a ``TypeError`` or ``ValueError`` if they are no finite numbers."""
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not targets:
        raise TypeError(f"`targets` must be a sequence of numbers, such as (0.0, 0.5, 1.0); got {targets!r}.")
    return tuple(finite_number("targets", target) for target in targets)


def _between_classes(
    loss: LearnedLoss, is_added: bool, x: Tensor, classes: int | None
) -> tuple[tuple[tuple[int, int], ...], tuple[LossPath, ...]]:
    # Where all outputs have one loss, one pair of classes says all.
    tells_apart = classes is not None and loss.tells_apart(classes)
    many = classes or 2
    outputs = many if tells_apart else 2
    labels = np.linspace(0, outputs - 1, min(_LABELS, outputs)).round().astype(int) if tells_apart else np.array([0])
    is_other = np.arange(outputs) != labels[:, None]
    y = (~torch.from_numpy(is_other)).float().unsqueeze(1).expand(-1, len(x), -1)  # (labels, G, outputs)

    def at(p: Tensor) -> Values:
        parts = _evaluated(loss, is_added, *(t.reshape(-1, outputs) for t in (p.unsqueeze(1).expand_as(y), y)))
        return parts.reshape(4, *y.shape).transpose(1, 3, 0, 2)  # (labels, outputs, 4, G)

    at_x, at_share = at(x), at((1 - x) / (many - 1))
    hit = at_x[~is_other]
    # What the label gains in probability the others lose; the grid is symmetric about one half.
    one = np.repeat(hit, outputs - 1, axis=0) + np.array([[1], [-1], [1], [-1]]) * at_x[is_other][..., ::-1]
    rest = at_share[is_other].reshape(len(labels), -1, *hit.shape[1:]).mean(axis=1)
    shared = hit + np.array([[many - 1], [-1], [many - 1], [-1]]) * rest
    paths = [_path("the rest on one other class", "probability of the label", 1.0, x, one)]
    if many > 2:
        paths.append(_path("the rest shared by the others", "probability of the label", 1.0, x, shared))
    pairs = tuple((int(labels[i]), int(c)) for i, c in np.argwhere(is_other)) if tells_apart else ()
    return pairs, tuple(paths)


def _heat(loss: LearnedLoss, is_added: bool, low: float, high: float, error: float) -> tuple[Values, Values, Values]:
    y = torch.linspace(low - error / 2, high + error / 2, _HEAT_POINTS)
    f = torch.linspace(low - error, high + error, 5 * _HEAT_POINTS)  # finer, since the valley may be sharp
    values = _evaluated(loss, is_added, f.expand(len(y), -1), y.unsqueeze(1).expand(-1, len(f)))[0]
    return y.double().numpy(), f.double().numpy(), values


def _path(name: str, variable: str, correct: float, x: Tensor, rows: Values) -> LossPath:
    """Return a path from rows (K, 4, G) of what :func:`_evaluated` returns."""
    grid = x.double().numpy()
    by_raw = 1.0 if variable.startswith("error") else grid * (1 - grid)
    return LossPath(name, variable, correct, grid, rows[:, 0], rows[:, 1] * by_raw, rows[0, 2], rows[0, 3] * by_raw)


def _evaluated(loss: LearnedLoss, is_added: bool, prediction: Tensor, target: Tensor) -> Values:
    """Return the loss of pairs, its slope by the prediction, and both of the handcrafted loss, (4, *pairs)."""
    like = next(loss.parameters()).detach()
    # Callbacks may run without gradients, in inference mode or under autocast, of which the slope must see nothing.
    with torch.inference_mode(False), torch.no_grad(), without_autocast(like.device):
        f, y = prediction.to(like).contiguous(), target.to(like).contiguous()
        values = loss.pairwise(f, y)
        if values.shape != f.shape:
            raise ValueError(
                f"`pairwise` of {type(loss).__name__} returned shape {tuple(values.shape)} for predictions of shape "
                f"{tuple(f.shape)}; it must return one value for each pair."
            )
        learned = torch.stack([values, loss.pair_gradient(f, y).value]).double().cpu()
        with torch.enable_grad():
            f = prediction.double().clone().requires_grad_()
            values = loss.pairing.pairwise(f, target.double())
            (slope,) = torch.autograd.grad(values.sum(), f)
    own = torch.stack([values.detach(), slope])
    if is_added:
        learned += own
        if loss.task == "regression":  # what a step does not do is not shown: its slope does not turn round
            turned = torch.where(slope.sign() * learned[1] <= 0, learned[1], 0.0)
            if turned.any():  # and the loss is the integral of the rest, so that it is level where nothing pulls
                learned[1] -= turned
                learned[0, ..., 1:] = learned[0, ..., :1] + torch.cumulative_trapezoid(learned[1], f.detach(), dim=-1)
    return torch.cat([learned, own]).numpy()
