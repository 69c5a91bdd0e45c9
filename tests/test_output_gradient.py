"""∂ℓ_φ/∂f of pairs and its product with φ: by hand against autograd, in chunks, and looked up at knots."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import psutil
import pytest
import torch
from reference import flat, relative_error
from torch import Tensor

from lightning_adalfl.losses import LossNetwork, TaylorLoss, output_gradient
from lightning_adalfl.losses.descent import LearnedGradient, Predicted
from lightning_adalfl.losses.knots import KnotGradient, pair_gradient
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.output_gradient import AutogradGradient, NetworkGradient, OutputGradient
from lightning_adalfl.losses.tasks import task_named

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "binary": ("binary", (19,)),
    "multilabel": ("multilabel", (9, 3)),
    "regression": ("regression", (9, 2)),
    "multiclass": ("multiclass", (9, 4)),
    "segmentation": ("multiclass", (3, 4, 3, 2)),
    "more than 100 classes": ("multiclass", (5, 101)),
}


def drawn(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[LossNetwork, Tensor, Tensor]:
    """Return a network with all its parameters at random, embeddings included, and pairs."""
    task, shape = SHAPES[kind]
    loss = LossNetwork(task, **options).to(dtype)
    with torch.no_grad():
        for p in loss.parameters():
            p.normal_().mul_(0.3)
    predictions = torch.randn(shape, dtype=dtype)
    target = torch.randn_like(predictions)
    if task == "multiclass":
        target = torch.randint(shape[1], (shape[0], *shape[2:]))
    pairs = task_named(task).pairs(predictions, target if task != "multilabel" else (target > 0).long())
    return loss, pairs.prediction, pairs.target


def assert_same(found: OutputGradient, expected: OutputGradient, tolerance: float) -> None:
    assert relative_error(found.value, expected.value) < tolerance
    assert relative_error(found.losses(), expected.losses()) < tolerance
    tangent = torch.randn_like(expected.value)
    by_phi, wanted = found.vjp(tangent.clone()), expected.vjp(tangent)
    assert by_phi.keys() == wanted.keys()
    for name in wanted:
        if (wanted[name] == 0).all():  # a bias of the last layer moves the loss and not its slope
            assert (by_phi[name] == 0).all(), name
        else:
            assert relative_error(by_phi[name], wanted[name]) < tolerance, name
    assert relative_error(flat(by_phi), flat(wanted)) < tolerance


@pytest.mark.parametrize("chunk", [1, 1 << 13])
@pytest.mark.parametrize(("bias", "sees"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("hidden", [(7,), (6, 5, 4)])
@pytest.mark.parametrize("kind", SHAPES)
def test_by_hand_equals_autograd(
    kind: str, hidden: tuple[int, ...], bias: bool, sees: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk and in many; where autograd does not take the activation for linear, as beyond a threshold."""
    task = SHAPES[kind][0]
    more = {"sees_classes": sees and task == "multiclass", "sees_error": sees and task == "regression"}
    loss, prediction, target = drawn(kind, hidden=hidden, bias=bias, **more)
    for unit, value in ((loss.unit, 0.7), (loss.center, 0.2), (loss.spread, 1.5)):
        unit.fill_(value if unit is loss.unit or task == "regression" else float(unit))
    monkeypatch.setitem(output_gradient.CHUNKS, "cpu", chunk)
    found = loss.pair_gradient(prediction, target)
    assert type(found) is NetworkGradient
    assert_same(found, AutogradGradient(loss.pairwise, loss.phi(), prediction, target), 1e-8)


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_single_precision_is_as_near_to_double_as_autograd_is(kind: str) -> None:
    loss, prediction, target = drawn(kind, sees_classes=kind == "multiclass", sees_error=kind == "regression")
    tangent = torch.randn_like(prediction)
    expected = flat(AutogradGradient(loss.pairwise, loss.phi(), prediction, target).vjp(tangent))
    found = loss.float().pair_gradient(prediction.float(), target.float()).vjp(tangent.float())
    assert relative_error(flat(found).double(), expected) < 1e-5


def test_soft_targets_of_a_loss_that_sees_classes() -> None:
    loss, prediction, _ = drawn("segmentation", sees_classes=True)
    target = torch.rand_like(prediction).softmax(1)
    expected = AutogradGradient(loss.pairwise, loss.phi(), prediction, target)
    assert_same(loss.pair_gradient(prediction, target), expected, 1e-8)


def test_parameters_that_are_frozen_are_left_out_by_name() -> None:
    loss, prediction, target = drawn("multiclass", sees_classes=True)
    everything = loss.pair_gradient(prediction, target).vjp(prediction)
    loss.linear[0].weight.requires_grad_(False)
    loss.output_embedding.requires_grad_(False)
    for gradient in (loss.pair_gradient(prediction, target), LearnedLoss.pair_gradient(loss, prediction, target)):
        found = gradient.vjp(prediction)
        assert found.keys() == everything.keys() - {"linear.0.weight", "output_embedding"}
        torch.testing.assert_close(found, {name: everything[name] for name in found}, rtol=1e-6, atol=1e-8)
    loss.requires_grad_(False)
    assert LearnedLoss.pair_gradient(loss, prediction, target).vjp(prediction) == {}


def test_other_losses_go_through_autograd() -> None:
    """A subclass with the network's own ℓ goes the fast way, whatever its name; one with another ℓ is told so."""

    class Renamed(LossNetwork):
        pass

    class Squared(LossNetwork):
        def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
            return super().pairwise(prediction, target).square()

    pairs = torch.randn(4, 2), torch.randn(4, 2)
    ml3 = LossNetwork("regression", activation="relu", output_activation="softplus")
    for loss in (ml3, Squared("regression"), TaylorLoss("regression")):
        assert type(loss.pair_gradient(*pairs)) is AutogradGradient
    assert type(Renamed("regression").pair_gradient(*pairs)) is NetworkGradient
    loss = Squared("regression")
    assert not loss.is_smooth()
    assert Renamed("regression").is_smooth()
    found = loss.pair_gradient(*pairs)
    assert_same(found, AutogradGradient(loss.pairwise, loss.phi(), *pairs), 1e-6)


def test_a_loss_whose_slope_has_no_phi() -> None:
    class Linear(TaylorLoss):
        def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
            return prediction + self.coefficients.sum() * target

    found = Linear("regression").pair_gradient(torch.randn(4, 2), torch.randn(4, 2))
    assert (found.value == 1).all()
    assert (found.vjp(torch.randn(4, 2))["coefficients"] == 0).all()


# At knots.

LARGE: dict[str, tuple[str, Any]] = {
    "classes": ("multiclass", lambda: 3 * torch.randn(64, 150)),
    "few classes": ("multiclass", lambda: 3 * torch.randn(3000, 5)),
    "pixels": ("multiclass", lambda: 3 * torch.randn(4, 3, 30, 30)),
    "sequences, classes last in memory": ("multiclass", lambda: 3 * torch.randn(300, 9, 4).transpose(1, 2)),
    "labels": ("multilabel", lambda: 3 * torch.randn(200, 40)),
    "labels, channels last": ("multilabel", lambda: torch.randn(20, 4, 9, 9).to(memory_format=torch.channels_last)),
    "certain": ("multilabel", lambda: torch.tensor([-1e4, 0.0, 1e4]).expand(600, 3)),
}


@pytest.mark.parametrize(
    ("kind", "sees"), [(k, s) for k in LARGE for s in (False, True) if not s or k in ("few classes", "pixels")]
)
def test_at_knots_it_is_within_1e_5_of_the_pairs(kind: str, sees: bool) -> None:
    """In single precision, of the paper's network with all its parameters at random."""
    task, make = LARGE[kind]
    loss = LossNetwork(task, sees_classes=sees)
    for embedding in (p for name, p in loss.named_parameters() if name.endswith("embedding")):
        torch.nn.init.normal_(embedding)
    predictions = make()
    labels = torch.randint(predictions.shape[1], (len(predictions), *predictions.shape[2:]))
    pairs = task_named(task).pairs(predictions, labels if task == "multiclass" else torch.randint(2, predictions.shape))
    found, expected = pair_gradient(loss, pairs), loss.pair_gradient(pairs.prediction, pairs.target)
    assert type(found) is KnotGradient
    for at_knots, wanted in ((found.value, expected.value), (found.losses(), expected.losses())):
        assert (at_knots - wanted).abs().max() < 1e-5 * wanted.abs().max()
    tangent = torch.randn_like(expected.value)
    assert relative_error(flat(found.vjp(tangent.clone())), flat(expected.vjp(tangent))) < 1e-5


def test_where_pairs_are_fewer_or_targets_are_soft_they_are_taken_themselves() -> None:
    loss, sees = LossNetwork("multiclass"), LossNetwork("multiclass", sees_classes=True)
    task = task_named("multiclass")
    few, many = torch.randn(20, 10), torch.randn(400, 10)
    labels = torch.randint(10, (400,))
    assert type(pair_gradient(loss, task.pairs(few, labels[:20]))) is NetworkGradient
    assert type(pair_gradient(loss, task.pairs(many, labels))) is KnotGradient
    assert type(pair_gradient(sees, task.pairs(many, labels))) is NetworkGradient
    assert type(pair_gradient(loss, task.pairs(many, many.softmax(1)))) is NetworkGradient


def test_the_knots_serve_until_phi_moves() -> None:
    loss = LossNetwork("multiclass")
    pairs = task_named("multiclass").pairs(torch.randn(400, 10), torch.randint(10, (400,)))
    calls = []
    at_pairs = loss.pair_gradient
    loss.pair_gradient = lambda *given: calls.append(1) or at_pairs(*given)  # type: ignore[method-assign,func-returns-value]
    first = pair_gradient(loss, pairs).value
    torch.testing.assert_close(pair_gradient(loss, pairs).value, first, rtol=0, atol=0)
    assert len(calls) == 1
    with torch.no_grad():
        loss.linear[1].weight.mul_(2.0)
    moved = pair_gradient(loss, pairs).value
    assert len(calls) == 2
    torch.testing.assert_close(moved, at_pairs(pairs.prediction, pairs.target).value, rtol=1e-4, atol=1e-5)
    loss.unit.fill_(3.0)
    torch.testing.assert_close(pair_gradient(loss, pairs).value, 3 * moved)
    loss.linear[2].weight.data = 2 * loss.linear[2].weight.data
    torch.testing.assert_close(pair_gradient(loss, pairs).value, 6 * moved)
    assert copy.deepcopy(LossNetwork("multiclass")).known is None
    del loss.pair_gradient
    assert loss.known is not None
    assert copy.deepcopy(loss).known is None


# Memory.


@pytest.mark.parametrize(
    ("way", "rows", "megabytes"),
    [("by hand", 8000, 150), ("knots", 8000, 220), ("value", 8000, 150), ("autograd", 2000, 120)],
)
def test_memory_of_8000_times_256_pairs(way: str, rows: int, megabytes: int) -> None:
    """Two million pairs through a network of width 40 in one piece would be a third of a gigabyte a layer."""
    loss = LossNetwork("multiclass", output_activation="softplus" if way == "autograd" else None)
    predictions, labels = torch.randn(rows, 256), torch.randint(256, (rows,))
    soft = torch.nn.functional.one_hot(labels, 256).float()
    predicted = Predicted.direct(predictions, labels if way == "knots" else soft)

    def run() -> None:
        if way == "value":
            with torch.no_grad():
                loss(predictions, labels)
        else:
            LearnedGradient(loss, predicted, by_outputs=True).vjp(predictions)

    assert peak_of(run) < megabytes * 2**20


def peak_of(run: Any) -> int:
    """Return how much the process grows at most while a function runs."""
    gc.collect()
    process = psutil.Process()
    before, done, peak = process.memory_info().rss, threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak[0]
