"""The shapes that a learned loss took over training, in memory, in a checkpoint and in a file."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_adalfl.arguments import whole_number
from lightning_adalfl.atomic_file import atomic_write
from lightning_adalfl.loss_shape import LossShape, PairwiseLoss, evaluate_loss_shape

__all__ = ["LossShape", "LossShapeHistory", "PairwiseLoss", "evaluate_loss_shape"]

_FORMAT_VERSION = 1
_SHARED = ("targets", "grid", "heat_targets", "heat_predictions")  # the same in every snapshot of a history
_STACKED = ("loss", "slope", "heat_loss")  # one row a snapshot
_MAX_FILE_BYTES = 1 << 28  # far above any history; a file that unpacks to more is not one


class LossShapeHistory:
    """Snapshots of one learned loss over training, bounded in number by thinning.

    Every snapshot is kept at first. Each time that there are more than `max_snapshots`, every other one is dropped and
    from then on half as many are kept, so that what remains is evenly spaced; the first and the newest always stay.

    Args:
        max_snapshots: Upper bound on the number of snapshots, at least 2.

    Example::

        figure = plot_loss_shapes(LossShapeHistory.load("lightning_logs/version_0/loss_shape.npz"))
        figure.savefig("loss_shape.png")
    """

    def __init__(self, max_snapshots: int = 64) -> None:
        self.max_snapshots = whole_number("max_snapshots", max_snapshots, 2)
        self._shapes: list[LossShape] = []
        self._indices: list[int] = []  # position of each kept snapshot among all that were ever appended
        self._count = 0
        self._stride = 1

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[LossShape]:
        return iter(self._shapes)

    def __getitem__(self, index: int) -> LossShape:
        return self._shapes[index]

    @property
    def steps(self) -> list[int]:
        """Base step of every snapshot, ascending."""
        return [shape.step for shape in self._shapes]

    def copy(self) -> LossShapeHistory:
        """A history of its own over the same snapshots."""
        twin = LossShapeHistory(self.max_snapshots)
        twin._shapes, twin._indices = list(self._shapes), list(self._indices)
        twin._count, twin._stride = self._count, self._stride
        return twin

    def accepts(self, shape: LossShape) -> bool:
        """Whether a snapshot has the task and the grids of those already here."""
        if not self._shapes:
            return True
        first = self._shapes[0]
        return shape.task == first.task and all(_same(getattr(shape, n), getattr(first, n)) for n in _SHARED)

    def append(self, shape: LossShape) -> None:
        """Adds the newest snapshot, and thins the history where it has become too long.

        Raises:
            ValueError: If the snapshot is not newer than the last one, or has another task or grid than the others.
        """
        if not self.accepts(shape):
            raise ValueError(
                f"the snapshot of step {shape.step} has another task or grid than the history; evaluate it with the "
                "same arguments, or begin a new LossShapeHistory."
            )
        if self._shapes and shape.step <= self._shapes[-1].step:
            raise ValueError(
                f"step={shape.step} is not after the last snapshot's step {self._shapes[-1].step}; append snapshots in "
                "the order of training, or begin a new LossShapeHistory."
            )
        if self._indices and self._indices[-1] % self._stride:
            self._shapes.pop()  # it was kept only as the newest
            self._indices.pop()
        self._shapes.append(shape)
        self._indices.append(self._count)
        self._count += 1
        self._thin()

    def _thin(self) -> None:
        while len(self._shapes) > self.max_snapshots:
            self._stride *= 2
            newest = len(self._shapes) - 1
            keep = [i for i, index in enumerate(self._indices) if index % self._stride == 0 or i == newest]
            self._shapes = [self._shapes[i] for i in keep]
            self._indices = [self._indices[i] for i in keep]

    def state_dict(self) -> dict[str, Any]:
        """The history as tensors and plain values, loadable with `torch.load(..., weights_only=True)`."""
        state: dict[str, Any] = {
            "version": _FORMAT_VERSION,
            "stride": self._stride,
            "count": self._count,
            "indices": list(self._indices),
            "steps": self.steps,
        }
        if self._shapes:
            first = self._shapes[0]
            state["task"] = first.task
            names = [name for name in (*_SHARED, *_STACKED) if getattr(first, name) is not None]
            for name in names:
                parts = [getattr(shape, name) for shape in self._shapes]
                state[name] = parts[0].clone() if name in _SHARED else torch.stack(parts)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the snapshots of a `state_dict()`; `max_snapshots` stays as it is, so a longer history is thinned.

        Raises:
            ValueError: If the state is not that of a history, or comes from a newer version of the format.
        """
        version = state.get("version")
        if not isinstance(version, int) or version < 1:
            raise ValueError("it holds no history of loss shapes; give what LossShapeHistory wrote")
        if version > _FORMAT_VERSION:
            raise ValueError(
                f"its format version {version} is newer than {_FORMAT_VERSION}, which this version reads; upgrade "
                "lightning_adalfl"
            )
        try:
            steps, indices = [int(step) for step in state["steps"]], [int(index) for index in state["indices"]]
            stride, count = int(state["stride"]), int(state["count"])
            shared = {name: state[name] for name in _SHARED if name in state}
            stacked = {name: state[name] for name in _STACKED if name in state}
            shapes = [
                LossShape(state["task"], step, **shared, **{name: rows[i] for name, rows in stacked.items()})
                for i, step in enumerate(steps)
            ]
            lengths = {len(steps), len(indices), *(len(rows) for rows in stacked.values())}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"its entries do not fit together ({error!r}); give what LossShapeHistory wrote"
            ) from error
        ordered = all(a < b for numbers in (steps, indices, [-1, *indices, count]) for a, b in pairwise(numbers))
        if not ordered or len(lengths) != 1 or stride < 1:
            raise ValueError("its steps do not fit together; give what LossShapeHistory wrote")
        self._shapes, self._indices, self._count, self._stride = shapes, indices, count, stride
        self._thin()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the history as an npz file without pickled objects; a reader sees the old file or the new one.

        Raises:
            ValueError: If there is no snapshot yet.
        """
        if not self._shapes:
            raise ValueError("the history is empty; append a snapshot before saving it.")
        arrays = {name: np.asarray(value) for name, value in self.state_dict().items()}
        arrays["max_snapshots"] = np.asarray(self.max_snapshots)
        with atomic_write(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LossShapeHistory:
        """Reads what `save` wrote. Nothing in the file is run.

        Raises:
            ValueError: If the file is truncated, corrupt, of another kind, or of a newer format version.
        """
        path = Path(path)
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"cannot read {path}: it is too large for a history of loss shapes; give another file.")
        data = path.read_bytes()
        try:
            state = _unpack(data)
        except Exception as error:  # whatever zipfile, zlib or numpy make of bytes that are not theirs
            raise ValueError(
                f"cannot read {path}: it is truncated, corrupt or no npz file ({error}); restore it from a copy, or "
                "let LossShapeLogger write it again from a checkpoint."
            ) from error
        try:
            history = cls(state.pop("max_snapshots", 64))
            history.load_state_dict(state)
        except (ValueError, TypeError) as error:
            raise ValueError(f"cannot read {path}: {error}.") from error
        return history


def _unpack(data: bytes) -> dict[str, Any]:
    """The entries of an npz file as plain values (scalars and strings) and tensors."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > _MAX_FILE_BYTES:
            raise ValueError("it unpacks to more than any history holds")
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return {name: value.item() if value.ndim == 0 else torch.from_numpy(value) for name, value in arrays.items()}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
