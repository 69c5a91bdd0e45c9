"""The four tasks: how outputs and targets become pairs, and the handcrafted losses of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_adalfl.checks import one_of

# Of the generalised cross-entropy (Zhang & Sabuncu, 2018); the value of that paper.
BOUNDED_EXPONENT = 0.7


class Pairs(NamedTuple):
    """Predictions and targets as the pairs (f_i, y_i) that a learned loss scores.

    Attributes:
        prediction: Probabilities for classification, raw values for regression.
        target: The same shape; in {0, 1} for classification, or probabilities.
        weight: What each pair counts in a mean over the batch, of a shape that broadcasts to theirs.
        is_binary: Whether the targets are 0 or 1 by their kind, and not only in this batch.
    """

    prediction: Tensor
    target: Tensor
    weight: Tensor
    is_binary: bool


class Task(ABC):
    """All that differs between tasks.

    Args:
        ignore_index: The target of what is to be left out, for ``"multiclass"``.

    Attributes:
        name: As the configuration has it.
        handcrafted: The handcrafted loss, in words.
    """

    name: ClassVar[str]
    handcrafted: ClassVar[str]

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index

    @abstractmethod
    def pairs(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Pairs:
        """Return the pairs of a batch, in the floating dtype of ``predictions``.

        Args:
            predictions: Raw model output: logits or values.
            target: Targets.
            weight: Weights or a mask, of the shape of ``target``.

        Raises:
            ValueError: If a dtype or a shape does not fit the task.
        """

    @abstractmethod
    def link_vjp(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient by the raw output of what has ``gradient`` by the paired ``prediction``.

        The Jacobian is symmetric for every task, so that this maps tangents of raw outputs to those of pairs as well.
        """

    @abstractmethod
    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the handcrafted loss of each pair, element-wise."""

    @abstractmethod
    def loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the handcrafted loss of a batch, a weighted mean."""

    @abstractmethod
    def bounded_loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return a loss that no single instance can rule; for regression the handcrafted one."""

    def check_values(self, predictions: Tensor, target: Tensor) -> None:
        """Raise a ``ValueError`` for targets out of range; it reads them, which on an accelerator waits for them."""
        paired = self.pairs(predictions, target)
        if not torch.isfinite(paired.prediction).all() or not torch.isfinite(paired.target).all():
            return  # what is to become of such a batch is the user's own business, as without a learned loss
        self._check_range(predictions, target)

    def _check_range(self, predictions: Tensor, target: Tensor) -> None:
        """Raise for targets out of range; any value is in it unless a task says otherwise."""


class Multiclass(Task):
    """Logits (N, C) or (N, C, d1, …); class indices (N,) or (N, d1, …), or class probabilities of the logits' shape."""

    name = "multiclass"
    handcrafted = "cross-entropy"

    def pairs(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Pairs:
        """Return softmax probabilities and one-hot targets; the mean is over instances, the sum over classes."""
        self._check_shapes(predictions, target)
        weight = self._weight(predictions, target, weight)
        if target.is_floating_point():
            return Pairs(predictions.softmax(1), target.to(predictions.dtype), weight.unsqueeze(1), False)
        labels = self._labels(target).unsqueeze(1)
        indicators = torch.zeros_like(predictions).scatter_(1, labels, 1.0)
        return Pairs(predictions.softmax(1), indicators, weight.unsqueeze(1), True)

    def link_vjp(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Return it through the softmax."""
        product = prediction * gradient
        return product.addcmul_(prediction, product.sum(1, keepdim=True), value=-1.0)

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ``-y log f``."""
        return -target * _log(prediction)

    def loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of logits."""
        self._check_shapes(predictions, target)
        probability_like = target.is_floating_point()
        losses = F.cross_entropy(predictions, target if probability_like else self._labels(target), reduction="none")
        return (losses * self._weight(predictions, target, weight)).sum()

    def bounded_loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the generalised cross-entropy ``(1 - p_y^q) / q`` of logits."""
        self._check_shapes(predictions, target)
        losses = _bounded(predictions.log_softmax(1))
        if target.is_floating_point():
            chosen = (losses * target).sum(1)
        else:
            chosen = losses.gather(1, self._labels(target).unsqueeze(1)).squeeze(1)
        return (chosen * self._weight(predictions, target, weight)).sum()

    def _check_shapes(self, predictions: Tensor, target: Tensor) -> None:
        _check_kind(predictions, target)
        if predictions.ndim < 2:
            raise ValueError(
                f"`predictions` must be logits of shape (N, C) or (N, C, d1, ...) for task 'multiclass'; "
                f"got {tuple(predictions.shape)}. One logit an instance is task 'binary'."
            )
        expected = (predictions.shape[0], *predictions.shape[2:])
        if target.is_floating_point():
            if target.shape != predictions.shape:
                raise ValueError(
                    "`target` must hold class indices (an integer dtype), or probabilities of shape "
                    f"{tuple(predictions.shape)}; got {target.dtype} of shape {tuple(target.shape)}."
                )
        elif tuple(target.shape) != expected:
            raise ValueError(
                f"`target` must have shape {expected} for logits of shape {tuple(predictions.shape)}; "
                f"got {tuple(target.shape)}."
            )

    def _labels(self, target: Tensor) -> Tensor:
        labels = target.long()
        return labels if self.ignore_index is None else labels.masked_fill(labels == self.ignore_index, 0)

    def _weight(self, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return what each instance counts, of the shape of class indices."""
        shape = (predictions.shape[0], *predictions.shape[2:])
        if weight is not None and tuple(weight.shape) != shape:
            raise ValueError(f"`weight` must have shape {shape}, one for each instance; got {tuple(weight.shape)}.")
        if self.ignore_index is not None and not target.is_floating_point():
            kept = target != self.ignore_index
            weight = kept if weight is None else kept * weight
        return _normalised(predictions, weight, shape)

    def _check_range(self, predictions: Tensor, target: Tensor) -> None:
        if target.is_floating_point():
            _check_bounds(target, 0, 1, "`target` must hold class probabilities")
        else:
            classes = predictions.shape[1]
            _check_bounds(
                self._labels(target), 0, classes - 1, f"`target` must hold class indices for {classes} classes"
            )


class _OneShape(Task):
    """Predictions and targets of one shape."""

    def _paired(self, predictions: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the target in the predictions' dtype, and what each pair counts."""
        _check_kind(predictions, target)
        for name, value in (("target", target), ("weight", weight)):
            if value is not None and predictions.shape != value.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `predictions` for task {self.name!r}, "
                    f"{tuple(predictions.shape)}; got {tuple(value.shape)}. Reshape one of them in `adalfl_predict`."
                )
        return target.to(predictions.dtype), _normalised(predictions, weight, tuple(predictions.shape))


class _Sigmoid(_OneShape):
    """Logits and 0/1 targets of one shape."""

    handcrafted = "binary cross-entropy"

    def pairs(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Pairs:
        """Return sigmoid probabilities and targets."""
        paired, counts = self._paired(predictions, target, weight)
        return Pairs(predictions.sigmoid(), paired, counts, not target.is_floating_point())

    def link_vjp(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Return it through the sigmoid."""
        return gradient * prediction * (1 - prediction)

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ``-y log f - (1 - y) log(1 - f)``."""
        return -target * _log(prediction) - (1 - target) * _log(1 - prediction)

    def loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the binary cross-entropy of logits."""
        paired, counts = self._paired(predictions, target, weight)
        return (F.binary_cross_entropy_with_logits(predictions, paired, reduction="none") * counts).sum()

    def bounded_loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the generalised cross-entropy of both outcomes."""
        paired, counts = self._paired(predictions, target, weight)
        losses = paired * _bounded(F.logsigmoid(predictions)) + (1 - paired) * _bounded(F.logsigmoid(-predictions))
        return (losses * counts).sum()

    def _check_range(self, predictions: Tensor, target: Tensor) -> None:
        if target.dtype != torch.bool:
            _check_bounds(target, 0, 1, f"`target` must hold 0/1 labels for task {self.name!r}")


class Binary(_Sigmoid):
    """One logit an instance, (N,) or (N, 1), and 0/1 targets of that shape."""

    name = "binary"


class Multilabel(_Sigmoid):
    """A logit a label, (N, C) or (N, C, d1, …), and 0/1 targets of that shape."""

    name = "multilabel"


class Regression(_OneShape):
    """Values and targets of one shape, such as (N,) or (N, D)."""

    name = "regression"
    handcrafted = "squared error"

    def pairs(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Pairs:
        """Return them as they are."""
        paired, counts = self._paired(predictions, target, weight)
        return Pairs(predictions, paired, counts, False)

    def link_vjp(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Return it as it is."""
        return gradient

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ``(f - y)²``."""
        return (prediction - target).square()

    def loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean squared error."""
        paired, counts = self._paired(predictions, target, weight)
        return ((predictions - paired).square() * counts).sum()

    def bounded_loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean squared error."""
        return self.loss(predictions, target, weight)


_TASKS = {task.name: task for task in (Multiclass, Binary, Multilabel, Regression)}


def task_named(name: str, ignore_index: int | None = None) -> Task:
    """Return a task by its name.

    Raises:
        ValueError: For an unknown name, or an ``ignore_index`` for a task without class indices.
    """
    one_of("task", name, _TASKS)
    if ignore_index is not None and name != "multiclass":
        raise ValueError(
            f"`ignore_index` is for task 'multiclass', whose targets are class indices; got {ignore_index} for "
            f"{name!r}. Return (predictions, target, weight) from `adalfl_predict` with a weight of zero instead."
        )
    return _TASKS[name](ignore_index)


def _normalised(predictions: Tensor, weight: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return weights that sum to one, or to zero where nothing is left."""
    if weight is None:
        count = 1
        for size in shape:
            count *= size
        return predictions.new_full((1,) * len(shape), 1.0 / count).expand(shape)
    weight = weight.to(predictions.dtype)
    return weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()


def _bounded(log_probability: Tensor) -> Tensor:
    # By `expm1`, since the slope of `1 - p ** q` is NaN once p underflows.
    return torch.expm1(BOUNDED_EXPONENT * log_probability).neg() / BOUNDED_EXPONENT


def _check_kind(predictions: Tensor, target: Tensor) -> None:
    if not predictions.is_floating_point():
        raise ValueError(f"`predictions` must be floating point (raw logits or values); got {predictions.dtype}.")
    if target.is_complex():
        raise ValueError(f"`target` must be real; got {target.dtype}. Give its two parts as two outputs.")
    if predictions.numel() == 0:
        raise ValueError(f"`predictions` must hold at least one instance; got shape {tuple(predictions.shape)}.")


def _check_bounds(target: Tensor, low: int, high: int, meaning: str) -> None:
    smallest, largest = (bound.item() for bound in torch.aminmax(target))
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{meaning}, in [{low}, {high}]; got values from {smallest} to {largest}.")
