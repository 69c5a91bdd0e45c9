"""What every learned loss is: ``loss(predictions, target) -> scalar``, applied output-wise (Eq. 3)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_adalfl.losses.pairing import check_task, to_pairs
from lightning_adalfl.losses.persistence import load_loss, save_loss

LossT = TypeVar("LossT", bound="LearnedLoss")
Reduction = Literal["mean", "sum"]


class LearnedLoss(nn.Module, ABC):
    """A loss M_φ with parameters φ that scores pairs of target and prediction, output by output (Eq. 3).

    Args:
        task: How predictions and targets become pairs; see :func:`lightning_adalfl.losses.pairing.to_pairs`.
        reduction: Over the outputs of an instance, ``"mean"`` as in Eq. 3, or ``"sum"`` as the paper's prose has it;
            with C outputs they differ by the factor C, which acts as a learning rate. Over instances it is always the
            mean.

    Raises:
        ValueError: For an unknown task or reduction.
    """

    def __init__(self, task: str, reduction: str = "mean") -> None:
        super().__init__()
        check_task(task)
        if not isinstance(reduction, str) or reduction not in get_args(Reduction):
            raise ValueError(f"`reduction` must be 'mean' or 'sum'; got {reduction!r}.")
        self.task = task
        self.reduction = reduction

    @abstractmethod
    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ℓ_φ(y_i, f_i) element-wise.

        Args:
            prediction: Any shape: probabilities for classification, raw values for regression.
            target: The same shape.

        Returns:
            The loss of each pair, of the same shape.
        """

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Return M_φ(y, f), a scalar (Eq. 3), computed in the precision of φ, under autocast too.

        Args:
            predictions: Raw model output, as ``task`` demands.
            target: Targets, as ``task`` demands.

        Raises:
            ValueError: If predictions and target do not fit the task.
        """
        with without_autocast(predictions.device):
            # Checked before the cast, so that an integer prediction is refused and not converted.
            precision = self.dtype if predictions.is_floating_point() else predictions.dtype
            paired, paired_target = to_pairs(self.task, predictions.to(precision), target)
            value = self.pairwise(paired, paired_target).mean()
            return value if self.reduction == "mean" else value * (paired.numel() / paired.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the loss is computed: that of φ."""
        return next(self.parameters()).dtype

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the loss to a safetensors file: φ, with the class and its arguments in the header.

        The file appears whole or not at all, replacing an older one. What is saved is φ and nothing of the training.

        Args:
            path: The file, such as ``"loss.safetensors"``.

        Raises:
            TypeError: If a class of your own does not keep an argument of its constructor as an attribute of that name.
            ValueError: If φ is not finite.
        """
        save_loss(self, path)

    @classmethod
    def load(cls: type[LossT], path: str | os.PathLike[str]) -> LossT:
        """Return the loss that :meth:`save` wrote, bit for bit, on the CPU; nothing in the file is run.

        ``LearnedLoss.load`` reads every representation, a subclass only its own. It is a plain ``nn.Module``::

            loss = LearnedLoss.load("loss.safetensors").requires_grad_(False)
            loss(model(x), y).backward()

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, corrupt, of another kind, from a newer version, or contradicts itself.
        """
        return load_loss(cls, path)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which nothing is cast; the meta device, on which costs are counted, casts nothing anyway."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device_type=device.type, enabled=False) if available else nullcontext()
