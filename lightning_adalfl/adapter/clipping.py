"""Sees how a user's own function has clipped the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adalfl.learning.optimizer_vjp import ClipByNorm, ClipByValue, Clipping


@dataclass
class Seen:
    """What the gradient has been through.

    Attributes:
        clipping: ``None`` if nothing has changed it.
    """

    clipping: Clipping | None = None


@contextmanager
def clipping_seen(parameters: Sequence[Tensor]) -> Iterator[Seen]:
    """Compare the gradients before and after the body.

    Raises:
        ValueError: If the body has changed them in another way than by their norm or element-wise by value.
    """
    known = [p for p in parameters if p.grad is not None]
    before = [p.grad.clone() for p in known]  # type: ignore[union-attr]
    seen = Seen()
    yield seen
    after = [p.grad for p in known]
    if any(g is None for g in after) or all(torch.equal(a, b) for a, b in zip(after, before)):  # type: ignore[arg-type]
        return
    seen.clipping = _explained(before, after)  # type: ignore[arg-type]


def _explained(before: Sequence[Tensor], after: Sequence[Tensor]) -> Clipping:
    norms = [torch.nn.utils.get_total_norm(list(tensors)) for tensors in (before, after)]
    factor = norms[1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
    tolerance = 100 * torch.finfo(norms[0].dtype).eps
    difference = torch.nn.utils.get_total_norm([a - factor * b for a, b in zip(after, before)])
    if factor < 1 and difference <= tolerance * norms[1]:
        return ClipByNorm(float(factor * (norms[0] + 1e-6)), norms[0])
    largest = float(max(g.abs().max() for g in after if g.numel()))
    if all(torch.equal(a, b.clamp(-largest, largest)) for a, b in zip(after, before)):
        return ClipByValue(largest)
    raise ValueError(
        "`configure_gradient_clipping` changes the gradient in a way that the hypergradient does not know: neither by "
        "its norm nor element-wise by value. Clip with `self.clip_gradients(optimizer, gradient_clip_val=..., "
        "gradient_clip_algorithm=...)`, or leave the gradient as it is."
    )
