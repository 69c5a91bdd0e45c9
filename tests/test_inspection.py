"""What a learned loss looks like and says: against autograd, and against losses whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl import LearnedLoss, LossHistory, LossNetwork
from lightning_adalfl.inspection import LossPath, LossReport, LossShape, loss_shape, plot_heatmap, report

TASKS = ("multiclass", "binary", "multilabel", "regression")


class Formula(LearnedLoss):
    """ℓ(f, y) from a function."""

    def __init__(self, task: str, function: Callable[[Tensor, Tensor], Tensor], reduction: str = "sum") -> None:
        super().__init__(task, reduction)
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.function(prediction, target) * self.scale


def class_network(classes: int) -> LossNetwork:
    """Return a network that has met so many classes."""
    loss = LossNetwork("multiclass", sees_classes=True)
    with torch.no_grad():
        loss.label_embedding[:classes].normal_()
        loss.output_embedding[:classes].normal_()
    return loss


def reported(task: str, function: Callable[[Tensor, Tensor], Tensor], **look: Any) -> LossReport:
    return report(loss_shape(Formula(task, function), **look), "sum")


@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 12])
def test_paths_between_classes_have_the_loss_and_the_gradient_of_an_instance(classes: int, is_added: bool) -> None:
    loss = class_network(classes).double()
    shape = loss_shape(loss, 5, is_added=is_added, resolution=11)
    assert (shape.step, shape.classes, len(shape.paths)) == (5, classes, 1 if classes == 2 else 2)
    assert len(shape.pairs) == min(classes, 10) * (classes - 1)

    def instance(label: int, probabilities: Tensor) -> tuple[float, float]:
        logits = probabilities.clamp_min(1e-30).log()[None].requires_grad_()
        target = torch.tensor([label])
        value = classes * loss(logits, target) + (F.cross_entropy(logits, target) if is_added else 0)
        (gradient,) = torch.autograd.grad(value, logits)
        return value.item(), gradient[0, label].item()

    def demand(path: LossPath, row: int, label: int, rest: Callable[[float], Tensor]) -> None:
        found = []
        for x in path.x:
            probabilities = rest(x)
            probabilities[label] = x
            found.append(instance(label, probabilities))
        value, slope = np.array(found).T
        np.testing.assert_allclose(path.each_slope[row], slope, rtol=1e-6, atol=1e-7)
        relative = path.each_loss[row] - path.each_loss[row][-1]
        np.testing.assert_allclose(relative, value - value[-1], rtol=1e-6, atol=1e-7)

    eye = torch.eye(classes).double()
    for row in (0, len(shape.pairs) // 2, len(shape.pairs) - 1):
        label, other = shape.pairs[row]
        demand(shape.paths[0], row, label, lambda x, other=other: eye[other] * (1 - x))
        if classes > 2:
            share = torch.ones(classes).double() / (classes - 1)
            demand(shape.paths[1], row // (classes - 1), label, lambda x, share=share: share * (1 - x))


def test_a_tilt_that_all_outputs_share_changes_nothing() -> None:
    plain, tilted = (
        loss_shape(Formula("multiclass", lambda f, y, a=a: (f - y) ** 2 + a * f), classes=4).paths for a in (0, 50)
    )
    for one, other in zip(plain, tilted, strict=True):
        np.testing.assert_allclose(other.slope, one.slope, atol=1e-4)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_a_path_for_each_target_of_an_output_of_its_own(task: str) -> None:
    shape = loss_shape(Formula(task, lambda f, y: 2 * (f - y) ** 2), resolution=11)
    for y, path in zip((1.0, 0.0), shape.paths, strict=True):
        f = path.x
        assert (path.name, path.correct) == (f"target {y:g}", y)
        np.testing.assert_allclose(path.loss, 2 * (f - y) ** 2, atol=1e-6)
        np.testing.assert_allclose(path.slope, 4 * (f - y) * f * (1 - f), atol=1e-6)
        np.testing.assert_allclose(path.own_slope, f - y, atol=1e-12)


def test_regression_is_looked_at_over_errors_and_on_a_grid_of_pairs() -> None:
    loss = Formula("regression", lambda f, y: 2 * (f - y) ** 2)
    shape = loss_shape(loss, resolution=21, targets=(-1.0, 0.5, 4.0), error_range=3.0)
    error = np.linspace(-3, 3, 21)
    for path in shape.paths:
        np.testing.assert_allclose(path.x, error, atol=1e-6)
        np.testing.assert_allclose(path.loss, 2 * error**2, atol=1e-4)
        np.testing.assert_allclose(path.slope, 4 * error, atol=1e-4)
    assert [path.name for path in shape.paths] == ["target -1", "target 0.5", "target 4"]
    targets, predictions, values = shape.heat
    assert (targets[0], targets[-1], predictions[0], predictions[-1]) == (-2.5, 5.5, -4.0, 7.0)
    np.testing.assert_allclose(values, 2 * (predictions - targets[:, None]) ** 2, atol=1e-4)


def test_a_loss_that_knows_the_units_of_the_data_is_looked_at_in_these() -> None:
    loss = LossNetwork("regression", sees_error=True)
    history = LossHistory()
    history.append(0, loss)
    loss.take_units(torch.tensor(300.0), torch.tensor(100.0), torch.tensor(50.0))
    history.append(10, loss)
    for shape in (loss_shape(loss), *history.shapes(targets=None)):
        assert [path.name for path in shape.paths] == ["target 200", "target 300", "target 400"]
        assert shape.paths[0].x[-1] == 100
    assert history.shapes(1, targets=(1.0,), error_range=2.0)[0].paths[0].x[-1] == 2


def test_looking_changes_nothing_and_sees_neither_inference_mode_nor_autocast() -> None:
    loss = class_network(3)
    state = torch.get_rng_state()
    expected = loss_shape(loss)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        seen = loss_shape(loss)
    for one, other in zip(seen.paths, expected.paths, strict=True):
        np.testing.assert_array_equal(one.each_slope, other.each_slope)
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_before_a_class_is_met_one_pair_says_all() -> None:
    shape = loss_shape(LossNetwork("multiclass", sees_classes=True))
    assert (shape.classes, shape.pairs, len(shape.paths)) == (None, (), 1)
    named = loss_shape(LossNetwork("multiclass"), classes=10)
    assert (named.classes, named.pairs, [len(path.each_loss) for path in named.paths]) == (10, (), [1, 1])


def test_what_is_added_is_drawn_as_long_as_a_step_is() -> None:
    large = loss_shape(Formula("binary", lambda f, y: 9 * (f - y) ** 2), is_added=True)
    length = [
        np.sqrt(np.mean([np.mean(getattr(p, name) ** 2) for p in large.paths])) for name in ("slope", "own_slope")
    ]
    assert large.size > 1
    assert length[0] * large.shortening == pytest.approx(length[1])
    small = loss_shape(Formula("binary", lambda f, y: -0.1 * (f - y) ** 2), is_added=True)
    assert small.shortening == 1
    begin = loss_shape(Formula("regression", lambda f, y: 0 * f * y), is_added=True)
    for path in begin.paths:
        np.testing.assert_array_equal(path.loss, path.own_loss)
        np.testing.assert_array_equal(path.slope, path.own_slope)
    assert loss_shape(Formula("binary", lambda f, y: 9 * (f - y) ** 2)).shortening == 1


def test_a_value_that_would_be_driven_away_is_drawn_as_left_where_it_is() -> None:
    """As `BentLoss` has it: (f - y)² - ½ (f - y)⁴ has no slope beyond an error of one."""
    shape = loss_shape(Formula("regression", lambda f, y: -0.5 * (f - y) ** 4), is_added=True, error_range=2.0)
    for path in shape.paths:
        outside = np.abs(path.x) > 1.01
        np.testing.assert_array_equal(path.slope[outside], 0.0)
        np.testing.assert_allclose(path.loss[outside] - path.loss[len(path.x) // 2], 0.5, atol=1e-2)
        inside = np.abs(path.x) < 0.99
        np.testing.assert_allclose(path.slope[inside], (2 * path.x - 2 * path.x**3)[inside], atol=1e-5)


@pytest.mark.parametrize("side", [-1, 1])
def test_where_nothing_pulls_the_loss_is_level_and_lowest_at_the_target(side: int) -> None:
    """On one side of the target the slope would turn round, and is drawn as none."""
    shape = loss_shape(Formula("regression", lambda f, y: 7 * side * (f - y) * (y + 2)), is_added=True)
    for path in shape.paths:
        assert np.ptp(path.loss[path.x * side < -0.01]) == 0
        assert np.ptp(path.loss[path.x * side > 0.01]) > 1
    assert report(shape).lowest == pytest.approx((0.0, 0.0, 0.0), abs=0.021)
    (lowest,) = (line for line in plot_heatmap(shape).axes[0].lines if line.get_label() == "lowest loss")
    np.testing.assert_allclose(lowest.get_xdata(), lowest.get_ydata(), atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "`step` must be a whole number, 0 or more; got -1"),
        ({"resolution": 2}, ValueError, "`resolution` must be a whole number, 3 or more; got 2"),
        ({"classes": 1}, ValueError, "`classes` must be a whole number, 2 or more; got 1"),
        ({"targets": ()}, TypeError, r"`targets` must be a sequence of numbers.*got \(\)"),
        ({"targets": "12"}, TypeError, r"`targets` must be a sequence of numbers.*got '12'"),
        ({"targets": (0.0, float("nan"))}, ValueError, "`targets` must be finite; got nan"),
        ({"error_range": 0.0}, ValueError, r"`error_range` must be positive; got 0\.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss_shape(LossNetwork("multiclass"), **arguments)


def test_a_loss_that_is_none_of_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`pairwise` of Formula returned shape \(\) .* one value for each pair"):
        loss_shape(Formula("binary", lambda f, y: (f - y).sum()))


# The report.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("task", TASKS)
def test_the_handcrafted_loss_is_seen_as_itself(task: str, reduction: str) -> None:
    loss = Formula(task, lambda f, y: LossNetwork(task).pairing.pairwise(f, y), reduction)
    shape = loss_shape(loss, classes=4 if task == "multiclass" else None)
    found = report(shape, reduction)
    # Eq. 3 averages over the C outputs, of which the cross-entropy has one term.
    assert found.strength == pytest.approx(0.25 if (task, reduction) == ("multiclass", "mean") else 1.0, rel=1e-4)
    assert found.alignment == pytest.approx(1.0, abs=1e-6)
    assert (shape.flatness, shape.turn_up if task != "regression" else 0) == (0, pytest.approx(0, abs=1e-6))
    assert not any((*found.flat, *found.away))
    assert "it is that loss but for strength" in str(found)
    assert "None: it pulls towards the target everywhere" in str(found)


def test_label_smoothing_is_a_turn_at_a_confident_prediction() -> None:
    def smoothed(f: Tensor, y: Tensor) -> Tensor:
        target = y * 0.7 + 0.15
        return -target * f.clamp_min(1e-9).log() - (1 - target) * (1 - f).clamp_min(1e-9).log()

    found = reported("binary", smoothed)
    for (region,), end, lowest in zip(found.away, (0.999, 0.001), (0.85, 0.15), strict=True):
        assert sorted(region) == pytest.approx(sorted((lowest, end)), abs=0.03)
    assert found.lowest == pytest.approx((0.85, 0.15), abs=0.01)
    assert found.shape.turn_up > 0.1
    # A loss that is lowest far from the label has no turn at a confident prediction.
    assert reported("binary", lambda f, y: (3 * f) * (1 - f)).shape.turn_up == 0
    assert "target 0: it pulls away from the target at 0.00 to 0.14, it is lowest at 0.15" in str(found)


def test_a_flat_region_is_found() -> None:
    found = reported("binary", lambda f, y: (0.6 - (1 - (f - y).abs())).clamp_min(0) ** 2)
    for (region,), wanted in zip(found.flat, ((0.58, 0.999), (0.001, 0.42)), strict=True):
        assert region == pytest.approx(wanted, abs=0.06)
    assert 0.35 < found.shape.flatness < 0.5
    assert "Flat regions (section 5.6). 4" in str(found)


def test_a_loss_that_has_flattened_altogether() -> None:
    none = reported("regression", lambda f, y: 0 * f * y)
    assert (none.strength, none.alignment, none.shape.flatness) == (0, 0, 1)
    faint = reported("regression", lambda f, y: 0.01 * (f - y) ** 2)
    assert faint.shape.flatness == 0
    assert "the loss has flattened, which stops training early (section 5.6)" in str(faint)


def test_a_minimum_off_the_target_is_found() -> None:
    found = reported("regression", lambda f, y: (f - y - 0.2) ** 2)
    for (region,) in found.away:
        assert region == pytest.approx((0.02, 0.18), abs=0.021)
    assert found.lowest == pytest.approx((0.2, 0.2, 0.2), abs=0.011)
    assert "it is lowest at 0.2" in str(found)


def test_a_loss_that_pulls_away_everywhere() -> None:
    found = reported("binary", lambda f, y: -((f - y) ** 2))
    assert found.strength < 0
    assert all(len(away) == 1 for away in found.away)
    assert "drives more from their targets than to them" in str(found)


def test_what_is_added_is_told_as_such() -> None:
    begin = report(loss_shape(LossNetwork("multiclass", sees_classes=True), is_added=True))
    assert "in the direction of cross-entropy as without what is learned" in str(begin)
    nothing = Formula("multiclass", lambda f, y: 0 * f * y)
    assert "hardly anything is learned as yet" in str(report(loss_shape(nothing, is_added=True)))
    met = report(loss_shape(class_network(3), is_added=True))
    assert "Classes. Between two of them it pulls to the label as hard as cross-entropy does from" in str(met)
    assert "-3     -1.5" in str(report(loss_shape(LossNetwork("regression"), error_range=3.0)))


def test_a_coarse_look_has_a_number_at_every_error() -> None:
    """No error has no rate, and stations next to it lie between that point and the next."""
    assert "nan" not in str(report(loss_shape(LossNetwork("regression"), resolution=11)))


def test_what_cannot_be_reported_is_refused() -> None:
    shape: LossShape = loss_shape(Formula("binary", lambda f, y: f * float("nan")))
    with pytest.raises(ValueError, match="the loss is not finite along its paths, so the run diverged"):
        report(shape)
    with pytest.raises(ValueError, match="`classes` is needed: a loss that trains alone is a mean over the outputs"):
        report(loss_shape(LossNetwork("multiclass")))
