"""The four tasks: pairs, weights and masks, handcrafted and bounded losses, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_adalfl.losses.tasks import BOUNDED_EXPONENT, BOUNDED_LEAK, check_task_loss, task_named

NAN = float("nan")
INTEGERS = [torch.uint8, torch.int32, torch.int64]


def batch(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return predictions and integer or real targets of seven instances."""
    shapes = {"multiclass": (7, 4), "segmentation": (7, 4, 3, 2), "binary": (7,), "multilabel": (7, 3)}
    predictions = torch.randn(shapes.get(name, (7, 2)), dtype=dtype)
    if name in ("multiclass", "segmentation"):
        return predictions, torch.randint(4, (7, *predictions.shape[2:]))
    if name == "regression":
        return predictions, torch.randn_like(predictions)
    return predictions, torch.randint(2, predictions.shape)


def named(name: str, **options: Any) -> Any:
    return task_named("multiclass" if name == "segmentation" else name, **options)


@pytest.mark.parametrize("spatial", [(), (5,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_multiclass_pairs_softmax_with_one_hot(spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    """Classes are dimension 1; the mean is over instances, and the sum over classes."""
    logits, target = torch.randn(2, 4, *spatial), torch.randint(4, (2, *spatial))
    pairs = task_named("multiclass").pairs(logits, target.to(dtype))
    prediction, indicators, weight, is_binary = pairs.prediction, pairs.target, pairs.weight, pairs.is_binary
    torch.testing.assert_close(prediction, logits.softmax(1))
    assert torch.equal(indicators, F.one_hot(target, 4).movedim(-1, 1).float())
    torch.testing.assert_close((weight * torch.ones_like(prediction)).sum(), torch.tensor(4.0))
    assert is_binary


@pytest.mark.parametrize("name", ["binary", "multilabel"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_labels_pair_with_the_sigmoid(name: str, dtype: torch.dtype) -> None:
    logits, target = batch(name, torch.float32)
    pairs = task_named(name).pairs(logits, target.to(dtype))
    prediction, labels, weight, is_binary = pairs.prediction, pairs.target, pairs.weight, pairs.is_binary
    torch.testing.assert_close(prediction, torch.sigmoid(logits))
    assert torch.equal(labels, target.float())
    torch.testing.assert_close(weight.sum(), torch.tensor(1.0))
    assert is_binary == (dtype != torch.float32)


@pytest.mark.parametrize(("name", "kind"), [("multiclass", "probabilities"), ("binary", "labels")])
def test_soft_targets_stand_as_they_are(name: str, kind: str) -> None:
    """In the precision of the predictions, for the handcrafted and the bounded loss too."""
    logits, _ = batch(name, torch.float32)
    soft = torch.rand_like(logits, dtype=torch.float64)
    soft = soft / soft.sum(1, keepdim=True) if name == "multiclass" else soft
    pairs = task_named(name).pairs(logits, soft)
    torch.testing.assert_close(pairs.target, soft.float())
    assert (pairs.prediction.dtype, pairs.is_binary) == (torch.float32, False)
    expected = task_named(name).pairwise(pairs.prediction, soft.float()).sum() / len(logits)
    torch.testing.assert_close(task_named(name).loss(logits, soft), expected)
    assert float(task_named(name).bounded_loss(logits, soft)) < (1 + BOUNDED_LEAK) * float(expected)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_regression_is_left_raw(shape: tuple[int, ...]) -> None:
    values, target = 100 * torch.randn(shape), torch.randint(-50, 50, shape)
    pairs = task_named("regression").pairs(values, target)
    prediction, paired = pairs.prediction, pairs.target
    assert torch.equal(prediction, values)
    assert torch.equal(paired, target.float())


REFERENCES: dict[str, Any] = {
    "multiclass": F.cross_entropy,
    "segmentation": F.cross_entropy,
    "binary": lambda f, y: F.binary_cross_entropy_with_logits(f, y.double()),
    "multilabel": lambda f, y: F.binary_cross_entropy_with_logits(f, y.double()),
    "regression": F.mse_loss,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_losses_are_those_of_torch_and_the_mean_of_the_pairs(name: str) -> None:
    predictions, target = batch(name)
    task = named(name)
    torch.testing.assert_close(task.loss(predictions, target), REFERENCES[name](predictions, target))
    pairs = task.pairs(predictions, target)
    by_pairs = (task.pairwise(pairs.prediction, pairs.target) * pairs.weight).sum()
    torch.testing.assert_close(task.loss(predictions, target), by_pairs)


@pytest.mark.parametrize("loss", ["loss", "bounded_loss"])
@pytest.mark.parametrize("name", REFERENCES)
def test_weights_count_instances_and_a_mask_leaves_them_out(name: str, loss: str) -> None:
    """What is left out may be NaN, or no class at all; and nothing at all may be left."""
    predictions, target = batch(name)
    function = getattr(named(name), loss)
    weight = torch.zeros_like(target, dtype=torch.float32)
    weight[2:5] = torch.tensor([1.0, 2.0, 1.0]).view(3, *[1] * (target.ndim - 1))
    parts = [float(function(predictions[i : i + 1], target[i : i + 1])) for i in (2, 3, 4)]
    odd = target.clone()
    odd[:2] = NAN if target.is_floating_point() else -100
    value = function(predictions.requires_grad_(), odd, weight)
    assert value.item() == pytest.approx((parts[0] + 2 * parts[1] + parts[2]) / 4)
    (slope,) = torch.autograd.grad(value, predictions)
    assert (slope[:2] == 0).all()
    assert slope[2:5].abs().sum() > 0
    pairs = named(name).pairs(predictions, odd, weight > 0)
    assert torch.isfinite(pairs.target).all()
    assert function(predictions, odd, torch.zeros_like(weight)).item() == 0


@pytest.mark.parametrize("name", ["multiclass", "segmentation"])
def test_an_ignored_index_is_left_out(name: str) -> None:
    predictions, target = batch(name)
    ignoring, kept = named(name, ignore_index=-100), target.clone()
    kept[3:] = -100
    for loss in ("loss", "bounded_loss"):
        expected = getattr(named(name), loss)(predictions[:3], target[:3])
        torch.testing.assert_close(getattr(ignoring, loss)(predictions, kept), expected)
        torch.testing.assert_close(getattr(ignoring, loss)(predictions, kept, torch.ones_like(kept)), expected)
    pairs = ignoring.pairs(predictions, kept)
    assert (pairs.weight[3:] == 0).all()
    ignoring.check_values(predictions, kept)
    with pytest.raises(ValueError, match=r"for 4 classes, in \[0, 3\], or `ignore_index` for no class; got"):
        named(name).check_values(predictions, kept)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_link_is_the_derivative_of_the_pairs_and_symmetric(name: str) -> None:
    predictions, target = batch(name)
    gradient, tangent = torch.randn_like(predictions), torch.randn_like(predictions)
    pairs = named(name).pairs(predictions.requires_grad_(), target)
    (expected,) = torch.autograd.grad(pairs.prediction, predictions, gradient)
    found = named(name).link_vjp_(pairs.prediction.detach(), gradient.clone())
    torch.testing.assert_close(found, expected)
    pushed = named(name).link_vjp_(pairs.prediction.detach(), tangent.clone())
    torch.testing.assert_close((found * tangent).sum(), (pushed * gradient).sum())


@pytest.mark.parametrize("name", ["multiclass", "binary", "multilabel"])
def test_the_bounded_loss_and_its_slope(name: str) -> None:
    """``(1 - p^q) / q - λ log p`` of the right outcome: finite where p underflows, and never without a way back."""
    predictions, target = batch(name)
    task, q = named(name), BOUNDED_EXPONENT
    pairs = task.pairs(predictions, target)
    right = pairs.prediction * pairs.target + (1 - pairs.prediction) * (1 - pairs.target)
    right = right.gather(1, target.unsqueeze(1)) if name == "multiclass" else right
    expected = (1 - right**q) / q - BOUNDED_LEAK * right.log()
    torch.testing.assert_close(task.bounded_loss(predictions, target), expected.mean())
    for size in (1e3, 1e30):
        extreme = torch.where(predictions > 0, size, -size).float()
        if name == "multiclass":  # as a mask over classes makes it
            extreme[0, target[0] - 1] = -float("inf")
        value = task.bounded_loss(extreme.requires_grad_(), target)
        (slope,) = torch.autograd.grad(value, extreme)
        assert torch.isfinite(value)
        assert torch.isfinite(slope).all()
        instances = len(slope) if name == "multiclass" else slope.numel()
        assert 0.99 * BOUNDED_LEAK <= float(slope.abs().max()) * instances <= 1 + BOUNDED_LEAK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_over_half_precision_are_taken_in_single(dtype: torch.dtype) -> None:
    logits, target = torch.randn(301, 4).to(dtype), torch.randint(4, (301,))
    loss = task_named("multiclass").loss(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target), rtol=2e-3, atol=0)


LONG = {"dtype": torch.long}
REFUSED = [
    ("multiclass", torch.zeros(3, 4, **LONG), torch.zeros(3, **LONG), "`predictions` must be floating point (raw log"),
    ("regression", torch.zeros(3, dtype=torch.complex64), torch.zeros(3), "`predictions` must be floating point"),
    ("regression", torch.zeros(3), torch.zeros(3, dtype=torch.complex64), "`target` must be real; got torch.complex64"),
    ("binary", torch.zeros(()), torch.zeros(()), "at least one instance; got shape ()"),
    ("regression", torch.zeros(0, 2), torch.zeros(0, 2), "at least one instance; got shape (0, 2)"),
    ("multiclass", torch.zeros(3), torch.zeros(3, **LONG), "One logit an instance is task 'binary'"),
    ("multiclass", torch.zeros(3, 4), torch.zeros(2, **LONG), "`target` must have shape (3,)"),
    ("multiclass", torch.zeros(3, 4), torch.zeros(3, 1, **LONG), "got (3, 1)"),
    ("multiclass", torch.zeros(2, 4, 5, 5), torch.zeros(2, 5, **LONG), "`target` must have shape (2, 5, 5)"),
    ("multiclass", torch.zeros(3, 4), torch.zeros(3), "or probabilities of shape (3, 4); got torch.float32"),
    ("binary", torch.zeros(3), torch.zeros(3, 1), "`target` must have the shape of `predictions` for task 'binary'"),
    ("regression", torch.zeros(3, 2), torch.zeros(3), "Reshape one of them in `adalfl_predict`"),
]
OUT_OF_RANGE = [
    ("multiclass", torch.zeros(3, 4), torch.tensor([0, 1, 4]), "for 4 classes, in [0, 3]"),
    ("multiclass", torch.zeros(3, 4), torch.tensor([0, -1, 2]), "got values from -1 to 2"),
    ("multiclass", torch.zeros(1, 2), torch.tensor([[1.5, -0.5]]), "class probabilities, in [0, 1]; got values from -"),
    ("binary", torch.zeros(3), torch.tensor([0, 1, 2]), "0/1 labels for task 'binary', in [0, 1]; got values from"),
    ("multilabel", torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), "0/1 labels for task 'multilabel'"),
]


@pytest.mark.parametrize(("name", "predictions", "target", "message"), REFUSED)
@pytest.mark.parametrize("method", ["pairs", "loss", "bounded_loss", "check_values"])
def test_refused_with_what_was_given(name: str, predictions: Tensor, target: Tensor, message: str, method: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(task_named(name), method)(predictions, target)


@pytest.mark.parametrize(("name", "predictions", "target", "message"), OUT_OF_RANGE)
def test_values_out_of_range(name: str, predictions: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        task_named(name).check_values(predictions, target)
    if target.is_floating_point():  # what is not finite is the user's own business
        task_named(name).check_values(predictions, torch.full_like(target, NAN))
    task_named(name).check_values(predictions * NAN, target)


@pytest.mark.parametrize("target", [0.0, torch.inf, NAN])
def test_a_task_loss_that_does_not_change_with_a_factor_is_no_sum(target: float) -> None:
    check_task_loss(F.mse_loss, torch.zeros(3, 1), torch.full((3, 1), target), None)


def test_other_refusals() -> None:
    task_named("regression").check_values(*batch("regression"))
    task_named("multilabel").check_values(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"`weight` must have shape \(3,\) for \(N, C, ...\) logits \(3, 4\); got \(3, 4\)"
    ):
        task_named("multiclass").pairs(torch.zeros(3, 4), torch.zeros(3, **LONG), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"`weight` must have the shape of `predictions` for task 'binary'"):
        task_named("binary").pairs(torch.zeros(3), torch.zeros(3), torch.ones(1))
    with pytest.raises(ValueError, match=r"`task` must be one of 'multiclass', 'binary', .*; got 'ranking'"):
        task_named("ranking")
    with pytest.raises(ValueError, match=r"`ignore_index` is for task 'multiclass', .*; got 0 for 'binary'. Return"):
        task_named("binary", 0)
