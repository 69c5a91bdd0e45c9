from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl.losses import LearnedLoss, LossNetwork, SmoothLeakyReLU, TaylorLoss

LOSSES: dict[str, Callable[..., LearnedLoss]] = {
    "network": LossNetwork,
    "ml3": LossNetwork.ml3,
    "biased": lambda task, **options: LossNetwork(task, bias=True, output_activation="smooth_leaky_relu", **options),
    "taylor": TaylorLoss,
}
BATCHES: dict[str, tuple[Tensor, Tensor]] = {
    "multiclass": (torch.linspace(-2, 2, 24).view(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])),
    "segmentation": (torch.linspace(-2, 2, 48).view(2, 4, 3, 2), torch.arange(12).view(2, 3, 2) % 4),
    "binary": (torch.linspace(-2, 2, 6), torch.tensor([0, 1, 1, 0, 1, 0])),
    "multilabel": (torch.linspace(-2, 2, 12).view(4, 3), torch.arange(12).view(4, 3) % 2),
    "regression": (torch.linspace(-2, 2, 12).view(4, 3), torch.linspace(1, -1, 12).view(4, 3)),
}


def task_of(batch: str) -> str:
    return "multiclass" if batch == "segmentation" else batch


@pytest.mark.parametrize("representation", LOSSES)
@pytest.mark.parametrize("batch", BATCHES)
def test_one_call_equals_a_loop_over_instances_and_outputs(representation: str, batch: str) -> None:
    """Eq. 3 spelled out: each output scored by itself, averaged over outputs and then over instances."""
    predictions, target = (t.double() if t.is_floating_point() else t for t in BATCHES[batch])
    loss = LOSSES[representation](task_of(batch)).double()
    if task_of(batch) == "multiclass":
        f, y = predictions.softmax(1), torch.zeros_like(predictions)
        for index in torch.cartesian_prod(*map(torch.arange, target.shape)).view(-1, target.ndim).tolist():
            y[(index[0], int(target[tuple(index)]), *index[1:])] = 1.0
    else:
        f, y = (predictions if batch == "regression" else predictions.sigmoid()), target.double()
    values = [loss.pairwise(a.view(1), b.view(1)).item() for a, b in zip(f.flatten(), y.flatten())]
    assert loss(predictions, target).item() == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert abs(sum(values)) > 1e-6


@pytest.mark.parametrize(
    ("batch", "outputs"), [("multiclass", 4), ("segmentation", 24), ("binary", 1), ("regression", 3)]
)
def test_sum_differs_from_mean_by_the_number_of_outputs(batch: str, outputs: int) -> None:
    mean = LossNetwork(task_of(batch))
    summed = LossNetwork(task_of(batch), reduction="sum")
    summed.load_state_dict(mean.state_dict())
    torch.testing.assert_close(summed(*BATCHES[batch]), outputs * mean(*BATCHES[batch]))


def test_network_is_that_of_the_paper() -> None:
    loss = LossNetwork("multiclass")
    kinds = [type(layer) for layer in loss.layers]
    assert kinds == [nn.Linear, SmoothLeakyReLU, nn.Linear, SmoothLeakyReLU, nn.Linear]
    assert [tuple(p.shape) for p in loss.parameters()] == [(40, 2), (40, 40), (1, 40)]


def test_network_scores_the_pair_of_target_and_prediction() -> None:
    """The input order (y, f) is part of what a stored φ means."""
    loss = LossNetwork("regression", hidden=(1,), activation="relu")
    with torch.no_grad():
        loss.layers[0].weight.copy_(torch.tensor([[2.0, -3.0]]))
        loss.layers[2].weight.fill_(5.0)
    prediction, target = torch.tensor([-1.0, 0.5]), torch.tensor([0.5, 2.0])
    torch.testing.assert_close(loss.pairwise(prediction, target), 5 * F.relu(2 * target - 3 * prediction))


def test_ml3_is_relu_inside_and_softplus_outside() -> None:
    loss = LossNetwork.ml3("multiclass")
    kinds = [type(layer) for layer in loss.layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.Softplus]
    assert loss.weight_init == "xavier_uniform"
    assert loss(*BATCHES["multiclass"]) > 0


def test_initial_weights_have_their_distribution() -> None:
    """Kaiming: deviation sqrt(2 / fan_in); Xavier: uniform within sqrt(6 / (fan_in + fan_out)); zero biases."""
    kaiming = LossNetwork("binary", hidden=(200, 200), bias=True)
    weight = kaiming.layers[2].weight
    assert weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.05)
    assert (kaiming.layers[2].bias == 0).all()
    xavier = LossNetwork("binary", hidden=(200, 200), weight_init="xavier_uniform").layers[2].weight
    assert xavier.abs().max().item() == pytest.approx((6 / 400) ** 0.5, rel=0.01)


@pytest.mark.parametrize("representation", LOSSES)
def test_a_fresh_draw_changes_all_of_phi_and_repeats_by_seed(representation: str) -> None:
    loss = LOSSES[representation]("multiclass")
    torch.manual_seed(1)
    loss.reset_parameters()
    drawn = [p.clone() for p in loss.parameters()]
    with torch.no_grad():
        for p in loss.parameters():
            p.fill_(7.0)
    torch.manual_seed(1)
    loss.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(drawn, loss.parameters()))


def polynomial(order: str, form: str, c: list[float], f: float, y: float) -> float:
    """The published forms, written out."""
    if form == "prediction_powers":
        value = c[2] * (f - c[1]) + 1 / 2 * c[3] * (f - c[1]) ** 2 + c[5] * (y - c[0]) * (f - c[1])
        if order == "cubic":
            value += 1 / 6 * c[4] * (f - c[1]) ** 3 + 1 / 2 * c[6] * (y - c[0]) * (f - c[1]) ** 2
            value += 1 / 2 * c[7] * (y - c[0]) ** 2 * (f - c[1])
    else:
        value = c[2] * (y - c[1]) + 1 / 2 * c[3] * (y - c[1]) ** 2 + c[5] * (f - c[0]) * (y - c[1])
        if order == "cubic":
            value += 1 / 6 * c[4] * (y - c[1]) ** 3 + 1 / 2 * c[6] * (f - c[0]) * (y - c[1]) ** 2
            value += 1 / 2 * c[7] * (f - c[0]) ** 2 * (y - c[0])
    return value


@pytest.mark.parametrize("order", ["quadratic", "cubic"])
@pytest.mark.parametrize("form", ["prediction_powers", "target_powers"])
def test_taylor_polynomial_is_the_published_one(order: str, form: str) -> None:
    loss = TaylorLoss("regression", order, form).double()
    coefficients = [0.3, -0.7, 1.1, -1.3, 1.7, 1.9, -2.3, 2.9]
    with torch.no_grad():
        loss.coefficients.copy_(torch.tensor(coefficients))
    coefficients = loss.coefficients.tolist()
    for f, y in ((0.4, 1.2), (-1.5, 0.2), (2.0, -0.3)):
        value = loss.pairwise(torch.tensor([f], dtype=torch.float64), torch.tensor([y], dtype=torch.float64))
        assert value.item() == pytest.approx(polynomial(order, form, coefficients, f, y), rel=1e-12)


def test_taylor_starts_small() -> None:
    draws = torch.stack([TaylorLoss("binary").coefficients.detach() for _ in range(200)])
    assert draws.std().item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("representation", LOSSES)
@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_reach_phi_and_the_predictions(representation: str, batch: str) -> None:
    predictions, target = BATCHES[batch]
    loss = LOSSES[representation](task_of(batch))
    predictions = predictions.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(predictions, target), predictions, create_graph=True)
    # The hypergradient differentiates the slope by φ.
    second = torch.autograd.grad(slope.square().sum(), list(loss.parameters()), allow_unused=True)
    assert slope.abs().sum() > 0
    assert second[0] is not None
    assert second[0].abs().sum() > 0
    assert all(g is None or g.isfinite().all() for g in second)


@pytest.mark.parametrize("representation", LOSSES)
def test_computed_in_float32_under_bfloat16_autocast(representation: str) -> None:
    predictions, target = BATCHES["multiclass"]
    loss = LOSSES[representation]("multiclass")
    expected = loss(predictions.bfloat16().float(), target)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(predictions.bfloat16(), target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


def test_slope_of_bfloat16_predictions_comes_back_in_bfloat16() -> None:
    predictions, target = BATCHES["multiclass"]
    predictions = predictions.bfloat16().requires_grad_()
    LossNetwork("multiclass")(predictions, target).backward()
    assert predictions.grad is not None
    assert predictions.grad.dtype == torch.bfloat16


def test_integer_predictions_are_refused_and_not_converted() -> None:
    with pytest.raises(ValueError, match=r"`predictions` must be floating point .*; got torch.int64"):
        LossNetwork("regression")(torch.arange(3), torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, "`task` must be one of 'multiclass', 'binary', 'multilabel', 'regression'; got"),
        ({"reduction": "none"}, "`reduction` must be 'mean' or 'sum'; got 'none'"),
        ({"hidden": ()}, "`hidden` must name at least one positive layer width, such as (40, 40); got ()"),
        ({"hidden": (40, 0)}, "`hidden` must name at least one positive layer width, such as (40, 40); got (40, 0)"),
        ({"activation": "tanh"}, "`activation` must be one of 'smooth_leaky_relu', 'relu', 'softplus'; got 'tanh'"),
        ({"activation": None}, "`activation` must be one of"),
        ({"output_activation": "tanh"}, "`output_activation` must be one of"),
        ({"weight_init": "zeros"}, "`weight_init` must be one of 'kaiming_normal', 'xavier_uniform'; got 'zeros'"),
    ],
)
def test_network_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LossNetwork(**{"task": "multiclass", **options})


def test_taylor_options() -> None:
    with pytest.raises(ValueError, match="`order` must be 'quadratic' or 'cubic'; got 'quartic'"):
        TaylorLoss("binary", order="quartic")
    with pytest.raises(ValueError, match="`form` must be 'target_powers' or 'prediction_powers'; got 'both'"):
        TaylorLoss("binary", form="both")
