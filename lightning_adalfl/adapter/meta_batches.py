"""Batches for meta-objective and offline phase: drawn forever, shuffled, apart from the user's loaders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler, Subset

from lightning_adalfl.config import AdaLFLConfig


class EndlessBatches:
    """Goes through a loader again and again, reshuffled each time, and can say where it is.

    It seeds torch's global generator at each pass, so draw from it under a random stream of its own.

    Args:
        loader: A loader from :func:`private_loader`, or the user's own.
        seed: Of the order in which private loaders draw.

    Raises:
        MisconfigurationException: While iterating, if the loader yields no batch.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self._epoch = 0
        self._drawn = 0
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = self._start()
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self._drawn == 0:
                    break
                self._iterator, self._epoch, self._drawn = None, self._epoch + 1, 0
                continue
            self._drawn += 1
            # A CombinedLoader yields (batch, batch_idx, dataloader_idx).
            return batch[0] if isinstance(self._loader, CombinedLoader) else batch
        raise MisconfigurationException(
            f"{self._loader!r} gave no batch for the meta-objective; is its data set empty, or smaller than one batch "
            "with `drop_last=True`?"
        )

    def _start(self) -> Iterator[Any]:
        torch.manual_seed(self._seed + self._epoch)  # a user's loader may draw its order from the global generator
        for generator, sampler in _drawing(self._loader):
            if generator is not None:
                generator.manual_seed(self._seed + self._epoch)
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(self._seed + self._epoch)
        return iter(self._loader)

    def state_dict(self) -> dict[str, int]:
        """Return the position: passes through the data, and batches drawn in this one."""
        return {"seed": self._seed, "epoch": self._epoch, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; the batches before it are drawn and dropped."""
        self._seed, self._epoch, self._drawn = state["seed"], state["epoch"], 0
        self._iterator = None
        for _ in range(state["drawn"]):
            next(self)


def private_meta_loader(trainer: pl.Trainer, config: AdaLFLConfig) -> Any:
    """Return a loader of one's own for meta batches, over the validation or the training data.

    Raises:
        MisconfigurationException: If there are no validation data, or several validation loaders.
    """
    if config.meta_data == "train":
        return private_train_loader(trainer, config.meta_batch_size)
    # Lightning keeps the loaders given to `fit` here alone until its loops begin.
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    loaders = source.dataloader() if source.is_defined() and source.instance is not None else None
    if loaders is None:
        raise MisconfigurationException(
            "`meta_data='val'` needs validation data, and there is no validation loader. Give one to `fit`, set "
            "`AdaLFLConfig(meta_data='train')`, or override `adalfl_meta_dataloader()`."
        )
    if not isinstance(loaders, DataLoader) and isinstance(loaders, (list, tuple)) and len(loaders) == 1:
        loaders = loaders[0]
    if not isinstance(loaders, DataLoader):
        raise MisconfigurationException(
            f"`meta_data='val'` needs one validation DataLoader; got {type(loaders).__name__}. Say which data the "
            "meta-objective uses by overriding `adalfl_meta_dataloader()`."
        )
    return private_loader(
        loaders, "the meta-objective", config.meta_batch_size, trainer.limit_val_batches, _replicas(trainer)
    )


def private_train_loader(trainer: pl.Trainer, batch_size: int | None = None) -> Any:
    """Return a shuffling loader of one's own over the training data."""
    source = trainer.fit_loop._data_source
    return private_loader(
        source.dataloader(), "the training data", batch_size, trainer.limit_train_batches, _replicas(trainer)
    )


def _replicas(trainer: pl.Trainer) -> tuple[int, int]:
    return trainer.world_size, trainer.global_rank


def private_loader(
    loaders: Any,
    purpose: str,
    batch_size: int | None = None,
    limit: float | int | None = None,
    replicas: tuple[int, int] = (1, 0),
) -> Any:
    """Return a shuffling loader over the same data sets, which shares no iterator, worker or generator with the user's.

    Args:
        loaders: What the user gave the Trainer: a DataLoader, a CombinedLoader, or containers of DataLoaders.
        purpose: What it is for, in error messages.
        batch_size: Instances in a batch; by default that of the user's loader.
        limit: The Trainer's ``limit_*_batches``: a number of batches or a part of them.
        replicas: World size and rank, for a distributed sampler.

    Raises:
        MisconfigurationException: For data that cannot be drawn at random: an IterableDataset, or no DataLoader at all.
    """

    def rebuild(loader: DataLoader[Any]) -> DataLoader[Any]:
        return _rebuilt(loader, purpose, batch_size, limit, replicas)

    if isinstance(loaders, CombinedLoader):
        return CombinedLoader(tree_map_only(DataLoader, rebuild, loaders.iterables), loaders._mode)
    if isinstance(loaders, DataLoader):
        return rebuild(loaders)
    if isinstance(loaders, (list, tuple, dict)) and loaders:
        return CombinedLoader(tree_map_only(DataLoader, rebuild, loaders), "max_size_cycle")
    raise MisconfigurationException(
        f"{purpose} needs a DataLoader whose data can be drawn at random; got {type(loaders).__name__}. "
        f"Return a loader from `adalfl_meta_dataloader()` (meta batches) or give `AdaLFLInit(train_dataloader=...)`."
    )


def _rebuilt(
    loader: DataLoader[Any], purpose: str, batch_size: int | None, limit: float | int | None, replicas: tuple[int, int]
) -> DataLoader[Any]:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise MisconfigurationException(
            f"{purpose} cannot be drawn at random from {type(dataset).__name__}, an IterableDataset. "
            "Return a loader from `adalfl_meta_dataloader()` (meta batches) or give `AdaLFLInit(train_dataloader=...)`."
        )
    size = batch_size or loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        raise MisconfigurationException(
            f"{purpose}: the loader has no `batch_size` (a batch sampler of its own). Set `meta_batch_size` in "
            "AdaLFLConfig."
        )
    length = len(dataset)  # type: ignore[arg-type]
    # One batch, the number 1, is not all of them, the part 1.0.
    if limit is not None and limit != 0 and not (isinstance(limit, float) and limit == 1.0):
        batches = math.ceil(length / (loader.batch_size or size))
        kept = int(limit) if isinstance(limit, int) else int(batches * limit)
        dataset = Subset(dataset, range(min(length, max(kept, 1) * (loader.batch_size or size))))
        length = len(dataset)
    generator = torch.Generator()
    sampler: Sampler[Any]
    if replicas[0] > 1:
        sampler = DistributedSampler(dataset, *replicas, shuffle=True)
    else:
        sampler = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        # A last batch of another size would weigh its instances more than the others.
        drop_last=length >= size * replicas[0],
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
        persistent_workers=loader.persistent_workers,
    )


def _drawing(loader: Any) -> list[tuple[torch.Generator | None, Any]]:
    loaders = loader.flattened if isinstance(loader, CombinedLoader) else [loader]
    return [(getattr(item, "generator", None), getattr(item, "sampler", None)) for item in loaders]


def moved_to_device(module: pl.LightningModule, batch: Any) -> Any:
    """Pass a batch through the precision's and the module's own transfer hooks."""
    batch = module.trainer.precision_plugin.convert_input(batch)
    batch = module.on_before_batch_transfer(batch, 0)
    return module.trainer.strategy.batch_to_device(batch, module.device, 0)
