"""What the Trainer's strategy, precision and clipping ask of a meta step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adalfl.adapter.lightning_private import is_own
from lightning_adalfl.learning.base_step import BaseStep
from lightning_adalfl.learning.meta_learner import MetaLearner
from lightning_adalfl.learning.optimizer_vjp import ClipByNorm, ClipByValue, Clipping
from lightning_adalfl.learning.torch_private import is_sharded, norm, version

_INITIAL = 2.0**16
_GROWTH_INTERVAL = 2000


def broadcast(learner: MetaLearner, trainer: Any) -> None:
    """Give every process the first one's φ."""
    if trainer.world_size > 1:
        known = {} if learner.loss is None else learner.loss.state_dict()
        for tensor in {**learner.learned, **known}.values():
            torch.distributed.broadcast(tensor.detach(), src=0)


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

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Go backward as the module does, and keep the gradient: hooks may change it before the step."""
        super().backward(loss, *args, **kwargs)  # type: ignore[misc]
        run = self._adalfl_online()  # type: ignore[attr-defined]
        run.gradient = GradientPath(run.base_step)
        run.gradient.keep(own_scale(run.trainer))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as the module does; where that fails, the optimizer is not left with the learned rate."""
        with self._adalfl_online().at_rate:  # type: ignore[attr-defined]
            super().optimizer_step(*args, **kwargs)  # type: ignore[misc]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip where automatic optimization would: after a gradient scaler has taken its factor out."""
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        run = self._adalfl_online()  # type: ignore[attr-defined]
        if optimizer is run.optimizer:
            run.gradient.see(refuses=False)
            run.check_evaluation()
        if self._adalfl_takes_step:
            self.configure_gradient_clipping(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip as the module does, and note how, so that the hypergradient passes through it."""
        own, gradient = super().configure_gradient_clipping, self._adalfl_online().gradient  # type: ignore
        if not is_own(own):
            gradient.keep()
        own(optimizer, *args, **kwargs)
        gradient.see()

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and note how."""
        trainer, run = self.trainer, self._adalfl_online()  # type: ignore[attr-defined]
        gradient, is_its = run.gradient, getattr(optimizer, "optimizer", optimizer) is run.optimizer
        value = gradient_clip_val if gradient_clip_val is not None else trainer.gradient_clip_val
        algorithm = gradient_clip_algorithm or trainer.gradient_clip_algorithm or "norm"
        is_by_value = str(getattr(algorithm, "value", algorithm)).lower() == "value"
        gradient.see()
        before = gradient.now() if value and is_its else []
        total = norm([g for _, g in before]) if before and not is_by_value else None
        super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)  # type: ignore[misc]
        if before:
            gradient.note(ClipByValue(float(value)) if total is None else ClipByNorm(float(value), total))


class GradientPath(Clipping):
    """What a base step's gradient goes through between the backward and the optimizer."""

    def __init__(self, step: BaseStep) -> None:
        self._step = step
        # An optimizer may change the gradient in place, and the clipping's derivative depends on it.
        self.passed: list[tuple[Clipping, list[Tensor]]] = []
        self._kept: list[tuple[Tensor, Tensor, int, Tensor]] = []

    def now(self) -> list[tuple[Tensor, Tensor]]:
        """Return parameters with their gradients, if a hypergradient has to know what these go through."""
        return [(p, p.grad) for p in self._step.parameters if p.grad is not None] if self._step.forwards else []

    def keep(self, scale: Tensor | float = 1.0) -> None:
        """Keep the gradient as it is, but for a factor that a gradient scaler will take out."""
        self._kept = [(p, gradient, version(gradient), gradient / scale) for p, gradient in self.now()]

    def see(self, refuses: bool = True) -> None:
        """Note what has been made of the gradient since it was kept; what is not known counts as not changing it."""
        kept, self._kept = [entry for entry in self._kept if entry[0].grad is not None], []
        if any(p.grad is not gradient or version(gradient) != number for p, gradient, number, _ in kept):
            self.note(_explained([before for *_, before in kept], [p.grad for p, *_ in kept], refuses))  # type: ignore

    def note(self, clipping: Clipping | None) -> None:
        """Take in a clipping, if any, with the gradient that it has left."""
        if clipping is not None:
            self.passed.append((clipping, [gradient.clone() for _, gradient in self.now()]))

    def vjp(self, clipped: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return ``vector`` pulled back through all of it, the last first."""
        for clipping, left in reversed(self.passed):
            vector = clipping.vjp(left, vector)
        return list(vector)


class _Pinned(Clipping):
    """Elements that were set to a bound, or to zero, lead no further back."""

    def __init__(self, left: list[Tensor]) -> None:
        self._left = left  # whether an element is as it was

    def vjp(self, clipped: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        return [w * same for w, same in zip(vector, self._left)]


def _explained(before: Sequence[Tensor], after: Sequence[Tensor], refuses: bool) -> Clipping | None:
    norms = [torch.nn.utils.get_total_norm(list(tensors)) for tensors in (before, after)]
    factor = norms[1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
    tolerance = 100 * torch.finfo(norms[0].dtype).eps
    difference = torch.nn.utils.get_total_norm([a - factor * b for a, b in zip(after, before)])
    is_scaled = difference <= tolerance * norms[1]
    # A gradient that is not finite has no meta step, whatever a hook makes of it.
    if not torch.isfinite(norms[0]) or (is_scaled and abs(1 - factor) <= tolerance):
        return None
    if is_scaled and factor < 1:
        return ClipByNorm(float(factor * (norms[0] + 1e-6)), norms[0])
    largest = float(max(g.abs().max() for g in after if g.numel()))
    left = [a == b for a, b in zip(after, before)]
    if all(bool((same | (a == 0) | (a.abs() == largest)).all()) for same, a in zip(left, after)):
        return _Pinned(left)
    if not refuses:
        return None
    raise ValueError(
        "`configure_gradient_clipping` changes the gradient in a way that the hypergradient does not know: "
        "neither by its norm, nor by a bound, nor to zero. Clip with `self.clip_gradients(optimizer, gradient_clip_val="
        "...)`, leave the gradient as it is, or learn nothing with `meta_every=None`."
    )
