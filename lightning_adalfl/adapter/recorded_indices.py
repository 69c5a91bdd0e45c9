"""Which instances a training batch holds, as its batch sampler has drawn them; and what chosen ones look like."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_adalfl.adapter.lightning_private import train_source, transferred
from lightning_adalfl.learning.recorded_forward import RandomState
from lightning_adalfl.learning.torch_private import tensors_in

REMEDY = (
    "Say which instances a batch holds, in a method of your module:\n\n"
    "    def adalfl_index(self, batch):\n"
    "        return batch['index']  # whole numbers from 0, one for each instance\n"
)


class RecordedIndices:
    """A batch sampler that notes what is drawn from it; in all else it is the one inside."""

    def __init__(self, sampler: Any) -> None:
        vars(self)["_sampler"] = sampler

    def __iter__(self) -> Iterator[Any]:
        return _Pass(iter(self._sampler))

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("_sampler"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sampler, name, value)


class _Pass(Iterator[Any]):
    """One pass through a batch sampler; workers draw from it ahead of the batch that is trained on."""

    def __init__(self, inner: Iterator[Any]) -> None:
        self.inner, self.drawn = inner, deque[Any]()
        self.position: int | None = None

    def __next__(self) -> Any:
        found = next(self.inner)
        self.drawn.append(found)
        return found


def record(loader: Any) -> None:
    """Have the indices noted that a loader draws from now on.

    Args:
        loader: The training loader, before anything is drawn from it.
    """
    is_plain = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not is_plain or loader.batch_sampler is None or hasattr(loader, "load_state_dict"):
        what = f" over {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else ""
        raise ValueError(f"a {type(loader).__name__}{what} does not tell which instances it draws. {REMEDY}")
    if not isinstance(loader.batch_sampler, RecordedIndices):
        _put(loader, RecordedIndices(loader.batch_sampler))


def unrecorded(loader: Any) -> Any:
    """Return a loader as it was before :func:`record`; a copy, where it is recorded."""
    if not isinstance(getattr(loader, "batch_sampler", None), RecordedIndices):
        return loader
    own = copy.copy(loader)
    vars(own)["_iterator"] = None
    forget(own)
    return own


def forget(loader: Any) -> None:
    """Make a loader, or several, what they were before :func:`record`."""
    for one in getattr(loader, "flattened", [loader]):
        if isinstance(getattr(one, "batch_sampler", None), RecordedIndices):
            _put(one, one.batch_sampler._sampler)


def indices_of(iterator: Any, batch_idx: int) -> list[Any]:
    """Return the indices of a batch; those of batches before it are forgotten.

    Args:
        iterator: The DataLoader's, which the trainer takes the batches from.
        batch_idx: Of the batch. A resumed epoch begins with a number above zero, at the sampler's first batch.
    """
    now = getattr(iterator, "_sampler_iter", None)
    if not isinstance(now, _Pass):
        raise ValueError(f"batches come from a {type(iterator).__name__} and no single DataLoader. {REMEDY}")
    now.position = batch_idx if now.position is None else now.position
    while now.position < batch_idx and now.drawn:
        now.drawn.popleft()
        now.position += 1
    if not now.drawn:
        raise ValueError(f"batch {batch_idx} is none that its sampler has drawn. {REMEDY}")
    return list(now.drawn[0])


@torch.no_grad()
def shown(module: Any, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return images, predictions and targets of chosen instances; ``None`` if there are no images of one size.

    Args:
        module: The user's module, in its run.
        chosen: Indices of the training data set.
    """
    loader, modes = train_source(module.trainer), [(part, part.training) for part in module.modules()]
    if not isinstance(loader, DataLoader):
        return None
    with RandomState.capture(module.device).replayed():
        rows = [loader.dataset[i] for i in chosen]
        try:
            rows = loader.collate_fn(rows)
        except RuntimeError:  # images of several sizes, which came one by one
            return None
        batch = transferred(module, rows, False)
        images = next((t for t in tensors_in(batch) if t.ndim == 4 and t.shape[1] in (1, 3)), None)
        if images is None:
            return None
        module.eval()
        predictions, target, *_ = module.adalfl_predict(batch)
        for part, mode in modes:  # each by itself: a frozen part may be in another
            part.training = mode
    return images, predictions, target


def _put(loader: Any, sampler: Any) -> None:
    vars(loader)["batch_sampler"] = sampler  # a loader refuses to have it set in the plain way
    if getattr(loader, "_iterator", None) is not None:  # whose workers stay from pass to pass
        loader._iterator._index_sampler = sampler
