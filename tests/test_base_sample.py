"""h on a part of the base batch: the mean over all parts is the hypergradient of the whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from projects import Ada, loaders, trainer
from torch import Tensor, nn

from lightning_adalfl import AdaLFLConfig
from lightning_adalfl.hypergradient import BaseStep, Hypergradient, hypergradient
from lightning_adalfl.losses import LossNetwork

COUNT = 5


@pytest.fixture
def loss() -> LossNetwork:
    torch.manual_seed(0)
    return LossNetwork("multiclass", hidden=(4,)).double()


def meta_step(loss: LossNetwork, batch: Any = None, model: nn.Module | None = None, **options: Any) -> Hypergradient:
    torch.manual_seed(1)
    model = model or nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(2, COUNT, 3, dtype=torch.float64)
    y = torch.randint(3, (2, COUNT))
    predict = options.pop("predict", None)
    step = BaseStep(model, torch.optim.SGD(model.parameters(), lr=0.3), predict, **options)
    step.forward((x[0], y[0]) if batch is None else batch(x[0], y[0]))
    step.evaluate(loss).backward()
    step.step()
    return hypergradient(
        step, loss, F.cross_entropy, (x[1], y[1]) if batch is None else batch(x[1], y[1]), epsilon=1e-5
    )


@pytest.fixture
def all_samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """Let successive draws go through every pair of instances once."""
    pairs = itertools.combinations(range(COUNT), 2)
    orders = (torch.tensor([*pair, *sorted(set(range(COUNT)) - set(pair))]) for pair in pairs)
    monkeypatch.setattr(torch, "randperm", lambda count: next(orders))
    return orders


@pytest.mark.parametrize(("method", "tolerance"), [("forward", 1e-10), ("finite_difference", 1e-4)])
def test_the_mean_over_all_samples_is_the_whole(
    loss: LossNetwork, all_samples: Iterator[Tensor], method: str, tolerance: float
) -> None:
    whole = meta_step(loss, method="forward")
    # ⌈0.3 · 5⌉ = 2 of 5 instances: ten samples.
    parts = [meta_step(loss, method=method, base_fraction=0.3) for _ in range(10)]
    assert next(all_samples, None) is None
    for k, expected in enumerate(whole.loss):
        found = torch.stack([part.loss[k] for part in parts])
        assert (found - expected).abs().max() > 0.05 * expected.abs().max()  # each alone is an estimate
        assert (found.mean(0) - expected).norm() < tolerance * expected.norm()
    for part in parts:
        torch.testing.assert_close(part.task_loss, whole.task_loss)
        torch.testing.assert_close(part.log_lr, whole.log_lr)


@pytest.mark.parametrize("method", ["forward", "finite_difference"])
def test_a_fraction_that_rounds_up_to_the_batch_is_exact(loss: LossNetwork, method: str) -> None:
    whole, part = (meta_step(loss, method=method, base_fraction=fraction) for fraction in (1.0, 0.81))
    for expected, found in zip(whole.loss, part.loss):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def test_nested_batches_are_sampled_along_dimension_zero(loss: LossNetwork) -> None:
    model = nn.Linear(3, 3).double()

    def predict(batch: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(batch["inputs"]["x"]))
        return model(batch["inputs"]["x"]), batch["y"]

    seen: list[int] = []
    meta_step(
        loss,
        lambda x, y: {"inputs": {"x": x}, "y": y, "name": "of a data set"},
        model,
        predict=predict,
        base_fraction=0.5,
    )
    assert seen == [COUNT, COUNT, 3]


def test_batchnorm_sees_the_sample_alone_on_both_ends_of_the_difference(loss: LossNetwork) -> None:
    """Otherwise the change of its statistics, divided by the length of the move, would drown the derivative."""
    results = []
    for method in ("forward", "finite_difference"):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
        results.append(meta_step(loss, model=model, method=method, base_fraction=0.5))
    for expected, found in zip(results[0].loss, results[1].loss):
        assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_refuses_a_fraction_out_of_range(loss: LossNetwork, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`base_fraction` must lie in \(0, 1\], the part of the base batch; got"):
        meta_step(loss, base_fraction=fraction)


def test_refuses_the_unrolled_reference(loss: LossNetwork) -> None:
    with pytest.raises(ValueError, match="'reverse' differentiates whole batches"):
        meta_step(loss, method="reverse", base_fraction=0.5)


def test_refuses_a_batch_whose_tensors_differ_in_length(loss: LossNetwork) -> None:
    model = nn.Linear(3, 3).double()
    with pytest.raises(
        ValueError, match=r"needs tensors with the 5 instances .* of shape \(2,\)\. Use base_fraction=1"
    ):
        meta_step(
            loss,
            lambda x, y: (x, y, torch.zeros(2)),
            model,
            predict=lambda batch: (model(batch[0]), batch[1]),
            base_fraction=0.5,
        )


def test_the_configuration_reaches_the_meta_step(tmp_path: Path) -> None:
    learned = []
    for fraction in (1.0, 0.5):
        torch.manual_seed(0)
        model = Ada(adalfl=AdaLFLConfig("multiclass", base_fraction=fraction, meta_lr=1e-2))
        trainer(tmp_path, max_steps=3).fit(model, *loaders())
        learned.append(torch.cat([p.detach().flatten() for p in model.adalfl.parameters()]))
    assert model.adalfl.meta_steps == 3
    assert not torch.equal(*learned)


def test_the_reference_takes_whole_batches() -> None:
    with pytest.raises(ValueError, match=r"`base_fraction` must be 1 with `hypergradient='reverse'`.* got 0.5"):
        AdaLFLConfig("multiclass", base_fraction=0.5, hypergradient="reverse")
