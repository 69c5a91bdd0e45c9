"""Every precision that a CPU has, with and without clipping; steps that a scaler skips have no meta step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from projects import (
    INERT,
    UNBOUNDED,
    Ada,
    Plain,
    assert_same,
    base_tensors,
    config,
    learned_tensors,
    loaders,
    make,
    trainer,
)
from torch import Tensor

from lightning_adalfl import AdaLFLInit, LossNetwork
from lightning_adalfl.hypergradient.network_slope import NetworkSlope


def half_mixed(init_scale: float = 2.0**10) -> dict[str, Any]:
    """Return what makes a Trainer on the CPU compute in half precision with a gradient scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


PRECISIONS = {
    "32-true": dict,
    "64-true": dict,
    "bf16-mixed": dict,
    "16-mixed": half_mixed,
}


def options_of(precision: str) -> tuple[dict[str, Any], torch.dtype]:
    extra = PRECISIONS[precision]()
    options = extra or {"precision": precision}
    return options, torch.float64 if precision == "64-true" else torch.float32


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.05}])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_are_those_of_the_plain_module(tmp_path: Any, precision: str, clipping: Any) -> None:
    states = []
    for kind, arguments in ((Plain, {}), (Ada, {"adalfl": INERT})):
        options, dtype = options_of(precision)
        module = make(kind, **arguments)
        trainer(tmp_path, **options, **clipping).fit(module, *loaders(dtype=dtype))
        states.append(base_tensors(module))
    assert_same(*states)
    assert states[0]["model.0.weight"].dtype == dtype


@pytest.fixture
def loss_precisions(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Keep the precisions in which the network of a learned loss computes, its slope by hand or by autograd."""
    seen: set[torch.dtype] = set()
    through, pairwise = NetworkSlope._through, LossNetwork.pairwise

    def watched_through(self: Any, pairs: Tensor) -> Any:
        result = through(self, pairs)
        seen.update(t.dtype for t in (pairs, *result))
        return result

    def watched_pairwise(self: Any, prediction: Tensor, target: Tensor) -> Any:
        result = pairwise(self, prediction, target)
        seen.update({prediction.dtype, result.dtype})
        return result

    monkeypatch.setattr(NetworkSlope, "_through", watched_through)
    monkeypatch.setattr(LossNetwork, "pairwise", watched_pairwise)
    return seen


@pytest.mark.parametrize("method", ["forward", "finite_difference", "reverse"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_learns_in_every_precision_and_computes_in_full(
    tmp_path: Any, precision: str, method: str, loss_precisions: set[torch.dtype]
) -> None:
    options, dtype = options_of(precision)
    module = make(Ada, adalfl=config(hypergradient=method))
    start = learned_tensors(module)
    t = trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)], gradient_clip_val=0.5, **options)
    t.fit(module, *loaders(dtype=dtype))
    assert module.adalfl.meta_steps == 12
    assert module.adalfl.skipped_meta_steps == 0
    assert loss_precisions == {dtype}
    for name, value in learned_tensors(module).items():
        assert value.dtype == dtype
        assert torch.isfinite(value).all()
        # The gain may be back at its bound, where it began.
        assert name == "adalfl.log_gain" or not torch.equal(value.to(start[name].dtype), start[name])


def first_hypergradient(tmp_path: Any, precision: str) -> torch.Tensor:
    options, dtype = options_of(precision)
    module = make(Ada, dropout=0.0, adalfl=config(meta_optimizer="SGD", meta_lr=1.0))
    before = module.adalfl.loss
    start = torch.cat([p.detach().reshape(-1).double() for p in before.parameters()])
    train, val = loaders(shuffle=False, dtype=dtype)
    trainer(tmp_path, max_steps=1, max_epochs=-1, **options).fit(module, train, val)
    return start - torch.cat([p.detach().reshape(-1).double() for p in module.adalfl.loss.parameters()])


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-mixed", 0.1), ("16-mixed", 0.02)])
def test_the_hypergradient_agrees_with_double_precision(tmp_path: Any, precision: str, tolerance: float) -> None:
    exact = first_hypergradient(tmp_path, "64-true")
    assert exact.norm() > 0
    error = (first_hypergradient(tmp_path, precision) - exact).norm() / exact.norm()
    assert error < tolerance


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
    assert module.adalfl.skipped_meta_steps == 0
    assert all(torch.isfinite(value).all() for value in learned_tensors(module).values())


def test_the_scale_does_not_change_what_is_learned(tmp_path: Any) -> None:
    results = []
    for scale in (2.0**4, 2.0**10):
        module = make(Ada, adalfl=config())
        trainer(tmp_path, gradient_clip_val=0.1, **half_mixed(scale)).fit(module, *loaders())
        results.append(learned_tensors(module))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_the_loss_keeps_single_precision_where_the_model_has_half(tmp_path: Any, precision: str) -> None:
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.half}[precision]
    module = make(Ada, lr=0.01, adalfl=config(meta_lr=1e-6, **UNBOUNDED))
    start = learned_tensors(module)
    t = trainer(tmp_path, callbacks=[AdaLFLInit(steps=1, lr=1e-6)], precision=precision)
    t.fit(module, *loaders(dtype=dtype))
    assert module.model[0].weight.dtype == dtype
    assert module.adalfl.meta_steps == 12
    for name, value in learned_tensors(module).items():
        assert value.dtype == torch.float32
        # Adam's steps of 1e-6 add up, which they could not in eight bits of mantissa.
        assert 0 < (value - start[name]).abs().max() < 2e-5


def test_the_offline_phase_learns_whatever_the_scale_of_the_run_is(tmp_path: Path) -> None:
    learned = []
    for scale in (2.0**4, 2.0**32):
        module = make(Ada, adalfl=config(online=False))
        callbacks = [AdaLFLInit(steps=5, lr=1e-2)]
        trainer(tmp_path, callbacks=callbacks, max_steps=1, **half_mixed(scale)).fit(module, *loaders())
        assert module.adalfl.skipped_meta_steps == 0
        learned.append(learned_tensors(module))
    assert_same(*learned)
