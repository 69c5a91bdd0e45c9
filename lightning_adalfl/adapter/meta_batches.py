"""Held-out batches, forever, from what the user's own loader would draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_adalfl.adapter.lightning_private import is_a, train_source, transferred, val_source
from lightning_adalfl.adapter.private_loader import private_copy, start, twin
from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.learning.base_step import BaseStep
from lightning_adalfl.learning.hypergradient import Hypergradient
from lightning_adalfl.learning.recorded_forward import RandomState

# What a stream of random numbers is for: streams of two purposes, seeds or passes have nothing in common.
META, OFFLINE_BASE, OFFLINE_META, MASKS, DRAWS, PROBES = range(6)


def derived_seed(purpose: int, seed: int, number: int = 0) -> int:
    """Return a seed that no other purpose, seed or number has."""
    return int(np.random.SeedSequence([purpose, seed, number]).generate_state(1)[0])


class EndlessBatches:
    """Goes through a loader again and again, and can say where it is.

    It seeds the global generators at each pass, so draw from it under a random stream of its own.

    Args:
        loader: Makes the loader anew; called at each pass, so that data that are reloaded are seen.
        seed: Of the order in which it draws.
        purpose: Of the batches.
    """

    def __init__(self, loader: Callable[[], Any], seed: int, purpose: int = META) -> None:
        self._loader = loader
        self._seed = seed
        self._purpose = purpose
        self._pass = 0
        self._drawn = 0
        self._iterator: Iterator[Any] | None = None
        self._is_combined = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def open(self) -> None:
        """Make the loader, so that one that cannot serve is refused; nothing is drawn."""
        self._iterator = self._iterator or self._start()

    def __next__(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = self._start()
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self._drawn == 0:
                    break
                self._iterator, self._pass, self._drawn = None, self._pass + 1, 0
                continue
            self._drawn += 1
            # Lightning's CombinedLoader yields (batch, batch_idx, dataloader_idx).
            return batch[0] if self._is_combined else batch
        raise ValueError(
            "the loader of held-out batches gave none; is its data set empty, or smaller than one batch with "
            "`drop_last=True`?"
        )

    def _start(self) -> Iterator[Any]:
        seed = derived_seed(self._purpose, self._seed, self._pass)
        loader = self._loader()
        self._is_combined = is_a(loader, "CombinedLoader")
        # What a user's hook returns may be a loader that is in use elsewhere.
        return start(loader if self._is_combined or hasattr(loader, "__next__") else twin(loader, {}), seed)

    def state_dict(self) -> dict[str, int]:
        """Return the position: passes through the data, and batches drawn in this one."""
        return {"seed": self._seed, "pass": self._pass, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; the batches before it in its pass are drawn and dropped."""
        self._seed, self._pass, self._drawn = state["seed"], state["pass"], 0
        self._iterator = None
        for _ in range(state["drawn"]):
            next(self)


class HeldOutBatches:
    """A few held-out batches to look at, the same through the whole run and in one that is resumed.

    Random numbers, modes and buffers of the run stay as they are.

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


def meta_loader(trainer: Any, config: AdaLFLConfig) -> Any:
    """Return a loader of held-out batches, apart from the user's."""
    found, size = _meta_loader(trainer, config), config.meta_batch_size
    if size is not None and _batch_size(found) != size:
        raise ValueError(
            f"`meta_batch_size` is {size}, and the loader of held-out batches makes its own, with a sampler or in "
            "another way. Set the size there, and leave `meta_batch_size` out."
        )
    return found


def _meta_loader(trainer: Any, config: AdaLFLConfig) -> Any:
    chosen, size = config.meta_data, config.meta_batch_size or _batch_size(train_source(trainer))
    if chosen == "train":
        return train_loader(trainer, config.meta_batch_size)
    if not isinstance(chosen, (str, int)):
        return private_copy(chosen, "`meta_data`", config.meta_batch_size, _replicas(trainer))
    loaders = val_source(trainer)
    several = list(loaders.values()) if isinstance(loaders, dict) else loaders
    several = list(several) if isinstance(several, (list, tuple)) else [several]
    if loaders is None or not several:
        raise ValueError(
            f"`meta_data={chosen!r}` needs validation data, and there is no validation loader. Give one to `fit`, set "
            "`AdaLFLConfig(meta_data=loader)` or `meta_data='train'`, or override `adalfl_meta_dataloader()`."
        )
    if isinstance(chosen, str) and len(several) > 1:
        raise ValueError(
            f"there are {len(several)} validation loaders; say which one the meta-objective uses with "
            "`AdaLFLConfig(meta_data=0)`, or override `adalfl_meta_dataloader()`."
        )
    index = 0 if isinstance(chosen, str) else chosen
    if index >= len(several):
        raise ValueError(f"`meta_data` is {index} and there are {len(several)} validation loaders; give one below.")
    limit = trainer.limit_val_batches
    return private_copy(several[index], f"`meta_data={chosen!r}`", size, _replicas(trainer), limit)


def transferred_meta_batch(module: Any, batch: Any, config: AdaLFLConfig) -> Any:
    """Pass a held-out batch through the transfer hooks, in the stage that its data are of."""
    index = config.meta_data if isinstance(config.meta_data, int) else 0
    return transferred(module, batch, config.meta_data == "train", index)


def train_loader(trainer: Any, batch_size: int | None = None) -> Any:
    """Return a loader over the training data, apart from the user's."""
    loaders = train_source(trainer)
    if loaders is None:
        raise ValueError("there are no training data to draw from; give `fit` a loader, or AdaLFLInit one of its own.")
    limit = trainer.limit_train_batches
    return private_copy(loaders, "the training data", batch_size, _replicas(trainer), limit)


def _batch_size(loaders: Any) -> int | None:
    if is_a(loaders, "CombinedLoader"):
        loaders = loaders.flattened[0]
    size = getattr(loaders, "batch_size", None) or getattr(getattr(loaders, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _replicas(trainer: Any) -> tuple[int, int]:
    return trainer.world_size, trainer.global_rank
