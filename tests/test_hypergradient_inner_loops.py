from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hypergradient_models import MODELS
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, NAdam, Optimizer, RMSprop
from whole_step import METHODS, WholeStep, by_half

from lightning_adalfl.hypergradient import BaseStep, ClipByNorm, hypergradient, unrolled

INNER: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.3),
    "momentum": lambda model: SGD(model.parameters(), lr=0.3, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "nesterov": lambda model: SGD(by_half(model, 0.3), momentum=0.9, nesterov=True),
    "adam": lambda model: Adam(by_half(model, 0.05), eps=1e-2, weight_decay=0.1),
    "amsgrad": lambda model: Adam(model.parameters(), lr=0.05, eps=1e-2, amsgrad=True),
    "rmsprop": lambda model: RMSprop(model.parameters(), lr=0.05, eps=1e-2, momentum=0.5),
    "nadam": lambda model: NAdam(model.parameters(), lr=0.05, eps=1e-2),
}


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("inner", [1, 2, 5])
@pytest.mark.parametrize("name", INNER)
def test_inner_loops(name: str, inner: int, warm: int) -> None:
    WholeStep(optimizer=INNER[name], inner=inner, warm=warm).check()


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("name", MODELS)
def test_inner_loops_of_models(name: str, optimizer: str) -> None:
    """BatchNorm's statistics move on from step to step, every step has masks of its own."""
    WholeStep(**MODELS[name], optimizer=INNER[optimizer], inner=3).check()


def test_inner_loop_with_clipping_and_accumulation() -> None:
    def clip(parameters: list[nn.Parameter]) -> ClipByNorm:
        return ClipByNorm(0.01, clip_grad_norm_(parameters, 0.01))

    WholeStep(optimizer=INNER["adam"], inner=3, accumulate=2, clip=clip).check()


@pytest.mark.parametrize("method", METHODS)
def test_an_inner_step_without_its_state(method: str) -> None:
    whole = WholeStep()
    model, optimizer = whole.start()
    steps = []
    for _ in range(2):
        step = BaseStep(model, optimizer, method=method)
        optimizer.zero_grad()
        whole.loss(*step.forward(whole.meta_batch)).backward()
        step.step()
        steps.append(step)
        step.snapshot = None
    with pytest.raises(
        ValueError, match=r"recorded without its optimizer state; make it with `BaseStep\(..., chained=True\)"
    ):
        hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch)


def bytes_alive(seen: set[int]) -> int:
    """Return the storage of all live tensors that are not in ``seen``, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in seen)


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("method", ["forward", "finite_difference"])
@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 2), ("momentum", 3), ("adam", 4)])
def test_memory_grows_by_copies_of_the_parameters(optimizer: str, copies: int, method: str) -> None:
    """A stored step holds θ, its gradient and the optimizer's state, and neither activations nor a graph."""
    width, batch = 16, 4096

    def wide() -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
        ).double()

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, 6, generator=generator, dtype=torch.float64), torch.arange(batch) % 4

    whole = WholeStep(model=wide, optimizer=INNER[optimizer], draw=draw, inner=6)
    parameter_bytes = 8 * sum(p.numel() for p in wide().parameters())
    predictions_bytes = 8 * batch * 4
    # What the caller holds anyway is not counted.
    held = {t.untyped_storage().data_ptr() for batches in whole.batches for pair in batches for t in pair}
    _, steps = whole.recorded(method)
    total = bytes_alive(held)
    steps.pop().optimizer.zero_grad()
    growth = total - bytes_alive(held)
    allowed = copies * parameter_bytes + predictions_bytes + 20_000
    assert parameter_bytes < growth < allowed
    # One kept activation would be noticed.
    assert width * batch * 8 > allowed


def test_the_backward_recursion_holds_one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step's graph is there, no tensor of another step's is: their number is that of the stored steps alone."""
    original = unrolled._differentiable_step
    counts: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        gc.collect()
        counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        return result

    monkeypatch.setattr(unrolled, "_differentiable_step", counting)
    whole = WholeStep(optimizer=INNER["momentum"], inner=8)
    _, steps = whole.recorded("forward")
    hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch)
    # From the third on, since the first has no adjoint of the state yet.
    assert len(counts) == 7
    assert len(set(counts[2:])) == 1
