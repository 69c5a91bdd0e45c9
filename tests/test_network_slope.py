"""The slope of the loss network by hand, against autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_adalfl.hypergradient.bounded_slope import BoundedSlope
from lightning_adalfl.hypergradient.loss_slope import AutogradSlope
from lightning_adalfl.hypergradient.network_slope import NetworkSlope
from lightning_adalfl.hypergradient.slope_choice import loss_slope
from lightning_adalfl.losses import LossNetwork, TaylorLoss
from lightning_adalfl.losses.bounded import BoundedLoss
from lightning_adalfl.losses.task_losses import default_task_loss

PREDICTIONS = {"multiclass": (9, 4), "binary": (9,), "multilabel": (9, 3), "regression": (9, 2)}


def drawn(task: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[LossNetwork, Tensor, Tensor]:
    """Return a network with all its parameters at random, predictions and targets."""
    loss = LossNetwork(task, **options).to(dtype)
    with torch.no_grad():
        for p in loss.parameters():
            p.normal_()
    predictions = torch.randn(PREDICTIONS[task], dtype=dtype)
    if task == "multiclass":
        return loss, predictions, torch.randint(4, (9,))
    target = torch.randn_like(predictions)
    return loss, predictions, target if task == "regression" else (target > 0).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 1e-6, "a reference of zero proves nothing"
    return float(((actual - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(
    ("reduction", "bias", "residual"), list(itertools.product(("mean", "sum"), (False, True), (False, True)))
)
@pytest.mark.parametrize("hidden", [(7,), (5, 4), (6, 5, 4)])
@pytest.mark.parametrize("task", PREDICTIONS)
def test_equals_autograd(task: str, hidden: tuple[int, ...], reduction: str, bias: bool, residual: bool) -> None:
    loss, predictions, target = drawn(task, hidden=hidden, reduction=reduction, bias=bias, residual=residual)
    by_hand, expected = loss_slope(loss, predictions, target), AutogradSlope(loss, predictions, target)
    assert type(by_hand) is NetworkSlope
    torch.testing.assert_close(by_hand.value, expected.value, rtol=1e-12, atol=0)
    assert relative_error(by_hand.slope, expected.slope) < 1e-12
    phi, h = list(loss.parameters()), torch.randn_like(predictions)
    for p, found, wanted in zip(phi, by_hand.contracted(phi, h), expected.contracted(phi, h)):
        if bias and p is phi[-1]:
            assert (found == 0).all()
            assert (wanted == 0).all()
        else:
            assert relative_error(found, wanted) < 1e-10


def test_float32_is_as_near_to_float64_as_autograd_is() -> None:
    loss, predictions, target = drawn("multiclass", torch.float32)
    h = torch.randn_like(predictions)
    found = loss_slope(loss, predictions, target).contracted(list(loss.parameters()), h)
    loss = loss.double()
    wanted = AutogradSlope(loss, predictions.double(), target).contracted(list(loss.parameters()), h.double())
    for a, b in zip(found, wanted):
        assert relative_error(a.double(), b) < 1e-5


def test_parameters_that_are_frozen_are_left_out() -> None:
    loss, predictions, target = drawn("regression")
    first, *rest = loss.parameters()
    first.requires_grad_(False)
    h = torch.randn_like(predictions)
    found = loss_slope(loss, predictions, target).contracted(rest, h)
    wanted = AutogradSlope(loss, predictions, target).contracted(rest, h)
    for a, b in zip(found, wanted):
        assert relative_error(a, b) < 1e-6


def test_half_precision_predictions_have_a_slope_of_their_own_precision() -> None:
    loss, predictions, target = drawn("multiclass", torch.float32)
    half = predictions.bfloat16().requires_grad_()
    slope = loss_slope(loss, half, target)
    slope.at(half).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert relative_error(half.grad.float(), AutogradSlope(loss, half, target).slope.float()) < 1e-2


def test_the_scalar_scales_its_gradient_and_leaves_phi_alone() -> None:
    loss, predictions, target = drawn("regression")
    leaf = predictions.requires_grad_()
    slope = loss_slope(loss, leaf, target)
    (3.0 * slope.at(leaf)).backward()
    torch.testing.assert_close(leaf.grad, 3.0 * slope.slope)
    assert all(p.grad is None for p in loss.parameters())


def test_other_losses_go_through_autograd() -> None:
    class Squared(LossNetwork):
        def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
            return super().pairwise(prediction, target).square()

    predictions, target = torch.randn(4, 2), torch.randn(4, 2)
    for loss in (LossNetwork.ml3("regression"), Squared("regression"), TaylorLoss("regression"), nn.MSELoss()):
        assert type(loss_slope(loss, predictions, target)) is AutogradSlope


def test_a_slope_holds_until_phi_changes() -> None:
    loss, predictions, target = drawn("regression")
    phi = list(loss.parameters())
    slope = loss_slope(loss, predictions, target)
    assert slope.holds_for(loss, phi)
    assert not slope.holds_for(LossNetwork("regression").double(), phi)
    with torch.no_grad():
        phi[0].add_(1.0)
    assert not slope.holds_for(loss, phi)


def test_integer_predictions_are_refused_as_by_the_loss_itself() -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        loss_slope(LossNetwork("regression"), torch.zeros(4, dtype=torch.int64), torch.zeros(4))


@pytest.mark.parametrize("steep", [False, True])  # so that bounds are active
@pytest.mark.parametrize("task", PREDICTIONS)
def test_bounds_around_it_equal_autograd_through_them(task: str, steep: bool) -> None:
    loss, predictions, target = drawn(task, residual=True)
    if not steep:  # near the handcrafted loss, where no bound is active
        with torch.no_grad():
            loss.layers[-1].weight.mul_(1e-3)
    bounded = BoundedLoss(loss, default_task_loss(task), 10.0, 0.95).double()
    with torch.no_grad():
        bounded.log_gain.fill_(0.7)
    found, expected = loss_slope(bounded, predictions, target), AutogradSlope(bounded, predictions.clone(), target)
    assert type(found) is BoundedSlope
    torch.testing.assert_close(found.value, expected.value, rtol=1e-12, atol=0)
    assert relative_error(found.slope, expected.slope) < 1e-12
    phi, h = list(bounded.parameters()), torch.randn_like(predictions)
    for a, b in zip(found.contracted(phi, h), expected.contracted(phi, h)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
