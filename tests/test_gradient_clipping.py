from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adam, Optimizer, RMSprop
from whole_step import WholeStep, by_half

from lightning_adalfl.hypergradient import ClipByNorm, ClipByValue


def by_norm(bound: float, parameters: list[nn.Parameter]) -> ClipByNorm:
    return ClipByNorm(bound, clip_grad_norm_(parameters, bound))


def by_value(bound: float, parameters: list[nn.Parameter]) -> ClipByValue:
    clip_grad_value_(parameters, bound)
    return ClipByValue(bound)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(by_half(model, 3.0), momentum=0.9),
    "adam": lambda model: Adam(model.parameters(), lr=0.05, eps=1e-2),
    "rmsprop": lambda model: RMSprop(model.parameters(), lr=0.05, eps=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [by_norm, by_value])
@pytest.mark.parametrize("bound", [0.003, 1e3])
def test_the_whole_step_through_clipping(optimizer: str, clip: Callable[..., object], bound: float) -> None:
    """Where everything is clipped, some of it, and nothing."""
    WholeStep(optimizer=OPTIMIZERS[optimizer], clip=functools.partial(clip, bound), warm=1).check()


def test_the_bounds_of_these_tests_clip() -> None:
    """Else the tests above would prove nothing of clipping."""
    _, (step,) = WholeStep(optimizer=OPTIMIZERS["sgd"], warm=1).recorded("forward")
    gradients = torch.cat([p.grad.flatten() for p in step.parameters if p.grad is not None]).abs()
    assert 0.003 < gradients.norm() < 1e3
    assert 0.1 < (gradients > 0.003).double().mean() < 0.9


@pytest.mark.parametrize("norm", [0.5, 5.0])
def test_norm_is_clipped_as_torch_does(norm: float) -> None:
    gradients = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    size = float(torch.cat([g.flatten() for g in gradients]).norm())
    gradients = [g * (norm / size) for g in gradients]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients):
        p.grad = g.clone()
    clip_grad_norm_(parameters, 1.0)
    for p, g in zip(parameters, ClipByNorm(1.0).forward(gradients), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "clip", [ClipByNorm(0.7, torch.tensor(0.0)), ClipByNorm(1e3, torch.tensor(0.0)), ClipByValue(0.5)]
)
def test_transposed_is_the_derivative_of_forward(clip: ClipByNorm | ClipByValue) -> None:
    gradients = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (4,))]
    vector = [torch.randn_like(g) for g in gradients]
    if isinstance(clip, ClipByNorm):
        clip.total_norm = torch.cat([g.detach().flatten() for g in gradients]).norm()
    clipped = clip.forward(gradients)
    expected = torch.autograd.grad(clipped, gradients, vector)
    actual = clip.transposed([g.detach() for g in clipped], vector)
    for u, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(u, e, rtol=1e-10, atol=1e-12)


def test_a_gradient_of_zero_stays_finite() -> None:
    zero = [torch.zeros(3)]
    vector: list[Tensor] = [torch.ones(3)]
    assert torch.equal(ClipByNorm(1.0, torch.tensor(0.0)).transposed(zero, vector)[0], vector[0])


def test_the_norm_must_be_given() -> None:
    with pytest.raises(ValueError, match="`total_norm` must be given, the norm that `clip_grad_norm_` returned"):
        ClipByNorm(1.0).transposed([torch.ones(2)], [torch.ones(2)])
