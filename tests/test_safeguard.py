"""The safeguard: when it trips, what it then does, and a run that diverges without it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin
from lightning_adalfl.adapter.meta_learner import MetaLearner
from lightning_adalfl.adapter.safeguard import UNUSABLE, Safeguard

LEARNED = [torch.ones(2)]


def feed(guard: Safeguard, values: list[float], norm: float = 1.0) -> list[str]:
    reasons = [guard.observe(value, norm, LEARNED) for value in values]
    return [reason for reason in reasons if reason is not None]


def test_it_stays_quiet_while_the_task_loss_falls() -> None:
    guard = Safeguard(window=4)
    assert feed(guard, [1.0 / step for step in range(1, 200)]) == []
    assert guard.level == 0
    assert torch.equal(guard.best_values[0], LEARNED[0])


def test_it_trips_when_no_window_is_a_new_best() -> None:
    guard = Safeguard(window=4)
    assert feed(guard, [0.9] * 4 + [0.5] * 11) == []  # two windows at least
    assert feed(guard, [0.5]) == ["the task loss on meta batches has not fallen for 8 meta steps"]


def test_it_waits_on_a_plateau_at_the_start() -> None:
    guard = Safeguard(window=4)
    assert feed(guard, [0.5] * 43) == []  # ten windows after the first
    assert feed(guard, [0.5]) == ["the task loss on meta batches has not fallen for 40 meta steps"]
    assert feed(guard, [0.5] * 27) == []
    assert len(feed(guard, [0.5])) == 1  # not a second time: half as many as there were before
    assert guard.level == 2


def test_it_waits_longer_the_longer_the_task_loss_has_fallen() -> None:
    guard = Safeguard(window=4)
    assert feed(guard, [0.5**step for step in range(80)]) == []
    assert feed(guard, [0.5**79] * 47) == []  # the first window of these is the best, after 84 meta steps
    assert feed(guard, [0.5**79]) == ["the task loss on meta batches has not fallen for 44 meta steps"]


def test_it_trips_at_once_when_the_task_loss_rises() -> None:
    guard = Safeguard(window=1000)
    reasons = feed(guard, [1.0] * 20 + [100.0])
    assert reasons == ["the task loss on meta batches rose to 3 times its best"]


@pytest.mark.parametrize(("value", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_it_trips_when_hypergradients_stay_not_finite(value: float, norm: float) -> None:
    guard = Safeguard(window=4)
    assert feed(guard, [value] * (UNUSABLE - 1), norm) == []
    assert feed(guard, [1.0]) == []  # one that is finite in between
    assert feed(guard, [value] * UNUSABLE, norm) == [f"{UNUSABLE} hypergradients in a row were not finite"]


def test_a_restored_one_goes_on_where_the_other_was() -> None:
    values = torch.rand(100).tolist()
    whole, first, second = Safeguard(4), Safeguard(4), Safeguard(4)
    feed(whole, values)
    feed(first, values[:37])
    second.load_state_dict(first.state_dict())
    feed(second, values[37:])
    assert whole.level == second.level == 2
    assert whole.state_dict().keys() == second.state_dict().keys()
    assert (whole._sum, whole._count, whole._best, whole._best_at) == (
        second._sum,
        second._count,
        second._best,
        second._best_at,
    )


@pytest.mark.parametrize(("window", "meta_every", "meta_steps"), [(50, 1, 50), (50, 4, 12), (50, 10, 10), (2, 10, 2)])
def test_its_window_is_in_base_steps(window: int, meta_every: int, meta_steps: int) -> None:
    config = AdaLFLConfig("regression", safeguard_window=window, meta_every=meta_every)
    assert MetaLearner(config).safeguard.window == meta_steps


class Line(L.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """It has one, so that validation data is no surprise to Lightning."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class AdaLine(AdaLFLMixin, Line):
    pass


LineT = TypeVar("LineT", bound=Line)


def data() -> tuple[DataLoader, DataLoader]:
    x = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    return DataLoader(TensorDataset(x[:64], y[:64]), 32), DataLoader(TensorDataset(x[64:], y[64:]), 32)


def fit(tmp_path: Path, lr: float, steps: int, start: float = 0.0, **options: Any) -> AdaLine:
    module = AdaLine(lr, adalfl=AdaLFLConfig("regression", **options))
    if start:
        module.adalfl.log_gain.data.fill_(math.log(start))
    return train(tmp_path, module, steps)


def train(tmp_path: Path, module: LineT, steps: int, *callbacks: L.Callback) -> LineT:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*is not finite.*")
        trainer.fit(module, *data())
    return module


@torch.no_grad()
def error(module: Line) -> float:
    return float(sum(F.mse_loss(module(x), y) for x, y in data()[1]) / 2)


@pytest.mark.parametrize("lr", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("offline", [False, True])
def test_training_with_it_is_no_worse_at_any_rate(tmp_path: Path, lr: float, offline: bool) -> None:
    """From far too low to where the ten times that the gain may reach diverge."""
    torch.manual_seed(0)
    plain = train(tmp_path, Line(lr), 100)
    torch.manual_seed(0)
    learned = train(tmp_path, AdaLine(lr, adalfl=AdaLFLConfig("regression")), 100, *[AdaLFLInit(steps=20)] * offline)
    assert error(learned) <= 1.02 * error(plain) + 1e-6


def test_a_run_that_diverges_without_it_does_not_with_it(tmp_path: Path) -> None:
    """At this rate the task loss converges; ten times the rate is beyond what any step size may be."""
    torch.manual_seed(0)
    without = fit(tmp_path, 0.12, 60, start=10.0, gain_lr=1e-6, safeguard=False)
    assert not error(without) < 1e3
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="rose to 3 times its best. Training goes on with the learned loss as it was"):
        guarded = fit(tmp_path, 0.12, 60, start=10.0, gain_lr=1e-6)
    assert guarded.adalfl.safeguard.level == 1
    assert float(guarded.adalfl.log_gain.detach()) == 0  # from then on, though the hypergradient asks for more
    assert error(guarded) < 1.0


def test_it_says_so_once_and_ends_with_the_task_loss(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has not fallen for 20 meta steps") as caught:
        module = fit(tmp_path, 1e-12, 60, safeguard_window=2)
    assert sum("has not fallen" in str(warning.message) for warning in caught) == 1
    assert module.adalfl.safeguard.level == 2
    assert module.adalfl.fell_back
    assert module.adalfl.meta_steps < 60  # meta steps have no use then
    assert module.adalfl.base_steps == 60
    predictions, target = torch.randn(8, 1), torch.randn(8, 1)
    assert torch.equal(module.adalfl.objective(predictions, target), F.mse_loss(predictions, target))
    assert float(module.trainer.callback_metrics["adalfl/safeguard"]) == 2


def test_its_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has not fallen"):
        module = fit(tmp_path, 1e-12, 60, safeguard_window=2)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = AdaLine.load_from_checkpoint(tmp_path / "last.ckpt", lr=0.1)
    assert loaded.adalfl.fell_back
