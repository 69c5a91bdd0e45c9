"""What the gain did to the task loss through more base steps than the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.hypergradient import Hypergradient

FEWEST_BASE_STEPS = 10  # between two steps of the gain: v has to be formed for one, which costs a pass over θ
LONGEST_GAIN_STEP = 0.2  # of the gain's logarithm
LEAST_FALL = 1e-4  # of all that the task loss has fallen, a base step: a gain that brings less comes down


class GainHorizon:
    """Holds θ̄, an average of the base parameters over the last base steps that forgets.

    A view of one base step sees that step overshoot along the steepest directions, and not how far many such steps get
    along the flat ones; so it asks for too small a gain. A gain is a factor on the learning rate, and what one that was
    held for some steps did is, to first order in them, ``∂L_T/∂γ = ⟨∇_θ L_T, Σ_k w_k (θ_{t+1-k} - θ_{t-k})⟩`` with
    weights w that fall. The last base step's part is exact, from the hypergradient; θ_t - θ̄ is the sum of the others.

    Args:
        config: The hyper-parameters.

    Attributes:
        lr: Of γ, for a step of the gain.
    """

    def __init__(self, config: AdaLFLConfig) -> None:
        every = config.meta_every
        self._interval = every * math.ceil(FEWEST_BASE_STEPS / every)
        # A rate for each base step: rarer steps are longer, as far as they are not too coarse.
        self.lr = max(config.gain_lr, min(config.gain_lr * self._interval, LONGEST_GAIN_STEP))
        self._horizon = config.gain_horizon
        self._average: list[Tensor] = []
        self._base_steps = 0.0  # the average of their numbers, by the same weights
        self._first: float | None = None  # task loss

    def due(self, base_steps: int) -> bool:
        """Whether the gain learns from the base step that makes their number ``base_steps``."""
        return base_steps % self._interval == 0

    @torch.no_grad()
    def earlier_steps(self, before: Sequence[Tensor]) -> list[Tensor] | None:
        """Return θ_t - θ̄, or ``None`` where there is no average yet.

        Args:
            before: θ_t, the parameters before the last base step.
        """
        return list(torch._foreach_sub(list(before), self._average)) if self._known(before) else None

    def gradient(self, exact: Tensor, found: Hypergradient, base_steps: int) -> Tensor:
        """Return what γ descends: its derivative, and a pull back to one where it is worth too little.

        Args:
            exact: ∂L_T/∂γ of the last base step.
            found: The hypergradient; its ``along`` is the derivative along :meth:`earlier_steps`.
            base_steps: The base steps taken, that last one included.
        """
        if self._first is None and torch.isfinite(found.task_loss):
            self._first = float(found.task_loss)
        seen = 1.0 if found.along is None else base_steps - self._base_steps
        # On a plateau at the start there is nothing that it could overfit to.
        fall = 0.0 if self._first is None else (self._first - found.task_loss).clamp_min(0.0)
        worth = LEAST_FALL * seen * float(fall)
        return exact + worth + (0.0 if found.along is None else found.along.to(exact))

    @torch.no_grad()
    def add(self, parameters: Sequence[Tensor], base_steps: int) -> None:
        """Take in the parameters as they are after ``base_steps`` base steps."""
        if self._horizon == 1 or base_steps % FEWEST_BASE_STEPS:
            return
        if self._known(parameters):
            weight = min(1.0, FEWEST_BASE_STEPS / self._horizon)
            torch._foreach_lerp_(self._average, list(parameters), weight)
            self._base_steps += weight * (base_steps - self._base_steps)
        else:
            self._average = [p.detach().clone() for p in parameters]
            self._base_steps = float(base_steps)

    def _known(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether there is an average of these parameters, on their device."""
        if [e.shape for e in self._average] != [p.shape for p in parameters]:
            return False  # a callback may have unfrozen more since
        self._average = [e.to(p) for e, p in zip(self._average, parameters)]
        return True

    def clear(self) -> None:
        """Forget the average."""
        self._average = []

    def state_dict(self) -> dict[str, Any]:
        """Return θ̄, how far back it lies, and the first task loss."""
        return {"average": [p.clone() for p in self._average], "base_steps": self._base_steps, "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._average = [p.clone() for p in state["average"]]  # it is updated in place
        self._base_steps = state["base_steps"]
        self._first = state["first"]
