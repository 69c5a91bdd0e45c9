"""A loss scale for the backward passes that Lightning does not take, in half precision."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from torch import Tensor

_INITIAL = 2.0**16
_GROWTH_INTERVAL = 2000


class LossScale:
    """The factor on a loss against underflow of its gradient; one where the Trainer has no gradient scaler.

    The scaler's own factor fits the learned loss's gradient, which may be smaller than the task loss's by orders of
    magnitude, so this one is found in the same way from the gradients that it is for: sixteen times smaller after an
    overflow, twice as large after 2,000 steps without one.

    Args:
        trainer: Says whether there is a gradient scaler.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self.value = _INITIAL if scaled else 1.0
        self._limit = self.value
        self._fitting = 0

    def fits(self, gradients: Iterable[Tensor]) -> bool:
        """Return whether the gradients may be used; if not, the scale is smaller now and they are to be taken again."""
        if self._limit == 1.0:
            return True
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            self._fitting = 0
            if self.value > 1.0:
                self.value = max(self.value / 16, 1.0)
                return False
            # Not finite without a scale either, so the scale was not to blame.
            self.value = self._limit
            return True
        self._fitting += 1
        if self._fitting == _GROWTH_INTERVAL:
            self.value, self._fitting = min(self.value * 2, self._limit), 0
        return True

    def state_dict(self) -> dict[str, float]:
        """Return the scale, and how long it has fitted."""
        return {"value": self.value, "fitting": self._fitting}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what :meth:`state_dict` returned, where there is still a scaler."""
        if self._limit > 1.0:
            self.value, self._fitting = state["value"], int(state["fitting"])
