"""Where a learned loss can be read from: its own file, a trajectory, a checkpoint, or a log folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.loss_shape import LossShape, evaluate_loss_shape
from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.persistence import LOSS_KIND, describe, rebuild
from lightning_adalfl.losses.representations import build_loss
from lightning_adalfl.losses.safe_file import kind_of
from lightning_adalfl.snapshots import LossShapeHistory
from lightning_adalfl.trajectory import TRAJECTORY_KIND, LossTrajectory

_IN_A_LOG = ("loss_shape.npz", "loss_trajectory.safetensors")


@dataclass(frozen=True)
class Source:
    """A learned loss that has been read.

    Attributes:
        path: The file.
        what: What it is, in words.
        shapes: Snapshots on a grid, oldest first, times the gain of their step.
        reduction: The loss's; a log folder's snapshots do not tell, and ``"mean"`` is the default.
        gain: The learned gain, where the loss trained within bounds and the file has it.
    """

    path: Path
    what: str
    shapes: tuple[LossShape, ...]
    reduction: str = "mean"
    gain: float | None = None


def read_source(path: str | Path, *, targets: Sequence[float] = (0.0, 0.5, 1.0), error_range: float = 1.0) -> Source:
    """Read a learned loss from a ``.safetensors`` file, a checkpoint, a ``.npz`` of snapshots, or a log folder.

    Nothing in a file is run, and a checkpoint is read with ``weights_only=True``.

    Args:
        path: The file, or a log folder with ``loss_shape.npz`` or ``loss_trajectory.safetensors``.
        targets: For regression, the targets to look at; snapshots have their own.
        error_range: For regression, the largest error to look at; snapshots have their own.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there is no learned loss in it, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"cannot read {path}: there is no such file or folder; check the path.")
    grid: dict[str, Any] = {"targets": targets, "error_range": error_range}
    if path.suffix == ".npz":
        shapes = tuple(LossShapeHistory.load(path))
        if not shapes:
            raise ValueError(f"cannot read {path}: it holds no snapshot.")
        return Source(path, f"{len(shapes)} snapshots of a learned loss", shapes)
    if path.suffix == ".ckpt":
        return _checkpoint(path, grid)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"cannot read {path}: give a .safetensors file, a checkpoint (.ckpt), loss_shape.npz, or a log folder."
        )
    kind = kind_of(path)
    if kind == TRAJECTORY_KIND:
        trajectory = LossTrajectory.load(path)
        losses = {step: trajectory.loss_at(step) for step in trajectory.steps}
        newest = losses[trajectory.steps[-1]]
        bounds = (trajectory.description or {}).get("bounds")
        return Source(
            path,
            f"{len(losses)} snapshots of {_named(newest)}",
            tuple(
                _times(evaluate_loss_shape(loss, step, **grid), trajectory.gain_at(step))
                for step, loss in losses.items()
            ),
            newest.reduction,
            None if bounds is None else trajectory.gain_at(trajectory.steps[-1]),
        )
    if kind != LOSS_KIND:
        raise ValueError(f"cannot read {path}: it holds {kind!r}, which has nothing to look at; give a learned loss.")
    loss = LearnedLoss.load(path)
    return Source(path, _named(loss), (evaluate_loss_shape(loss, 0, **grid),), loss.reduction)


def _in_folder(folder: Path) -> Path:
    for name in _IN_A_LOG:
        if (folder / name).is_file():
            return folder / name
    below = sorted({str(found.parent) for name in _IN_A_LOG for found in folder.glob(f"**/{name}")})
    remedy = (
        f"below it, {', '.join(below[:5])} has one; give that folder"
        if below
        else "train with LossShapeLogger or TrajectoryRecorder, or give a checkpoint"
    )
    raise ValueError(f"{folder} holds neither {' nor '.join(_IN_A_LOG)}; {remedy}.")


def _checkpoint(path: Path, grid: dict[str, Any]) -> Source:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever zipfile and torch make of bytes that are not theirs
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cannot read {path}: it is truncated, corrupt, or holds more than tensors and plain values ({reason}); "
            "give a checkpoint that loads with `weights_only=True`."
        ) from error
    try:
        learned, values = checkpoint["adalfl"], checkpoint["hyper_parameters"]["adalfl"]
        state, step = dict(learned["state_dict"]), int(learned["progress"]["base_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot read {path}: it has no learned loss; give a checkpoint of a module with AdaLFLMixin."
        ) from error
    try:
        loss, config = _built(values, state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    gain = float(state["log_gain"].exp()) if config.max_gain is not None and "log_gain" in state else None
    shape = _times(evaluate_loss_shape(loss, step, **grid), 1.0 if gain is None else gain)
    return Source(path, _named(loss), (shape,), loss.reduction, gain)


def _times(shape: LossShape, gain: float) -> LossShape:
    heat = None if shape.heat_loss is None else shape.heat_loss * gain
    return replace(shape, loss=shape.loss * gain, slope=shape.slope * gain, heat_loss=heat)


def _built(values: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> tuple[LearnedLoss, AdaLFLConfig]:
    # The task loss has no part in the shape, and its import path may name anything.
    config = AdaLFLConfig.from_dict({**values, "task_loss": None, "initial_loss": None})
    if not config.learns_loss:
        raise ValueError("only the learning rate was learned, `learn='lr'`; there is no learned loss to look at.")
    with torch.random.fork_rng(devices=[]):
        description = describe(build_loss(config))
    phi = {name.removeprefix("loss."): value for name, value in state.items() if name.startswith("loss.")}
    return rebuild(LearnedLoss, description, phi), config  # type: ignore[type-abstract]


def _named(loss: LearnedLoss) -> str:
    size = sum(parameter.numel() for parameter in loss.parameters())
    return f"a {type(loss).__name__} of {size:,} numbers, the {loss.reduction} over its outputs"
