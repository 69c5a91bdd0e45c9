"""The output gradient by lookup, so that its cost does not grow with classes or pixels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.output_gradient import OutputGradient
from lightning_adalfl.losses.tasks import Pairs

KNOTS = 257
# A pair looked up costs about this part of one evaluated.
LOOKUP_COST = 0.1
_CHUNK = 1 << 20


def pair_gradient(loss: LearnedLoss, pairs: Pairs) -> OutputGradient:
    """Return ``∂ℓ_φ/∂f`` of pairs in the cheapest way: at knots where these are fewer, else at the pairs themselves."""
    if pairs.is_binary and pairs.prediction.ndim > 1:
        outputs = pairs.prediction.shape[1]
        knots = KNOTS * (outputs**2 if loss.tells_apart(outputs) else 2)
        if knots < (1.0 - LOOKUP_COST) * pairs.prediction.numel():
            return KnotGradient(loss, pairs.prediction, pairs.target)
    return loss.pair_gradient(pairs.prediction, pairs.target)


class KnotGradient(OutputGradient):
    """Where every target is 0 or 1 the gradient is a few functions of the probability: two, or one a pair of classes.

    Each is evaluated at knots and interpolated by the cubic through four of them; the interpolation is linear in the
    values at the knots, so the derivative by φ goes back through it to the knots, and from there through the loss.

    Args:
        loss: ℓ_φ.
        prediction: Probabilities, (N, C, ...).
        target: Zeros and ones, for a loss that tells classes apart one-hot along dimension 1.
    """

    def __init__(self, loss: LearnedLoss, prediction: Tensor, target: Tensor) -> None:
        self._prediction, self._target = prediction.detach(), target.detach()
        classes = prediction.shape[1]
        self._classes = classes if loss.tells_apart(classes) else None
        grid = torch.linspace(0.0, 1.0, KNOTS, dtype=prediction.dtype, device=prediction.device)
        if self._classes is None:
            at_knots = grid.unsqueeze(1).expand(-1, 2)
            wanted = torch.tensor([0.0, 1.0], dtype=grid.dtype, device=grid.device).expand(KNOTS, -1)
        else:
            at_knots = grid.repeat(classes).unsqueeze(1).expand(-1, classes)  # (label · knot, output)
            wanted = torch.eye(classes, dtype=grid.dtype, device=grid.device).repeat_interleave(KNOTS, dim=0)
        self._knots = loss.pair_gradient(at_knots, wanted)
        self._table = self._functions(self._knots.value)
        self.value = torch.empty_like(self._prediction, memory_format=torch.contiguous_format)
        for part, group, base, weights in self._parts():
            first = group * KNOTS + base
            total = torch.zeros_like(weights[0])
            for i, weight in enumerate(weights):
                total.addcmul_(weight, self._table[first + i])
            self.value.view(-1)[part] = total

    def _functions(self, at_knots: Tensor) -> Tensor:
        """Return the values at the knots function by function, flat."""
        if self._classes is None:
            return at_knots.T.reshape(-1)
        return at_knots.view(self._classes, KNOTS, self._classes).transpose(1, 2).reshape(-1)

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor, list[Tensor]]]:
        """Yield a chunk of the pairs, which function each has, its first knot, and the weights of four knots."""
        p, y = self._prediction.reshape(-1), self._target
        groups = y.reshape(-1) if self._classes is None else self._pairs_of_classes().reshape(-1)
        for start in range(0, p.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            x = p[part] * (KNOTS - 1)
            base = (x.long() - 1).clamp_(0, KNOTS - 4)
            u = x - base
            v, w, z = u - 1, u - 2, u - 3
            weights = [v * w * z / -6, u * w * z / 2, u * v * z / -2, u * v * w / 6]
            yield part, groups[part].long(), base, weights

    def _pairs_of_classes(self) -> Tensor:
        classes = self._target.shape[1]
        shape = (1, -1, *[1] * (self._target.ndim - 2))
        outputs = torch.arange(classes, device=self._target.device).view(shape)
        return self._target.argmax(1, keepdim=True) * classes + outputs

    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ Σ_i tangent_i · value_i``."""
        flat, at_knots = tangent.reshape(-1), torch.zeros_like(self._table)
        for part, group, base, weights in self._parts():
            first = group * KNOTS + base
            for i, weight in enumerate(weights):
                at_knots.index_add_(0, first + i, weight * flat[part])
        if self._classes is None:
            return self._knots.vjp(at_knots.view(2, KNOTS).T)
        back = at_knots.view(self._classes, self._classes, KNOTS).transpose(1, 2)
        return self._knots.vjp(back.reshape(-1, self._classes))
