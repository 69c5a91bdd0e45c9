"""How predictions and targets become the pairs (y_i, f_i) that a learned loss scores."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Task = Literal["multiclass", "binary", "multilabel", "regression"]
TASKS: tuple[str, ...] = get_args(Task)


def check_task(task: str) -> None:
    """Raise a ``ValueError`` unless ``task`` names one of the four tasks."""
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(map(repr, TASKS))}; got {task!r}.")


def to_pairs(task: str, predictions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a model's raw output and its target into pairs of equal shape.

    Args:
        task: ``"multiclass"``: logits (N, C) or (N, C, d1, ...) with class indices (N,) or (N, d1, ...), or class
            probabilities of the shape of the logits; ``"binary"`` and ``"multilabel"``: logits and 0/1 targets of one
            shape; ``"regression"``: values and targets of one shape, (N,) or (N, D).
        predictions: Raw model output, floating point.
        target: Targets as above.

    Returns:
        ``(predictions, target)`` of one shape and floating dtype: probabilities in [0, 1] with 0/1 targets for
        classification (softmax or sigmoid), raw values for regression.

    Raises:
        ValueError: For a prediction that is not floating point, a shape that does not fit, or a target out of range.
            Ranges are checked where that costs no device synchronisation, on the CPU.
    """
    if not predictions.is_floating_point():
        raise ValueError(f"`predictions` must be floating point (raw logits or values); got {predictions.dtype}.")
    if target.is_complex():
        raise ValueError(f"`target` must be real; got {target.dtype}. Give its two parts as two outputs.")
    if predictions.numel() == 0:
        raise ValueError(f"`predictions` must hold at least one instance; got shape {tuple(predictions.shape)}.")
    if task == "multiclass":
        indicators = _class_indicators(predictions, target)  # first, since it checks the shapes
        return torch.softmax(predictions, dim=1), indicators
    if predictions.shape != target.shape:
        raise ValueError(
            f"`target` must have the shape of `predictions` for task {task!r}, {tuple(predictions.shape)}; "
            f"got {tuple(target.shape)}. Reshape one of them in `adalfl_predict`."
        )
    target = target.to(predictions.dtype)
    if task == "regression":
        return predictions, target
    _check_range(target, 0, 1, f"`target` must hold 0/1 labels for task {task!r}")
    return torch.sigmoid(predictions), target


def slope_by_output(task: str, paired: Tensor, slope: Tensor) -> Tensor:
    """Return the slope by the raw output of what has ``slope`` by the ``paired`` predictions of :func:`to_pairs`.

    The Jacobian of the pairing is symmetric for every task, so that it passes tangents as well.
    """
    if task == "multiclass":
        return torch.ops.aten._softmax_backward_data(slope, paired, 1, paired.dtype)
    if task == "regression":
        return slope
    return torch.ops.aten.sigmoid_backward(slope, paired)


def _class_indicators(logits: Tensor, target: Tensor) -> Tensor:
    """Return the targets as indicators of the shape of ``logits``, classes along dimension 1."""
    if logits.ndim < 2:
        raise ValueError(
            f"`predictions` must be logits of shape (N, C) or (N, C, d1, ...) for task 'multiclass'; "
            f"got {tuple(logits.shape)}. One logit an instance is task 'binary'."
        )
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                "`target` must hold class indices (an integer dtype), "
                f"or probabilities of shape {tuple(logits.shape)}; got {target.dtype} of shape {tuple(target.shape)}."
            )
        _check_range(target, 0, 1, "`target` must hold class probabilities")
        return target.to(logits.dtype)
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(
            f"`target` must have shape {expected} for logits of shape {tuple(logits.shape)}; got {tuple(target.shape)}."
        )
    classes = logits.shape[1]
    _check_range(target, 0, classes - 1, f"`target` must hold class indices for {classes} classes")
    return torch.zeros_like(logits).scatter_(1, target.long().unsqueeze(1), 1.0)


def _check_range(target: Tensor, low: int, high: int, meaning: str) -> None:
    # On an accelerator reading the range would wait for the device; there the indexing kernels check it themselves.
    if target.device.type != "cpu" or target.dtype == torch.bool:
        return
    smallest, largest = (bound.item() for bound in torch.aminmax(target))
    # Written so that NaN, which compares false with everything, fails as well.
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{meaning}, in [{low}, {high}]; got values from {smallest} to {largest}.")
