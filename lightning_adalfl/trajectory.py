"""The values that φ took over training: kept in bounded memory, read at any step, stored without pickle."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adalfl.arguments import whole_number
from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.bounded import BoundedLoss
from lightning_adalfl.losses.persistence import describe, rebuild
from lightning_adalfl.losses.safe_file import read_safe_file, write_safe_file
from lightning_adalfl.losses.task_losses import TaskLoss, default_task_loss

TRAJECTORY_KIND = "loss trajectory"
_VERSION = 1


class LossTrajectory:
    """Snapshots of φ over base steps, with the gain where there are bounds, and linear interpolation between them.

    A snapshot of step t is φ_t, the φ with which the base step from θ_t to θ_{t+1} is taken. When there are more than
    ``max_snapshots``, the interval doubles and those off the new schedule are dropped; the first and the newest stay.

    Args:
        every_n_steps: Base steps from one snapshot to the next, at first.
        max_snapshots: Upper bound on their number.

    Attributes:
        task_loss_from: The base step from which the task loss alone trained, once the safeguard had given up on φ.

    Raises:
        TypeError: For an argument that is no whole number.
        ValueError: For one that is out of range.

    Example::

        trajectory = LossTrajectory.load("lightning_logs/version_0/loss_trajectory.safetensors")
        loss = trajectory.build()
        for step, (x, y) in enumerate(batches):
            trajectory.write_into(loss, step)
            ...  # an ordinary training step with loss(model(x), y)
    """

    def __init__(self, every_n_steps: int = 100, max_snapshots: int = 128) -> None:
        self.max_snapshots = whole_number("max_snapshots", max_snapshots, 2)
        self.task_loss_from: int | None = None
        self._interval = whole_number("every_n_steps", every_n_steps)
        self._description: dict[str, Any] | None = None
        self._steps: list[int] = []
        self._snapshots: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> list[int]:
        """The base step of every snapshot, ascending."""
        return list(self._steps)

    @property
    def interval(self) -> int:
        """Base steps from one snapshot to the next, now."""
        return self._interval

    @property
    def description(self) -> dict[str, Any] | None:
        """The class, the options and the bounds of the loss, as plain values."""
        return self._description

    def accepts(self, loss: nn.Module) -> bool:
        """Return whether ``loss`` has the class, the options and the bounds of the snapshots."""
        return self._description is None or _description(loss) == self._description

    def due(self, step: int) -> bool:
        """Return whether a snapshot is due at base step ``step``."""
        return not self._steps or (step > self._steps[-1] and self._scheduled(step))

    def append(self, step: int, loss: nn.Module) -> None:
        """Add φ as it is now; a newest snapshot that is off schedule makes room for it.

        Args:
            step: Base steps taken.
            loss: What trains the base model: a :class:`LearnedLoss`, or one within its bounds.

        Raises:
            ValueError: If ``step`` is not after the newest one, or the loss is of another structure.
        """
        if step < 0 or (self._steps and step <= self._steps[-1]):
            raise ValueError(f"step {step} is not after {self._steps[-1] if self._steps else -1}; append in order.")
        description = _description(loss)
        if self._description not in (None, description):
            raise ValueError(f"{description} is not what the trajectory is of, {self._description}; begin a new one.")
        self._description = description
        if self._steps and not self._scheduled(self._steps[-1]):
            del self._steps[-1], self._snapshots[-1]
        self._steps.append(step)
        self._snapshots.append({name: value.detach().cpu().clone() for name, value in _tensors(loss).items()})
        self._thin()

    def at(self, step: float) -> dict[str, Tensor]:
        """Return φ at base step ``step``: a snapshot bit for bit where there is one, else between two.

        Before the first snapshot and after the last one φ is constant.

        Raises:
            ValueError: If there is no snapshot.
        """
        if not self._steps:
            raise ValueError("the trajectory is empty; append a snapshot first.")
        index = max(bisect_right(self._steps, step) - 1, 0)
        before = self._snapshots[index]
        if step <= self._steps[index] or index == len(self) - 1:
            return {name: value.clone() for name, value in before.items()}
        weight = (step - self._steps[index]) / (self._steps[index + 1] - self._steps[index])
        return {name: torch.lerp(value, self._snapshots[index + 1][name], weight) for name, value in before.items()}

    @torch.no_grad()
    def write_into(self, loss: nn.Module, step: float) -> None:
        """Set φ of ``loss``, and its gain, to what they were at base step ``step``."""
        phi = self.at(step)
        for name, value in _tensors(loss).items():
            value.copy_(phi[name])

    def loss_at(self, step: float) -> LearnedLoss:
        """Return the learned loss at base step ``step``, a module of its own, without its bounds."""
        return _rebuilt(self._description, self.at(step))

    def gain_at(self, step: float) -> float:
        """Return the gain at base step ``step``, which is one where there are no bounds."""
        gain = self.at(step).get("log_gain")
        return 1.0 if gain is None else float(gain.exp())

    def build(self, task_loss: TaskLoss | None = None) -> LearnedLoss | BoundedLoss:
        """Return what trained the base model first, for :meth:`write_into` to move, with φ that takes no gradient.

        Args:
            task_loss: What the bounds are around; by default the task's.
        """
        loss = self.loss_at(self._steps[0] if self._steps else 0)
        bounds = (self._description or {}).get("bounds")
        if bounds is None:
            return loss.requires_grad_(False)
        bounded = BoundedLoss(loss, task_loss or default_task_loss(loss.task), **bounds).requires_grad_(False)
        self.write_into(bounded, self._steps[0])
        return bounded

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values, fit for ``torch.load(..., weights_only=True)``."""
        names = self._snapshots[0] if self._snapshots else {}
        return {
            "description": self._description,
            "interval": self._interval,
            "task_loss_from": self.task_loss_from,
            "steps": torch.tensor(self._steps, dtype=torch.int64),
            "phi": {name: torch.stack([snapshot[name] for snapshot in self._snapshots]) for name in names},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, thinned to ``max_snapshots``.

        Raises:
            ValueError: If its parts do not fit together.
        """
        try:
            steps, phi = state["steps"].tolist(), dict(state["phi"])
            description, interval, end = state["description"], state["interval"], state["task_loss_from"]
            rows = {len(value) for value in phi.values()} if steps else {0}
            ordered = all(isinstance(step, int) for step in steps) and all(a < b for a, b in pairwise([-1, *steps]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it holds no trajectory of a loss ({error!r})") from error
        if rows != {len(steps)} or not ordered or isinstance(interval, bool) or not isinstance(interval, int):
            raise ValueError("its steps do not fit its snapshots, or are not in order")
        if interval < 1 or not (end is None or (isinstance(end, int) and end >= 0)):
            raise ValueError(f"its interval {interval} or its last step of φ, {str(end)[:20]}, is none")
        snapshots = [{name: value[row].clone() for name, value in phi.items()} for row in range(len(steps))]
        for snapshot in snapshots:
            if description is None or not all(torch.isfinite(value).all() for value in snapshot.values()):
                raise ValueError("its φ is not finite, or of no known class; the run that it is of may have diverged")
        if snapshots:
            _rebuilt(description, snapshots[0])
        self._description, self._interval, self.task_loss_from = description if steps else None, interval, end
        self._steps, self._snapshots = steps, snapshots
        self._thin()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            ValueError: If there is no snapshot.
        """
        if not self._steps:
            raise ValueError("the trajectory is empty; append a snapshot before saving it.")
        state = self.state_dict()
        plain = {name: state[name] for name in ("interval", "task_loss_from")}
        content = {**state["description"], **plain, "max_snapshots": self.max_snapshots}
        tensors = {"steps": state["steps"], **{f"phi.{name}": value for name, value in state["phi"].items()}}
        write_safe_file(path, TRAJECTORY_KIND, _VERSION, content, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LossTrajectory:
        """Read what :meth:`save` wrote; nothing in the file is run.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, corrupt, of another kind, from a newer version, or contradicts itself.
        """
        content, tensors = read_safe_file(path, TRAJECTORY_KIND, _VERSION)
        state = {
            "description": {name: content.get(name) for name in ("class", "options", "bounds")},
            "interval": content.get("interval"),
            "task_loss_from": content.get("task_loss_from"),
            "steps": tensors.pop("steps", None),
            "phi": {name.removeprefix("phi."): value for name, value in tensors.items()},
        }
        try:
            trajectory = cls(max_snapshots=content.get("max_snapshots", 0))
            trajectory.load_state_dict(state)
            if not len(trajectory):
                raise ValueError("it holds no snapshot")
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot read {os.fspath(path)}: {error}; record it again.") from error
        return trajectory

    def _scheduled(self, step: int) -> bool:
        return (step - self._steps[0]) % self._interval == 0

    def _thin(self) -> None:
        while len(self) > self.max_snapshots:
            self._interval *= 2
            newest = self._steps[-1]
            kept = [i for i, step in enumerate(self._steps) if self._scheduled(step) or step == newest]
            self._steps = [self._steps[i] for i in kept]
            self._snapshots = [self._snapshots[i] for i in kept]


def _description(loss: nn.Module) -> dict[str, Any]:
    if isinstance(loss, BoundedLoss):
        return {**describe(loss.loss), "bounds": {"max_gain": loss.max_gain, "min_cosine": loss.min_cosine}}
    return {**describe(loss), "bounds": None}  # type: ignore[arg-type]


def _tensors(loss: nn.Module) -> dict[str, Tensor]:
    state = loss.state_dict()
    return state if isinstance(loss, BoundedLoss) else {f"loss.{name}": value for name, value in state.items()}


def _rebuilt(description: Mapping[str, Any] | None, state: Mapping[str, Tensor]) -> LearnedLoss:
    """Return the learned loss of a snapshot; raise a ``ValueError`` if its parts, bounds included, do not fit."""
    if not isinstance(description, Mapping):
        raise ValueError(f"its description {str(description)[:100]} is none of a loss")
    bounds = description.get("bounds")
    gain = state.get("log_gain")
    if (bounds is None) != (gain is None) or (gain is not None and gain.ndim):
        raise ValueError("its gain and its bounds do not belong together")
    if bounds is not None and not _are_bounds(bounds):
        raise ValueError(f"its bounds {str(bounds)[:100]} are none")
    phi = {name: value for name, value in state.items() if name != "log_gain"}
    for name in phi:
        if not name.startswith("loss."):
            raise ValueError(f"its {name!r} is no part of a learned loss")
    phi = {name.removeprefix("loss."): value for name, value in phi.items()}
    return rebuild(LearnedLoss, description, phi)  # type: ignore[type-abstract]


def _are_bounds(bounds: Any) -> bool:
    return (
        isinstance(bounds, Mapping)
        and bounds.keys() == {"max_gain", "min_cosine"}
        and all(isinstance(value, (int, float)) and value > 0 for value in bounds.values())
    )
