"""Every precision that a CPU has, and numbers that are not finite: they never reach φ, nor through it the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from projects import (
    WATCHING,
    Ada,
    AdaSmooth,
    Plain,
    Smooth,
    assert_same,
    config,
    loaders,
    make,
    phi,
    points,
    tensors,
    trainer,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLInit, LossNetwork


def half_mixed(init_scale: float = 2.0**10) -> dict[str, Any]:
    """Return what makes a Trainer on the CPU compute in half precision with a gradient scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


PRECISIONS = ["32-true", "64-true", "bf16-mixed", "16-mixed"]


def options_of(precision: str) -> tuple[dict[str, Any], torch.dtype]:
    options = half_mixed() if precision == "16-mixed" else {"precision": precision}
    return options, torch.float64 if precision == "64-true" else torch.float32


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.05}], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_are_those_of_the_plain_module(tmp_path: Any, precision: str, clipping: Any) -> None:
    states = []
    for kind, arguments in ((Plain, {}), (Ada, {"adalfl": WATCHING})):
        options, dtype = options_of(precision)
        module = make(kind, **arguments)
        trainer(tmp_path, **options, **clipping).fit(module, *loaders(dtype=dtype))
        states.append(tensors(module))
    assert_same(*states)
    assert states[0]["model.0.weight"].dtype == dtype


@pytest.fixture
def loss_precisions(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Keep the precisions in which the network of a learned loss computes, by hand or by autograd."""
    seen: set[torch.dtype] = set()
    for name in ("pairwise", "pair_gradient"):
        original = getattr(LossNetwork, name)

        def watched(self: Any, prediction: Tensor, target: Tensor, original: Any = original) -> Any:
            result = original(self, prediction, target)
            seen.update({prediction.dtype, getattr(result, "value", result).dtype})
            return result

        monkeypatch.setattr(LossNetwork, name, watched)
    return seen


@pytest.mark.parametrize("way", ["forward", "finite_difference", "reverse"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_learns_in_every_precision_and_computes_in_single(
    tmp_path: Any, precision: str, way: str, loss_precisions: set[torch.dtype]
) -> None:
    options, dtype = options_of(precision)
    module = make(Ada, adalfl=config(hypergradient=way, learn="both"))
    start = phi(module)
    t = trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)], gradient_clip_val=0.5, **options)
    t.fit(module, *loaders(dtype=dtype))
    assert module.adalfl.meta_steps == 12
    assert module.adalfl.state_dict()["skipped_meta_steps"] == 0
    assert loss_precisions == {torch.float32}
    for name, value in phi(module).items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        assert torch.equal(value, start[name]) == (name == "linear.2.bias")  # which no slope depends on


def first_move(tmp_path: Any, precision: str, **changes: Any) -> dict[str, Tensor]:
    options, dtype = options_of(precision)
    module = make(Ada, dropout=0.0, adalfl=config(meta_optimizer="SGD", meta_lr=1.0, **changes))
    before = phi(module)
    train, val = loaders(shuffle=False, dtype=dtype)
    trainer(tmp_path, max_steps=1, max_epochs=-1, **options).fit(module, train, val)
    return {name: value - before[name] for name, value in phi(module).items()}


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-mixed", 0.1), ("16-mixed", 0.02)])
@pytest.mark.parametrize("options", [{}, {"own_loss": False, "loss": "paper"}], ids=str)
def test_the_hypergradient_agrees_with_double_precision(
    tmp_path: Any, precision: str, tolerance: float, options: dict[str, Any]
) -> None:
    exact = torch.cat([value.flatten() for value in first_move(tmp_path, "64-true", **options).values()])
    found = torch.cat([value.flatten() for value in first_move(tmp_path, precision, **options).values()])
    assert exact.norm() > 0
    assert (found - exact).norm() / exact.norm() < tolerance


class Scales(Callback):
    def __init__(self) -> None:
        self.rows: list[tuple[bool, int, int]] = []
        self._before = 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._before = trainer.precision_plugin.scaler.get_scale()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        skipped = trainer.precision_plugin.scaler.get_scale() < self._before
        self.rows.append((skipped, pl_module.adalfl.base_steps, pl_module.adalfl.meta_steps))


def test_a_step_that_the_scaler_skips_has_no_meta_step(tmp_path: Any) -> None:
    scales = Scales()
    module = make(Ada, adalfl=config())
    trainer(tmp_path, callbacks=[scales], max_epochs=6, **half_mixed(2.0**32)).fit(module, *loaders())
    skipped = [row[0] for row in scales.rows]
    assert any(skipped)
    assert not all(skipped)
    taken = 0
    for row in scales.rows:
        taken += not row[0]
        assert row[1:] == (taken, taken)
    assert module.adalfl.state_dict()["skipped_meta_steps"] == 0
    assert all(torch.isfinite(value).all() for value in phi(module).values())


def test_the_scale_does_not_change_what_is_learned(tmp_path: Any) -> None:
    online, offline = [], []
    for scale in (2.0**4, 2.0**10):
        module = make(Ada, adalfl=config())
        trainer(tmp_path, gradient_clip_val=0.1, **half_mixed(scale)).fit(module, *loaders())
        online.append(phi(module))
    for name, value in online[0].items():
        torch.testing.assert_close(value, online[1][name], rtol=0.05, atol=5e-3)
    for scale in (2.0**4, 2.0**32):
        module = make(Ada, adalfl=config(meta_every=None))
        callbacks = [AdaLFLInit(steps=5, lr=1e-2)]
        trainer(tmp_path, callbacks=callbacks, max_steps=1, **half_mixed(scale)).fit(module, *loaders())
        offline.append(phi(module))
    assert_same(*offline)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_the_loss_keeps_single_precision_where_the_model_has_half(tmp_path: Any, precision: str) -> None:
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.half}[precision]
    module = make(Ada, lr=0.01, adalfl=config(meta_lr=1e-6))
    start = phi(module)
    t = trainer(tmp_path, callbacks=[AdaLFLInit(steps=1, lr=1e-6)], precision=precision)
    t.fit(module, *loaders(dtype=dtype))
    assert module.model[0].weight.dtype == dtype
    assert module.adalfl.meta_steps == 12
    for name, value in phi(module).items():
        assert value.dtype == torch.float32
        # Adam's steps of 1e-6 add up, which they could not in eight bits of mantissa.
        if name != "linear.2.bias":  # which no slope depends on
            assert 0 < (value - start[name]).abs().max() < 2e-5


# Numbers that are not finite.

NAN, INF = float("nan"), float("inf")


class Plant(Callback):
    """Calls ``plant(module, batch)`` before the batches of some numbers."""

    def __init__(self, plant: Callable[[Any, Any], None], at: int = 3, often: int = 1) -> None:
        self.plant, self.at, self.often = plant, at, often

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.at <= trainer.fit_loop.epoch_loop.total_batch_idx < self.at + self.often:
            self.plant(module, batch)


def data() -> tuple[DataLoader, DataLoader]:
    return DataLoader(points(), 16), DataLoader(points(32, 1), 16)


def fit(root: Path, options: dict[str, Any], plant: Callback, **more: Any) -> tuple[Any, list[str], dict[str, Tensor]]:
    """Train; return the module, the warnings that name a remedy, and what was logged last."""
    module = make(AdaSmooth, adalfl=config(meta_data="train", **options))
    t = trainer(root, max_epochs=-1, max_steps=12, callbacks=[plant], limit_val_batches=0, **more)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(module, *data())
    return module, [str(w.message) for w in caught if "finite" in str(w.message)], dict(t.callback_metrics)


def is_finite(values: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values.values())


@torch.no_grad()
def fill(tensor: Tensor, value: float) -> None:
    tensor.view(-1)[0] = value


LEFT_OUT = (
    r"A meta step before base step \d+ was left out.*hypergradient or the task loss.*not finite.*clip the gradient"
)


@pytest.mark.parametrize("options", [{}, {"own_loss": False, "loss": "paper", "meta_lr": 1e-3}], ids=str)
def test_a_batch_that_is_not_finite_is_reported_once_and_spares_the_learned_loss(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    module, messages, logged = fit(tmp_path, options, Plant(lambda module, batch: fill(batch[0], NAN)))
    # As plain training does: nothing is hidden from the user.
    plain = make(Smooth)
    plant = Plant(lambda module, batch: fill(batch[0], NAN))
    trainer(tmp_path, max_steps=4, callbacks=[plant], limit_val_batches=0).fit(plain, *data())
    assert not is_finite(tensors(plain))
    assert not is_finite(tensors(module))
    assert is_finite(phi(module))
    assert logged["adalfl/skipped_meta_steps"] == 9
    assert len(messages) == 1
    with pytest.raises(UserWarning, match=LEFT_OUT):
        warnings.warn(messages[0], stacklevel=1)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("way", ["forward", "finite_difference", "reverse"])
def test_a_learned_loss_that_is_not_finite_is_the_users_own_loss(tmp_path: Path, value: float, way: str) -> None:
    kept: dict[str, Tensor] = {}

    def plant(module: Any, batch: Any) -> None:
        fill(next(iter(module.adalfl.learned.values())), value)
        kept.update(tensors(module))

    module, messages, _ = fit(tmp_path, {"hypergradient": way}, Plant(plant))
    assert is_finite(tensors(module))
    assert any(not torch.equal(value, kept[name]) for name, value in tensors(module).items())
    assert len(messages) == 1


@pytest.mark.parametrize("scale", [1e3, 1e14, -50.0])
def test_a_learned_loss_of_any_size_or_sign_makes_no_step_longer(tmp_path: Path, scale: float) -> None:
    @torch.no_grad()
    def plant(module: Any, batch: Any) -> None:
        for parameter in module.adalfl.learned.values():
            parameter.mul_(scale)

    module, _, logged = fit(tmp_path, {}, Plant(plant))
    assert is_finite(tensors(module))
    assert is_finite(phi(module))
    # How far a step goes along the user's own, times the learning rate.
    assert abs(float(logged["adalfl/implied_lr"])) <= 0.1 * (1 + 1e-5)


def test_a_meta_batch_that_is_not_finite_costs_its_meta_step_alone(tmp_path: Path) -> None:
    bad = points(32)
    bad.tensors[0][0, 0] = NAN
    module = make(AdaSmooth, adalfl=config(meta_data=DataLoader(bad, 16)))
    with pytest.warns(UserWarning, match=r"A meta step before base step \d+ was left out"):
        trainer(tmp_path, max_steps=6, limit_val_batches=0).fit(module, *data())
    assert module.adalfl.state_dict()["skipped_meta_steps"] == 3
    assert module.adalfl.meta_steps == 6
    assert is_finite(tensors(module))
    assert is_finite(phi(module))


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_bf16_with_inputs_of_any_size_keeps_everything_finite(tmp_path: Path, scale: float) -> None:
    plant = Plant(lambda module, batch: batch[0].mul_(scale), 2, 3)
    for options in ({}, {"own_loss": False, "loss": "paper", "meta_lr": 1e-3}):
        module, _, _ = fit(tmp_path, options, plant, precision="bf16-mixed")
        assert is_finite(tensors(module))
        assert is_finite(phi(module))
