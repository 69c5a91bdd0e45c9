"""The output gradient by lookup, so that its cost does not grow with classes or pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.output_gradient import OutputGradient, Pairs

KNOTS = 257
_BETWEEN = KNOTS - 1
# Where all classes share a loss its table stays small, and is made so fine that straight lines do: half the look-ups.
_FINE = 16
# A pair looked up costs about this part of one evaluated, and the table itself as much as so many.
_LOOKUP_COST, _TABLE_COST = 0.1, 1_000


@cache  # a copy from the processor would have an accelerator wait
def _basis(pieces: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what takes four knots in a row to the coefficients between the middle two, (pieces, degree + 1, 4).

    Those of the cubic through the four as one piece, or those of the lines between its values at the ends of many.
    """
    cubic = torch.linalg.inv(torch.vander(torch.arange(-1.0, 3.0, dtype=torch.float64), increasing=True))
    if pieces > 1:
        places = torch.linspace(0.0, 1.0, pieces + 1, dtype=torch.float64)
        ends = torch.vander(places, 4, increasing=True) @ cubic
        return torch.stack([ends[:-1], ends.diff(dim=0)], dim=1).to(device, dtype)
    return cubic.unsqueeze(0).to(device, dtype)


def pair_gradient(loss: LearnedLoss, pairs: Pairs) -> OutputGradient:
    """Return ``∂ℓ_φ/∂f`` of pairs: of a smooth loss at knots where these are fewer, else at the pairs themselves."""
    if loss.is_smooth() and pairs.is_binary and pairs.prediction.ndim > 1:
        outputs = pairs.prediction.shape[1]
        knots = KNOTS * (outputs**2 if loss.tells_apart(outputs) else 2)
        if knots + _TABLE_COST < (1.0 - _LOOKUP_COST) * pairs.prediction.numel():
            return KnotGradient(loss, pairs)
    return loss.pair_gradient(pairs.prediction, pairs.target)


class KnotGradient(OutputGradient):
    """Where every target is 0 or 1 the gradient is a few functions of the probability: two, or one a pair of classes.

    Each is evaluated at knots and interpolated by the cubic through four of them, or by many lines along it; both are
    linear in the values at the knots, so the derivative by φ goes back to them, and from there through the loss.

    Args:
        loss: ℓ_φ.
        pairs: With targets that are 0 or 1 by their kind; (N, C, ...).
    """

    def __init__(self, loss: LearnedLoss, pairs: Pairs) -> None:
        self._pairs, p = pairs, pairs.prediction.detach()
        # What fits the cache of a processor is fastest there; an accelerator wants larger pieces.
        self._chunk = 1 << (15 if p.device.type == "cpu" else 22)
        self._classes = p.shape[1] if loss.tells_apart(p.shape[1]) else None
        self._knots = _knots_of(loss, self._classes, p)
        self.value = self._looked_up(self._knots.table.detach())

    def losses(self) -> Tensor:
        """Return them by lookup too."""
        return self._looked_up(self._knots.table_of(self._knots.gradient.losses()))

    def _looked_up(self, table: Tensor) -> Tensor:
        """Return at the pairs what is known at the knots."""
        labels, p = self._labels(), self._pairs.prediction.detach()
        if labels is None:
            return self._at(table, p, self._starts())
        of_label = self._at(table, p.gather(1, labels), self._knots.pieces)
        return self._at(table, p, 0).scatter_(1, labels, of_label)

    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ Σ_i tangent_i · value_i``; the tangent is overwritten."""
        labels, p, table = self._labels(), self._pairs.prediction.detach(), self._knots.table
        # Most probabilities are near zero: without four lanes each would wait until the one before it is added.
        moments = table.new_zeros(len(table), 4 if self._classes is None else 1, table.shape[1])
        if labels is None:
            self._spread(moments, p, tangent, self._starts())
        else:
            self._spread(moments, p.gather(1, labels), tangent.gather(1, labels), self._knots.pieces)
            self._spread(moments, p, tangent.scatter_(1, labels, 0.0), 0)
        return self._knots.vjp(moments.sum(1))

    def _labels(self) -> Tensor | None:
        """Return the labels, (N, 1, ...), where one output of each instance has another function than all others."""
        labels = self._pairs.labels
        return None if labels is None or self._classes is not None else labels.unsqueeze(1)

    def _starts(self) -> Tensor:
        """Return where each pair's function begins in the table, of the shape of the pairs."""
        pairs, classes = self._pairs, self._classes
        if classes is None:
            return pairs.target.int() * self._knots.pieces
        labels = pairs.target.argmax(1) if pairs.labels is None else pairs.labels
        outputs = torch.arange(classes, device=labels.device).view(1, -1, *[1] * (labels.ndim - 1))
        return (labels.unsqueeze(1) * classes + outputs) * self._knots.pieces

    def _chunks(self, p: Tensor, starts: Tensor | int, other: Tensor) -> Iterator[tuple[Tensor, Tensor | int, Tensor]]:
        parts = p.reshape(-1).split(self._chunk)
        begins = [starts] * len(parts) if isinstance(starts, int) else starts.reshape(-1).split(self._chunk)
        return zip(parts, begins, other.reshape(-1).split(self._chunk))

    def _places(self, p: Tensor, start: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return in which piece of the table a probability lies, and where in it, in [0, 1]."""
        x = p * self._knots.pieces
        piece = x.int().clamp_(0, self._knots.pieces - 1)  # half as wide as a long one
        u = x.sub_(piece)
        return piece if isinstance(start, int) and start == 0 else piece.add_(start), u

    def _at(self, table: Tensor, p: Tensor, starts: Tensor | int) -> Tensor:
        value = torch.empty_like(p, memory_format=torch.contiguous_format)
        highest, *lower = table.flip(0)
        for part, start, into in self._chunks(p, starts, value):
            piece, u = self._places(part, start)
            torch.index_select(highest, 0, piece, out=into)
            for coefficients in lower:
                torch.addcmul(coefficients.index_select(0, piece), into, u, out=into)
        return value

    def _spread(self, moments: Tensor, p: Tensor, tangent: Tensor, starts: Tensor | int) -> None:
        """Add the tangents to the coefficients that they meet, in one lane after the other."""
        _, lanes, size = moments.shape
        lane = torch.arange(min(self._chunk, p.numel()), dtype=torch.int32, device=p.device).remainder_(lanes) * size
        for part, start, weight in self._chunks(p, starts, tangent):
            piece, u = self._places(part, start)
            piece = piece.add_(lane[: len(piece)]).long()  # which `scatter_add_` asks for
            for power, row in enumerate(moments.flatten(1)):
                weight = weight * u if power else weight
                row.scatter_add_(0, piece, weight)


class _Knots:
    """The functions of a learned loss at their knots, and the table of what is between; they serve until φ moves."""

    def __init__(self, loss: LearnedLoss, classes: int | None, p: Tensor, state: tuple[Any, ...] | None) -> None:
        self.state = state  # what they are of
        grid = torch.linspace(0.0, 1.0, KNOTS, dtype=p.dtype, device=p.device)
        if classes is None:
            at_knots = grid.unsqueeze(1).expand(-1, 2)
            wanted = torch.arange(2, dtype=p.dtype, device=p.device).expand(KNOTS, -1)
        else:
            at_knots = grid.repeat(classes).unsqueeze(1).expand(-1, classes)  # (label · knot, output)
            wanted = torch.eye(classes, dtype=p.dtype, device=p.device).repeat_interleave(KNOTS, dim=0)
        self.gradient = loss.pair_gradient(at_knots, wanted)
        self.pieces = _BETWEEN * (_FINE if classes is None else 1)
        with torch.enable_grad():
            self._values = self.gradient.value.detach().requires_grad_()
            self.table = self.table_of(self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a loss that is copied or written goes without

    def table_of(self, at_knots: Tensor) -> Tensor:
        """Return of each function and piece the coefficients, (degree + 1, functions · pieces)."""
        values = at_knots.view(-1, KNOTS, at_knots.shape[1]).transpose(1, 2).reshape(-1, KNOTS)
        # What the cubic through the four knots at either end has one knot beyond them.
        ends = [4 * (e[:, :1] + e[:, 2:3]) - 6 * e[:, 1:2] - e[:, 3:] for e in (values[:, :4], values[:, -4:].flip(1))]
        knots = torch.cat([ends[0], values, ends[1]], dim=1).unfold(1, 4, 1)
        basis = _basis(self.pieces // _BETWEEN, values.dtype, values.device)
        return torch.einsum("fwq,rkq->kfwr", knots, basis).reshape(basis.shape[1], -1)

    def vjp(self, moments: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ ⟨table, moments⟩``."""
        (at_knots,) = torch.autograd.grad(self.table, self._values, moments, retain_graph=True)
        return self.gradient.vjp(at_knots)


def _knots_of(loss: LearnedLoss, classes: int | None, p: Tensor) -> _Knots:
    """Return the knots of a loss for probabilities like p; those of before, as long as φ has stood still."""
    tensors = [*loss.parameters(), *loss.buffers()]
    if any(tensor.is_inference() for tensor in tensors):  # they do not count their changes
        return _Knots(loss, classes, p, None)
    state = (classes, p.dtype, p.device, *((id(t), t.data_ptr(), t._version) for t in tensors))
    if loss.known is None or loss.known.state != state:
        loss.known = _Knots(loss, classes, p, state)
    return loss.known
