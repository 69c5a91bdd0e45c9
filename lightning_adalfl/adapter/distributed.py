"""Keep the meta-learner equal over processes."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


def broadcast(learner: nn.Module, trainer: pl.Trainer) -> None:
    """Give every process the first one's φ."""
    if trainer.world_size > 1:
        for tensor in learner.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)


def mean_over_processes(trainer: pl.Trainer) -> Callable[[list[Tensor]], None] | None:
    """Return a function that averages tensors over processes in place, in one flat buffer; ``None`` for one process."""
    if trainer.world_size == 1:
        return None

    def all_reduce(tensors: list[Tensor]) -> None:
        # The widest precision among them, and never less than single, for one flat buffer.
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= trainer.world_size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))

    return all_reduce
