"""What one base forward saw and gave, so that it can be evaluated again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_adalfl.hypergradient.loss_slope import LossSlope
from lightning_adalfl.hypergradient.random_state import RandomState
from lightning_adalfl.hypergradient.tangent_rules import PrimalTape


@dataclass
class ForwardTrace:
    """One base forward f_{θ_t}(x).

    Attributes:
        batch: What ``predict`` was given.
        random_state: The generators before it, for the same dropout masks.
        buffers: The buffers before it.
        predictions: f_{θ_t}(x), detached.
        target: y.
        tape: The results of its costly layers, or ``None`` if they were not kept.
        slope: ∂M_φ/∂f there, once the base step has evaluated it.
    """

    batch: Any
    random_state: RandomState
    buffers: dict[str, Tensor]
    predictions: Tensor
    target: Tensor
    tape: PrimalTape | None = None
    slope: LossSlope | None = None
