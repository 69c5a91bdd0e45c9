"""Steps of an optimizer that can be taken back without waiting for the device to say whether they must be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


class Undo:
    """What the steps of an optimizer change, kept from before them.

    Args:
        optimizer: Before its steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before = {key: value.detach().clone() for key, value in self._tensors().items()}

    @torch.no_grad()
    def unless(self, keep: Tensor) -> None:
        """Put everything back where ``keep``, a scalar, is false; state that there was not yet is zero then."""
        for key, value in self._tensors().items():
            before = self._before.get(key)
            value.copy_(torch.where(keep, value, torch.zeros_like(value) if before is None else before))

    def _tensors(self) -> dict[tuple[int, str], Tensor]:
        """Return parameters and state; counters of some optimizers lie on another device, and go on."""
        found: dict[tuple[int, str], Tensor] = {}
        for p in (p for group in self._optimizer.param_groups for p in group["params"]):
            state = {**self._optimizer.state.get(p, {}), "": p}
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            found.update({(id(p), key): value for key, value in tensors.items() if value.device == p.device})
        return found
