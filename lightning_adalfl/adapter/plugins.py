"""What the Trainer's strategy, precision and clipping ask of a meta step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adalfl.adapter.lightning_private import is_own
from lightning_adalfl.learning.meta_learner import MetaLearner
from lightning_adalfl.learning.optimizer_vjp import ClipByNorm, ClipByValue, Clipping
from lightning_adalfl.learning.torch_private import is_sharded

_INITIAL = 2.0**16
_GROWTH_INTERVAL = 2000


def broadcast(learner: MetaLearner, trainer: Any) -> None:
    """Give every process the first one's φ."""
    if trainer.world_size > 1:
        tensors = [] if learner.loss is None else list(learner.loss.state_dict().values())
        for tensor in [*tensors, *(p.detach() for p in learner.learned.values())]:
            torch.distributed.broadcast(tensor, src=0)


def mean_over_processes(trainer: Any) -> Callable[[list[Tensor]], None] | None:
    """Return a function that averages tensors over processes in place, in one flat buffer; ``None`` for one process."""
    if trainer.world_size == 1:
        return None

    def all_reduce(tensors: list[Tensor]) -> None:
        tensors = [t for t in tensors if not is_sharded(t)]  # whose gradients are averaged where they are scattered
        if not tensors:
            return
        # The widest precision among them, and never less than single, for one flat buffer.
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= trainer.world_size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))

    return all_reduce


def gathered(value: dict[str, Any], trainer: Any) -> list[dict[str, Any]]:
    """Return the values of all processes."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def own_scale(trainer: Any) -> Tensor | float:
    """Return the factor that the Trainer's gradient scaler has on the loss at present."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return 1.0
    # The tensor itself, where there is one: `get_scale` waits for the device.
    scale = getattr(scaler, "_scale", None)
    return scale.detach().clone() if isinstance(scale, Tensor) else float(scaler.get_scale())


class LossScale:
    """The factor on the task loss against underflow of its gradient; 1.0 where the Trainer has no gradient scaler.

    The scaler's own factor fits the user's loss, whose gradient may differ from the task loss's by orders of
    magnitude, so this one is found in the same way from the gradients that it is for: sixteen times smaller after an
    overflow, twice as large after 2,000 steps without one.

    Args:
        trainer: Says whether there is a gradient scaler.
    """

    def __init__(self, trainer: Any) -> None:
        self.is_needed = getattr(trainer.precision_plugin, "scaler", None) is not None
        self.value = _INITIAL if self.is_needed else 1.0
        self._fitting = 0

    def fits(self, gradients: Sequence[Tensor]) -> bool:
        """Return whether the gradients may be used; if not, the scale is smaller now and they are to be taken again."""
        if not self.is_needed:
            return True
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            self._fitting = 0
            if self.value > 1.0:
                self.value = max(self.value / 16, 1.0)
                return False
            # Not finite without a scale either, so the scale was not to blame.
            self.value = _INITIAL
            return True
        self._fitting += 1
        if self._fitting == _GROWTH_INTERVAL:
            self.value, self._fitting = min(self.value * 2, _INITIAL), 0
        return True

    def state_dict(self) -> dict[str, float]:
        """Return the scale, and how long it has fitted."""
        return {"value": self.value, "fitting": self._fitting}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what :meth:`state_dict` returned, where there is still a scaler."""
        if self.is_needed:
            self.value, self._fitting = state["value"], int(state["fitting"])


class NotedClipping:
    """The hooks of a module between the backward and the step."""

    _adalfl_takes_step = False  # in manual optimization, for a module that returns a loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip where automatic optimization would: after a gradient scaler has taken its factor out."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        run = self._adalfl_online()  # type: ignore[attr-defined]
        if optimizer is run.optimizer:
            run.check_evaluation()
        if self._adalfl_takes_step:
            self.configure_gradient_clipping(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None)

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
