"""Which instances a training batch holds: what its loader's sampler has drawn, seen as it passes."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

_REMEDY = (
    "Say which instances a batch holds, in a method of {name}:\n\n"
    "    def adalfl_index(self, batch):\n"
    "        return batch['index']  # whole numbers, one for each instance\n"
)


class RecordedIndices:
    """A sampler that notes what is drawn from it; in all else, and in a copy, it is the one inside.

    Args:
        sampler: A batch sampler; or a sampler, of a loader without batches.
    """

    def __init__(self, sampler: Any) -> None:
        vars(self).update(_sampler=sampler, _passes=[], _now=None)

    def __iter__(self) -> Iterator[Any]:
        drawn = iter(self._sampler)
        has_state = hasattr(drawn, "state_dict") and hasattr(drawn, "load_state_dict")
        self._passes.append((_StatefulPass if has_state else _Pass)(drawn))
        return self._passes[-1]

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_sampler"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._sampler, name, value)

    def __copy__(self) -> Any:
        return copy.copy(self._sampler)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._sampler, memo)

    def of_batch(self, batch_idx: int, loader: Any) -> list[int]:
        """Return the indices of a batch; those of batches before it are forgotten.

        Args:
            batch_idx: Lightning's, which counts from the epoch's first batch.
            loader: Whose sampler this is.

        Raises:
            TypeError: If they are no whole numbers.
        """
        now = self._now
        if now is None or batch_idx < now.position:
            now = self._begun(batch_idx, loader)
        while now.position < batch_idx:
            now.position += 1
            if now.drawn:
                now.drawn.popleft()
        if not now.drawn:
            raise ValueError(
                "a batch came that no sampler has drawn; the loader cuts or joins batches. "
                + _REMEDY.format(name="your module")
            )
        found = now.drawn[0]
        found = list(found) if hasattr(found, "__iter__") else [found]
        if not all(hasattr(index, "__index__") for index in found):
            raise TypeError(f"a sampler drew {found[:3]}, which are no indices. " + _REMEDY.format(name="your module"))
        return found

    def _begun(self, batch_idx: int, loader: Any) -> _Pass:
        """Return the pass that Lightning has begun; a user may have gone through the loader too."""
        drawn = [one for one in self._passes if one.count]
        # The trainer draws its first pass before any callback can, and later ones after the last hook of an epoch.
        now = drawn[0] if self._now is None else drawn[-1]
        # A fit may go on within an epoch. A loader without a state begins anew then; one with a state may have drawn
        # what it goes on behind.
        has_state = hasattr(loader, "load_state_dict")
        yielded = getattr(getattr(loader, "_iterator", None), "_sampler_iter_yielded", None)
        is_behind = now.count == yielded if yielded is not None else now.count > batch_idx
        now.position = 0 if has_state and is_behind else batch_idx
        vars(self).update(_now=now, _passes=[])
        return now


class _Pass(Iterator[Any]):
    def __init__(self, inner: Any) -> None:
        self.inner, self.drawn, self.count, self.position = inner, deque[Any](), 0, 0

    def __next__(self) -> Any:
        found = next(self.inner)
        self.drawn.append(found)
        self.count += 1
        return found


class _StatefulPass(_Pass):
    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


def record(loader: Any, name: str) -> None:
    """Have the indices noted that a map-style loader draws from now on.

    Args:
        loader: The training loader, before anything is drawn from it.
        name: Of the module's class, for the error.

    Raises:
        ValueError: If there are no indices.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = type(getattr(loader, "dataset", loader)).__name__
        raise ValueError(f"the instances of {what} have no index to be told apart by. " + _REMEDY.format(name=name))
    if recorded(loader) is None:
        kind = "sampler" if loader.batch_sampler is None else "batch_sampler"
        _put(loader, kind, RecordedIndices(getattr(loader, kind)))


def forget(loader: Any) -> None:
    """Make a loader what it was before :func:`record`."""
    for kind, sampler in list(vars(loader).items()):
        if isinstance(sampler, RecordedIndices):
            _put(loader, kind, sampler._sampler)


def recorded(loader: Any) -> RecordedIndices | None:
    """Return what notes the indices of a loader, if anything does."""
    found = (getattr(loader, kind, None) for kind in ("batch_sampler", "sampler"))
    return next((sampler for sampler in found if isinstance(sampler, RecordedIndices)), None)


def unrecorded(loader: Any) -> Any:
    """Return a loader as it was before :func:`record`; a copy, where it is recorded."""
    if recorded(loader) is None:
        return loader
    own = copy.copy(loader)
    vars(own)["_iterator"] = None
    forget(own)
    return own


def _put(loader: Any, kind: str, sampler: Any) -> None:
    vars(loader)[kind] = sampler  # a loader refuses to have it set in the plain way
    if getattr(loader, "_iterator", None) is not None:  # whose workers stay from pass to pass
        loader._iterator._index_sampler = sampler
