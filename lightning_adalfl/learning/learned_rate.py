"""The logarithm of a factor on the learning rate, learned (Algorithms 3 and 4) and judged over a horizon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adalfl.learning.hypergradient import Hypergradient

PASS_EVERY = 10  # base steps between two passes over θ for the average


class LearnedRate:
    """s, where the base optimizer steps with α·exp(s).

    A view of one base step sees that step overshoot along the steepest directions, and not how far many such steps get
    along the flat ones; so it asks for too small a rate. What a rate that was held for some steps did is, to first
    order in them, ``∂L_T/∂s = ⟨∇_θ L_T, Σ_k w_k (θ_{t+1-k} - θ_{t-k})⟩`` with weights w that fall. The last base step's
    part is exact, from the hypergradient; ``θ_t - θ̄`` is the sum of the others, with θ̄ an average that forgets.

    Args:
        horizon: The base steps through which the effect of the rate is followed; 1 for the last one alone.

    Attributes:
        log_scale: s.
    """

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon
        precision = torch.promote_types(torch.get_default_dtype(), torch.float32)  # whatever that of the model is
        self.log_scale = nn.Parameter(torch.zeros((), dtype=precision))
        self._average: list[Tensor] = []

    @property
    def scale(self) -> float:
        """exp(s); it is read from the device."""
        return float(self.log_scale.detach().exp())

    @contextmanager
    def applied_to(self, optimizer: Optimizer) -> Iterator[None]:
        """Let an optimizer step with its rates times exp(s) in the body; ``BaseStep.step`` does so by itself."""
        scale = self.scale
        rates = [(group["lr"], group["lr"] * scale) for group in optimizer.param_groups]
        try:
            for group, (_, scaled) in zip(optimizer.param_groups, rates):
                group["lr"] = scaled
            yield
        finally:
            for group, (rate, scaled) in zip(optimizer.param_groups, rates):
                # A closure may have set a rate too; that one stays.
                group["lr"] = rate if group["lr"] == scaled else group["lr"]

    @torch.no_grad()
    def along(self, before: Sequence[Tensor]) -> list[Tensor] | None:
        """Return ``θ_t - θ̄``, or ``None`` where there is no average yet."""
        return list(torch._foreach_sub(list(before), self._average)) if self._knows(before) else None

    def gradient(self, found: Hypergradient) -> Tensor:
        """Return ``∂L_T/∂s``."""
        exact = torch.zeros((), device=self.log_scale.device) if found.log_lr is None else found.log_lr.sum()
        return (exact if found.along is None else exact + found.along).to(self.log_scale.dtype)

    @torch.no_grad()
    def add(self, parameters: Sequence[Tensor], base_steps: int) -> None:
        """Take in the parameters as they are after ``base_steps`` base steps."""
        if self.horizon == 1 or base_steps % PASS_EVERY:
            return
        if self._knows(parameters):
            torch._foreach_lerp_(self._average, list(parameters), PASS_EVERY / self.horizon)
        else:
            self._average = [p.detach().clone() for p in parameters]

    def _knows(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether there is an average of these parameters, on their device."""
        if [e.shape for e in self._average] != [p.shape for p in parameters]:
            return False  # a callback may have unfrozen more since
        self._average = [e.to(p) for e, p in zip(self._average, parameters)]
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return s and θ̄."""
        return {"log_scale": self.log_scale.detach().clone(), "average": [p.clone() for p in self._average]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.log_scale.copy_(state["log_scale"])
        self._average = [p.clone() for p in state["average"]]
