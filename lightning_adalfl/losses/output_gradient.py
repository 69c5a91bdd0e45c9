"""A learned loss's gradient by the predictions of pairs, and its vector-Jacobian product with φ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class OutputGradient(ABC):
    """``∂ℓ_φ(y_i, f_i)/∂f_i`` of each pair, as a function of φ.

    Attributes:
        value: The gradient, of the shape of the pairs.
    """

    value: Tensor

    @abstractmethod
    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ Σ_i tangent_i · value_i``, by the names of the parameters that learn."""


class AutogradGradient(OutputGradient):
    """For any loss: by autograd, in chunks of instances, so that the memory does not grow with their number.

    Args:
        pairwise: ℓ_φ, element-wise.
        phi: φ by name: what :meth:`vjp` is by.
        prediction: f, (N, ...).
        target: y, of that shape.
        chunk: Pairs that are evaluated at once.
    """

    def __init__(
        self,
        pairwise: Callable[[Tensor, Tensor], Tensor],
        phi: Mapping[str, Tensor],
        prediction: Tensor,
        target: Tensor,
        chunk: int = 1 << 18,
    ) -> None:
        self._pairwise = pairwise
        self._phi = dict(phi)
        self._prediction, self._target = prediction.detach(), target.detach()
        self._rows = max(1, chunk * len(prediction) // prediction.numel())
        self.value = torch.cat([self._gradient(p, y, False) for p, y in self._chunks()])

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._prediction.split(self._rows), self._target.split(self._rows))

    def _gradient(self, prediction: Tensor, target: Tensor, create_graph: bool) -> Tensor:
        with torch.enable_grad():
            leaf = prediction.detach().requires_grad_()
            total = self._pairwise(leaf, target).sum()
            (gradient,) = torch.autograd.grad(
                total, leaf, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        return gradient

    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return it by a second backward, chunk by chunk."""
        total = {name: torch.zeros_like(p) for name, p in self._phi.items()}
        for (prediction, target), weight in zip(self._chunks(), tangent.split(self._rows)):
            gradient = self._gradient(prediction, target, True)
            if not gradient.requires_grad:  # a loss that is linear in f has a gradient without φ
                continue
            parts = torch.autograd.grad(gradient, list(self._phi.values()), weight, allow_unused=True)
            for name, part in zip(self._phi, parts):
                if part is not None:  # a bias of the last layer moves the loss and not its gradient
                    total[name] += part
        return total
