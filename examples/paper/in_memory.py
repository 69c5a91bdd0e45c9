"""Data sets that are held in memory and give a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


class InMemory(TensorDataset):
    """Pairs (x, y) whose batches are indexed in one go, since one row at a time costs more than a small model's step.

    A loader over it needs `whole_batch` as its ``collate_fn``.
    """

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the batch of those rows."""
        index = torch.as_tensor(rows)
        return tuple(tensor[index] for tensor in self.tensors)


def whole_batch(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a batch of :class:`InMemory`, which needs no collating."""
    return batch
