"""The bounds on the learned loss: what they promise about the slope, and that the hypergradient goes through them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, BaseStep, LossNetwork, hypergradient
from lightning_adalfl.adapter.meta_learner import MetaLearner
from lightning_adalfl.hypergradient import Hypergradient
from lightning_adalfl.losses.bounded import BoundedLoss
from lightning_adalfl.losses.task_losses import default_task_loss

EMPTY = torch.zeros(0)


def batch(task: str, size: int = 16) -> tuple[Tensor, Tensor]:
    predictions = torch.randn(size, 3, dtype=torch.double)
    target = {
        "multiclass": torch.randint(0, 3, (size,)),
        "regression": torch.randn(size, 3, dtype=torch.double),
    }
    return predictions, target.get(task, torch.randint(0, 2, (size, 3)))


def bounded(task: str, min_cosine: float = 0.9, spread: float = 0.5, gain: float = 2.0) -> BoundedLoss:
    loss = LossNetwork(task, residual=True).double()
    nn.init.normal_(loss.layers[-1].weight, std=spread)
    wrapped = BoundedLoss(loss, default_task_loss(task), 10.0, min_cosine).double()
    wrapped.log_gain.data.fill_(math.log(gain))
    return wrapped


def slope(loss: nn.Module, predictions: Tensor, target: Tensor) -> Tensor:
    leaf = predictions.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, target), leaf)[0]


class TaskLoss(nn.Module):
    def __init__(self, task: str) -> None:
        super().__init__()
        self.task_loss = default_task_loss(task)

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        return self.task_loss(predictions, target)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel", "regression"])
def test_a_residual_begins_as_the_handcrafted_loss(task: str) -> None:
    predictions, target = batch(task)
    loss = LossNetwork(task, residual=True).double()
    wrapped = BoundedLoss(loss, default_task_loss(task), 10.0, 0.9).double()
    expected = slope(TaskLoss(task), predictions, target)
    assert torch.allclose(slope(wrapped, predictions, target), expected, atol=1e-12)
    if task == "multiclass":  # Eq. 3 averages over the outputs, of which the cross-entropy has one that counts
        expected = expected / 3
    assert torch.allclose(slope(loss, predictions, target), expected, atol=1e-12)


@pytest.mark.parametrize("task", ["multiclass", "regression"])
@pytest.mark.parametrize("spread", [0.05, 0.5, 50.0])
def test_gain_and_direction_stay_within_the_bounds(task: str, spread: float) -> None:
    predictions, target = batch(task)
    loss = bounded(task, min_cosine=0.9, spread=spread)
    m, tau = slope(loss, predictions, target), slope(TaskLoss(task), predictions, target)
    assert float((m * tau).sum() / tau.square().sum()) == pytest.approx(2.0)
    assert float(F.cosine_similarity(m.flatten(), tau.flatten(), dim=0)) >= 0.9 - 1e-9


def test_a_loss_that_points_the_wrong_way_or_is_not_finite_is_left_out() -> None:
    predictions, target = batch("regression")
    tau = slope(TaskLoss("regression"), predictions, target)
    loss = bounded("regression")
    loss.loss.layers[-1].weight.data.fill_(math.nan)
    assert torch.allclose(slope(loss, predictions, target), 2 * tau)
    opposite = bounded("regression")
    opposite.loss.forward = lambda f, y: -F.mse_loss(f, y)
    assert torch.allclose(slope(opposite, predictions, target), 2 * tau)


def test_the_gain_is_clamped() -> None:
    loss = bounded("regression")
    for value, expected in ((-1.0, 0.0), (1.0, 1.0), (9.0, math.log(10.0))):
        loss.log_gain.data.fill_(value)
        loss.clamp_gain()
        assert float(loss.log_gain.detach()) == pytest.approx(expected)


@pytest.mark.parametrize(("meta_every", "rate"), [(1, 0.1), (10, 0.1), (100, 0.2)])
def test_the_gain_moves_as_fast_where_meta_steps_are_rare(meta_every: int, rate: float) -> None:
    learner = MetaLearner(AdaLFLConfig("regression", meta_every=meta_every))
    learner.start()
    gradient = Hypergradient(tuple(-torch.ones_like(p) for p in learner.trained.parameters()), EMPTY, EMPTY.sum())
    learner.step(gradient, learn_gain=True)
    assert float(learner.log_gain.detach()) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("task", ["multiclass", "regression"])
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("min_cosine", [0.3, 0.95])  # with the second, the bound is active
def test_the_hypergradient_is_that_of_the_bounded_step(task: str, inner_steps: int, min_cosine: float) -> None:
    """Against central differences of the whole inner loop."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    loss, task_loss = bounded(task, min_cosine), default_task_loss(task)
    inputs = torch.randn(16, 5, dtype=torch.double)
    target = batch(task)[1]
    meta_batch = (inputs.flip(0) * 1.1, target)

    def run() -> list[BaseStep]:
        model.load_state_dict(initial)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        steps = [BaseStep(model, optimizer, chained=inner_steps > 1) for _ in range(inner_steps)]
        for step in steps:
            step.forward((inputs, target))
            optimizer.zero_grad()
            step.evaluate(loss).backward()
            step.step()
        return steps

    computed = hypergradient(run(), loss, task_loss, meta_batch).loss
    assert len(computed) == 4  # the gain and three layers
    for parameter, gradient in zip(loss.parameters(), computed):
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-5)
            run()
            with torch.no_grad():
                values.append(float(task_loss(model(meta_batch[0]), target)))
                parameter.sub_(direction, alpha=sign * 1e-5)
        expected = (values[0] - values[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_gain": 1.0}, ValueError, "`max_gain` must be more than 1"),
        ({"max_gain": "2"}, TypeError, "`max_gain` must be a number"),
        ({"min_cosine": 1.0}, ValueError, r"`min_cosine` must lie in \(0, 1\)"),
        ({"min_cosine": 0.0}, ValueError, "`min_cosine` must be positive"),
        ({"gain_lr": -1.0}, ValueError, "`gain_lr` must be positive"),
        ({"safeguard_window": 0}, ValueError, "`safeguard_window` must be a whole number, 1 or more"),
        ({"safeguard": 1}, TypeError, "`safeguard` must be True or False"),
        ({"residual": None}, TypeError, "`residual` must be True or False"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaLFLConfig("regression", **options)


def test_the_papers_recipe_has_a_name() -> None:
    config = AdaLFLConfig.paper("regression", meta_every=2)
    assert (config.residual, config.max_gain, config.safeguard, config.meta_lr) == (False, None, False, 1e-5)
    assert config.meta_every == 2
    init = AdaLFLInit.paper(inner_steps=5)
    assert (init.steps, init.lr, init.inner_steps) == (2500, 1e-3, 5)
