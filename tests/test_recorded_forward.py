"""What a base forward saw, seen again: random states; and what torch does not promise, each with a test of its own."""

from __future__ import annotations

import io
import random
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_adalfl.learning import torch_private
from lightning_adalfl.learning.recorded_forward import Model, RandomState, RandomStream, TorchState

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def draw_and_fail(context: AbstractContextManager[None], drawn: list[Any]) -> None:
    with context:
        drawn.append(draw())
        raise KeyError("body")


def test_restores_every_generator() -> None:
    state = RandomState.capture(CPU)
    expected = draw()
    assert draw() != expected
    state.restore()
    assert draw() == expected
    assert state.draws_elsewhere()
    state.restore()
    torch.rand(())
    assert not state.draws_elsewhere()


@pytest.mark.parametrize("fails", [False, True])
def test_replay_leaves_the_generators_as_they_were(fails: bool) -> None:
    state = RandomState.capture(CPU)
    expected, again = draw(), []
    between = RandomState.capture(CPU)
    after = draw()
    between.restore()
    if fails:
        with pytest.raises(KeyError, match="body"):
            draw_and_fail(state.replayed(), again)
    else:
        with state.replayed():
            again.append(draw())
    assert again == [expected]
    assert draw() == after


@pytest.mark.parametrize("seed", [3, 2**32 + 5])
def test_seeded_repeats_and_touches_nothing(seed: int) -> None:
    before = RandomState.capture(CPU)
    expected = draw()
    before.restore()
    states = [RandomState.seeded(s, CPU) for s in (seed, seed, seed + 1)]
    assert draw() == expected
    draws = []
    for state in states:
        with state.replayed():
            draws.append(draw())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2]))


def test_survives_a_checkpoint() -> None:
    """As plain containers and tensors, which load without trusting the file."""
    state, file = RandomState.capture(CPU), io.BytesIO()
    expected = draw()
    torch.save(state.to_plain(), file)
    file.seek(0)
    RandomState.from_plain(torch.load(file, weights_only=True), CPU).restore()
    assert draw() == expected


def test_a_stream_goes_on_where_it_stopped() -> None:
    stream = RandomStream(RandomState.seeded(1, CPU))
    with stream.state.replayed():
        expected = [draw() for _ in range(3)]
    outside = RandomState.capture(CPU)
    untouched = [draw() for _ in range(2)]
    outside.restore()
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


class Accelerators:
    """Stands for ``torch.cuda`` with two devices, whose generators are numbers."""

    def __init__(self) -> None:
        self.states, self.current = [1, 2], 0

    def get_rng_state(self, device: torch.device) -> int:
        return self.states[device.index]

    def set_rng_state(self, state: int, device: torch.device) -> None:
        self.states[device.index] = state

    def manual_seed(self, seed: int) -> None:
        self.states[self.current] = seed

    def device(self, device: torch.device) -> Any:
        return Selected(self, device.index)


class Selected:
    def __init__(self, accelerators: Accelerators, index: int) -> None:
        self.accelerators, self.index = accelerators, index

    def __enter__(self) -> None:
        self.before, self.accelerators.current = self.accelerators.current, self.index

    def __exit__(self, *_: Any) -> None:
        self.accelerators.current = self.before


def test_other_accelerators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeding reaches the generator of the one device, and not even that for longer than it takes."""
    accelerators, seen = Accelerators(), []
    monkeypatch.setattr(torch, "get_device_module", lambda device: accelerators)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every accelerator"))
    device = torch.device("cuda", 1)
    state = RandomState.seeded(7, device)
    assert (state.accelerator, accelerators.states) == (7, [1, 2])
    with state.replayed():
        seen.append(list(accelerators.states))
        accelerators.states[1] = 8
    assert (seen, accelerators.states) == ([[1, 7]], [1, 2])
    assert RandomState.from_plain(state.to_plain(), device).accelerator == 7
    assert RandomState.from_plain(state.to_plain(), CPU).accelerator is None
    TorchState(*TorchState.capture(device)).restore()
    assert accelerators.states == [1, 2]


# What torch does not promise.


@pytest.mark.parametrize("function", torch_private.TANGENT_RULES)
def test_tangent_rules(function: Any) -> None:
    x, tangent = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    _, expected = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(torch_private.TANGENT_RULES[function](tangent, function(x)), expected)


def test_batch_norm_and_its_input_gradient() -> None:
    x, gradient = torch.randn(2, 4, 3, 5, dtype=torch.float64).unbind()
    x.requires_grad_()
    weight, bias = torch.randn(2, 3, dtype=torch.float64).unbind()
    output, mean, inverse_std = torch_private.batch_norm(x, weight, bias, 1e-3)
    expected = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-3)
    torch.testing.assert_close(output, expected)
    (by_input,) = torch.autograd.grad(expected, x, gradient)
    found = torch_private.batch_norm_input_gradient(gradient, x.detach(), weight, mean, inverse_std, 1e-3)
    torch.testing.assert_close(found, by_input)


def test_weight_norm_is_what_the_parametrization_calls() -> None:
    seen: list[Any] = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    with Seeing():
        layer(torch.randn(1, 2))
    assert torch_private.weight_norm in seen


def test_the_version_of_a_tensor_counts_changes_in_place() -> None:
    x = torch.zeros(3)
    before = torch_private.version(x)
    x[1:].add_(1)
    assert torch_private.version(x) == before + 1
    with torch.inference_mode():
        assert torch_private.version(torch.zeros(3)) == 0


@dataclass
class Output:
    logits: Tensor
    name: str = "output"


def test_tensors_are_found_and_replaced_in_containers_and_dataclasses() -> None:
    a, b, c = torch.zeros(3, 1).unbind()
    value = {"x": [a, (b, 2)], "out": Output(c)}
    assert [id(t) for t in torch_private.tensors_in(value)] == [id(a), id(b), id(c)]
    copied = torch_private.map_tensors(lambda t: t + 1, value)
    assert [float(t) for t in torch_private.tensors_in(copied)] == [1, 1, 1]
    assert (copied["out"].name, copied["x"][1][1], float(value["out"].logits)) == ("output", 2, 0)


def test_compiled_modules_are_known() -> None:
    plain, in_place = nn.Linear(2, 2), nn.Linear(2, 2)
    in_place.compile(backend="eager")
    assert not torch_private.is_compiled(plain)
    assert torch_private.is_compiled(in_place)
    assert torch_private.is_compiled(torch.compile(plain, backend="eager"))


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_of_a_module_go_through_a_handler(compiled: bool) -> None:
    """Its hooks run within; nested calls come one by one; afterwards the module is as it was."""
    inner, order = nn.Linear(2, 2), []
    outer = nn.Sequential(inner, nn.Tanh())
    inner.register_forward_hook(lambda *_: order.append("hook"))
    if compiled:
        outer.compile(backend="eager")
    before = [dict(vars(m)) for m in (outer, inner)]

    def handler(module: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        order.append(type(module).__name__)
        return call(*args, **kwargs)

    x = torch.randn(1, 2)
    expected = outer(x)
    order.clear()
    with torch_private.InterceptedCalls([outer] if compiled else [outer, inner], handler):
        assert torch.equal(outer(x), expected)
    assert order == (["Sequential", "hook"] if compiled else ["Sequential", "Linear", "hook"])
    outer(x)
    assert order[-1] == "hook"
    assert [dict(vars(m)) for m in (outer, inner)] == before


def test_reentrant_checkpoints_give_way_to_others_in_a_body_and_come_back() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    x.requires_grad_()

    def run(value: Tensor) -> Tensor:
        return checkpoint(layer, value, use_reentrant=True).sum()

    expected = torch.autograd.grad(layer(x).sum(), x)
    with torch_private.checkpoints_not_reentrant():
        assert torch.equal(torch.autograd.grad(run(x), x)[0], expected[0])
    with torch_private.checkpoints_run_through(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangent = forward_ad.unpack_dual(run(dual)).tangent
    torch.testing.assert_close(tangent, expected[0].sum())
    with pytest.raises(RuntimeError, match=r"When use_reentrant=True, torch.utils.checkpoint is incompatible"):
        torch.autograd.grad(run(x), x)


def test_the_leaves_of_a_graph() -> None:
    a, b, c = (torch.ones(1, requires_grad=True) for _ in range(3))
    found = torch_private.leaves_of_graph((a * b).tanh() + a + c.detach())
    assert {id(t) for t in found} == {id(a), id(b)}
    assert torch_private.leaves_of_graph(torch.ones(1)) == []


def test_norm_and_dot_over_lists() -> None:
    a, b = ([torch.randn(2, 3), torch.randn(4)] for _ in range(2))
    flat = [torch.cat([t.flatten() for t in tensors]).double() for tensors in (a, b)]
    torch.testing.assert_close(torch_private.norm(a).double(), flat[0].norm())
    torch.testing.assert_close(torch_private.dot(a, b), flat[0] @ flat[1])
    assert torch_private.dot(a, b).dtype == torch.float64
    assert torch_private.dot([], [], CPU) == 0
    z, w = torch.randn(2, 3, dtype=torch.complex64).unbind()
    expected = (torch.view_as_real(z) * torch.view_as_real(w)).sum().double()
    torch.testing.assert_close(torch_private.dot([z], [w]), expected)


def test_a_buffer_of_two_modules_is_one_in_a_run_too() -> None:
    count, module = torch.zeros(()), nn.ModuleList([nn.Module(), nn.Module()])
    for part in module:
        part.register_buffer("count", count)

    def counted() -> Tensor:
        module[0].count.add_(1)
        return module[1].count

    model = Model(module, [], lambda batch: batch)
    assert float(model.run(counted, model.buffers())) == 1
    assert float(count) == 0
