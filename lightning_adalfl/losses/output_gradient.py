"""Predictions and targets, pair by pair; a learned loss's gradient by them, and its vector-Jacobian product with φ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

# Pairs that are evaluated at once: what fits the cache of a processor, and more on an accelerator.
CHUNKS = {"cpu": 1 << 13, "other": 1 << 17}


class Pairs:
    """Predictions and targets as the pairs (f_i, y_i) that a learned loss scores.

    Args:
        prediction: Probabilities for classification, raw values for regression.
        target: The same shape; in {0, 1} for classification, or probabilities. ``None`` where ``labels`` say it.
        weight: What each pair counts in a mean over the batch, of a shape that broadcasts to theirs.
        labels: Class indices, where they are known: the target is one for that class, along dimension 1.
        is_binary: Whether the targets are 0 or 1 by their kind, and not only in this batch.
    """

    def __init__(
        self,
        prediction: Tensor,
        target: Tensor | None,
        weight: Tensor,
        labels: Tensor | None = None,
        is_binary: bool = False,
    ) -> None:
        self.prediction, self.weight, self.labels = prediction, weight, labels
        self.is_binary = is_binary or labels is not None
        self._target = target

    @property
    def target(self) -> Tensor:
        """The targets; one-hot ones are made when they are asked for, since there may be many classes."""
        if self._target is None and self.labels is not None:
            self._target = torch.zeros_like(self.prediction).scatter_(1, self.labels.unsqueeze(1), 1.0)
        return self._target  # type: ignore[return-value]


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return an iterator over parts of tensors with the pairs' first dimension: memory does not grow with their number.

    Args:
        *tensors: The pairs, (N, ...), first, then others of that length.
    """
    first = tensors[0]
    rows = max(1, CHUNKS["cpu" if first.is_cpu else "other"] * len(first) // first.numel())
    return zip(*(tensor.split(rows) for tensor in tensors))


def evaluated(function: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """Return an element-wise function of pairs, chunk by chunk.

    The result is filled in place: small parts of it between large temporary tensors would break up the memory.
    """
    result = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    with torch.no_grad():
        for f, y, part in in_chunks(prediction, target, result):
            part.copy_(function(f, y))
    return result


class OutputGradient(ABC):
    """``∂ℓ_φ(y_i, f_i)/∂f_i`` of each pair, as a function of φ.

    Attributes:
        value: The gradient, of the shape of the pairs.
    """

    value: Tensor

    @abstractmethod
    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ Σ_i tangent_i · value_i``, by the names of the parameters that learn."""

    @abstractmethod
    def losses(self) -> Tensor:
        """Return ``ℓ_φ(y_i, f_i)`` of each pair, of their shape."""


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
        self.value = evaluated(partial(self._gradient, create_graph=False), *self._pairs)

    def losses(self) -> Tensor:
        """Return them chunk by chunk."""
        return evaluated(self._pairwise, *self._pairs)

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
            gradient = self._gradient(prediction, target, create_graph=True)
            if not total or not gradient.requires_grad:  # a loss that is linear in f has a gradient without φ
                continue
            parts = torch.autograd.grad(gradient, list(self._phi.values()), weight, allow_unused=True)
            for name, part in zip(self._phi, parts):
                if part is not None:  # a bias of the last layer moves the loss and not its gradient
                    total[name] += part
        return total
