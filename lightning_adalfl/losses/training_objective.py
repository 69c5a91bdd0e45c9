"""What the base step descends: the user's loss with its direction bent, the learned loss alone, or the user's loss."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_adalfl.files import PathLike
from lightning_adalfl.losses.descent import Descent, KnownGradient, LearnedGradient, Predicted, inner, precise, ratio
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.tasks import Task

# Of predictions, target and, where there is one, weight.
BatchLoss = Callable[..., Tensor]


class TrainingObjective(ABC):
    """What the base step descends.

    Attributes:
        loss: The learned loss, if there is one.
        is_zero: Whether the user's own step is left as it is, to the bit.
    """

    loss: LearnedLoss | None = None
    is_zero: bool = False

    @abstractmethod
    def descend(self, own_loss: Tensor, predicted: Predicted) -> Descent:
        """Return what the backward of a base forward is to start from.

        Args:
            own_loss: L_u, the scalar that the user's own training step returned, with its graph.
            predicted: The predictions that it was computed from.
        """

    @abstractmethod
    def gradient(self, own_loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return m as a differentiable function of predictions and φ, where L_u is a function of the predictions."""

    def judged(self, task_loss: BatchLoss, all_reduce: Callable[[list[Tensor]], Any] | None) -> BatchLoss:
        """Return L_T as it is; by its calls the learned loss knows of which classes there are held-out instances."""

        def judge(*held_out: Tensor) -> Tensor:
            if self.loss is not None:
                self.loss.take_classes(held_out, all_reduce)
            return task_loss(*held_out)

        return judge

    def take_units(self, descents: Sequence[Descent], all_reduce: Callable[[list[Tensor]], Any] | None) -> None:
        """See in which units the user's loss and targets are, before φ moves for the first time.

        Args:
            descents: Of the base step, whose backward has run.
            all_reduce: Averages a list of tensors over processes in place.
        """
        return


class OwnLoss(TrainingObjective):
    """The user's own loss, as it is."""

    is_zero = True

    def descend(self, own_loss: Tensor, predicted: Predicted) -> Descent:
        """Return the user's loss."""
        return _OwnDescent(own_loss, predicted)

    def gradient(self, own_loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return τ."""
        return _gradient(own_loss, predictions, target, weight)


class _OwnDescent(Descent):
    def refresh(self) -> None:
        return

    def applied(self) -> list[Tensor]:
        return self.own

    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        return {}


@dataclass(eq=False)
class BentLoss(TrainingObjective):
    """The user's loss with the slope of the learned one added to its own, and never a longer slope.

    With τ = ∂L_u/∂o by the outputs o of a batch and ρ_φ that of the learned loss, a mean over instances, the backward
    goes on from ``m = (τ + ρ_φ) · min(1, ‖τ‖ / ‖τ + ρ_φ‖)``, for each output tensor by itself. For regression the slope
    by no element turns round: where τ + ρ_φ would, it is zero. Else far predictions would be driven ever farther.

    Args:
        loss: r_φ.
        is_zero: Whether r_φ is zero as yet, so that nothing need be computed.
    """

    loss: LearnedLoss
    is_zero: bool = False

    def descend(self, own_loss: Tensor, predicted: Predicted) -> Descent:
        """Return the user's loss; hooks on the outputs bend its slope on the way back."""
        return _BentDescent(self.loss, self.is_zero, own_loss, predicted)

    def take_units(self, descents: Sequence[Descent], all_reduce: Callable[[list[Tensor]], Any] | None) -> None:
        """Give the learned loss the unit of the user's slope, and for regression that of the targets."""
        found = torch.stack([_units(descent, self.loss.pairing) for descent in descents]).mean(0)
        if all_reduce is not None:
            all_reduce([found])
        mean, square, slope = found
        self.loss.take_units(mean, (square - mean.square()).clamp_min(0).sqrt(), slope.sqrt())

    def gradient(self, own_loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return m by autograd."""
        tau = _gradient(own_loss, predictions, target, weight)
        bent = tau + self.loss.outputs(predictions) * _gradient(self.loss, predictions, target, weight)
        if self.loss.task == "regression":
            bent = torch.where(tau.sign() * bent < 0, 0.0, bent)
        return bent * (tau.norm() / bent.norm()).clamp(max=1.0)


@torch.no_grad()
def _units(descent: Descent, task: Task) -> Tensor:
    """Return mean and mean square of the targets, and the mean square of an instance's slope, (3,)."""
    predicted, (tau, *_) = descent.predicted, descent.own
    pairs = task.pairs(predicted.predictions.to(tau.dtype), predicted.target, predicted.weight)
    weight, target = pairs.weight.to(tau.dtype), pairs.target  # zero where nothing is counted
    counts = weight.expand_as(target) / weight.expand_as(target).sum()
    if tau.shape == predicted.predictions.shape:
        slope = torch.where(weight > 0, tau.square() / weight, 0).sum()
    else:  # the predictions are another view of the outputs, or made of several
        slope = tau.square().sum() * (weight > 0).sum()
    return torch.stack([(counts * target).sum(), (counts * target.square()).sum(), slope])


class _BentDescent(Descent):
    def __init__(self, learned_loss: LearnedLoss, is_zero: bool, own_loss: Tensor, predicted: Predicted) -> None:
        super().__init__(own_loss, predicted)
        self._learned_loss = learned_loss
        self._learned: LearnedGradient | None = None
        self._rho: list[Tensor] | None = None
        self._known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        if not is_zero:
            self.refresh()

    def refresh(self) -> None:
        if self._learned is None:
            self._learned = LearnedGradient(self._learned_loss, self.predicted, by_outputs=False)
        else:
            self._learned.refresh()
        self._rho, self._known = self.predicted.pulled(self._learned.value), {}

    def bent(self, i: int) -> Tensor | None:
        return None if self._rho is None else self._parts(i)[0]

    def _parts(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return km and c of an output, and whether τ + ρ is finite; where it is not, τ stands alone."""
        if i not in self._known:
            slope = self._slope(i)
            # In place, and without the slow `where`: of many outputs each pass and each new tensor is felt.
            rho = None if self._rho is None else self._rho[i].to(slope.dtype)
            room = rho if self.predicted.is_direct else None  # else autograd's, which may be another's too
            bent = slope.clone() if rho is None else torch.addcmul(slope, rho, self.k, out=room)
            own, length = slope.norm(), bent.norm()
            is_finite = length < torch.inf
            if self._learned_loss.task == "regression":
                bent.masked_fill_(slope.sign() * bent < 0, 0.0)
                length = bent.norm()
            c = (own / length).nan_to_num_(0.0).clamp_(max=1.0)
            bent.nan_to_num_(0.0, 0.0, 0.0).mul_(c * is_finite).addcmul_(slope, (~is_finite).to(slope.dtype))
            self._known[i] = bent, c, is_finite
        return self._known[i]

    def applied(self) -> list[Tensor]:
        return [self._parts(i)[0] / self.k for i in range(len(self._slopes))]

    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        learned = self._learned or LearnedGradient(self._learned_loss, self.predicted, by_outputs=False)
        through = []
        for i, h in enumerate(tangents):
            m, c, is_finite = self._parts(i)
            h, rows = h.to(m.dtype), m.reshape(-1)
            along = rows.dot(h.reshape(-1)) / rows.dot(rows).clamp_min(torch.finfo(m.dtype).tiny)
            if self._learned_loss.task == "regression":  # what was stopped may only go back
                is_finite = is_finite & ((m != 0) | (self._slope(i).sign() * h <= 0))
            # c (h - ⟨m, h⟩ m / ⟨m, m⟩) where the slope was shortened, else h.
            by_bent = h.mul_(c).addcmul_(m, torch.where(c < 1, c * along, 0.0), value=-1.0)
            through.append(by_bent.masked_fill_(~is_finite, 0.0))
        return learned.vjp(self.predicted.pushed(through))

    def evidence(self, tangents: Sequence[Tensor]) -> Tensor:
        return inner((self._slope(i) - self._parts(i)[0] for i in range(len(tangents))), tangents) / self.k

    def value(self) -> Tensor:
        return self.loss.detach() if self._learned is None else self.loss.detach() + self._learned.loss()


@dataclass(eq=False)
class LearnedAlone(TrainingObjective):
    """M_φ alone, with its own scale (Eq. 3), as the paper descends it."""

    loss: LearnedLoss

    def descend(self, own_loss: Tensor, predicted: Predicted) -> Descent:
        """Return M_φ of the predictions; the user's loss has no part."""
        return _AloneDescent(self.loss, predicted)

    def gradient(self, own_loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return ∂M_φ/∂f by autograd."""
        return _gradient(self.loss, predictions, target, weight)


class _AloneDescent(Descent):
    def __init__(self, learned_loss: LearnedLoss, predicted: Predicted) -> None:
        self._learned_loss, self.predicted = learned_loss, predicted
        self._learned = LearnedGradient(learned_loss, predicted, by_outputs=True)
        known = [*predicted.pulled(self._learned.value), *predicted.outputs]
        super().__init__(KnownGradient.apply(self._learned.loss(), len(predicted.outputs), *known), predicted)

    def refresh(self) -> None:
        self._learned.refresh()

    def applied(self) -> list[Tensor]:
        return [m.to(precise(m)) for m in self.predicted.pulled(self._learned.value)]

    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        return self._learned.vjp(self.predicted.pushed(tangents))

    def implied_scale(self) -> Tensor:
        loss, predicted = self._learned_loss, self.predicted
        with torch.enable_grad():  # the user's loss has not been differentiated; the handcrafted one stands for it
            leaf = predicted.predictions.detach().to(loss.dtype).requires_grad_()
            (tau,) = torch.autograd.grad(loss.pairing.loss(leaf, predicted.target, predicted.weight), leaf)
        return ratio([self._learned.value], [tau])


def _gradient(loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    arguments = (target,) if weight is None else (target, weight)
    (gradient,) = torch.autograd.grad(loss(predictions, *arguments), predictions, create_graph=True)
    return gradient


def initial_objective(
    given: LearnedLoss | PathLike | None, task: Task, own_loss: bool
) -> tuple[TrainingObjective, bool]:
    """Return what trains the base model at the start, and whether its φ was learned before.

    Args:
        given: A preset's name, the file of a learned loss, or one itself, which is used as it is; ``None`` for none.
        task: Makes pairs, and knows what is to be left out.
        own_loss: Whether the user's own loss is descended, with its slope bent.

    Raises:
        ValueError: If the file cannot be read, or holds a loss for another task.
        TypeError: If a loss of a user's own could not be written into a checkpoint.
    """
    if given is None:
        return OwnLoss(), False
    # φ has random numbers of its own, so that everything else is drawn as without it.
    with torch.random.fork_rng(devices=[]):
        loss, is_learned = _loss_of(given, task.name)
    loss.describe()
    loss.pairing = task
    if not own_loss:
        return LearnedAlone(loss), is_learned
    is_zero = not is_learned and not isinstance(given, LearnedLoss)
    if is_zero:
        loss.scale_(0.0)
    return BentLoss(loss, is_zero), is_learned


def _loss_of(given: LearnedLoss | PathLike, task: str) -> tuple[LearnedLoss, bool]:
    if isinstance(given, LearnedLoss):
        return copy.deepcopy(given), False  # the configuration's may serve another learner
    path = os.fspath(given)
    if path == os.path.basename(path) and "." not in path:
        loss = LearnedLoss.named(path, task)
        # The default precision may be that of a half-precision model, in which φ would not move.
        return loss.to(torch.promote_types(loss.dtype, torch.float32)), False
    try:
        loss = LearnedLoss.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"`loss` {path!r} cannot be used: {error}") from error
    if loss.task != task:
        raise ValueError(
            f"`loss` {path!r} is for task {loss.task!r} and `task` is {task!r}: its predictions are of another kind. "
            "Give a loss that was learned on the same kind of task."
        )
    return loss, True
