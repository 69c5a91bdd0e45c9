"""φ over training: kept in bounded memory, read at any step, and read back from a file or a log folder."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor

from lightning_adalfl.checks import whole_number
from lightning_adalfl.files import PathLike, exists, kind_of, read_tensors, within, write_tensors
from lightning_adalfl.inspection.loss_shape import LossShape, classes_met, loss_shape, usual_look
from lightning_adalfl.losses.learned_loss import LOSS_KIND, LearnedLoss

HISTORY_KIND = "loss history"
FILE_NAME = "loss_history.safetensors"
_VERSION = 1


class LossHistory:
    """Snapshots of φ over base steps, and linear interpolation between them.

    A snapshot of step t is φ_t, with which the base step from θ_t to θ_{t+1} is taken. One is kept for every interval
    of steps. When there are more than ``max_snapshots``, the interval doubles; the first and the newest always stay.

    Args:
        every_n_steps: Base steps from one snapshot to the next, at first.
        max_snapshots: Upper bound on their number.
        is_added: Whether the loss is added to the user's own (``own_loss=True``), or trains alone.

    Attributes:
        description: The class and the options of the loss, as plain values.
        steps: The base step of every snapshot, ascending.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For one out of range.

    Example::

        history = LossHistory.load("lightning_logs/version_0/loss_history.safetensors")
        for step, batch in enumerate(train):
            learner.set_phi(history.at(step))
            ...  # a base step of the learner's
    """

    def __init__(self, every_n_steps: int = 100, max_snapshots: int = 64, is_added: bool = True) -> None:
        self.max_snapshots = whole_number("max_snapshots", max_snapshots, 2)
        self.is_added = is_added
        self._interval = whole_number("every_n_steps", every_n_steps)
        self.description: dict[str, Any] = {}
        self.steps: list[int] = []
        self._snapshots: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.steps)

    def accepts(self, loss: LearnedLoss) -> bool:
        """Return whether ``loss`` has the class and the options of the snapshots."""
        return self.description in ({}, loss.describe())

    def is_due(self, step: int) -> bool:
        """Return whether base step ``step`` is the first to be seen of its interval."""
        return not self.steps or self._slot(step) > self._slot(self.steps[-1])

    def append(self, step: int, loss: LearnedLoss) -> None:
        """Add φ as it is now; a newest snapshot that is not the first of its interval makes room for it.

        Args:
            step: Base steps taken.
            loss: ℓ_φ.

        Raises:
            ValueError: If ``step`` is not after the newest one, or the loss is of another structure.
        """
        last = self.steps[-1] if self.steps else -1
        if step <= last:
            raise ValueError(f"`step` {step} is not after {last}; append in the order of training.")
        description = loss.describe()
        if not self.accepts(loss):
            raise ValueError(f"`loss` is {description}, and the history is of {self.description}; begin a new one.")
        self.description = description
        if len(self) > 1 and self._slot(last) == self._slot(self.steps[-2]):
            del self.steps[-1], self._snapshots[-1]
        self.steps.append(step)
        self._snapshots.append({name: value.detach().cpu().clone() for name, value in loss.state_dict().items()})
        self._thin()

    def at(self, step: float) -> dict[str, Tensor]:
        """Return φ at base step ``step``: a snapshot bit for bit where there is one, else between two.

        Before the first snapshot and after the last one φ is constant.

        Raises:
            ValueError: If there is no snapshot.
        """
        if not self.steps:
            raise ValueError("the history is empty; append a snapshot first.")
        i = max(bisect_right(self.steps, step) - 1, 0)
        before = self._snapshots[i]
        if step <= self.steps[i] or i == len(self) - 1:
            return {name: value.clone() for name, value in before.items()}
        weight = (step - self.steps[i]) / (self.steps[i + 1] - self.steps[i])
        return {name: torch.lerp(value, self._snapshots[i + 1][name], weight) for name, value in before.items()}

    def loss_at(self, step: float) -> LearnedLoss:
        """Return the learned loss at base step ``step``, a module of its own."""
        return LearnedLoss.rebuild(self.description, self.at(step))

    def shapes(self, count: int = 24, **look: Any) -> list[LossShape]:
        """Return shapes to draw, oldest first: of the newest snapshot, the first, and others evenly between.

        Args:
            count: Upper bound on their number.
            **look: See :func:`~lightning_adalfl.inspection.loss_shape.loss_shape`; by default as the newest has it.
        """
        if not self.steps:
            return []
        newest = self.loss_at(self.steps[-1])
        given = {name: value for name, value in look.items() if value is not None}
        look = {"is_added": self.is_added, "classes": classes_met(newest), **usual_look(newest), **given}
        chosen = np.linspace(len(self) - 1, 0, min(whole_number("count", count), len(self))).round()
        shapes = []
        for i in chosen[::-1].astype(int):
            newest.load_state_dict(self._snapshots[i])
            shapes.append(loss_shape(newest, self.steps[i], **look))
        return shapes

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values, fit for ``torch.load(..., weights_only=True)``."""
        names = self._snapshots[0] if self._snapshots else {}
        return {
            "description": self.description,
            "interval": self._interval,
            "is_added": self.is_added,
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "phi": {name: torch.stack([snapshot[name] for snapshot in self._snapshots]) for name in names},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, thinned to ``max_snapshots``.

        Raises:
            ValueError: If its parts do not fit together.
        """
        try:
            steps, phi, description = state["steps"].tolist(), dict(state["phi"]), dict(state["description"])
            interval, is_added = whole_number("interval", state["interval"]), state["is_added"]
            rows = {len(value) for value in phi.values()} if steps else {0}
            is_ordered = all(type(step) is int for step in steps) and all(a < b for a, b in pairwise([-1, *steps]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"it holds no history of a loss ({error!r})") from error
        if rows != {len(steps)} or not is_ordered or not isinstance(is_added, bool):
            raise ValueError("its steps do not fit its snapshots, or are not in order")
        if not all(torch.isfinite(value).all() for value in phi.values()):
            raise ValueError("its φ is not finite; the run that it is of may have diverged")
        snapshots = [{name: value[row].clone() for name, value in phi.items()} for row in range(len(steps))]
        if snapshots:
            LearnedLoss.rebuild(description, snapshots[0])
        self.description, self._interval, self.is_added = description if steps else {}, interval, is_added
        self.steps, self._snapshots = steps, snapshots
        self._thin()

    def save(self, path: PathLike) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            ValueError: If there is no snapshot.
        """
        if not self.steps:
            raise ValueError("the history is empty; append a snapshot before saving it.")
        state = self.state_dict()
        tensors = {"steps": state.pop("steps"), **{f"phi.{name}": value for name, value in state.pop("phi").items()}}
        write_tensors(path, HISTORY_KIND, _VERSION, {**state, "max_snapshots": self.max_snapshots}, tensors)

    @classmethod
    def load(cls, path: PathLike) -> LossHistory:
        """Read what :meth:`save` wrote, by the file or the folder that it is in; nothing in it is run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, corrupt, of another kind, from a newer version, or contradicts itself.
        """
        content, tensors = read_tensors(within(path, FILE_NAME), HISTORY_KIND, _VERSION)
        state = {**content, "steps": tensors.pop("steps", None)}
        state["phi"] = {name.removeprefix("phi."): value for name, value in tensors.items()}
        try:
            history = cls(max_snapshots=content.get("max_snapshots", 0))
            history.load_state_dict(state)
            if not len(history):
                raise ValueError("it holds no snapshot")
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot read {os.fspath(path)}: {error}; record it again.") from error
        return history

    def _slot(self, step: int) -> int:
        return (step - self.steps[0]) // self._interval

    def _thin(self) -> None:
        while len(self) > self.max_snapshots:
            self._interval *= 2
            slots = [self._slot(step) for step in self.steps]
            kept = [i for i, slot in enumerate(slots) if i in (0, len(self) - 1) or slot > slots[i - 1]]
            self.steps = [self.steps[i] for i in kept]
            self._snapshots = [self._snapshots[i] for i in kept]


def read(path: PathLike, is_added: bool = True) -> LossHistory:
    """Return what there is of a learned loss in a file or a log folder; nothing in it is run.

    Args:
        path: The file of a history or of a learned loss; a checkpoint, read with ``weights_only=True``; or a log folder
            with ``loss_history.safetensors``.
        is_added: Whether a learned loss, whose file does not say so, is added to the user's own or trains alone.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there is no learned loss in it, or it cannot be read.
    """
    name = os.fspath(path)
    filesystem, place = fsspec.core.url_to_fs(name)
    if filesystem.isdir(place) and not name.endswith(".ckpt"):
        if exists(os.path.join(name, FILE_NAME)):
            return LossHistory.load(name)
        below = sorted(os.path.dirname(found) for found in filesystem.glob(f"{place}/**/{FILE_NAME}"))
        remedy = f"below it, {', '.join(below[:5])} has one; give that" if below else "train with LossShapeLogger"
        raise ValueError(f"cannot read {name}: the folder holds no {FILE_NAME}; {remedy}.")
    if not filesystem.exists(place):
        raise FileNotFoundError(f"cannot read {name}: there is no such file or folder; check the path.")
    if name.endswith(".ckpt") or filesystem.cat_file(place, end=2) == b"PK":  # a checkpoint is a zip file
        return _from_checkpoint(name)
    return _of_one(0, LearnedLoss.load(name), is_added) if kind_of(name) == LOSS_KIND else LossHistory.load(name)


def learner_state(path: str) -> dict[str, Any]:
    """Return what a checkpoint holds of its learner, as tensors and plain values.

    Raises:
        ValueError: If it cannot be read, or there is no such entry.
    """
    try:
        path = os.fspath(within(path, "meta.pt"))  # of sharded parameters
        is_local = os.path.isfile(path)
        with fsspec.open(path, "rb") as file:
            checkpoint = torch.load(path if is_local else file, map_location="cpu", weights_only=True, mmap=is_local)
    except Exception as error:  # whatever zipfile and torch make of bytes that are not theirs
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cannot read {path}: it is truncated, corrupt, or holds more than tensors and plain values ({reason}); "
            "give a checkpoint that loads with `weights_only=True`."
        ) from error
    try:
        state = dict(checkpoint["adalfl"]["learner"])
        int(state["base_steps"]), bool(state["config"]["own_loss"]), state["loss"], state["phi"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot read {path}: it has no learned loss; give a checkpoint of a module with AdaLFLMixin."
        ) from error
    return state


def _from_checkpoint(path: str) -> LossHistory:
    state = learner_state(path)
    if state["loss"] is None:
        raise ValueError(f"cannot read {path}: no loss was learned with `learn={state['config'].get('learn')!r}`.")
    try:
        loss = LearnedLoss.rebuild(state["loss"], state["phi"])
        return _of_one(int(state["base_steps"]), loss, bool(state["config"]["own_loss"]))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _of_one(step: int, loss: LearnedLoss, is_added: bool) -> LossHistory:
    history = LossHistory(is_added=is_added)
    history.append(step, loss)
    return history
