"""Accumulated gradients: a base step and at most one meta step for each window of batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from projects import (
    INERT,
    UNBOUNDED,
    Ada,
    AdaSmooth,
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

from lightning_adalfl import AdaLFLMixin


class Counters(Callback):
    def __init__(self) -> None:
        self.counts: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.counts.append((trainer.global_step, pl_module.adalfl.base_steps, pl_module.adalfl.meta_steps))


def fit(tmp_path: Any, module: Any, batch_size: int, **options: Any) -> Any:
    train, val = loaders(batch_size, shuffle=False, dtype=torch.float64)
    trainer(tmp_path, precision="64-true", **options).fit(module, train, val)
    return module


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("method", ["forward", "finite_difference", "reverse"])
@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.05}])
def test_accumulated_batches_learn_as_one_large_batch_does(tmp_path: Any, method: str, clipping: Any) -> None:
    options = config(hypergradient=method, meta_optimizer="SGD", meta_lr=0.1, **UNBOUNDED)
    large = fit(tmp_path, make(AdaSmooth, adalfl=options), 48, **clipping)
    cut = fit(tmp_path, make(AdaSmooth, adalfl=options), 16, accumulate_grad_batches=3, **clipping)
    assert cut.adalfl.meta_steps == large.adalfl.meta_steps == 4
    assert_close(base_tensors(large), base_tensors(cut))
    assert_close(learned_tensors(large), learned_tensors(cut))


def test_the_window_that_an_epoch_cuts_short_is_stepped_as_for_the_plain_module(tmp_path: Any) -> None:
    options = {"accumulate_grad_batches": 4}
    plain = fit(tmp_path, make(Plain), 16, **options)
    assert_same(base_tensors(plain), base_tensors(fit(tmp_path, make(Ada, adalfl=INERT), 16, **options)))
    learned = {"meta_optimizer": "SGD", "meta_lr": 0.1}
    forward = fit(tmp_path, make(Ada, adalfl=config(**learned)), 16, **options)
    reverse = fit(tmp_path, make(Ada, adalfl=config(hypergradient="reverse", **learned)), 16, **options)
    assert forward.adalfl.meta_steps == 4
    assert_close(learned_tensors(forward), learned_tensors(reverse))


def test_there_is_at_most_one_meta_step_for_a_window(tmp_path: Any) -> None:
    counters = Counters()
    fit(tmp_path, make(Ada, adalfl=config()), 16, accumulate_grad_batches=2, callbacks=[counters], max_epochs=1)
    assert counters.counts == [(0, 0, 0), (1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2), (3, 3, 3)]
    counters = Counters()
    module = make(Ada, adalfl=config(meta_every=2))
    fit(tmp_path, module, 16, accumulate_grad_batches=2, callbacks=[counters])
    assert [meta for _, _, meta in counters.counts] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


# Lightning says of any module with an `optimizer_step` that it is called once for each window, which is what is wanted.
@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches != 1.`")
def test_a_schedule_of_windows_is_followed(tmp_path: Any) -> None:
    def windows() -> dict[str, Any]:
        return {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 3})], "max_epochs": 2}

    plain = fit(tmp_path, make(Plain), 16, **windows())
    assert_same(base_tensors(plain), base_tensors(fit(tmp_path, make(Ada, adalfl=INERT), 16, **windows())))
    adaptive = fit(tmp_path, make(Ada, adalfl=config()), 16, **windows())
    assert adaptive.adalfl.meta_steps == adaptive.adalfl.base_steps == 8


class Picky(Plain):
    """Skips every third batch by returning nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


class AdaPicky(AdaLFLMixin, Picky):
    pass


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_the_training_step_skips_moves_nothing(tmp_path: Any, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
    # Predicting is part of a training step here, so BatchNorm counts the skipped batch too: compare parameters alone.
    inert = fit(tmp_path, make(AdaPicky, dropout=0.0, adalfl=INERT), 16, **options)
    plain = fit(tmp_path, make(Picky, dropout=0.0), 16, **options)
    for (name, p), (_, q) in zip(plain.model.named_parameters(), inert.model.named_parameters()):
        assert torch.equal(p, q), name
    learned = {"meta_optimizer": "SGD", "meta_lr": 0.1}
    forward = fit(tmp_path, make(AdaPicky, adalfl=config(**learned)), 16, **options)
    reverse = fit(tmp_path, make(AdaPicky, adalfl=config(hypergradient="reverse", **learned)), 16, **options)
    assert forward.adalfl.meta_steps == {1: 4, 2: 3, 3: 2}[accumulate]
    assert_close(learned_tensors(forward), learned_tensors(reverse))
