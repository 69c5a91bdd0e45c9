"""What the base step descends: the bend of the user's slope, on its way back, and what else is known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl.losses import LearnedLoss, LossNetwork
from lightning_adalfl.losses.descent import Descent, Predicted
from lightning_adalfl.losses.tasks import task_named
from lightning_adalfl.losses.training_objective import BentLoss, LearnedAlone, OwnLoss

TASKS = {"multiclass": (6, 4), "segmentation": (2, 4, 3, 2), "binary": (6,), "multilabel": (6, 3), "regression": (6, 3)}
MANY = {"multiclass": (400, 4), "segmentation": (40, 4, 5, 2), "multilabel": (300, 3)}


def problem(
    kind: str, shapes: Any = TASKS, size: float = 1.0, dtype: Any = torch.float64
) -> tuple[LearnedLoss, Any, Any]:
    """Return a loss with a slope of that size, predictions with a graph, and targets."""
    task = "multiclass" if kind == "segmentation" else kind
    loss = LossNetwork(task, sees_classes=task == "multiclass").to(dtype)
    loss.linear[-1].weight.data.mul_(size)
    predictions = torch.randn(shapes[kind], dtype=dtype, requires_grad=True) * 1.0
    target = torch.randn_like(predictions).detach()
    if task == "multiclass":
        return loss, predictions, torch.randint(4, (len(predictions), *predictions.shape[2:]))
    return loss, predictions, target if task == "regression" else (target > 0).long()


def own_loss(loss: LearnedLoss, predictions: Tensor, target: Tensor) -> Tensor:
    return loss.pairing.loss(predictions, target)


def slope(value: Tensor, predictions: Tensor) -> Tensor:
    return torch.autograd.grad(value, predictions, retain_graph=True)[0]


def descended(objective: Any, own: Tensor, predicted: Predicted, k: float = 1.0) -> tuple[Descent, list[Tensor]]:
    """Return the descent and the gradient that arrives behind each output."""
    inputs = [o.grad_fn.next_functions[0][0].variable for o in predicted.outputs]
    descent = objective.descend(own, predicted)
    return descent, list(torch.autograd.grad(k * descent.loss, inputs, retain_graph=True))


@pytest.mark.parametrize("size", [-0.05, 1.0, 1e3])
@pytest.mark.parametrize("kind", TASKS)
def test_the_slope_is_bent_and_never_longer(kind: str, size: float) -> None:
    """m = (τ + ρ) min(1, ‖τ‖ / ‖τ + ρ‖), with ρ by autograd from the pairs; the loss that is returned is the user's.

    For regression no element of τ + ρ turns round.
    """
    loss, f, y = problem(kind, size=size)
    own, pairs = own_loss(loss, f, y), loss.pairing.pairs(f, y)
    tau = slope(own, f)
    rho = slope((loss.pairwise(pairs.prediction, pairs.target) * pairs.weight).sum(), f)
    bent = tau + rho
    if kind == "regression":
        bent[tau * bent < 0] = 0.0
    expected = bent * min(1.0, float(tau.norm() / bent.norm()))
    descent, (found,) = descended(BentLoss(loss), own, Predicted.direct(f, y))
    assert descent.loss is own
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(descent.applied()[0], expected, rtol=1e-6, atol=1e-10)
    assert found.norm() <= tau.norm() * (1 + 1e-12)
    assert (found - tau).norm() > 1e-3 * tau.norm()
    m = BentLoss(loss).gradient(loss.pairing.loss, f, y, None)
    torch.testing.assert_close(m, expected, rtol=1e-6, atol=1e-10)
    assert float(descent.implied_scale()) == pytest.approx(float((expected * tau).sum() / tau.square().sum()))
    value = own + (loss.pairwise(pairs.prediction, pairs.target) * pairs.weight).sum()
    torch.testing.assert_close(descent.value(), value.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_no_value_is_driven_away_from_its_target(size: float) -> None:
    """A learned slope that would turn a value round leaves it where it is, and φ may only learn to let it go back."""
    loss, f, y = problem("regression", size=size)
    descent, (found,) = descended(BentLoss(loss), own_loss(loss, f, y), Predicted.direct(f, y))
    turned = (f - y) * (slope(own_loss(loss, f, y), f) + slope(loss(f, y), f)) < 0
    assert turned.any()
    (applied,) = descent.applied()
    assert not (applied * (f - y) < 0).any()
    assert not applied[turned].any()
    torch.testing.assert_close(found, applied, rtol=1e-12, atol=1e-15)
    further = torch.where(turned, (f - y).detach().sign(), torch.zeros_like(f))
    assert not any(v.any() for v in descent.vjp([further.clone()]).values())
    assert any(v.any() for v in descent.vjp([-further]).values())


@pytest.mark.parametrize("kind", MANY)
def test_of_many_pairs_it_is_looked_up(kind: str) -> None:
    loss, f, y = problem(kind, MANY, dtype=torch.float32)
    _, (found,) = descended(BentLoss(loss), own_loss(loss, f, y), Predicted.direct(f, y))
    expected = BentLoss(loss).gradient(loss.pairing.loss, f, y, None).detach()
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_zero", [True, False])
@pytest.mark.parametrize("kind", TASKS)
def test_a_loss_that_is_zero_leaves_the_users_step_to_the_bit(kind: str, is_zero: bool, dtype: torch.dtype) -> None:
    loss, f, y = problem(kind, dtype=dtype)
    loss.float().scale_(0.0)
    own = own_loss(loss, f, y)
    expected = slope(own, f)
    _, (found,) = descended(BentLoss(loss, is_zero), own, Predicted.direct(f, y))
    assert torch.equal(found, expected)
    assert found.dtype == dtype


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_slope_that_is_not_finite_leaves_the_users_own(bad: float) -> None:
    loss, f, y = problem("regression", dtype=torch.float32)
    loss.linear[-1].weight.data.fill_(bad)
    own = own_loss(loss, f, y)
    expected = slope(own, f)
    descent, (found,) = descended(BentLoss(loss), own, Predicted.direct(f, y))
    assert torch.equal(found, expected)
    assert torch.equal(descent.applied()[0], expected)
    assert float(descent.evidence([torch.randn_like(f)])) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_the_users_own_stays_theirs(bad: float) -> None:
    """Element by element, as it would be without us."""
    loss, f, y = problem("regression")
    weight = torch.ones_like(f).index_fill(0, torch.tensor([1]), bad)
    own = (weight * f).sum()
    expected = slope(own, f)
    descent, (found,) = descended(BentLoss(loss), own, Predicted.direct(f, y))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert all((gradient == 0).all() for gradient in descent.vjp([torch.ones_like(f)]).values())


@pytest.mark.parametrize("k", [1.0, 1 / 3, 2.0**16, -0.5])
@pytest.mark.parametrize("make", [BentLoss, LearnedAlone, lambda loss: OwnLoss()])
def test_the_factor_on_the_loss_is_found(make: Any, k: float) -> None:
    """As accumulation, a gradient scaler or the user puts it there."""
    results = []
    for factor in (1.0, k):
        torch.manual_seed(0)
        loss, f, y = problem("multiclass")
        results.append(descended(make(loss), own_loss(loss, f, y), Predicted.direct(f, y), factor))
    (one, (by_one,)), (other, (by_k,)) = results
    torch.testing.assert_close(by_k, k * by_one)
    assert float(other.scale) == k
    torch.testing.assert_close(other.own + other.applied(), one.own + one.applied())
    assert one.is_reached


def test_a_factor_of_zero_gives_a_gradient_of_zero() -> None:
    loss, f, y = problem("multiclass")
    _, (found,) = descended(BentLoss(loss), own_loss(loss, f, y), Predicted.direct(f, y), 0.0)
    assert (found == 0).all()


def test_only_the_gradient_of_the_loss_is_bent_and_only_once() -> None:
    """A gradient of something else runs through it before, and any gradient after."""
    loss, f, y = problem("multiclass", size=1e3)
    own = own_loss(loss, f, y)
    (leaf,) = (f.grad_fn.next_functions[0][0].variable,)
    plain = slope(own, f)
    descent = BentLoss(loss).descend(own, Predicted.direct(f, y))
    assert torch.equal(torch.autograd.grad(f.sum(), leaf, retain_graph=True)[0], torch.ones_like(f))
    assert not descent.is_reached
    first, second = (torch.autograd.grad(own, leaf, retain_graph=True)[0] for _ in range(2))
    assert not torch.allclose(first, plain)
    assert torch.equal(second, plain)
    released = BentLoss(loss).descend(own, Predicted.direct(f, y))
    released.release()
    assert torch.equal(torch.autograd.grad(own, leaf)[0], plain)
    assert (released.scale, released.is_reached, released.predicted.outputs) == (None, False, [])
    assert released.loss.grad_fn is None
    assert not released.own[0].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", TASKS)
def test_the_learned_loss_alone(kind: str, reduction: str) -> None:
    """Its value and its slope are those of Eq. 3, with a factor on it; the user's loss has no part."""
    loss, f, y = problem(kind)
    loss.reduction = reduction
    expected = loss(f, y)
    by_autograd = slope(expected, f)
    descent, (found,) = descended(LearnedAlone(loss), f.sum() * math.nan, Predicted.direct(f, y), 3.0)
    torch.testing.assert_close(descent.loss, expected)
    torch.testing.assert_close(descent.value(), expected.detach())
    torch.testing.assert_close(found, 3 * by_autograd, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(descent.own[0], by_autograd, rtol=1e-6, atol=1e-10)
    m = LearnedAlone(loss).gradient(own_loss, f, y, None)
    torch.testing.assert_close(m, by_autograd)
    tau = slope(own_loss(loss, f, y), f)
    expected = (m.detach() * tau).sum() / tau.square().sum()
    torch.testing.assert_close(descent.implied_scale(), expected, rtol=1e-6, atol=1e-9)
    assert abs(float(descent.evidence([torch.randn_like(f)]))) < 1e-15


@pytest.mark.parametrize("make", [BentLoss, LearnedAlone])
def test_what_a_task_leaves_out_has_no_part(make: Any) -> None:
    """An ignored index and weights, in the slope and in the values that are logged."""
    loss, f, y = problem("multiclass")
    loss.pairing = task_named("multiclass", -100)
    weight = torch.rand(6, dtype=torch.float64)
    left_out = y.clone()
    left_out[[1, 4]] = -100
    descent, (found,) = descended(make(loss), own_loss(loss, f, left_out), Predicted.direct(f, left_out, weight))
    assert (found[[1, 4]] == 0).all()
    kept = [0, 2, 3, 5]
    alone = LossNetwork("multiclass", sees_classes=True).double()
    alone.load_state_dict(loss.state_dict())
    part = f[kept].detach().requires_grad_() * 1.0
    expected, (by_part,) = descended(
        make(alone), alone.pairing.loss(part, y[kept]), Predicted.direct(part, y[kept], weight[kept])
    )
    torch.testing.assert_close(found[kept], by_part)
    torch.testing.assert_close(descent.value(), expected.value())
    torch.testing.assert_close(descent.implied_scale(), expected.implied_scale())


# Predictions as a function of outputs.


def through(outputs: Sequence[Tensor]) -> Tensor:
    wide, narrow = outputs
    return (wide.squeeze(1)[:, 1:].float() * torch.sigmoid(narrow)).double()


def test_predictions_are_pulled_and_pushed_through_what_makes_them() -> None:
    leaves = [torch.randn(5, 1, 4, requires_grad=True), torch.randn(5, 3, requires_grad=True)]
    predicted = Predicted([leaf * 1 for leaf in leaves], leaves, through(leaves), torch.zeros(5, dtype=torch.long))
    gradient, tangents = torch.randn(5, 3).double(), [torch.randn_like(leaf) for leaf in leaves]
    pulled, pushed = predicted.pulled(gradient), predicted.pushed(tangents)
    _, expected = torch.func.jvp(lambda *o: through(o), tuple(leaves), tuple(tangents))
    torch.testing.assert_close(pushed, expected)
    left = sum((p * t).sum().double() for p, t in zip(pulled, tangents))
    torch.testing.assert_close(left, (pushed * gradient).sum(), rtol=1e-5, atol=1e-6)


def test_what_an_output_spreads_to_many_predictions_can_be_written_to_when_it_is_pushed() -> None:
    leaf, tangent = torch.randn(5, 1, requires_grad=True), torch.randn(5, 1)
    predicted = Predicted([leaf * 1], [leaf], leaf.expand(5, 3), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(predicted.pushed([tangent]).mul_(2.0), 2 * tangent.expand(5, 3))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_evidence_is_the_difference_of_the_slopes_along_h(factor: float) -> None:
    loss, f, y = problem("multiclass")
    descent, _ = descended(BentLoss(loss), own_loss(loss, f, y), Predicted.direct(f, y), factor)
    h = torch.randn_like(f)
    expected = ((descent.own[0] - descent.applied()[0]) * h).sum()
    assert expected != 0
    torch.testing.assert_close(descent.evidence([h]), expected)


def test_each_output_keeps_its_own_length() -> None:
    loss, leaves = LossNetwork("multiclass"), [torch.randn(5, 1, 4), torch.randn(5, 3)]
    loss.linear[-1].weight.data.mul_(1e3)
    outputs = [leaf.clone().requires_grad_() * 1.0 for leaf in leaves]
    y, copies = torch.randint(3, (5,)), [leaf.requires_grad_() for leaf in leaves]
    own = F.cross_entropy(through(outputs), y) + outputs[1].square().mean()
    taus = torch.autograd.grad(own, outputs, retain_graph=True)
    descent, found = descended(BentLoss(loss), own, Predicted(outputs, copies, through(copies), y))
    for tau, m in zip(taus, found):
        torch.testing.assert_close(m.norm(), tau.norm())
        assert not torch.allclose(m, tau)
    torch.testing.assert_close(descent.influence(found), sum((t * m).flatten(1).sum(1) for t, m in zip(taus, found)))


def test_influence_needs_a_row_for_each_instance() -> None:
    outputs = [torch.randn(10, 3, requires_grad=True) * 1.0]
    leaf = outputs[0].detach().requires_grad_()
    predicted = Predicted(outputs, [leaf], leaf.view(5, 2, 3).mean(1), torch.zeros(5, dtype=torch.long))
    descent = OwnLoss().descend(outputs[0].sum(), predicted)
    with pytest.raises(
        ValueError, match=r"5 instances cannot be told from outputs of shapes \[\(10, 3\)\]; let the mod"
    ):
        descent.influence([torch.zeros(10, 3)])


def test_a_loss_of_ones_own_bends_too() -> None:
    """A contributor's representation: one method."""

    class Power(LearnedLoss):
        def __init__(self, task: str) -> None:
            super().__init__(task)
            self.power = nn.Parameter(torch.tensor(1.5))

        def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
            return (prediction - target).abs() ** self.power

    loss, f, y = Power("multilabel").double(), torch.randn(6, 3).double().requires_grad_() * 1.0, torch.ones(6, 3)
    own = F.binary_cross_entropy_with_logits(f, y.double())
    descent, (found,) = descended(BentLoss(loss), own, Predicted.direct(f, y))
    torch.testing.assert_close(found, BentLoss(loss).gradient(loss.pairing.loss, f, y, None).detach())
    h, size = torch.randn_like(f), 1e-6
    ends = []
    for sign in (1, -1):
        loss.power.data += sign * size
        ends.append((BentLoss(loss).gradient(loss.pairing.loss, f, y, None) * h).sum())
        loss.power.data -= sign * size
    assert float(descent.vjp([h])["power"]) == pytest.approx(float((ends[0] - ends[1]).detach()) / (2 * size), rel=1e-5)


@pytest.mark.parametrize("view", [lambda z: z.transpose(1, 2), lambda z: z.reshape(-1, 4)])
def test_the_unit_is_the_same_in_whatever_view_the_predictions_are_given(view: Callable[[Tensor], Tensor]) -> None:
    """A language model's outputs are (N, T, C), and the classes of predictions are dimension 1."""
    outputs, target = torch.randn(6, 5, 4, requires_grad=True), torch.randint(4, (6, 5))
    target[:, 3:] = -100
    leaf = outputs.detach().requires_grad_()
    direct = outputs.detach().transpose(1, 2).clone().requires_grad_()
    units = []
    for predicted, own in [
        (Predicted([outputs], [leaf], f := view(leaf), target.view(len(f), *f.shape[2:])), outputs.transpose(1, 2)),
        (Predicted.direct(direct, target), direct),
    ]:
        objective = BentLoss(LossNetwork("multiclass"), is_zero=True)
        objective.loss.pairing = task_named("multiclass", -100)
        descent = objective.descend(F.cross_entropy(own, target), predicted)
        descent.loss.backward()
        objective.take_units([descent], None)
        units.append(objective.loss.unit)
    assert units[0] != 1.0
    torch.testing.assert_close(*units)


def test_where_the_users_slope_is_zero_there_is_nothing_to_learn() -> None:
    """m is then zero whatever φ is."""
    loss, f, y = problem("multiclass")
    loss.scale_(0.0)
    descent, (found,) = descended(BentLoss(loss), f.sum() * 0.0, Predicted.direct(f, y))
    assert not found.any()
    assert float(descent.implied_scale()) == 0
    assert not any(v.any() for v in descent.vjp([torch.randn_like(f)]).values())


def test_targets_that_are_all_alike_have_no_spread() -> None:
    """Rounding would make the variance of these less than zero."""

    class Told(LossNetwork):
        def take_units(self, center: Tensor, spread: Tensor, slope: Tensor) -> None:
            self.told = float(center), float(spread)

    f, y = torch.randn(7, 1, requires_grad=True) * 1.0, torch.full((7, 1), 0.7)
    objective = BentLoss(loss := Told("regression"), is_zero=True)
    descent, _ = descended(objective, F.mse_loss(f, y), Predicted.direct(f, y))
    objective.take_units([descent], None)
    assert loss.told == pytest.approx((0.7, 0.0))


def test_a_value_that_the_users_loss_does_not_mind_may_be_moved_by_the_learned_one() -> None:
    """Such as one within the margin of a loss that has one: its slope of zero has no direction to turn round."""
    loss, f, y = problem("regression")
    loss.scale_(0.0)
    own = torch.where(torch.arange(6).unsqueeze(1) < 3, f, 0.0).square().mean()
    descent, _ = descended(BentLoss(loss), own, Predicted.direct(f, y))
    h = torch.zeros_like(f).index_fill(0, torch.tensor([4, 5]), 1.0)
    assert any(v.any() for v in descent.vjp([h]).values())


def test_outputs_that_autograd_gives_one_gradient_are_bent_each_by_itself() -> None:
    loss, y = LossNetwork("multiclass"), torch.randint(3, (5,))
    loss.linear[-1].weight.data.mul_(1e3)
    outputs = [torch.randn(5, 3, requires_grad=True) * 1.0 for _ in range(2)]
    leaves = [o.detach().requires_grad_() for o in outputs]
    predicted = Predicted(outputs, leaves, leaves[0] + leaves[1], y)
    _, found = descended(BentLoss(loss), F.cross_entropy(outputs[0] + outputs[1], y), predicted)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("make", [BentLoss, LearnedAlone])
def test_a_factor_beyond_half_precision_is_no_overflow(make: Any) -> None:
    """The norm of a slope, and the factor itself, may be beyond it where every element is not."""
    found = []
    for dtype, factor in ((torch.float16, 2.0**18), (torch.float32, 1.0)):
        torch.manual_seed(0)
        loss, f, y = problem("multiclass", dtype=torch.float32)
        half = f.detach().to(dtype).requires_grad_() * 1.0
        own = own_loss(loss, half.float(), y)
        found.append(descended(make(loss), own, Predicted.direct(half, y), factor)[1][0] / factor)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4, check_dtype=False)
