from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_adalfl.hypergradient.tangent_rules import PrimalTape, RecordPrimals, ReplayPrimals

Function = Callable[..., Tensor]


def module(layer: nn.Module) -> Function:
    return lambda x: layer(x)


def in_place_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The ReLU overwrites what the convolution gave."""
    return F.relu(F.conv2d(x, w, b), inplace=True) * 2


def in_place_sum(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y += x.sum()
    return torch.tanh(y)


def result_used_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w, b)
    return y * torch.sigmoid(y) + F.linear(y.tanh(), w.T)


def view_overwritten(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y[:, :1].mul_(x.sum())
    return y


# Each function with the shapes of its arguments.
CASES: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((4, 3), (5, 3), (5,))),
    "linear, no bias": (F.linear, ((4, 3), (5, 3))),
    "linear, keywords": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), ((4, 3), (5, 3), (5,))),
    "linear on three dimensions": (F.linear, ((2, 4, 3), (5, 3), (5,))),
    "linear on a vector": (F.linear, ((3,), (5, 3), (5,))),
    "conv1d": (F.conv1d, ((2, 3, 7), (4, 3, 3), (4,))),
    "conv2d": (F.conv2d, ((2, 3, 6, 6), (4, 3, 3, 3), (4,))),
    "conv3d": (F.conv3d, ((2, 3, 4, 4, 4), (4, 3, 2, 2, 2), (4,))),
    "conv2d, no bias": (F.conv2d, ((2, 3, 6, 6), (4, 3, 3, 3))),
    "conv2d, positional": (lambda x, w, b: F.conv2d(x, w, b, 2, 1, 2), ((2, 3, 8, 8), (4, 3, 3, 3), (4,))),
    "conv2d, keywords": (
        lambda x, w, b: F.conv2d(x, weight=w, bias=b, stride=2, padding=1, dilation=2),
        ((2, 3, 8, 8), (4, 3, 3, 3), (4,)),
    ),
    "conv2d, same": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), ((2, 3, 6, 6), (4, 3, 3, 3), (4,))),
    "conv2d, groups": (lambda x, w, b: F.conv2d(x, w, b, groups=3), ((2, 3, 6, 6), (6, 1, 3, 3), (6,))),
    "conv1d without a batch": (F.conv1d, ((3, 4), (4, 3, 1), (4,))),
    "conv2d without a batch": (F.conv2d, ((3, 6, 6), (4, 3, 3, 3), (4,))),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((6, 3, 4, 4), (3,), (3,))),
    "batch norm on vectors": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((6, 3), (3,), (3,))),
    "batch norm on sequences": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((6, 3, 4), (3,), (3,))),
    "batch norm, not affine": (lambda x: F.batch_norm(x, None, None, training=True), ((6, 3, 4, 4),)),
    "batch norm, large epsilon": (
        lambda x, w, b: F.batch_norm(x, None, None, weight=w, bias=b, training=True, eps=0.5),
        ((6, 3, 4), (3,), (3,)),
    ),
    "batch norm, evaluating": (
        lambda x, w, b: F.batch_norm(x, torch.ones(3).double(), torch.full((3,), 2.0).double(), w, b),
        ((6, 3, 4, 4), (3,), (3,)),
    ),
    "relu": (F.relu, ((4, 3),)),
    "relu, in place": (lambda x: F.relu(x * 1, inplace=True), ((4, 3),)),
    "relu, in place, positional": (lambda x: F.relu(x * 1, True), ((4, 3),)),
    "activations": (lambda x: torch.relu(x) + x.tanh() * torch.sigmoid(x) + x.sigmoid() * x.relu(), ((4, 3),)),
    "modules": (module(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.Softplus())), ((4, 3),)),
    "average pooling": (
        lambda x: F.avg_pool2d(x, 2) + F.avg_pool2d(x, kernel_size=3, stride=2, padding=1),
        ((2, 3, 4, 4),),
    ),
    "other poolings": (lambda x: F.max_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 2), ((2, 3, 4, 4),)),
    "overwritten by a ReLU": (in_place_relu, ((2, 3, 6, 6), (4, 3, 3, 3), (4,))),
    "overwritten by a sum": (in_place_sum, ((4, 3), (5, 3))),
    "overwritten in a part": (view_overwritten, ((4, 3), (5, 3))),
    "used twice": (result_used_twice, ((4, 3), (3, 3), (3,))),
}


def replay(
    function: Function, values: list[Tensor], tangents: list[Tensor | None], tape: PrimalTape
) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level(), ReplayPrimals(tape, {}):
        duals = [v if t is None else forward_ad.make_dual(v, t) for v, t in zip(values, tangents)]
        primal, tangent = forward_ad.unpack_dual(function(*duals))
        return primal.clone(), torch.zeros_like(primal) if tangent is None else tangent.clone()


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kept", [True, False])
def test_rules_equal_those_of_torch(case: str, kept: bool) -> None:
    """For every choice of which arguments vary: the others are frozen."""
    function, shapes = CASES[case]
    values = [torch.randn(s, dtype=torch.float64) for s in shapes]
    tape = PrimalTape()
    with RecordPrimals(tape) if kept else torch.no_grad():
        expected = function(*(v.clone().requires_grad_() for v in values)).detach()
    for varies in itertools.product([True, False], repeat=len(values)):
        if not any(varies):
            continue
        tangents = [torch.randn_like(v) if varying else None for v, varying in zip(values, varies)]
        zeros = [torch.zeros_like(v) if t is None else t for v, t in zip(values, tangents)]
        _, tangent = torch.func.jvp(function, tuple(values), tuple(zeros))
        for _ in range(2):
            tape.rewind()
            primal, by_rules = replay(function, [v.clone() for v in values], tangents, tape)
            torch.testing.assert_close(primal, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(by_rules, tangent, rtol=1e-9, atol=1e-10)
            assert by_rules.abs().sum() > 0


@pytest.mark.parametrize("function", [F.linear, lambda x, w: F.linear(x, w).relu_()])
def test_a_kept_result_is_used_unless_it_was_overwritten(function: Function) -> None:
    x, w = torch.randn(2, 600), torch.randn(5, 600)
    tape = PrimalTape()
    with RecordPrimals(tape):
        kept = F.linear(x, w)
    if function is not F.linear:
        kept.relu_()
    tape.rewind()
    with forward_ad.dual_level(), ReplayPrimals(tape, {}):
        primal, _ = forward_ad.unpack_dual(F.linear(x, forward_ad.make_dual(w, torch.ones_like(w))))
        assert (primal.data_ptr() == kept.data_ptr()) == (function is F.linear)
        torch.testing.assert_close(primal, x @ w.T, rtol=1e-4, atol=1e-4)


def test_cheap_results_are_kept_up_to_a_limit() -> None:
    """A costly result is always kept; of cheaper ones, a hundred megabytes are too many."""
    megabyte = torch.zeros(2**18)
    tape = PrimalTape()
    for multiplications in (100, 10**5):
        for _ in range(100):
            tape.keep(megabyte, multiplications)
    cheap = [tape.take() is not None for _ in range(100)]
    assert cheap == sorted(cheap, reverse=True)
    assert 0 < sum(cheap) <= 64
    assert all(tape.take() is not None for _ in range(100))
    # Beyond its end, as after a forward that went another way, there is nothing.
    assert tape.take() is None


def test_no_tangent_passes_where_the_model_forbids_gradients() -> None:
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    with forward_ad.dual_level(), ReplayPrimals(PrimalTape(), {}):
        dual = forward_ad.make_dual(w, torch.ones_like(w))
        with torch.no_grad():
            stopped = torch.sigmoid(F.linear(x, dual)) * dual.sum()
        assert forward_ad.unpack_dual(stopped).tangent is None
        assert forward_ad.unpack_dual(F.linear(x, dual).sum() * stopped).tangent is not None
