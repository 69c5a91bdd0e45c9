"""What a callback that watches a run needs of it, without a change to its random numbers, modes and buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_adalfl.adapter.lightning_private import train_source, transferred
from lightning_adalfl.adapter.meta_batches import PROBES, EndlessBatches, transferred_meta_batch
from lightning_adalfl.learning.base_step import BaseStep
from lightning_adalfl.learning.hypergradient import Hypergradient
from lightning_adalfl.learning.recorded_forward import RandomState
from lightning_adalfl.learning.torch_private import tensors_in


class HeldOutBatches:
    """A few held-out batches, the same through the whole run and in one that is resumed.

    Args:
        module: The user's module, in its run.
        count: How many batches.
    """

    def __init__(self, module: Any, count: int) -> None:
        self._module = module
        with RandomState.capture(module.device).replayed():
            seed = module._adalfl_online().batches.state_dict()["seed"]
            drawn = EndlessBatches(module.adalfl_meta_dataloader, seed, PROBES)
            batches = [next(drawn) for _ in range(count)]
            self._batches = [transferred_meta_batch(module, batch, module.adalfl.config) for batch in batches]

    def tangent(self, place: int, step: BaseStep, found: Hypergradient) -> tuple[Tensor, Tensor, Tensor]:
        """Return predictions, targets and h of a batch, after a base step and along the direction of it.

        Args:
            place: Of the batch.
            step: The base step.
            found: Its hypergradient, whose direction is still there.
        """
        model, batch = step.model, self._batches[place]
        scale, direction = found.direction or (0.0, [])
        with RandomState.capture(step.device).replayed(), torch.no_grad():
            forward, (f, y, *_) = model.run(lambda: model.record(batch, step.device), model.buffers())
            (h,) = step.jvp(model, forward, {i: step.parameters[i].detach() for i in step.active}, direction)
        return f, y, scale * h


@torch.no_grad()
def shown(module: Any, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return images, predictions and targets of chosen instances; ``None`` if the training data have no images.

    Args:
        module: The user's module, in its run.
        chosen: Indices of the training data set.
    """
    loader, was_training = train_source(module.trainer), module.training
    with RandomState.capture(module.device).replayed():
        batch = transferred(module, loader.collate_fn([loader.dataset[i] for i in chosen]), False)
        images = next((t for t in tensors_in(batch) if t.ndim == 4 and t.shape[1] in (1, 3)), None)
        if images is None:
            return None
        module.eval()
        predictions, target, *_ = module.adalfl_predict(batch)
        module.train(was_training)
    return images, predictions, target
