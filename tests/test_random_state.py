from __future__ import annotations

import io
import random
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from lightning_adalfl.hypergradient.random_state import RandomState, RandomStream

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def draw_and_fail(context: AbstractContextManager[None], drawn: list[Any] | None = None) -> None:
    with context:
        values = draw()
        if drawn is not None:
            drawn.append(values)
        raise KeyError("body")


def test_restores_every_generator() -> None:
    state = RandomState.capture(CPU)
    expected = draw()
    assert draw() != expected
    state.restore()
    assert draw() == expected


def test_replay_leaves_the_generators_as_they_were() -> None:
    state = RandomState.capture(CPU)
    first, second = draw(), draw()
    between = RandomState.capture(CPU)
    third = draw()
    between.restore()
    with state.replayed():
        assert draw() == first
        assert draw() == second
    assert draw() == third


def test_replay_leaves_the_generators_as_they_were_after_an_error() -> None:
    state = RandomState.capture(CPU)
    expected = draw()
    state.restore()
    with pytest.raises(KeyError, match="body"):
        draw_and_fail(state.replayed())
    assert draw() == expected


@pytest.mark.parametrize("seed", [3, 2**32 + 5])
def test_seeded_repeats_and_touches_nothing(seed: int) -> None:
    before = RandomState.capture(CPU)
    expected = draw()
    before.restore()
    states = [RandomState.seeded(seed, CPU) for _ in range(2)]
    other = RandomState.seeded(seed + 1, CPU)
    assert draw() == expected
    draws = []
    for state in (*states, other):
        with state.replayed():
            draws.append(draw())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2]))


def test_survives_a_checkpoint() -> None:
    """As plain containers and tensors, which load without trusting the file."""
    state = RandomState.capture(CPU)
    expected = draw()
    file = io.BytesIO()
    torch.save(state.to_plain(), file)
    file.seek(0)
    RandomState.from_plain(torch.load(file, weights_only=True), CPU).restore()
    assert draw() == expected


def test_a_stream_goes_on_where_it_stopped() -> None:
    start = RandomState.seeded(1, CPU)
    with start.replayed():
        expected = [draw() for _ in range(3)]
    outside = RandomState.capture(CPU)
    untouched = [draw() for _ in range(2)]
    outside.restore()
    stream = RandomStream(start)
    drawn: list[Any] = []
    with stream.drawing():
        drawn.append(draw())
    assert draw() == untouched[0]
    with pytest.raises(KeyError, match="body"):
        draw_and_fail(stream.drawing(), drawn)
    assert draw() == untouched[1]
    with stream.drawing():
        drawn.append(draw())
    assert drawn == expected
