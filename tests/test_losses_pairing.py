from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_adalfl.losses.pairing import TASKS, to_pairs
from lightning_adalfl.losses.task_losses import default_task_loss


def test_multiclass_pairs_softmax_with_one_hot() -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
    predictions, indicators = to_pairs("multiclass", logits, target)
    torch.testing.assert_close(predictions, logits.softmax(1))
    assert torch.equal(indicators, F.one_hot(target, 4).float())


@pytest.mark.parametrize("spatial", [(5,), (3, 2), (2, 3, 2)])
def test_segmentation_has_its_classes_along_dimension_1(spatial: tuple[int, ...]) -> None:
    logits, target = torch.randn(2, 4, *spatial), torch.randint(4, (2, *spatial))
    predictions, indicators = to_pairs("multiclass", logits, target)
    assert predictions.shape == indicators.shape == logits.shape
    torch.testing.assert_close(predictions.sum(1), torch.ones(2, *spatial))
    assert torch.equal(indicators.argmax(1), target)
    assert torch.equal(indicators.sum(1), torch.ones(2, *spatial))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_dtype_holds_class_indices(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 2, 1])
    _, expected = to_pairs("multiclass", torch.zeros(3, 3), target)
    assert torch.equal(to_pairs("multiclass", torch.zeros(3, 3), target.to(dtype))[1], expected)


def test_class_probabilities_stand_as_they_are() -> None:
    logits = torch.randn(3, 4)
    smoothed = torch.full((3, 4), 0.025, dtype=torch.float64)
    smoothed[:, 1] = 0.925
    predictions, target = to_pairs("multiclass", logits, smoothed)
    torch.testing.assert_close(target, smoothed.float())
    assert predictions.dtype == target.dtype == torch.float32


@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_labels_pair_with_the_sigmoid(task: str, dtype: torch.dtype) -> None:
    shape = (5,) if task == "binary" else (5, 3)
    logits, target = torch.randn(shape), torch.randint(2, shape).to(dtype)
    predictions, labels = to_pairs(task, logits, target)
    torch.testing.assert_close(predictions, torch.sigmoid(logits))
    assert torch.equal(labels, target.float())


def test_label_probabilities_are_accepted() -> None:
    _, target = to_pairs("binary", torch.zeros(3), torch.tensor([0.0, 0.3, 1.0]))
    torch.testing.assert_close(target, torch.tensor([0.0, 0.3, 1.0]))


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_regression_is_left_raw(shape: tuple[int, ...]) -> None:
    values, target = 100 * torch.randn(shape), torch.randint(-50, 50, shape)
    predictions, paired = to_pairs("regression", values, target)
    assert torch.equal(predictions, values)
    assert torch.equal(paired, target.float())


REFUSED = [
    ("multiclass", torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, dtype=torch.long), "got torch.int64"),
    ("regression", torch.zeros(3, dtype=torch.complex64), torch.zeros(3), "`predictions` must be floating point"),
    ("regression", torch.zeros(0, 2), torch.zeros(0, 2), "at least one instance; got shape (0, 2)"),
    ("multiclass", torch.zeros(3), torch.zeros(3, dtype=torch.long), "One logit an instance is task 'binary'"),
    ("multiclass", torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), "`target` must have shape (3,)"),
    ("multiclass", torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.long), "got (3, 1)"),
    ("multiclass", torch.zeros(2, 4, 5, 5), torch.zeros(2, 5, dtype=torch.long), "`target` must have shape (2, 5, 5)"),
    (
        "multiclass",
        torch.zeros(3, 4),
        torch.tensor([0, 1, 4]),
        "class indices for 4 classes, in [0, 3]; got values from 0 to 4",
    ),
    ("multiclass", torch.zeros(3, 4), torch.tensor([0, -1, 2]), "got values from -1 to 2"),
    (
        "multiclass",
        torch.zeros(3, 4),
        torch.zeros(3),
        "or probabilities of shape (3, 4); got torch.float32 of shape (3,)",
    ),
    (
        "multiclass",
        torch.zeros(1, 2),
        torch.tensor([[1.5, -0.5]]),
        "class probabilities, in [0, 1]; got values from -0.5",
    ),
    (
        "multiclass",
        torch.zeros(1, 2),
        torch.tensor([[float("nan"), 1.0]]),
        "class probabilities, in [0, 1]; got values from nan",
    ),
    (
        "binary",
        torch.zeros(3),
        torch.zeros(3, 1),
        "`target` must have the shape of `predictions` for task 'binary', (3,)",
    ),
    (
        "binary",
        torch.zeros(3),
        torch.tensor([0, 1, 2]),
        "0/1 labels for task 'binary', in [0, 1]; got values from 0.0 to 2.0",
    ),
    ("multilabel", torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), "0/1 labels for task 'multilabel'"),
    ("regression", torch.zeros(3, 2), torch.zeros(3), "Reshape one of them in `adalfl_predict`"),
]


@pytest.mark.parametrize(("task", "predictions", "target", "message"), REFUSED)
def test_refused_with_what_was_given(task: str, predictions: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        to_pairs(task, predictions, target)


@pytest.mark.parametrize(
    ("task", "predictions", "target", "expected"),
    [
        ("multiclass", torch.tensor([[0.0, 0.0]]), torch.tensor([1]), 0.6931472),
        ("binary", torch.tensor([0.0, 0.0]), torch.tensor([0, 1]), 0.6931472),
        ("multilabel", torch.tensor([[0.0, 0.0]]), torch.tensor([[True, False]]), 0.6931472),
        ("regression", torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), 2.5),
    ],
)
def test_task_loss_of_each_task(task: str, predictions: Tensor, target: Tensor, expected: float) -> None:
    assert default_task_loss(task)(predictions, target).item() == pytest.approx(expected)


def test_every_task_has_a_task_loss_and_no_other_has() -> None:
    assert len({task: default_task_loss(task) for task in TASKS}) == 4
    with pytest.raises(ValueError, match=r"`task` must be one of 'multiclass', .*; got 'ranking'"):
        default_task_loss("ranking")
