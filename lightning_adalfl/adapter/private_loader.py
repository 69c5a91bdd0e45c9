"""A loader that draws as the user's does, and shares no iterator, worker, sampler or generator with it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from lightning_adalfl.adapter.lightning_private import is_a
from lightning_adalfl.adapter.module_state import GENERATORS
from lightning_adalfl.adapter.recorded_indices import unrecorded


def private_copy(
    loader: Any,
    purpose: str,
    batch_size: int | None = None,
    replicas: tuple[int, int] = (1, 0),
    limit: float | int | None = None,
) -> Any:
    """Return a loader of one's own over the data of the user's.

    A plain DataLoader, with the samplers that torch chooses, is shuffled, and draws batches of ``batch_size``; any
    other goes on in its own way.

    Args:
        loader: The user's.
        purpose: What it is for, in error messages.
        batch_size: Instances in a batch; by default as the user's.
        replicas: World size and rank, for a distributed sampler.
        limit: The Trainer's ``limit_*_batches``: a number of batches or a part of them.
    """
    loader = unrecorded(loader)
    if is_a(loader, "CombinedLoader"):
        own = copy.copy(loader)
        own.flattened = [private_copy(part, purpose, batch_size, replicas, limit) for part in loader.flattened]
        return own
    if _is_plain(loader) and len(loader.dataset):
        return _redrawn(loader, batch_size or loader.batch_size, replicas, limit)
    once = next((x for x in (loader, getattr(loader, "dataset", None)) if hasattr(x, "__next__")), None)
    if once is not None or not hasattr(loader, "__iter__"):
        why = "which is no loader" if once is None else "which can be gone through only once"
        raise ValueError(
            f"{purpose} is {type(loader if once is None else once).__name__}, {why}, so that nothing can be drawn "
            "from it beside your own use. Give a loader, or override `adalfl_meta_dataloader()`."
        )
    return twin(loader, {})


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
    dataset: Any = _own_dataset(loader.dataset, {})
    # One batch, the number 1, is not all of them, the part 1.0.
    if limit is not None and limit != 0 and not (isinstance(limit, float) and limit == 1.0):
        own_size = loader.batch_size or batch_size
        kept = limit if isinstance(limit, int) else int(limit * math.ceil(len(dataset) / own_size))
        dataset = Subset(dataset, range(min(len(dataset), max(kept, 1) * own_size)))
    generator = torch.Generator()
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DistributedSampler(dataset, *replicas)
        if replicas[0] > 1
        else RandomSampler(dataset, generator=generator),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        # A last batch of another size would weigh its instances more than the others.
        drop_last=len(dataset) >= batch_size * replicas[0],
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
        # Workers would outlive the pass, whose loader is made anew.
        persistent_workers=False,
    )


def twin(value: Any, known: dict[int, Any]) -> Any:
    """Return a shallow copy of a loader, with loaders, samplers and generators of its own inside it.

    Args:
        value: A loader, a sampler or a generator.
        known: The copies so far, by what they are of; what is shared inside the user's is shared in the copy.
    """
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Generator):
        own: Any = torch.Generator(value.device)
    else:
        own = copy.deepcopy(value) if isinstance(value, GENERATORS) else copy.copy(value)
    known[id(value)] = own
    attributes = vars(own) if hasattr(own, "__dict__") else {}
    if isinstance(own, DataLoader):
        attributes["_iterator"] = None
        if own.num_workers:
            attributes["persistent_workers"] = False
    for name, item in list(attributes.items()):
        if name == "dataset":
            attributes[name] = _own_dataset(item, known)
        elif _moves(name, item):
            attributes[name] = twin(item, known)
    return own


def _moves(name: str, item: Any) -> bool:
    is_sampler = name in ("sampler", "batch_sampler") and item is not None
    return is_sampler or isinstance(item, (DataLoader, Sampler, *GENERATORS))


def _own_dataset(dataset: Any, known: dict[int, Any]) -> Any:
    """Return the user's data set; where it moves, or draws from generators of its own, a shallow copy."""
    held = vars(dataset).items() if hasattr(dataset, "__dict__") else ()
    inner = {name: _own_dataset(item, known) for name, item in held if name == "dataset"}
    changed = {name: item for name, item in inner.items() if item is not vars(dataset)[name]}
    changed.update({name: twin(item, known) for name, item in held if isinstance(item, GENERATORS)})
    if not changed and not isinstance(dataset, IterableDataset):
        return dataset
    own = copy.copy(dataset)
    vars(own).update(changed)
    return own


def start(loader: Any, seed: int) -> Iterator[Any]:
    """Return an iterator over a private loader whose every random choice follows from the seed.

    It seeds the global generators, from which a user's loader may draw its order.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed every accelerator, in milliseconds
    parts, generators = _inside(loader)
    for i, generator in enumerate(generators):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed + i)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed + i).state
        else:
            generator.seed((seed + i) % 2**32)
    for part in parts:
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(seed % 2**31)
    return iter(loader)


def _inside(loader: Any) -> tuple[list[Any], list[Any]]:
    """Return a loader with the loaders and samplers inside it, and all generators there and in the data."""
    parts: list[Any] = []
    generators: list[Any] = []
    seen: set[int] = set()
    waiting = [(item, False) for item in (loader.flattened if is_a(loader, "CombinedLoader") else [loader])]
    while waiting:
        item, is_data = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, GENERATORS):
            generators.append(item)
            continue
        if not is_data:
            parts.append(item)
        for name, inner in vars(item).items() if hasattr(item, "__dict__") else ():
            if name == "dataset" or _moves(name, inner):
                waiting.append((inner, is_data or name == "dataset"))
    return parts, generators
