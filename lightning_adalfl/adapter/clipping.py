"""What clipping does to the gradient, noted so that the hypergradient passes through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adalfl.adapter.lightning_private import is_own
from lightning_adalfl.learning.optimizer_vjp import ClipByNorm, ClipByValue, Clipping


class NotedClipping:
    """The hooks of a module in which gradients are clipped."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the module does, and note how, so that the hypergradient passes through it."""
        own = super().configure_gradient_clipping  # type: ignore[misc]
        how = {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": gradient_clip_algorithm}
        run = self._adalfl_online()  # type: ignore[attr-defined]
        if is_own(own) or not run.wants_clipping:
            own(optimizer, **how)
            return
        run.clipping = None
        with clipping_seen(run.base_step.parameters) as seen:
            own(optimizer, **how)
        if run.clipping is None and seen.clipping is not None:
            run.note_clipping(seen.clipping)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and note how."""
        trainer, run = self.trainer, self._adalfl_online()  # type: ignore[attr-defined]
        value = gradient_clip_val if gradient_clip_val is not None else trainer.gradient_clip_val
        algorithm = gradient_clip_algorithm or trainer.gradient_clip_algorithm or "norm"
        is_by_value = str(getattr(algorithm, "value", algorithm)).lower() == "value"
        total = run.gradient_norm() if value and run.wants_clipping and not is_by_value else None
        super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)  # type: ignore[misc]
        if value and run.wants_clipping:
            run.note_clipping(ClipByValue(float(value)) if total is None else ClipByNorm(float(value), total))


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
