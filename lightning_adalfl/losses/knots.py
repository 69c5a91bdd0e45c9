"""The output gradient by lookup, so that its cost does not grow with classes or pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.output_gradient import OutputGradient, Pairs

KNOTS = 257
_WINDOWS = KNOTS - 3  # of four knots each
# A pair looked up costs about this part of one evaluated.
_LOOKUP_COST = 0.1


@cache  # a copy from the processor would have an accelerator wait
def _cubic(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what takes the values at 0, 1, 2 and 3 to the coefficients of the cubic through them."""
    powers = torch.vander(torch.arange(4.0, dtype=torch.float64), increasing=True)
    return torch.linalg.inv(powers).to(device, dtype)


def pair_gradient(loss: LearnedLoss, pairs: Pairs) -> OutputGradient:
    """Return ``∂ℓ_φ/∂f`` of pairs in the cheapest way: at knots where these are fewer, else at the pairs themselves."""
    if pairs.is_binary and pairs.prediction.ndim > 1:
        outputs = pairs.prediction.shape[1]
        knots = KNOTS * (outputs**2 if loss.tells_apart(outputs) else 2)
        if knots < (1.0 - _LOOKUP_COST) * pairs.prediction.numel():
            return KnotGradient(loss, pairs)
    return loss.pair_gradient(pairs.prediction, pairs.target)


class KnotGradient(OutputGradient):
    """Where every target is 0 or 1 the gradient is a few functions of the probability: two, or one a pair of classes.

    Each is evaluated at knots and interpolated by the cubic through four of them; the interpolation is linear in the
    values at the knots, so the derivative by φ goes back through it to the knots, and from there through the loss.

    Args:
        loss: ℓ_φ.
        pairs: With targets that are 0 or 1 by their kind; (N, C, ...).
    """

    def __init__(self, loss: LearnedLoss, pairs: Pairs) -> None:
        self._pairs, p = pairs, pairs.prediction.detach()
        # What fits the cache of a processor is fastest there; an accelerator wants larger pieces.
        self._chunk = 1 << (15 if p.device.type == "cpu" else 22)
        classes = p.shape[1]
        self._classes = classes if loss.tells_apart(classes) else None
        grid = torch.linspace(0.0, 1.0, KNOTS, dtype=p.dtype, device=p.device)
        if self._classes is None:
            at_knots = grid.unsqueeze(1).expand(-1, 2)
            wanted = torch.arange(2, dtype=p.dtype, device=p.device).expand(KNOTS, -1)
        else:
            at_knots = grid.repeat(classes).unsqueeze(1).expand(-1, classes)  # (label · knot, output)
            wanted = torch.eye(classes, dtype=p.dtype, device=p.device).repeat_interleave(KNOTS, dim=0)
        self._knots = loss.pair_gradient(at_knots, wanted)
        self.value = self._interpolated(self._knots.value)

    def losses(self) -> Tensor:
        """Return them by lookup too."""
        return self._interpolated(self._knots.losses())

    def _interpolated(self, at_knots: Tensor) -> Tensor:
        """Return at the pairs what is known at the knots."""
        pairs, p = self._pairs, self._pairs.prediction.detach()
        values = at_knots.view(-1, KNOTS, at_knots.shape[1]).transpose(1, 2).reshape(-1, KNOTS)
        # Of each function and window the four coefficients, (4, functions · windows).
        table = torch.einsum("fwk,ck->cfw", values.unfold(1, 4, 1), _cubic(values.dtype, values.device)).reshape(4, -1)
        if self._classes is not None:
            return self._looked_up(table, p, self._pairs_of_classes())
        if pairs.labels is None:
            return self._looked_up(table, p, pairs.target.long() * _WINDOWS)
        labels = pairs.labels.unsqueeze(1)
        of_label = self._looked_up(table, p.gather(1, labels), None, function=1)
        return self._looked_up(table, p, None).scatter_(1, labels, of_label)

    def _pairs_of_classes(self) -> Tensor:
        """Return where the functions of the pairs of classes begin, of the shape of the pairs."""
        pairs, classes = self._pairs, self._pairs.prediction.shape[1]
        labels = pairs.target.argmax(1) if pairs.labels is None else pairs.labels
        outputs = torch.arange(classes, device=labels.device).view(1, -1, *[1] * (labels.ndim - 1))
        return (labels.unsqueeze(1) * classes + outputs) * _WINDOWS

    def _chunks(
        self, p: Tensor, starts: Tensor | None, other: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        parts = p.reshape(-1).split(self._chunk)
        begins = [None] * len(parts) if starts is None else starts.reshape(-1).split(self._chunk)
        return zip(parts, begins, other.reshape(-1).split(self._chunk))

    @staticmethod
    def _places(p: Tensor, starts: Tensor | None, function: int) -> tuple[Tensor, Tensor]:
        """Return in which window of the table a probability lies, and where in it, in [0, 3]."""
        x = p * (KNOTS - 1)
        window = (x.long() - 1).clamp_(0, _WINDOWS - 1)
        u = x.sub_(window)
        if starts is not None:
            window += starts
        return window.add_(function * _WINDOWS) if function else window, u

    def _looked_up(self, table: Tensor, p: Tensor, starts: Tensor | None, function: int = 0) -> Tensor:
        value = torch.empty_like(p, memory_format=torch.contiguous_format)
        for part, begin, into in self._chunks(p, starts, value):
            window, u = self._places(part, begin, function)
            torch.index_select(table[3], 0, window, out=into)
            for k in (2, 1, 0):
                into.mul_(u).add_(table[k].index_select(0, window))
        return value

    def _spread(self, moments: Tensor, p: Tensor, tangent: Tensor, starts: Tensor | None, function: int = 0) -> None:
        """Add the tangents to the coefficients that they meet."""
        for part, begin, weight in self._chunks(p, starts, tangent):
            window, u = self._places(part, begin, function)
            by_power = weight.unsqueeze(1).repeat(1, 4)
            for k in range(1, 4):
                torch.mul(by_power[:, k - 1], u, out=by_power[:, k])
            moments.index_add_(0, window, by_power)

    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ Σ_i tangent_i · value_i``."""
        pairs, p, functions = self._pairs, self._pairs.prediction.detach(), self._knots.value.numel() // KNOTS
        moments = p.new_zeros(functions * _WINDOWS, 4)
        if self._classes is not None:
            self._spread(moments, p, tangent, self._pairs_of_classes())
        elif pairs.labels is not None:
            labels = pairs.labels.unsqueeze(1)
            of_label = tangent.gather(1, labels)
            self._spread(moments, p, tangent.scatter(1, labels, 0.0), None)
            self._spread(moments, p.gather(1, labels), of_label, None, function=1)
        else:
            self._spread(moments, p, tangent, pairs.target.long() * _WINDOWS)
        by_window = (moments @ _cubic(moments.dtype, moments.device)).view(-1, _WINDOWS, 4)
        at_knots = by_window.new_zeros(len(by_window), KNOTS)
        for i in range(4):
            at_knots[:, i : i + _WINDOWS] += by_window[:, :, i]
        outputs = self._knots.value.shape[1]
        return self._knots.vjp(at_knots.view(-1, outputs, KNOTS).transpose(1, 2).reshape(-1, outputs))
