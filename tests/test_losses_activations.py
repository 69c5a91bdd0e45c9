from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_adalfl.losses import SmoothLeakyReLU


def eq_4(x: Tensor, gamma: float, beta: float) -> Tensor:
    return (1 - gamma) * torch.log(1 + torch.exp(beta * x)) / beta + gamma * x


def eq_25(x: Tensor, gamma: float, beta: float) -> Tensor:
    """The derivative, written with exponentials as the paper has it."""
    return (torch.exp(beta * x) + gamma) / (torch.exp(beta * x) + 1)


@pytest.mark.parametrize(("gamma", "beta"), [(0.01, 10.0), (0.0, 1.0), (0.3, 4.0)])
def test_value_and_slope_are_those_of_the_paper(gamma: float, beta: float) -> None:
    x = torch.linspace(-5, 5, 401, dtype=torch.float64, requires_grad=True)
    y = SmoothLeakyReLU(gamma, beta)(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    # torch's softplus is the identity above 20 / β, where the logarithm differs by exp(-20) / β.
    torch.testing.assert_close(y, eq_4(x, gamma, beta), rtol=0, atol=1e-8)
    torch.testing.assert_close(slope, eq_25(x, gamma, beta), rtol=0, atol=1e-8)


def test_defaults_are_those_of_the_paper() -> None:
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(SmoothLeakyReLU()(x), eq_4(x, 0.01, 10.0), rtol=0, atol=1e-8)


def test_slope_stays_between_the_leak_and_one() -> None:
    x = torch.linspace(-1e4, 1e4, 1001, requires_grad=True)
    y = SmoothLeakyReLU()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert slope.min() == pytest.approx(0.01)
    assert slope.max() == pytest.approx(1.0)


def test_representation_names_the_constants() -> None:
    assert repr(SmoothLeakyReLU(0.2, 3.0)) == "SmoothLeakyReLU(gamma=0.2, beta=3.0)"


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_leak_out_of_range(gamma: float) -> None:
    with pytest.raises(ValueError, match=rf"`gamma` must lie in \[0, 1\).*got {gamma}"):
        SmoothLeakyReLU(gamma=gamma)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf"), float("nan")])
def test_smoothness_out_of_range(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"`beta` must be positive and finite; got {beta}"):
        SmoothLeakyReLU(beta=beta)
