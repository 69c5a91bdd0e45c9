"""What the gain is judged by: the derivative along earlier base steps, and what it changes in a training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from projects import Ada, Plain, config, loaders, make, trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from whole_step import METHODS, WholeStep

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin
from lightning_adalfl.adapter.gain_horizon import GainHorizon
from lightning_adalfl.adapter.meta_learner import MetaLearner
from lightning_adalfl.hypergradient import Hypergradient, hypergradient


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_the_derivative_along_a_direction(method: str, inner: int) -> None:
    """Against central differences of the task loss after the step(s)."""
    whole = WholeStep(inner=inner)
    model, steps = whole.recorded(method)
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in steps[-1].parameters]
    found = hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch, along=along)
    values = []
    for size in (1e-6, -1e-6):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            torch._foreach_add_(list(moved.parameters()), along, alpha=size)
            values.append(float(whole.task_loss(*whole.predict(moved, whole.meta_batch))))
    assert float(found.along) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)
    _, again = whole.recorded(method)
    without = hypergradient(again, whole.loss, whole.task_loss, whole.meta_batch)
    assert without.along is None
    torch.testing.assert_close(found.loss, without.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_over_processes_it_is_the_mean(method: str) -> None:
    """Two processes with the same batches, simulated by a mean that doubles and halves."""
    whole = WholeStep()
    sizes: list[int] = []

    def mean(tensors: list[Tensor]) -> None:
        sizes.append(len(tensors))
        for tensor in tensors:
            tensor.copy_((tensor + tensor) / 2)

    results = []
    for reduce in (None, mean):
        _, steps = whole.recorded(method)
        along = [torch.ones_like(p) for p in steps[-1].parameters]
        options: dict[str, Any] = {"all_reduce": reduce, "along": along}
        results.append(hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch, **options))
    assert sizes
    torch.testing.assert_close(results[0].along, results[1].along)
    torch.testing.assert_close(results[0].loss, results[1].loss)
    torch.testing.assert_close(results[0].task_loss, results[1].task_loss)


def test_earlier_steps_are_those_since_an_average_that_forgets() -> None:
    horizon = GainHorizon(AdaLFLConfig("regression", gain_horizon=40))
    parameters = [torch.zeros(3), torch.zeros(2, 2)]
    assert horizon.earlier_steps(parameters) is None
    path = [[torch.full_like(p, value) for p in parameters] for value in (1.0, 5.0, -7.0)]
    for step, values in zip((10, 20, 30), path):
        horizon.add(values, step)
    horizon.add([p + 100.0 for p in parameters], 35)  # between two tenth base steps
    average = 0.75 * (0.75 * 1.0 + 0.25 * 5.0) + 0.25 * -7.0
    for moved in horizon.earlier_steps([p + 2.0 for p in parameters]) or []:
        torch.testing.assert_close(moved, torch.full_like(moved, 2.0 - average))
    torch.testing.assert_close(path[0][0], torch.ones(3))  # what it was given is left alone


def test_that_is_the_weighted_sum_of_the_steps() -> None:
    """With as many base steps as lie between two additions, all steps since the last one."""
    horizon = GainHorizon(AdaLFLConfig("regression", gain_horizon=10))
    horizon.add([torch.zeros(2)], 10)
    horizon.add([torch.ones(2)], 20)
    (moved,) = horizon.earlier_steps([torch.full((2,), 4.0)]) or []
    torch.testing.assert_close(moved, torch.full((2,), 3.0))


def test_a_horizon_of_one_is_the_last_step_alone() -> None:
    horizon = GainHorizon(AdaLFLConfig("regression", gain_horizon=1))
    horizon.add([torch.ones(2)], 10)
    assert horizon.earlier_steps([torch.ones(2)]) is None


def found_gradient(task_loss: float, along: float | None) -> Hypergradient:
    derivative = None if along is None else torch.tensor(along, dtype=torch.float64)
    return Hypergradient((), torch.zeros(0), torch.tensor(task_loss), derivative)


@pytest.mark.parametrize("horizon", [1, 100])
def test_a_gain_that_brings_too_little_comes_down(horizon: int) -> None:
    """It has to lower the task loss by 1e-4 of all its fall for each base step that is in view."""
    watched = GainHorizon(AdaLFLConfig("regression", gain_horizon=horizon))
    parameters = [torch.zeros(2)]
    watched.gradient(torch.tensor(0.0), found_gradient(5.0, None), 10)
    for step in range(10, 3010, 10):
        watched.add(parameters, step)
    for fall in (0.9e-4, 1.1e-4):
        # The last of a hundred steps is the exact part.
        along = None if watched.earlier_steps(parameters) is None else -2.0 * 99 * fall
        pull = watched.gradient(torch.tensor(-2.0 * fall), found_gradient(3.0, along), 3010)
        assert (float(pull) < 0) == (fall > 1e-4)


def test_on_a_plateau_at_the_start_any_fall_is_worth_a_gain() -> None:
    watched = GainHorizon(AdaLFLConfig("regression"))
    for task_loss in (5.0, 5.0, 5.1):
        assert float(watched.gradient(torch.tensor(-1e-9), found_gradient(task_loss, None), 10)) < 0


def test_a_first_task_loss_that_is_not_finite_is_no_measure() -> None:
    watched = GainHorizon(AdaLFLConfig("regression"))
    watched.gradient(torch.tensor(0.0), found_gradient(float("inf"), None), 10)
    watched.gradient(torch.tensor(0.0), found_gradient(5.0, None), 20)
    assert float(watched.gradient(torch.tensor(0.0), found_gradient(3.0, None), 30)) == pytest.approx(2e-4)


def test_what_is_saved_stays_as_it_was() -> None:
    first, second = GainHorizon(AdaLFLConfig("regression")), GainHorizon(AdaLFLConfig("regression"))
    first.add([torch.ones(2), torch.ones(2, dtype=torch.complex64)], 10)
    saved = first.state_dict()
    second.load_state_dict(saved)
    for horizon in (first, second):
        horizon.add([torch.zeros(2), torch.zeros(2, dtype=torch.complex64)], 20)
    torch.testing.assert_close(saved["average"][0], torch.ones(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict())


@pytest.mark.parametrize(("meta_every", "interval"), [(1, 10), (3, 12), (10, 10), (40, 40)])
def test_the_gain_is_due_with_a_meta_step_and_not_before_ten_base_steps(meta_every: int, interval: int) -> None:
    horizon = GainHorizon(AdaLFLConfig("regression", meta_every=meta_every))
    assert [step for step in range(1, 101) if horizon.due(step)] == list(range(interval, 101, interval))


def test_it_begins_anew_with_parameters_that_are_unfrozen_later() -> None:
    horizon, parameters = GainHorizon(AdaLFLConfig("regression")), [torch.ones(2)]
    horizon.add(parameters, 10)
    parameters.append(torch.ones(3))
    assert horizon.earlier_steps(parameters) is None
    horizon.add(parameters, 20)
    assert [float(e.sum()) for e in horizon.earlier_steps(parameters) or []] == [0.0, 0.0]


def test_the_gain_rests_between_its_steps(tmp_path: Path) -> None:
    gains: list[float] = []

    class Gains(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gains.append(float(pl_module.adalfl.log_gain.detach()))

    module = make(Ada, adalfl=config(), lr=0.01)
    trainer(tmp_path, max_steps=24, max_epochs=-1, callbacks=[Gains()]).fit(module, *loaders())
    assert gains[:9] == [0.0] * 9
    assert gains[9] == pytest.approx(0.1, rel=1e-3)
    assert gains[9:19] == [gains[9]] * 10
    assert gains[19] > gains[18]
    assert gains[19:] == [gains[19]] * 5


def test_an_offline_phase_leaves_no_earlier_steps(tmp_path: Path) -> None:
    module = make(Ada, adalfl=config())
    trainer(tmp_path, max_steps=5, callbacks=[AdaLFLInit(steps=30)]).fit(module, *loaders())
    assert module.adalfl.progress()["gain_horizon"]["average"] == []


def test_a_derivative_that_is_not_finite_is_left_out() -> None:
    learner = MetaLearner(AdaLFLConfig("regression"))
    learner.start()
    zero = torch.zeros(())
    by_phi = tuple(torch.zeros_like(p) for p in learner.trained.parameters())
    with pytest.warns(UserWarning, match="the hypergradient is not finite"):
        learner.step(Hypergradient(by_phi, torch.zeros(0), zero, torch.tensor(torch.nan)), learn_gain=True)
    assert (learner.skipped_meta_steps, float(learner.log_gain.detach())) == (1, 0.0)


class Digits(Plain):
    """8 x 8 digits.

    Args:
        lr: α.
        depth: Hidden layers.
    """

    def __init__(self, lr: float, depth: int) -> None:
        super().__init__(lr)
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(32, 32), nn.ReLU())]
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), *hidden, nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class AdaDigits(AdaLFLMixin, Digits):
    pass


def loss_on_digits(folder: Path, depth: int, **options: Any) -> float:
    """Return the cross-entropy on held-out digits after 600 base steps."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(bunch.data, dtype=torch.float32)[order] / 16, torch.tensor(bunch.target)[order]
    shuffled = torch.Generator().manual_seed(1)
    train = DataLoader(TensorDataset(x[:1000], y[:1000]), 32, shuffle=True, generator=shuffled)
    val = DataLoader(TensorDataset(x[1000:1300], y[1000:1300]), 100)
    torch.manual_seed(0)
    module: Digits = Digits(0.03, depth)
    if options:
        torch.manual_seed(0)
        module = AdaDigits(0.03, depth, adalfl=AdaLFLConfig("multiclass", meta_every=5, **options))
    trainer(folder, max_steps=600, max_epochs=-1, limit_val_batches=0).fit(module, train, val)
    with torch.no_grad():
        return float(F.cross_entropy(module(x[1300:]), y[1300:]))


def test_a_rate_that_is_too_low_is_made_up_for_longer(tmp_path: Path) -> None:
    """One step alone overshoots along the steepest directions, and asks for less gain than the training could use."""
    assert loss_on_digits(tmp_path, 2, gain_horizon=100) < 0.85 * loss_on_digits(tmp_path, 2, gain_horizon=1)


def test_a_plateau_at_the_start_is_left(tmp_path: Path) -> None:
    """On it the task loss falls by less than the safeguard asks for later."""
    plain = loss_on_digits(tmp_path, 4)
    assert plain > 2.2
    assert loss_on_digits(tmp_path, 4, gain_horizon=100) < 0.5 * plain
