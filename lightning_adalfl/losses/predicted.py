"""The predictions of a base forward, and the gradient of the learned loss by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
        self._transposed: tuple[Tensor, list[Tensor]] | None = None

    @classmethod
    def direct(cls, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Predicted:
        """Return predictions that are themselves what the loss is computed from."""
        leaf = predictions.detach().requires_grad_()
        return cls([predictions], [leaf], leaf, target, weight)

    def pulled(self, gradient: Tensor) -> list[Tensor]:
        """Return ``P'ᵀ gradient``, one tensor for each output."""
        gradient = gradient.to(self.predictions.dtype)
        if self.predictions is self.leaves[0]:
            return [gradient]
        return list(torch.autograd.grad(self.predictions, self.leaves, gradient, retain_graph=True))

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
            by_pairs = self._gradient.value * self._weight
            self.value = self._loss.pairing.link_vjp(self._pairs.prediction, by_pairs)

    def loss(self) -> Tensor:
        """Return the loss whose gradient this is, a scalar."""
        with without_autocast(self._weight.device):
            return (self._gradient.losses() * self._weight).sum()

    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ ⟨value, tangent⟩``."""
        with without_autocast(tangent.device), torch.no_grad():
            prediction = self._pairs.prediction
            at_pairs = self._loss.pairing.link_vjp(prediction, tangent.to(prediction.dtype))
            return self._gradient.vjp(at_pairs * self._weight)
