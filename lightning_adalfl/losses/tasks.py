"""The four tasks: how outputs and targets become pairs, and the handcrafted losses of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_adalfl.checks import one_of
from lightning_adalfl.losses.output_gradient import Pairs

# Of the generalised cross-entropy (Zhang & Sabuncu, 2018), and of the cross-entropy, which wins lost classes back.
BOUNDED_EXPONENT, BOUNDED_LEAK = 0.7, 0.3


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
            weight: Weights or a mask, one for each target or class index.

        Raises:
            ValueError: If a dtype or a shape does not fit the task.
        """

    @abstractmethod
    def link_vjp_(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient by the raw output of what has ``gradient``, which is overwritten, by ``prediction``.

        The Jacobian is symmetric for every task, so that this maps tangents of raw outputs to those of pairs as well.
        """

    @abstractmethod
    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the handcrafted loss of each pair, element-wise."""

    def loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the handcrafted loss of a batch, a weighted mean; the arguments are those of :meth:`pairs`."""
        target, counts = self._prepared(predictions, target, weight)
        return (self._losses(predictions, target) * counts).sum()

    def bounded_loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return what few instances cannot rule: for classification the generalised cross-entropy, with a leak."""
        target, counts = self._prepared(predictions, target, weight)
        return (self._bounded_losses(predictions, target) * counts).sum()

    def check_values(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Raise a ``ValueError`` for targets out of range; it reads them, which on an accelerator waits for them."""
        prepared, _ = self._prepared(predictions, target, weight)
        if not torch.isfinite(predictions).all() or not torch.isfinite(prepared).all():
            return  # what is to become of such a batch is the user's own business, as without a learned loss
        low, high, meaning = self._range(predictions, prepared)
        smallest, largest = (bound.item() for bound in torch.aminmax(prepared))
        if smallest < low or largest > high:
            raise ValueError(f"`target` must hold {meaning}; got values from {smallest} to {largest}.")

    @abstractmethod
    def _prepared(self, predictions: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the checked target, class indices or in the predictions' dtype, and what each element counts."""

    @abstractmethod
    def _losses(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Return the handcrafted loss of each element."""

    def _bounded_losses(self, predictions: Tensor, target: Tensor) -> Tensor:
        return self._losses(predictions, target)

    def _range(self, predictions: Tensor, target: Tensor) -> tuple[float, float, str]:
        return -math.inf, math.inf, "numbers"


class Multiclass(Task):
    """Logits (N, C) or (N, C, d1, …); class indices (N,) or (N, d1, …), or class probabilities of the logits' shape."""

    name = "multiclass"
    handcrafted = "cross-entropy"

    def pairs(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Pairs:
        """Return softmax probabilities and one-hot targets; the mean is over instances, the sum over classes."""
        paired, counts = self._prepared(predictions, target, weight)
        if paired.is_floating_point():
            return Pairs(predictions.softmax(1), paired, counts.unsqueeze(1))
        return Pairs(predictions.softmax(1), None, counts.unsqueeze(1), labels=paired)

    def link_vjp_(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Return it through the softmax."""
        product = gradient.mul_(prediction)
        return product.addcmul_(prediction, product.sum(1, keepdim=True), value=-1.0)

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ``-y log f``."""
        return -target * _log(prediction)

    def _losses(self, predictions: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(predictions, target, reduction="none")

    def _bounded_losses(self, predictions: Tensor, target: Tensor) -> Tensor:
        log_probabilities = predictions.log_softmax(1)
        if target.is_floating_point():
            return (_bounded(log_probabilities) * target).sum(1)
        return _bounded(log_probabilities.gather(1, target.unsqueeze(1)).squeeze(1))

    def _prepared(self, predictions: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        _check_kind(predictions, target)
        if predictions.ndim < 2:
            raise ValueError(
                f"`predictions` must be logits of shape (N, C) or (N, C, d1, ...) for task 'multiclass'; "
                f"got {tuple(predictions.shape)}. One logit an instance is task 'binary'."
            )
        shape = (predictions.shape[0], *predictions.shape[2:])
        if target.is_floating_point() and target.shape != predictions.shape:
            raise ValueError(
                "`target` must hold class indices (an integer dtype), or probabilities of shape "
                f"{tuple(predictions.shape)}; got {target.dtype} of shape {tuple(target.shape)}."
            )
        labels = shape if target.is_floating_point() else tuple(target.shape)
        for name, found in (("target", labels), ("weight", shape if weight is None else tuple(weight.shape))):
            if found != shape:
                raise ValueError(
                    f"`{name}` must have shape {shape} for (N, C, ...) logits {tuple(predictions.shape)}; got {found}."
                )
        if target.is_floating_point():
            return target.to(predictions.dtype), _normalised(predictions, weight, shape)
        if self.ignore_index is not None:
            kept = target != self.ignore_index
            weight = kept if weight is None else kept * weight
        return _counted(target, weight).long(), _normalised(predictions, weight, shape)

    def _range(self, predictions: Tensor, target: Tensor) -> tuple[float, float, str]:
        if target.is_floating_point():
            return 0, 1, "class probabilities, in [0, 1]"
        last = predictions.shape[1] - 1
        return 0, last, f"class indices for {last + 1} classes, in [0, {last}], or `ignore_index` for no class"


class _OneShape(Task):
    """Predictions and targets of one shape."""

    def _prepared(self, predictions: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        _check_kind(predictions, target)
        for name, value in (("target", target), ("weight", weight)):
            if value is not None and predictions.shape != value.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `predictions` for task {self.name!r}, "
                    f"{tuple(predictions.shape)}; got {tuple(value.shape)}. Reshape one of them in `adalfl_predict`."
                )
        return _counted(target.to(predictions.dtype), weight), _normalised(predictions, weight, predictions.shape)


class _Sigmoid(_OneShape):
    """Logits and 0/1 targets of one shape."""

    handcrafted = "binary cross-entropy"

    def pairs(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Pairs:
        """Return sigmoid probabilities and targets."""
        paired, counts = self._prepared(predictions, target, weight)
        return Pairs(predictions.sigmoid(), paired, counts, is_binary=not target.is_floating_point())

    def link_vjp_(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Return it through the sigmoid."""
        return gradient.mul_(prediction).mul_(1 - prediction)

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ``-y log f - (1 - y) log(1 - f)``."""
        return -target * _log(prediction) - (1 - target) * _log(1 - prediction)

    def _losses(self, predictions: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(predictions, target, reduction="none")

    def _bounded_losses(self, predictions: Tensor, target: Tensor) -> Tensor:
        return target * _bounded(F.logsigmoid(predictions)) + (1 - target) * _bounded(F.logsigmoid(-predictions))

    def _range(self, predictions: Tensor, target: Tensor) -> tuple[float, float, str]:
        return 0, 1, f"0/1 labels for task {self.name!r}, in [0, 1]"


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
        return Pairs(predictions, *self._prepared(predictions, target, weight))

    def link_vjp_(self, prediction: Tensor, gradient: Tensor) -> Tensor:
        """Return it as it is."""
        return gradient

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ``(f - y)²``."""
        return (prediction - target).square()

    def _losses(self, predictions: Tensor, target: Tensor) -> Tensor:
        return self.pairwise(predictions, target)


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
    """Return weights that sum to one, or to zero where nothing is left; never in less than single precision."""
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    if weight is None:
        return predictions.new_full((1,) * len(shape), 1.0 / math.prod(shape), dtype=dtype).expand(shape)
    weight = weight.to(dtype)
    return weight / weight.sum().clamp_min(torch.finfo(dtype).tiny)


def _counted(target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the targets, with zero for those without weight: these may be no class, or NaN."""
    return target if weight is None else target.masked_fill(weight == 0, 0)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()


def _bounded(log_probability: Tensor) -> Tensor:
    """Return ``(1 - p^q) / q - λ log p``, by `expm1`, since the slope of ``1 - p ** q`` is NaN once p underflows."""
    return -torch.expm1(BOUNDED_EXPONENT * log_probability) / BOUNDED_EXPONENT - BOUNDED_LEAK * log_probability


def _check_kind(predictions: Tensor, target: Tensor) -> None:
    if not predictions.is_floating_point():
        raise ValueError(f"`predictions` must be floating point (raw logits or values); got {predictions.dtype}.")
    if target.is_complex():
        raise ValueError(f"`target` must be real; got {target.dtype}. Give its two parts as two outputs.")
    if predictions.ndim == 0 or predictions.numel() == 0:
        raise ValueError(f"`predictions` must hold at least one instance; got shape {tuple(predictions.shape)}.")


def check_task_loss(task_loss: Callable[..., Tensor], f: Tensor, y: Tensor, weight: Tensor | None) -> None:
    """Raise a ``ValueError`` unless the task loss of a first batch is a mean that can be differentiated."""
    with torch.enable_grad():
        value = task_loss(f.detach().requires_grad_(), y, *([] if weight is None else [weight]))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"`task_loss` must return a scalar mean; got {getattr(value, 'shape', type(value).__name__)}.")
    if not value.requires_grad:
        raise ValueError("`task_loss` cannot be differentiated; leave out `argmax`, rounding, `detach` and NumPy.")
    if weight is None:
        one, two = float(value.detach()), float(task_loss(torch.cat([f.detach()] * 2), torch.cat([y, y])).detach())
        if 0 < abs(one) < math.inf and math.isclose(two, 2 * one, rel_tol=1e-3):
            raise ValueError(
                f"`task_loss` must return a mean; got {one:.4g}, and {two:.4g} for the batch twice. Divide the sum."
            )
