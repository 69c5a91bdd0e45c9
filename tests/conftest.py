from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_adalfl.learning.forward_mode import PrimalTape

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def only_new_garbage() -> Iterator[None]:
    """The collector passes over what was there before, by which it is a hundred times as fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward mode gets every result that the base forward could keep, as if each had cost much."""
    keep = PrimalTape.keep
    monkeypatch.setattr(PrimalTape, "keep", lambda self, result, multiplications: keep(self, result, 10**9))


@pytest.fixture
def keep_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward mode computes all values again."""

    def nothing(self: PrimalTape) -> Tensor | None:
        return None

    monkeypatch.setattr(PrimalTape, "take", nothing)
