"""Held-out batches, forever, from what the user's own loader would draw."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lightning_adalfl.adapter.lightning_private import is_a, train_source, val_source
from lightning_adalfl.config import AdaLFLConfig


class EndlessBatches:
    """Goes through a loader again and again, and can say where it is.

    It seeds torch's global generator at each pass, so draw from it under a random stream of its own.

    Args:
        loader: Makes the loader anew; called at each pass, so that data that are reloaded are seen.
        seed: Of the order in which it draws; one for each purpose.

    Raises:
        ValueError: While iterating, if the loader yields no batch.
    """

    def __init__(self, loader: Callable[[], Any], seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self._pass = 0
        self._drawn = 0
        self._iterator: Iterator[Any] | None = None
        self._is_combined = False

    def __iter__(self) -> Iterator[Any]:
        return self

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
        # A stream for each pass that no other purpose or pass has.
        seed = int(np.random.SeedSequence([self._seed, self._pass]).generate_state(1)[0])
        torch.manual_seed(seed)  # a user's loader may draw its order from the global generator
        loader = self._loader()
        self._is_combined = is_a(loader, "CombinedLoader")
        for i, generator in enumerate(_generators(loader)):
            _reseed(generator, seed + i)
        for sampler in _samplers(loader):
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(seed % 2**31)
        return iter(loader)

    def state_dict(self) -> dict[str, int]:
        """Return the position: passes through the data, and batches drawn in this one."""
        return {"seed": self._seed, "pass": self._pass, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; the batches before it in its pass are drawn and dropped."""
        self._seed, self._pass, self._drawn = state["seed"], state["pass"], 0
        self._iterator = None
        for _ in range(state["drawn"]):
            next(self)


def meta_loader(trainer: Any, config: AdaLFLConfig) -> Any:
    """Return a loader of held-out batches, apart from the user's.

    Raises:
        ValueError: If there are no such data, or it is not clear which.
    """
    chosen, size = config.meta_data, config.meta_batch_size or _batch_size(train_source(trainer))
    if chosen == "train":
        return train_loader(trainer, config.meta_batch_size)
    if not isinstance(chosen, (str, int)):
        return private_copy(chosen, "`meta_data`", config.meta_batch_size, _replicas(trainer))
    loaders = val_source(trainer)
    if loaders is None:
        raise ValueError(
            f"`meta_data={chosen!r}` needs validation data, and there is no validation loader. Give one to `fit`, set "
            "`AdaLFLConfig(meta_data=loader)` or `meta_data='train'`, or override `adalfl_meta_dataloader()`."
        )
    is_several = isinstance(loaders, (list, tuple))
    if is_several and (len(loaders) == 1 or isinstance(chosen, int)):
        index = chosen if isinstance(chosen, int) else 0
        if index >= len(loaders):
            raise ValueError(f"`meta_data` is {index} and there are {len(loaders)} validation loaders; give one below.")
        loaders = loaders[index]
    elif is_several or isinstance(loaders, dict):
        raise ValueError(
            f"there are {len(loaders)} validation loaders; say which one the meta-objective uses with "
            "`AdaLFLConfig(meta_data=0)`, or override `adalfl_meta_dataloader()`."
        )
    limit = trainer.limit_val_batches
    return private_copy(loaders, "`meta_data='val'`", size, _replicas(trainer), limit)


def train_loader(trainer: Any, batch_size: int | None = None) -> Any:
    """Return a loader over the training data, apart from the user's."""
    loaders = train_source(trainer)
    if loaders is None:
        raise ValueError("there are no training data to draw from; give `fit` a loader, or AdaLFLInit one of its own.")
    limit = trainer.limit_train_batches
    return private_copy(loaders, "the training data", batch_size, _replicas(trainer), limit)


def private_copy(
    loader: Any,
    purpose: str,
    batch_size: int | None = None,
    replicas: tuple[int, int] = (1, 0),
    limit: float | int | None = None,
) -> Any:
    """Return a loader that draws as the user's does, and shares no iterator, worker or generator with it.

    A plain DataLoader, with the samplers that torch chooses, is shuffled, and draws batches of ``batch_size``; any
    other goes on in its own way.

    Args:
        loader: The user's.
        purpose: What it is for, in error messages.
        batch_size: Instances in a batch; by default as the user's.
        replicas: World size and rank, for a distributed sampler.
        limit: The Trainer's ``limit_*_batches``: a number of batches or a part of them.

    Raises:
        ValueError: For what can be gone through only once.
    """
    if is_a(loader, "CombinedLoader"):
        twin = copy.copy(loader)
        twin.flattened = [private_copy(part, purpose, batch_size, replicas, limit) for part in loader.flattened]
        return twin
    if _is_plain(loader):
        return _redrawn(loader, batch_size or loader.batch_size, replicas, limit)
    if not hasattr(loader, "__iter__") or hasattr(loader, "__next__"):
        raise ValueError(
            f"{purpose} is {type(loader).__name__}, which can be gone through only once, so that nothing can be drawn "
            "from it beside your own use. Give a loader, or override `adalfl_meta_dataloader()`."
        )
    return _twin(loader)


def _is_plain(loader: Any) -> bool:
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
        and not (type(loader.sampler) is RandomSampler and loader.sampler.replacement)
    )


def _redrawn(
    loader: DataLoader[Any], batch_size: int, replicas: tuple[int, int], limit: float | int | None
) -> DataLoader[Any]:
    dataset: Any = loader.dataset
    length = len(dataset)
    # One batch, the number 1, is not all of them, the part 1.0.
    if limit is not None and limit != 0 and not (isinstance(limit, float) and limit == 1.0):
        own_size = loader.batch_size or batch_size
        batches = math.ceil(length / own_size)
        kept = int(limit) if isinstance(limit, int) else int(batches * limit)
        dataset = Subset(dataset, range(min(length, max(kept, 1) * own_size)))
        length = len(dataset)
    generator = torch.Generator()
    sampler: Any = RandomSampler(dataset, generator=generator)
    if replicas[0] > 1:
        sampler = DistributedSampler(dataset, *replicas, shuffle=True)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        # A last batch of another size would weigh its instances more than the others.
        drop_last=length >= batch_size * replicas[0],
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        # Workers would outlive the pass, whose loader is made anew.
        persistent_workers=False,
    )


def _twin(loader: Any) -> Any:
    """Return a shallow copy of a loader and its samplers, with generators and iterators of its own."""
    twin = copy.copy(loader)
    attributes = vars(twin) if hasattr(twin, "__dict__") else {}
    attributes.pop("_iterator", None)
    if isinstance(twin, DataLoader):
        attributes["_iterator"] = None
        if twin.num_workers:
            attributes["persistent_workers"] = False
    for name, value in list(attributes.items()):
        if isinstance(value, _GENERATORS):
            own = torch.Generator(value.device) if isinstance(value, torch.Generator) else copy.deepcopy(value)
            attributes[name] = own
        elif name in ("sampler", "batch_sampler"):
            attributes[name] = _twin(value)
    batch_sampler = attributes.get("batch_sampler")
    if batch_sampler is not None and getattr(loader.batch_sampler, "sampler", None) is getattr(loader, "sampler", 0):
        batch_sampler.sampler = attributes["sampler"]
    return twin


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _parts(loader: Any) -> list[Any]:
    loaders = loader.flattened if is_a(loader, "CombinedLoader") else [loader]
    found = []
    for item in loaders:
        found += [item, *_samplers(item)]
    return found


def _samplers(loader: Any) -> list[Any]:
    found: list[Any] = []
    for item in loader.flattened if is_a(loader, "CombinedLoader") else [loader]:
        batch_sampler = getattr(item, "batch_sampler", None)
        candidates = (getattr(item, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        found += [s for s in candidates if s is not None and not any(s is known for known in found)]
    return found


def _generators(loader: Any) -> list[Any]:
    found: list[Any] = []
    for part in _parts(loader):
        for value in vars(part).values() if hasattr(part, "__dict__") else ():
            if isinstance(value, _GENERATORS) and not any(value is known for known in found):
                found.append(value)
    return found


def _reseed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)


def _batch_size(loaders: Any) -> int | None:
    if is_a(loaders, "CombinedLoader"):
        loaders = loaders.flattened[0]
    size = getattr(loaders, "batch_size", None) or getattr(getattr(loaders, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _replicas(trainer: Any) -> tuple[int, int]:
    return trainer.world_size, trainer.global_rank
