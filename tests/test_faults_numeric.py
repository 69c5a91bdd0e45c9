"""Values that are not finite, and losses that have gone bad: reported once, and never the way by which θ gets a NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from projects import (
    UNBOUNDED,
    AdaSmooth,
    Plain,
    Smooth,
    assert_same,
    base_tensors,
    config,
    learned_tensors,
    make,
    points,
    trainer,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin
from lightning_adalfl.adapter import finite_steps

NAN, INF = float("nan"), float("inf")
LOOSE = {**UNBOUNDED, "meta_lr": 1e-3}


class Plant(Callback):
    """Calls ``plant(module, batch)`` before the batch of one number."""

    def __init__(self, plant: Callable[[Any, Any], None], at: int = 3, often: int = 1) -> None:
        self.plant, self.at, self.often = plant, at, often

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.at <= trainer.fit_loop.epoch_loop.total_batch_idx < self.at + self.often:
            self.plant(module, batch)


def fit(
    root: Path, options: dict[str, Any], plant: Callback | None = None, steps: int = 12, **trainer_options: Any
) -> tuple[Any, list[str], dict[str, Tensor]]:
    """Train; return the module, the warnings that name a remedy, and what was logged last."""
    module = make(AdaSmooth, adalfl=config(meta_data="train", **options))
    fitter = trainer(
        root, max_epochs=-1, max_steps=steps, callbacks=[plant] if plant else [], limit_val_batches=0, **trainer_options
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitter.fit(module, *data())
    messages = [str(w.message) for w in caught if "finite" in str(w.message) or "safeguard" in str(w.message)]
    return module, messages, dict(fitter.callback_metrics)


def data() -> tuple[DataLoader, DataLoader]:
    return DataLoader(points(), 16), DataLoader(points(32, 1), 16)


def task_loss(module: Any) -> float:
    """Return the cross-entropy on all the data."""
    x, y = points().tensors
    with torch.no_grad():
        return float(F.cross_entropy(module(x), y))


def finite(module: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in base_tensors(module).values())


@torch.no_grad()
def fill(tensor: Tensor, value: float) -> None:
    tensor.view(-1)[0] = value


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("options", [{}, LOOSE], ids=["bounded", "loose"])
def test_a_batch_that_is_not_finite_is_reported_once_and_spares_the_learned_loss(
    tmp_path: Path, value: float, options: dict[str, Any]
) -> None:
    def plant(module: Any, batch: Any) -> None:
        fill(batch[0], value)

    module, messages, logged = fit(tmp_path, {"safeguard": False, **options}, Plant(plant))
    reported = [m for m in messages if "Predictions or targets at base step 3 are not finite" in m]
    if value == NAN:  # tanh makes an infinite input finite, and its gradient with it
        assert len(reported) == 1
        assert "detect_anomaly=True" in reported[0]
        # As plain training does: nothing is hidden from the user.
        assert not finite(module)
        assert len(messages) == 2, messages
        assert logged["adalfl/skipped_meta_steps"] == 9
    assert all(t.isfinite().all() for t in learned_tensors(module).values())


def test_plain_training_would_have_stepped_too(tmp_path: Path) -> None:
    module = make(Smooth)
    plant = Plant(lambda module, batch: fill(batch[0], NAN))
    trainer(tmp_path, max_steps=4, callbacks=[plant], limit_val_batches=0).fit(module, *data())
    assert not finite(module)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("method", ["forward", "finite_difference", "reverse"])
def test_a_learned_loss_that_is_not_finite_does_not_reach_the_base_model(
    tmp_path: Path, value: float, method: str
) -> None:
    def plant(module: Any, batch: Any) -> None:
        fill(next(module.adalfl.loss.parameters()), value)
        plant.before = base_tensors(module)

    module, messages, logged = fit(tmp_path, {**LOOSE, "hypergradient": method}, Plant(plant))
    assert finite(module)
    assert_same(base_tensors(module), plant.before)
    assert len(messages) == 1
    assert "The gradient of the learned loss at base step 3 is not finite" in messages[0]
    assert "lower `meta_lr`" in messages[0]
    assert logged["adalfl/skipped_base_steps"] == 9


def test_a_bounded_loss_that_is_not_finite_is_the_task_loss(tmp_path: Path) -> None:
    def plant(module: Any, batch: Any) -> None:
        fill(next(module.adalfl.loss.parameters()), NAN)

    module, messages, logged = fit(tmp_path, {"safeguard": False}, Plant(plant))
    assert finite(module)
    assert len(messages) == 1
    assert "A meta step at base step 3 was left out" in messages[0]
    assert logged["adalfl/task_loss"] < 1.2


def test_training_that_stands_still_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite_steps, "LIMIT", 5)
    plant = Plant(lambda module, batch: fill(next(module.adalfl.loss.parameters()), NAN))
    with pytest.raises(RuntimeError, match=r"The last 5 base steps had to be left out.*earlier checkpoint"):
        fit(tmp_path, LOOSE, plant)


def test_single_steps_that_are_left_out_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite_steps, "LIMIT", 2)
    kept: dict[str, Tensor] = {}

    def plant(module: Any, batch: Any) -> None:
        parameter = next(module.adalfl.loss.parameters())
        if kept:
            parameter.data.copy_(kept.pop("phi"))
        else:
            kept["phi"] = parameter.detach().clone()
            fill(parameter, NAN)

    module, _, logged = fit(tmp_path, LOOSE, Plant(plant, 2, 8))
    assert logged["adalfl/skipped_base_steps"] == 4
    assert finite(module)


def test_an_exploding_scale_is_left_out_before_it_overflows_in_the_model(tmp_path: Path) -> None:
    @torch.no_grad()
    def plant(module: Any, batch: Any) -> None:
        for parameter in module.adalfl.loss.parameters():
            parameter.mul_(1e14)

    module, messages, _ = fit(tmp_path, LOOSE, Plant(plant))
    assert finite(module)
    assert messages


def test_a_meta_batch_that_is_not_finite_costs_its_meta_step_alone(tmp_path: Path) -> None:
    bad = points(32)
    bad.tensors[0][0, 0] = NAN

    class OneBadBatch(AdaSmooth):
        def adalfl_meta_dataloader(self) -> Any:
            return DataLoader(bad, 16)

    module = make(OneBadBatch, adalfl=config(safeguard=False))
    fitter = trainer(tmp_path, max_steps=6, limit_val_batches=0)
    with pytest.warns(
        UserWarning, match=r"A meta step at base step 0 was left out.*task loss on the meta batch, which is nan"
    ):
        fitter.fit(module, *data())
    assert module.adalfl.skipped_meta_steps == 3
    assert module.adalfl.meta_steps == 3
    assert finite(module)
    assert all(t.isfinite().all() for t in learned_tensors(module).values())


def test_a_meta_optimizer_with_a_broken_state_begins_anew(tmp_path: Path) -> None:
    def plant(module: Any, batch: Any) -> None:
        state = next(iter(module.adalfl._optimizer.state.values()))
        fill(state["exp_avg"], NAN)

    module, messages, _ = fit(tmp_path, {"safeguard": False}, Plant(plant))
    assert len(messages) == 1
    assert "the meta optimizer made the learned loss not finite" in messages[0]
    assert module.adalfl.meta_steps == 11
    assert all(t.isfinite().all() for t in learned_tensors(module).values())
    assert finite(module)


def test_a_base_optimizer_with_a_broken_state_is_reported_by_what_it_did(tmp_path: Path) -> None:
    def plant(module: Any, batch: Any) -> None:
        fill(next(iter(module.trainer.optimizers[0].state.values()))["momentum_buffer"], NAN)

    module, messages, _ = fit(tmp_path, {"safeguard": False}, Plant(plant))
    assert any("Predictions or targets at base step 4 are not finite" in m for m in messages)
    assert len(messages) == 2
    assert all(t.isfinite().all() for t in learned_tensors(module).values())


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_bf16_with_inputs_of_any_size_keeps_everything_finite(tmp_path: Path, scale: float) -> None:
    def plant(module: Any, batch: Any) -> None:
        batch[0].mul_(scale)

    module, _, _ = fit(tmp_path, {"safeguard": False, **LOOSE}, Plant(plant, 2, 3), precision="bf16-mixed")
    assert finite(module)
    assert all(t.isfinite().all() for t in learned_tensors(module).values())


@torch.no_grad()
def reversed_sign(module: Any, batch: Any) -> None:
    list(module.adalfl.loss.parameters())[-1].mul_(-50)


@torch.no_grad()
def flat(module: Any, batch: Any) -> None:
    list(module.adalfl.loss.parameters())[-1].zero_()


@torch.no_grad()
def steep(module: Any, batch: Any) -> None:
    list(module.adalfl.loss.parameters())[-1].mul_(1e6)


@pytest.mark.parametrize("plant", [reversed_sign, flat, steep])
def test_a_bounded_loss_that_has_gone_bad_still_descends_the_task_loss(tmp_path: Path, plant: Any) -> None:
    # Without the task loss inside, so that nothing but the bounds is left to help.
    options = {"residual": False, "safeguard": False, "meta_lr": 1e-5}
    module, _, logged = fit(tmp_path, options, Plant(plant, 0), steps=60)
    assert finite(module)
    assert 0.09 <= float(logged["adalfl/implied_lr"]) <= 0.1 * module.adalfl.config.max_gain * 1.01
    assert task_loss(module) < 0.7


@pytest.mark.parametrize("plant", [reversed_sign, steep])
def test_the_safeguard_ends_what_nothing_bounds(tmp_path: Path, plant: Any) -> None:
    options = {**LOOSE, "safeguard": True, "safeguard_window": 10, "meta_lr": 1e-5}
    module, messages, logged = fit(tmp_path, options, Plant(plant, 40), steps=400)
    assert finite(module)
    assert logged["adalfl/safeguard"] >= 1
    assert sum("goes on with the learned loss as it was at its best" in m for m in messages) == 1
    # Where it is the loss that was bad and θ has not been thrown too far, what is left of training repairs it.
    assert plant is steep or task_loss(module) < 1.2


def test_an_offline_phase_on_broken_data_says_so_and_leaves_the_loss_as_it_was(tmp_path: Path) -> None:
    broken = points()
    broken.tensors[0].fill_(NAN)

    class Broken(AdaLFLMixin, Plain):
        pass

    module = make(Broken, adalfl=AdaLFLConfig(task="multiclass", meta_data="train"))
    before = learned_tensors(module)
    fitter = trainer(tmp_path, max_steps=1, limit_train_batches=1, limit_val_batches=0, callbacks=[AdaLFLInit(steps=5)])
    reports = pytest.warns(UserWarning, match="Predictions or targets at base step 0 are not finite")
    with reports, pytest.warns(UserWarning, match="A meta step at base step 0 was left out"):
        fitter.fit(module, DataLoader(broken, 16), data()[1])
    assert_same(learned_tensors(module), before)
