"""What the base step descends: the user's loss with its direction bent, the learned loss alone, or the user's loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_adalfl.losses.knots import pair_gradient
from lightning_adalfl.losses.learned_loss import LearnedLoss, without_autocast
from lightning_adalfl.losses.tasks import Task

# Of predictions, target and, where there is one, weight.
BatchLoss = Callable[..., Tensor]


class Predicted:
    """The predictions of a base forward as a function f = P(o) of the outputs that the user's loss was computed from.

    Args:
        outputs: o, with the graph to θ.
        leaves: Copies of them that P starts from.
        predictions: f, with the graph to the leaves.
        target: y.
        weight: Of each target, or ``None``.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        predictions: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
    ) -> None:
        self.outputs, self.leaves = list(outputs), list(leaves)
        self.predictions, self.target, self.weight = predictions, target, weight
        self._transposed: tuple[Tensor, list[Tensor]] | None = None

    @classmethod
    def direct(cls, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Predicted:
        """Return predictions that are themselves what the loss is computed from."""
        leaf = predictions.detach().requires_grad_()
        return cls([predictions], [leaf], leaf, target, weight)

    def pulled(self, gradient: Tensor) -> list[Tensor]:
        """Return ``Pᵀ gradient``, one tensor for each output."""
        if self.predictions is self.leaves[0]:
            return [gradient.to(self.predictions.dtype)]
        vector = gradient.to(self.predictions.dtype)
        return list(torch.autograd.grad(self.predictions, self.leaves, vector, retain_graph=True))

    def pushed(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return ``P' tangents``, of the shape of the predictions."""
        if self.predictions is self.leaves[0]:
            return tangents[0]
        vector, pulled = self._linear()
        weights = [t.to(p.dtype) for t, p in zip(tangents, pulled)]
        (pushed,) = torch.autograd.grad(pulled, vector, weights, retain_graph=True)
        return pushed

    def _linear(self) -> tuple[Tensor, list[Tensor]]:
        # The transpose of a vector-Jacobian product, which is linear in the vector, is a Jacobian-vector product.
        if self._transposed is None:
            with torch.enable_grad():
                vector = torch.zeros_like(self.predictions).requires_grad_()
                pulled = torch.autograd.grad(self.predictions, self.leaves, vector, create_graph=True)
            self._transposed = (vector, list(pulled))
        return self._transposed


class LearnedGradient:
    """The gradient of the learned loss by the predictions of a batch, as a function of φ.

    Args:
        loss: M_φ.
        task: Makes the pairs.
        predicted: Of a base forward.
        by_outputs: Whether the mean is over the outputs of an instance as well, as ``loss.reduction`` has it.

    Attributes:
        value: Of the shape of the predictions, in the precision of φ.
    """

    def __init__(self, loss: LearnedLoss, task: Task, predicted: Predicted, by_outputs: bool) -> None:
        with without_autocast(predicted.predictions.device), torch.no_grad():
            predictions = predicted.predictions.detach().to(loss.dtype)
            pairs = task.pairs(predictions, predicted.target, predicted.weight)
            self._task, self._prediction = task, pairs.prediction
            self._weight = pairs.weight / loss.outputs(pairs.prediction) if by_outputs else pairs.weight
            self._gradient = pair_gradient(loss, pairs)
            self.value = task.link_vjp(pairs.prediction, self._gradient.value * self._weight)

    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ ⟨value, tangent⟩``."""
        with without_autocast(tangent.device), torch.no_grad():
            at_pairs = self._task.link_vjp(self._prediction, tangent.to(self._prediction.dtype))
            return self._gradient.vjp(at_pairs * self._weight)


class Descent(ABC):
    """What one base forward's backward descends, and its derivative by φ.

    Args:
        objective: What trains.
        loss: What the backward starts from.
        predicted: Of the forward.

    Attributes:
        objective, loss, predicted: As above.
        scale: k, the factor that accumulation, a gradient scaler or the user puts on the loss; known once the backward
            has run, ``None`` before.
        own: τ, the gradient of the user's loss by each output, once the backward has run.
        is_reached: Whether the backward has come to an output.
    """

    def __init__(self, objective: TrainingObjective, loss: Tensor, predicted: Predicted) -> None:
        self.objective = objective
        self.loss = loss
        self.predicted = predicted
        self.scale: Tensor | None = None
        self.is_reached = False
        self.own: list[Tensor] = [torch.zeros_like(o, dtype=_precise(o)) for o in predicted.leaves]
        self._handles = [loss.register_hook(self._note_scale)]
        for i, output in enumerate(predicted.outputs):
            self._handles.append(output.register_hook(partial(self._note_own, i)))

    def _note_scale(self, gradient: Tensor) -> None:
        self.scale = gradient.detach().to(_precise(gradient))

    def _note_own(self, i: int, gradient: Tensor) -> Tensor | None:
        # Any later gradient through this output would run the hook again.
        self._handles[i + 1].remove()
        if self.scale is None:
            return None
        self.is_reached = True
        self.own[i] = gradient.detach().to(_precise(gradient)) / self.scale
        bend = self._bend(i)
        return None if bend is None else gradient + (self.scale * bend).to(gradient.dtype)

    def _bend(self, i: int) -> Tensor | None:
        """Return what is added to τ of an output."""
        return None

    def release(self) -> None:
        """Remove what hangs on the graph of the forward, and let go of it."""
        for handle in self._handles:
            handle.remove()
        self.predicted.outputs = []
        self.loss = self.loss.detach()

    @abstractmethod
    def applied(self) -> list[Tensor]:
        """Return m of each output: what was descended in place of τ."""

    @abstractmethod
    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return ``∂/∂φ ⟨m, tangents⟩`` at the present φ."""

    def refresh(self) -> Any:
        """Take in that φ has moved."""

    def influence(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return ``τ_i · h_i`` of each instance, (N,): how the held-out loss answers to its weight, to first order."""
        parts = [(tau * h.to(tau.dtype)).flatten(1).sum(1) for tau, h in zip(map(_two, self.own), map(_two, tangents))]
        return torch.stack(parts).sum(0)

    def implied_scale(self) -> Tensor:
        """Return ``⟨m, τ⟩ / ⟨τ, τ⟩``: how far a step goes along the user's own, per unit of it (section 5.5)."""
        return _ratio(self.applied(), self.own)

    def value(self) -> Tensor:
        """Return the value of what is descended, the learned loss included."""
        return self.loss.detach()

    def evidence(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return ``⟨τ, h⟩ - ⟨m, h⟩``: to first order, how much lower the held-out loss is for the bend."""
        differences = [((tau - m) * h.to(m.dtype)).sum() for tau, m, h in zip(self.own, self.applied(), tangents)]
        return torch.stack(differences).sum()


class TrainingObjective(ABC):
    """What the base step descends.

    Args:
        loss: The learned loss, if there is one.
        task: Makes pairs of predictions and targets.
    """

    def __init__(self, loss: LearnedLoss | None, task: Task) -> None:
        self.loss = loss
        self.task = task

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


class OwnLoss(TrainingObjective):
    """The user's own loss, as it is."""

    def __init__(self, task: Task) -> None:
        super().__init__(None, task)

    def descend(self, own_loss: Tensor, predicted: Predicted) -> Descent:
        """Return the user's loss."""
        return _OwnDescent(self, own_loss, predicted)

    def gradient(self, own_loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return τ."""
        return _gradient(own_loss, predictions, target, weight)


class _OwnDescent(Descent):
    def applied(self) -> list[Tensor]:
        return self.own

    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        return {}


class BentLoss(TrainingObjective):
    """The user's loss with the slope of the learned one added to its own, and never a longer slope.

    With τ = ∂L_u/∂o by the outputs o of a batch and ρ_φ that of the learned loss, a mean over instances, the backward
    goes on from ``m = (τ + ρ_φ) · min(1, ‖τ‖ / ‖τ + ρ_φ‖)``, for each output tensor by itself.

    Args:
        loss: r_φ.
        task: Makes pairs of predictions and targets.
        is_zero: Whether r_φ is zero as yet, so that nothing need be computed.
    """

    loss: LearnedLoss

    def __init__(self, loss: LearnedLoss, task: Task, is_zero: bool) -> None:
        super().__init__(loss, task)
        self.is_zero = is_zero

    def descend(self, own_loss: Tensor, predicted: Predicted) -> Descent:
        """Return the user's loss; hooks on the outputs bend its slope on the way back."""
        return _BentDescent(self, own_loss, predicted)

    def gradient(self, own_loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return m by autograd."""
        tau = _gradient(own_loss, predictions, target, weight)
        pairs = self.task.pairs(predictions.to(self.loss.dtype), target, weight)
        value = (self.loss.pairwise(pairs.prediction, pairs.target) * pairs.weight).sum()
        (rho,) = torch.autograd.grad(value, predictions, create_graph=True)
        bent = tau + rho
        return bent * (tau.norm() / bent.norm()).clamp(max=1.0)


class _BentDescent(Descent):
    objective: BentLoss

    def __init__(self, objective: BentLoss, own_loss: Tensor, predicted: Predicted) -> None:
        super().__init__(objective, own_loss, predicted)
        self._learned: LearnedGradient | None = None
        self._rho: list[Tensor] | None = None
        if not objective.is_zero:
            self.refresh()

    def refresh(self) -> LearnedGradient:
        self._learned = LearnedGradient(self.objective.loss, self.objective.task, self.predicted, by_outputs=False)
        self._rho = self.predicted.pulled(self._learned.value)
        return self._learned

    def _bend(self, i: int) -> Tensor | None:
        if self._rho is None:
            return None
        c, rho = self._length(i)
        # In this form it is exactly zero where ρ is.
        return (c - 1) * self.own[i] + c * rho

    def _length(self, i: int) -> tuple[Tensor, Tensor]:
        """Return c, the factor on the length, and ρ; where τ + ρ is not finite they are one and zero."""
        tau = self.own[i]
        rho = torch.zeros_like(tau) if self._rho is None else self._rho[i].to(tau.dtype)
        own, bent = tau.norm(), (tau + rho).norm()
        is_finite = torch.isfinite(bent)
        c = torch.where(is_finite & (bent > own), own / bent, torch.ones_like(own))
        return c, torch.where(is_finite, rho, torch.zeros_like(rho))

    def value(self) -> Tensor:
        learned, predicted = self.objective.loss, self.predicted
        with torch.no_grad():
            outputs = learned.outputs(predicted.predictions)
            return self.loss.detach() + outputs * learned(predicted.predictions, predicted.target, predicted.weight)

    def applied(self) -> list[Tensor]:
        result = []
        for i, tau in enumerate(self.own):
            c, rho = self._length(i)
            result.append(c * (tau + rho))
        return result

    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        learned = self._learned or self.refresh()
        through = []
        for i, h in enumerate(tangents):
            tau = self.own[i]
            c, rho = self._length(i)
            bent = tau + rho
            h = h.to(tau.dtype)
            along = (bent * h).sum() / bent.square().sum().clamp_min(torch.finfo(bent.dtype).tiny)
            through.append(torch.where(c < 1, c * (h - bent * along), h))
        return learned.vjp(self.predicted.pushed(through))


class LearnedAlone(TrainingObjective):
    """M_φ alone, with its own scale (Eq. 3), as the paper descends it."""

    loss: LearnedLoss

    def descend(self, own_loss: Tensor, predicted: Predicted) -> Descent:
        """Return M_φ of the predictions; the user's loss has no part."""
        return _AloneDescent(self, predicted)

    def gradient(self, own_loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return ∂M_φ/∂f by autograd."""
        return _gradient(self.loss, predictions, target, weight)


class _AloneDescent(Descent):
    objective: LearnedAlone

    def __init__(self, objective: LearnedAlone, predicted: Predicted) -> None:
        self.objective, self.predicted = objective, predicted
        self.refresh()
        with torch.no_grad():
            value = objective.loss(predicted.predictions, predicted.target, predicted.weight)
        loss = _KnownGradient.apply(value, len(self._m), *self._m, *predicted.outputs)
        super().__init__(objective, loss, predicted)

    def refresh(self) -> None:
        self._learned = LearnedGradient(self.objective.loss, self.objective.task, self.predicted, by_outputs=True)
        self._m = self.predicted.pulled(self._learned.value)

    def applied(self) -> list[Tensor]:
        return [m.to(_precise(m)) for m in self._m]

    def implied_scale(self) -> Tensor:
        with torch.enable_grad():
            leaf = self.predicted.predictions.detach().to(self.objective.loss.dtype).requires_grad_()
            own = self.objective.task.loss(leaf, self.predicted.target, self.predicted.weight)
            (tau,) = torch.autograd.grad(own, leaf)
        return _ratio([self._learned.value], [tau])

    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        return self._learned.vjp(self.predicted.pushed(tangents))


class _KnownGradient(torch.autograd.Function):
    """A scalar whose value and derivatives have been computed already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *gradients_and_outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_outputs[:count])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        scaled = [(m.to(_precise(m)) * gradient).to(m.dtype) for m in known]
        return (None, None, *[None] * len(known), *scaled)


def _ratio(m: Sequence[Tensor], tau: Sequence[Tensor]) -> Tensor:
    along = torch.stack([(a * b).sum() for a, b in zip(m, tau)]).sum()
    size = torch.stack([b.square().sum() for b in tau]).sum()
    return along / size.clamp_min(torch.finfo(size.dtype).tiny)


def _gradient(loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    arguments = (target,) if weight is None else (target, weight)
    (gradient,) = torch.autograd.grad(loss(predictions, *arguments), predictions, create_graph=True)
    return gradient


def _precise(tensor: Tensor) -> torch.dtype:
    """Return the tensor's precision, and never less than single."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _two(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor
