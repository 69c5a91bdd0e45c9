"""One base forward: its predictions, the learned loss's gradient by them, and what its backward descends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_adalfl.losses.knots import pair_gradient
from lightning_adalfl.losses.learned_loss import LearnedLoss, without_autocast


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
        self.is_direct = predictions is leaves[0]  # P is the identity
        self._transposed: tuple[Tensor, Sequence[Tensor]] | None = None

    @classmethod
    def direct(cls, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Predicted:
        """Return predictions that are themselves what the loss is computed from."""
        leaf = predictions.detach().requires_grad_()
        return cls([predictions], [leaf], leaf, target, weight)

    def pulled(self, gradient: Tensor) -> list[Tensor]:
        """Return ``P'ᵀ gradient``, one tensor for each output."""
        gradient = gradient.to(self.predictions.dtype)
        if self.is_direct:
            return [gradient]
        return list(torch.autograd.grad(self.predictions, self.leaves, gradient, retain_graph=True))

    def pushed(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return ``P' tangents``, of the shape of the predictions; these are given away."""
        if self.is_direct:
            return tangents[0]
        # The transpose of a vector-Jacobian product, which is linear in the vector, is a Jacobian-vector product.
        if self._transposed is None:
            with torch.enable_grad():
                start = torch.zeros_like(self.predictions).requires_grad_()
                self._transposed = start, torch.autograd.grad(self.predictions, self.leaves, start, create_graph=True)
        vector, pulled = self._transposed
        weights = [t.to(p.dtype) for t, p in zip(tangents, pulled)]
        (pushed,) = torch.autograd.grad(pulled, vector, weights, retain_graph=True)
        return pushed.contiguous()  # it may be an expanded one


class LearnedGradient:
    """The gradient of the learned loss by the predictions of a batch, as a function of φ.

    Args:
        loss: M_φ.
        predicted: Of a base forward.
        by_outputs: Whether the mean is over the outputs of an instance as well, as ``loss.reduction`` has it.

    Attributes:
        value: Of the shape of the predictions, in the precision of φ.
    """

    def __init__(self, loss: LearnedLoss, predicted: Predicted, by_outputs: bool) -> None:
        self._loss = loss
        with without_autocast(predicted.predictions.device), torch.no_grad():
            predictions = predicted.predictions.detach().to(loss.dtype)
            self._pairs = loss.pairing.pairs(predictions, predicted.target, predicted.weight)
            weight = self._pairs.weight
            self._weight = (weight / loss.outputs(self._pairs.prediction) if by_outputs else weight).to(loss.dtype)
        self.refresh()

    def refresh(self) -> None:
        """Take in that φ has moved."""
        with without_autocast(self._weight.device), torch.no_grad():
            self._gradient = pair_gradient(self._loss, self._pairs)
            by_pairs = self._gradient.value.mul_(self._weight)  # in place, since nobody else has it
            self.value = self._loss.pairing.link_vjp_(self._pairs.prediction, by_pairs)

    def loss(self) -> Tensor:
        """Return the loss whose gradient this is, a scalar."""
        with without_autocast(self._weight.device):
            return (self._gradient.losses() * self._weight).sum()

    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ ⟨value, tangent⟩``; the tangent is overwritten, since of many outputs each copy is felt."""
        with without_autocast(tangent.device), torch.no_grad():
            known = self._loss.known_pairs(self._pairs)  # before the softmax and behind it
            tangent = tangent.to(self._weight.dtype).mul_(known)
            at_pairs = self._loss.pairing.link_vjp_(self._pairs.prediction, tangent)
            return self._gradient.vjp(at_pairs.mul_(self._weight).mul_(known))


class Descent(ABC):
    """What one base forward's backward descends, and its derivative by φ.

    Args:
        loss: What the backward starts from.
        predicted: Of the forward.

    Attributes:
        loss, predicted: As above.
        scale: k, the factor that accumulation, a gradient scaler or the user puts on the loss; known once the backward
            has run, ``None`` before.
        is_reached: Whether the backward has come to an output.
    """

    def __init__(self, loss: Tensor, predicted: Predicted) -> None:
        self.loss = loss
        self.predicted = predicted
        self.scale: Tensor | None = None
        self.is_reached = False
        self._slopes: list[Tensor | None] = [None] * len(predicted.outputs)  # kτ of those that the backward has reached
        self._handles = [loss.register_hook(self._note_scale)]
        for i, output in enumerate(predicted.outputs):
            self._handles.append(output.register_hook(partial(self._note_slope, i)))

    def _note_scale(self, gradient: Tensor) -> None:
        self.scale = gradient.detach().to(precise(gradient))

    def _note_slope(self, i: int, gradient: Tensor) -> Tensor | None:
        if self.scale is None:
            return None  # a gradient of something else
        # Any later gradient through this output would run the hook again.
        self._handles[i + 1].remove()
        self.is_reached = True
        self._slopes[i] = gradient.detach()
        bent = self.bent(i)
        return None if bent is None else bent.to(gradient.dtype)

    def _slope(self, i: int) -> Tensor:
        slope, leaf = self._slopes[i], self.predicted.leaves[i]
        return torch.zeros_like(leaf, dtype=precise(leaf)) if slope is None else slope.to(precise(slope))

    def bent(self, i: int) -> Tensor | None:
        """Return km of an output, which goes on in place of kτ; ``None`` to leave it."""
        return None

    @property
    def own(self) -> list[Tensor]:
        """τ, the gradient of the user's loss by each output, once the backward has run."""
        return [self._slope(i) / self.k for i in range(len(self._slopes))]

    @property
    def k(self) -> Tensor:
        """:attr:`scale`, and one where no backward has run."""
        return self.loss.new_ones(()) if self.scale is None else self.scale

    def release(self) -> None:
        """Remove what hangs on the graph of the forward, and let go of it."""
        for handle in self._handles:
            handle.remove()
        self.predicted.outputs = []
        self.loss = self.loss.detach()

    @abstractmethod
    def refresh(self) -> None:
        """Take in that φ has moved."""

    @abstractmethod
    def applied(self) -> list[Tensor]:
        """Return m of each output: what was descended in place of τ."""

    @abstractmethod
    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return ``∂/∂φ ⟨m, tangents⟩`` at the φ of the last :meth:`refresh`; the tangents are overwritten."""

    def value(self) -> Tensor:
        """Return the value of what is descended, the learned loss included."""
        return self.loss.detach()

    def implied_scale(self) -> Tensor:
        """Return ``⟨m, τ⟩ / ⟨τ, τ⟩``: how far a step goes along the user's own, per unit of it (section 5.5)."""
        return ratio(self.applied(), self.own)

    def evidence(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return ``⟨τ, h⟩ - ⟨m, h⟩``: to first order, how much lower the held-out loss is for the bend."""
        return self.k.new_zeros(())

    def influence(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return ``τ_i · h_i`` of each row of the outputs, (N,): how the held-out loss answers to its weight.

        Raises:
            ValueError: If the loss is computed from outputs without a row for each instance.
        """
        count, shapes = len(self.predicted.predictions), [tuple(h.shape) for h in tangents]
        rows = (*shapes[0], 0)[0]
        # A row may stand for several predictions, as a sequence does for its tokens.
        if any(shape[:1] != (rows,) for shape in shapes) or rows == 0 or count % rows:
            raise ValueError(
                f"the influence of {count} instances cannot be told from outputs of shapes {shapes}; let the modules "
                "that `training_step` calls return a row for each instance."
            )
        parts = [(tau * h.to(tau.dtype)).reshape(rows, -1).sum(1) for tau, h in zip(self.own, tangents)]
        return torch.stack(parts).sum(0)


class KnownGradient(torch.autograd.Function):
    """A scalar whose value and derivatives have been computed already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *gradients_and_outputs: Tensor) -> Tensor:
        """Return the value; so many gradients come first, then as many outputs."""
        ctx.save_for_backward(*gradients_and_outputs[:count])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients by the outputs."""
        scaled = [(m.to(precise(m)) * gradient).to(m.dtype) for m in ctx.saved_tensors]
        return (None, None, *[None] * len(scaled), *scaled)


def ratio(m: Sequence[Tensor], tau: Sequence[Tensor]) -> Tensor:
    """Return ``⟨m, τ⟩ / ⟨τ, τ⟩`` over lists of tensors."""
    return inner(m, tau) / inner(tau, tau).clamp_min(torch.finfo(tau[0].dtype).tiny)


def inner(a: Iterable[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return ``⟨a, b⟩`` over lists of tensors, in the precision of the first."""
    return torch.stack([x.reshape(-1).dot(y.to(x.dtype).reshape(-1)) for x, y in zip(a, b)]).sum()


def precise(tensor: Tensor) -> torch.dtype:
    """Return the tensor's precision, and never less than single."""
    return torch.promote_types(tensor.dtype, torch.float32)
