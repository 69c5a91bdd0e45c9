"""Predictions and targets, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor


class Pairs:
    """Predictions and targets as the pairs (f_i, y_i) that a learned loss scores.

    Args:
        prediction: Probabilities for classification, raw values for regression.
        target: The same shape; in {0, 1} for classification, or probabilities. ``None`` where ``labels`` say it.
        weight: What each pair counts in a mean over the batch, of a shape that broadcasts to theirs.
        labels: Class indices, where they are known: the target is one for that class, along dimension 1.
        is_binary: Whether the targets are 0 or 1 by their kind, and not only in this batch.
    """

    def __init__(
        self,
        prediction: Tensor,
        target: Tensor | None,
        weight: Tensor,
        labels: Tensor | None = None,
        is_binary: bool = False,
    ) -> None:
        self.prediction, self.weight, self.labels = prediction, weight, labels
        self.is_binary = is_binary or labels is not None
        self._target = target

    @property
    def target(self) -> Tensor:
        """The targets; one-hot ones are made when they are asked for, since there may be many classes."""
        if self._target is None and self.labels is not None:
            self._target = torch.zeros_like(self.prediction).scatter_(1, self.labels.unsqueeze(1), 1.0)
        return self._target  # type: ignore[return-value]
