"""A learned loss in numbers and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_adalfl.inspection.loss_shape import FLAT, LossShape, Values

Interval = tuple[float, float]

_NOISE = 0.02  # of the size of the whole slope: a smaller pull away from the target is none
_RUN = 3  # points that make a region
_STATIONS = {"classification": (0.05, 0.25, 0.5, 0.75, 0.95), "regression": (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)}


@dataclass(frozen=True)
class LossReport:
    """What a learned loss says; its ``str`` is the text.

    Attributes:
        shape: What was looked at.
        scale: The factor from its slope to what is descended.
        strength: ⟨m, τ⟩ / ⟨τ, τ⟩ over predictions spread evenly along the paths, where m and τ are the gradients of
            what is descended and of the handcrafted loss by the raw output: the implied learning rate, relative to the
            optimizer's (section 5.5).
        alignment: The cosine between m and τ; 1 for the handcrafted loss but for its strength.
        flat: Along each path, where it pulls less than a tenth as hard as all in all (section 5.6).
        away: Along each path, where it pulls away from the target.
        lowest: Along each path, the x at which it is lowest; just short of a certain prediction with label smoothing
            (section 5.7).
    """

    shape: LossShape
    scale: float
    strength: float
    alignment: float
    flat: tuple[tuple[Interval, ...], ...]
    away: tuple[tuple[Interval, ...], ...]
    lowest: tuple[float, ...]

    def __str__(self) -> str:
        """Return strength, shape, flat and turning regions, and how far classes differ, in plain words."""
        parts = [self._strength(), self._rates(), self._flat(), self._turning(), self._classes()]
        return "\n\n".join(part for part in parts if part)

    def _strength(self) -> str:
        own, is_added = self.shape.own, self.shape.is_added
        if is_added:
            text = f"A step goes {self.strength:.3g} times as far in the direction of {own} as without what is learned."
            same = "hardly anything is learned as yet"
        else:
            times = f"{self.strength:.3g} times"
            text = f"It pulls {times} as hard as {own}: the implied learning rate is {times} the optimizer's."
            same = "it is that loss but for strength"
        rest = same if self.alignment > 0.995 else "the rest is shape, which no learning rate gives"
        lines = [f"Strength (section 5.5). {text}", f"The cosine between the two is {self.alignment:.3f}: {rest}."]
        if self.strength <= 0:
            lines.append("Not above zero: of predictions spread evenly it drives more from their targets than to them.")
        elif self.strength < 0.05 and not is_added:
            lines.append("That is next to nothing: the loss has flattened, which stops training early (section 5.6).")
        return "\n".join(lines)

    def _rates(self) -> str:
        paths, is_regression = self.shape.paths, self.shape.task == "regression"
        stations = np.array(_STATIONS["regression" if is_regression else "classification"])
        stations = stations * paths[0].x[-1] if is_regression else stations
        width = max(len(path.name) for path in paths)
        lines = [f"Shape. How many times as hard it pulls as {self.shape.own}, by {paths[0].variable}:"]
        lines.append(" " * (width + 2) + "".join(f"{station:>9.3g}" for station in stations))
        for path in paths:
            pulls = path.own_slope != 0
            rates = np.interp(stations, path.x[pulls], path.rate[pulls] * self.scale)
            lines.append(f"  {path.name:{width}}" + "".join(f"{rate:9.3g}" for rate in rates))
        return "\n".join(lines)

    def _flat(self) -> str:
        found = [f"{path.name}: {_listed(flat)}" for path, flat in zip(self.shape.paths, self.flat) if flat]
        if not found:
            return "Flat regions (section 5.6). None."
        part = f"{self.shape.flatness:.0%} of the predictions hardly move, less than a tenth as hard as all in all."
        return "\n  ".join([f"Flat regions (section 5.6). {part}", *found])

    def _turning(self) -> str:
        lines = []
        for path, away, lowest in zip(self.shape.paths, self.away, self.lowest):
            said = [f"it pulls away from the target at {_listed(away)}"] if away else []
            if abs(lowest - path.correct) > 1.5 * (path.x[2] - path.x[1]):
                said.append(f"it is lowest at {lowest:.3g}")
            lines += [f"{path.name}: {', '.join(said)}"] if said else []
        if not lines:
            return "Turning regions (section 5.7). None: it pulls towards the target everywhere."
        return "\n  ".join([f"Turning regions (section 5.7), by {self.shape.paths[0].variable}.", *lines])

    def _classes(self) -> str:
        if not self.shape.pairs:
            return ""
        path = self.shape.paths[0]
        pull = self.scale * path.each_slope.mean(axis=1) / path.own_slope.mean()
        least, most = (
            f"{pull[i]:.3g} times (label {self.shape.pairs[i][0]}, other class {self.shape.pairs[i][1]})"
            for i in (pull.argmin(), pull.argmax())
        )
        own = self.shape.own
        return f"Classes. Between two of them it pulls to the label as hard as {own} does from {least} to {most}."


def report(shape: LossShape, reduction: str = "mean") -> LossReport:
    """Describe a learned loss.

    Args:
        shape: What it looks like.
        reduction: Of the loss: over the outputs of an instance, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If the loss is not finite, or its strength depends on a number of classes that is not known.
    """
    # What is added is summed over the outputs of an instance, as cross-entropy is.
    is_mean = shape.task == "multiclass" and not shape.is_added and reduction == "mean"
    if is_mean and shape.classes is None:
        raise ValueError(
            "`classes` is needed: a loss that trains alone is a mean over the outputs, so that its strength depends on "
            "their number, which it does not know. Give `classes` (`--classes` on the command line)."
        )
    if not all(np.isfinite(path.each_loss).all() and np.isfinite(path.each_slope).all() for path in shape.paths):
        raise ValueError("the loss is not finite along its paths, so the run diverged; take an earlier snapshot.")
    scale = shape.shortening / (shape.classes or 1) if is_mean else shape.shortening
    m, own = (np.concatenate(parts) for parts in zip(*((path.slope * scale, path.own_slope) for path in shape.paths)))
    length = float(np.sqrt(m @ m / (own @ own)))
    strength = float(m @ own / (own @ own))
    rates = [path.rate * scale for path in shape.paths]
    return LossReport(
        shape,
        scale,
        strength,
        strength / length if length else 0.0,
        tuple(_regions(p.x, np.abs(r) <= FLAT * length, 2 * _RUN) for p, r in zip(shape.paths, rates)),
        tuple(_regions(p.x, r < -_NOISE * length, _RUN) for p, r in zip(shape.paths, rates)),
        tuple(float(p.x[np.lexsort((np.abs(p.x - p.correct), p.loss))[0]]) for p in shape.paths),
    )


def _regions(x: Values, where: NDArray[np.bool_], least: int) -> tuple[Interval, ...]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(int)))
    runs = zip(edges[::2], edges[1::2])
    return tuple((float(x[start]), float(x[stop - 1])) for start, stop in runs if stop - start >= least)


def _listed(intervals: Sequence[Interval]) -> str:
    return ", ".join(f"{low:.2f} to {high:.2f}" for low, high in intervals)
