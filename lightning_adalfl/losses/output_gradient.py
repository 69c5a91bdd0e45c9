"""A learned loss's gradient by the predictions of pairs, and its vector-Jacobian product with φ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

# Pairs that are evaluated at once: what fits the cache of a processor, and more on an accelerator.
CHUNKS = {"cpu": 1 << 13}
CHUNK = 1 << 17


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return an iterator over parts of tensors with the pairs' first dimension: memory does not grow with their number.

    Args:
        *tensors: The pairs, (N, ...), first, then others of that length.
    """
    first = tensors[0]
    rows = max(1, CHUNKS.get(first.device.type, CHUNK) * len(first) // first.numel())
    return zip(*(tensor.split(rows) for tensor in tensors))


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
    """For any loss: by autograd, in chunks of instances.

    Args:
        pairwise: ℓ_φ, element-wise.
        phi: φ by name: what :meth:`vjp` is by.
        prediction: f, (N, ...).
        target: y, of that shape.
    """

    def __init__(
        self,
        pairwise: Callable[[Tensor, Tensor], Tensor],
        phi: Mapping[str, Tensor],
        prediction: Tensor,
        target: Tensor,
    ) -> None:
        self._pairwise = pairwise
        self._phi = dict(phi)
        self._pairs = prediction.detach(), target.detach()
        # Filled in place: small results between large temporary ones would break up the memory.
        self.value = torch.empty_like(self._pairs[0])
        for f, y, part in in_chunks(*self._pairs, self.value):
            part.copy_(self._gradient(f, y, False))

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
        for prediction, target, weight in in_chunks(*self._pairs, tangent):
            gradient = self._gradient(prediction, target, True)
            if not total or not gradient.requires_grad:  # a loss that is linear in f has a gradient without φ
                continue
            parts = torch.autograd.grad(gradient, list(self._phi.values()), weight, allow_unused=True)
            for name, part in zip(self._phi, parts):
                if part is not None:  # a bias of the last layer moves the loss and not its gradient
                    total[name] += part
        return total
