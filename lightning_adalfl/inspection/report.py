"""The numbers that describe a learned loss, from its values and slopes on a grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_adalfl.inspection.closed_form import ClosedForm, fit_closed_form
from lightning_adalfl.inspection.paths import LossPath, loss_paths
from lightning_adalfl.loss_shape import LossShape

Interval = tuple[float, float]

_FLAT = 0.1  # of the overall strength
_NOISE = 0.02  # of the overall strength: a smaller pull away from the target is none
_RUN = 3  # grid points that make a region
_FLAT_RUN = 6  # more than what a change of sign takes


@dataclass(frozen=True)
class PathReport:
    """A learned loss along one path of predictions.

    Attributes:
        path: The path, with the loss and the relative rate along it.
        flat: Where it pulls less than a tenth as hard as the handcrafted loss of the same size (section 5.6).
        away: Where it pulls away from the target.
        turn: Classification: the confident prediction beyond which the loss turns up (section 5.7). Regression: the
            error at which it is lowest, if that is not 0.
        smoothing: Classification: the ε of label smoothing with the same turning point.
    """

    path: LossPath
    flat: tuple[Interval, ...]
    away: tuple[Interval, ...]
    turn: float | None
    smoothing: float | None


@dataclass(frozen=True)
class LossReport:
    """What a learned loss says.

    Attributes:
        shape: The snapshot that was looked at.
        classes: The number of classes, for multiclass.
        reduction: Over the outputs, ``"mean"`` or ``"sum"``.
        strength: ⟨m, τ⟩ / ⟨τ, τ⟩ over predictions spread evenly along the paths, where m and τ are the gradients of the
            learned and the handcrafted loss by the model's raw output: the implied learning rate relative to the
            handcrafted loss (section 5.5).
        alignment: The cosine of the angle between m and τ there; 1 if the loss is the handcrafted one but for strength.
        paths: The loss along each path.
        closed_forms: A closed form of ℓ_φ for each target.
    """

    shape: LossShape
    classes: int
    reduction: str
    strength: float
    alignment: float
    paths: tuple[PathReport, ...]
    closed_forms: tuple[ClosedForm, ...]

    @property
    def flatness(self) -> float:
        """The part of the paths that is flat, in [0, 1] (section 5.6)."""
        points = sum(len(report.path.x) for report in self.paths)
        flat = sum(int(_inside(report.path.x, interval).sum()) for report in self.paths for interval in report.flat)
        return flat / points


def inspect_shape(shape: LossShape, *, classes: int = 10, reduction: str = "mean") -> LossReport:
    """Describe a learned loss by numbers.

    Args:
        shape: A snapshot.
        classes: For multiclass, the number of classes C: the strength depends on it.
        reduction: The loss's: ``"mean"`` divides by C, ``"sum"`` does not.

    Raises:
        ValueError: If the loss is not finite, or ``classes`` is less than two.
    """
    if classes < 2:
        raise ValueError(f"`classes` must be 2 or more; got {classes}.")
    paths = loss_paths(shape, classes, reduction)
    if not all(np.isfinite(path.rate).all() and np.isfinite(path.loss).all() for path in paths):
        raise ValueError("the loss is not finite on its grid, so the run diverged; take an earlier snapshot or φ.")
    pull = np.concatenate([path.rate * path.handcrafted_pull for path in paths])
    handcrafted = np.concatenate([path.handcrafted_pull for path in paths])
    product, size, own = pull @ handcrafted, handcrafted @ handcrafted, pull @ pull
    strength = float(product / size)
    alignment = float(product / np.sqrt(size * own)) if own > 0 else 0.0
    scale = float(np.sqrt(own / size))
    return LossReport(
        shape,
        classes,
        reduction,
        strength,
        alignment,
        tuple(_report(path, scale, shape.task, classes) for path in paths),
        fit_closed_form(shape),
    )


def _report(path: LossPath, scale: float, task: str, classes: int) -> PathReport:
    away = _regions(path.x, path.rate < -_NOISE * scale) if scale else ()
    everywhere = ((float(path.x[0]), float(path.x[-1])),)
    flat = _regions(path.x, np.abs(path.rate) < _FLAT * scale, _FLAT_RUN) if scale else everywhere
    turn = _minimum(path) if task == "regression" else _turn(path, away)
    smoothing = None
    if turn is not None and task != "regression":
        doubt = abs(path.correct - turn)
        # Smoothed targets are 1 - ε + ε/C for the true class; an output of its own has two classes.
        smoothing = doubt * classes / (classes - 1) if task == "multiclass" else 2 * doubt
    return PathReport(path, flat, away, turn, smoothing)


def _turn(path: LossPath, away: tuple[Interval, ...]) -> float | None:
    """The last prediction before the confident end at which the pull changes sign, if it is away from there on."""
    x, rate = (path.x, path.rate) if path.correct > 0.5 else (path.x[::-1], path.rate[::-1])
    towards = np.flatnonzero(rate > 0)
    if not any(x[-1] in interval for interval in away) or not len(towards) or towards[-1] == len(x) - 1:
        return None
    last = towards[-1]
    return float(x[last] + (x[last + 1] - x[last]) * rate[last] / (rate[last] - rate[last + 1]))


def _minimum(path: LossPath) -> float | None:
    """The error at which the loss is lowest, if it is more than a grid step from 0."""
    best = float(path.x[path.loss.argmin()])
    return best if abs(best) > 1.5 * float(path.x[-1] - path.x[-2]) else None


def _regions(x: NDArray[np.float64], where: NDArray[np.bool_], least: int = _RUN) -> tuple[Interval, ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(int)))
    runs = zip(edges[::2], edges[1::2])
    return tuple((float(x[start]), float(x[stop - 1])) for start, stop in runs if stop - start >= least)


def _inside(x: NDArray[np.float64], interval: Interval) -> NDArray[np.bool_]:
    return (interval[0] <= x) & (x <= interval[1])
