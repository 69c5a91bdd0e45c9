"""What the Trainer's strategy and precision ask of a meta step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_adalfl.learning.meta_learner import MetaLearner

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
    """The factor on the task loss against underflow of its gradient; one where the Trainer has no gradient scaler.

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
