"""The figures: of a learned loss, and of influence; no trainer, no pyplot state, and a light background."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, MaxNLocator

from lightning_adalfl.inspection.history import LossHistory
from lightning_adalfl.inspection.influence import InfluenceTable
from lightning_adalfl.inspection.loss_shape import LossPath, LossShape, Values

_GRID = 10  # columns of images
_COLOURS = colormaps["viridis"]
_OWN: dict[str, Any] = {"color": "tab:red", "ls": "--", "lw": 1.5}
_EACH: dict[str, Any] = {"color": "0.45", "lw": 0.6}


def plot_history(history: LossHistory | Iterable[LossShape], *, title: str | None = None) -> Figure:
    """Draw how a learned loss changed over training, beside the handcrafted loss of its task.

    The upper row is the loss along paths of predictions, less its value at the right one, since a constant changes
    nothing. The lower row is its slope by the raw output, a logit or a value: what acts on the model. Thin lines are
    pairs of classes in the newest snapshot, where they are told apart.

    A loss that is added to the user's own is shown with the handcrafted one in its place, and as long as a step with
    it is: never longer than without. A loss that trains alone has its own scale; beside it stands the handcrafted one
    times the factor that fits best.

    Args:
        history: A history, or shapes of one loss, oldest first.
        title: Replaces the default title.

    Returns:
        A figure of its own, to be saved with ``figure.savefig(path)``.

    Raises:
        ValueError: If there is no snapshot.

    Example::

        plot_history(LossHistory.load("lightning_logs/version_0/loss_history.safetensors")).savefig("loss.png")
    """
    shapes = history.shapes() if isinstance(history, LossHistory) else list(history)
    if not shapes:
        raise ValueError("the history is empty; append a snapshot before drawing it.")
    newest, steps = shapes[-1], np.array([shape.step for shape in shapes])
    colours = Normalize(steps[0], max(steps[-1], steps[0] + 1))
    factor = 1.0 if newest.is_added else _factor(newest.paths)
    with matplotlib.style.context("default"):
        figure = _figure(max(6.0, 3.3 * len(newest.paths) + 1.2), 6.2)
        axes = figure.subplots(2, len(newest.paths), sharex=True, sharey="row", squeeze=False)
        shown: tuple[list[Values], list[Values]] = ([], [])
        for column, path in enumerate(newest.paths):
            of_step = [(shape.paths[column], shape.shortening) for shape in shapes]
            losses = np.array([_less_correct(p, p.loss) * c for p, c in of_step])
            slopes = np.array([p.slope * c for p, c in of_step])
            each = _less_correct(path, path.each_loss) * newest.shortening, path.each_slope * newest.shortening
            own = _less_correct(path, path.own_loss) * factor, path.own_slope * factor
            for row, curves in enumerate((losses, slopes)):
                _draw(axes[row, column], path.x, curves, each[row], own[row], steps, colours)
                shown[row].extend([*curves, own[row]])
            axes[0, column].set_title(path.name, fontsize=10)
            axes[1, column].set(xlabel=path.variable, xlim=path.x[[0, -1]].round(2))
        for row, lines in enumerate(shown):
            axes[row, 0].set_ylim(_limits(lines))
        axes[0, 0].set_ylabel("loss, less its value\nat the right prediction")
        axes[1, 0].set_ylabel(f"slope by the {'prediction' if newest.task == 'regression' else 'logit'}")
        bar = figure.colorbar(ScalarMappable(colours, _COLOURS), ax=axes, label="base step", pad=0.015, aspect=35)
        bar.locator = MaxNLocator(6, integer=True) if len(shapes) > 1 else FixedLocator([newest.step])
        bar.update_ticks()
        _legend(figure, newest, factor, axes[0, 0].lines[-2])
        figure.suptitle(title or _title(newest), fontsize=11)
    return figure


def plot_heatmap(shape: LossShape, *, title: str | None = None) -> Figure:
    """Draw a regression loss over (prediction, target), less its value at the right prediction of each target.

    The dashed line is the right prediction; the solid one is the prediction that the loss likes best for each target.
    Where they part, the loss pulls the model away from the target.

    Args:
        shape: The shape of a regression loss.
        title: Replaces the default title.

    Raises:
        ValueError: If the loss is for another task.
    """
    if shape.heat is None:
        raise ValueError(f"a heat map is for task 'regression'; got {shape.task!r}, for which there is `plot_history`.")
    targets, predictions, loss = shape.heat
    rows = _finite(loss)
    values = (rows - _at(predictions, rows, targets)[:, None]) * shape.shortening
    with matplotlib.style.context("default"):
        figure = _figure(6.4, 4.6)
        axes = figure.subplots()
        mesh = axes.pcolormesh(predictions, targets, np.ma.masked_invalid(values), cmap=_COLOURS, shading="gouraud")
        if np.isfinite(values).all() and np.ptp(values) > 0:
            levels = np.linspace(values.min(), values.max(), 10)[2:-1]  # the lowest would only trace the valley's floor
            axes.contour(predictions, targets, values, levels=levels, colors="white", linewidths=0.6, alpha=0.6)
            axes.plot(_lowest(predictions, values, targets), targets, color="tab:red", lw=1.8, label="lowest loss")
        axes.plot(targets, targets, "--", color="white", lw=1.6, label="right prediction, f = y")
        axes.set(xlabel="prediction f", ylabel="target y", xlim=predictions[[0, -1]], ylim=targets[[0, -1]])
        axes.legend(loc="upper left", fontsize=8, framealpha=0.85, facecolor="0.35", edgecolor="none", labelcolor="w")
        figure.colorbar(mesh, ax=axes, label="loss, less its value at f = y", pad=0.02)
        figure.suptitle(title or _title(shape), fontsize=11)
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")


def _draw(axes: Axes, x: Values, curves: Values, each: Values, own: Values, steps: Values, colours: Normalize) -> None:
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    lines = [np.column_stack([x, curve]) for curve in curves]
    axes.add_collection(LineCollection(lines, array=steps, cmap=_COLOURS, norm=colours, linewidths=1.4, zorder=2))
    if len(each) > 1:
        axes.plot(x, each.T, alpha=max(0.1, min(0.6, 20 / len(each))), zorder=1.5, **_EACH)
    # The newest is the one that trains the model; its outline keeps the light end of the map apart from the paper.
    outline = [Stroke(linewidth=3.2, foreground="0.25"), Normal()]
    axes.plot(x, curves[-1], color=_COLOURS(colours(steps[-1])), lw=2.0, path_effects=outline, zorder=2.5)
    axes.plot(x, own, zorder=3, **_OWN)


def _limits(curves: Iterable[Values]) -> tuple[float, float]:
    """Return what shows all curves but for their ends, where a logarithm goes to infinity."""
    bounds = [np.quantile(curve[np.isfinite(curve)], [0.02, 0.98]) for curve in curves if np.isfinite(curve).any()]
    low, high = float(np.min(bounds)), float(np.max(bounds))
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _legend(figure: Figure, shape: LossShape, factor: float, newest: Line2D) -> None:
    known = {"newest": newest}
    if shape.pairs:
        known["pairs of classes, newest"] = Line2D([], [], **_EACH)
    known[f"{shape.own} alone" if shape.is_added else f"{shape.own} × {factor:.3g}"] = Line2D([], [], **_OWN)
    note = f"Drawn as long as a step is: never longer than with {shape.own} alone." if shape.is_added else None
    style: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, "frameon": False}
    figure.legend(known.values(), known.keys(), title=note, title_fontsize=8, **style)


def _title(shape: LossShape) -> str:
    what = f"{shape.own.capitalize()} plus what is learned" if shape.is_added else "The learned loss alone"
    return f"{what}, at base step {shape.step:,}"


def _less_correct(path: LossPath, loss: Values) -> Values:
    """Return rows (..., G) less their value at the right prediction."""
    rows = _finite(loss)
    flat = rows.reshape(-1, rows.shape[-1])
    return rows - _at(path.x, flat, np.full(len(flat), path.correct)).reshape(*rows.shape[:-1], 1)


def _finite(values: Values) -> Values:
    """Return the values with a gap where one is not finite."""
    return np.where(np.isfinite(values), values, np.nan)


def _at(grid: Values, rows: Values, where: Values) -> Values:
    return np.array([np.interp(point, grid, row) for point, row in zip(where, rows, strict=True)])


def _lowest(grid: Values, rows: Values, near: Values) -> Values:
    """Return where each row is lowest, by a parabola through its lowest; where that is level, nearest to ``near``."""
    is_lowest = rows <= rows.min(axis=1, keepdims=True)
    centre = np.where(is_lowest, np.abs(grid - near[:, None]), np.inf).argmin(axis=1)
    inner = centre.clip(1, len(grid) - 2)
    left, middle, right = (np.take_along_axis(rows, (inner + i)[:, None], axis=1)[:, 0] for i in (-1, 0, 1))
    curvature = np.maximum(left - 2 * middle + right, 1e-12)
    shift = np.where(centre == inner, (0.5 * (left - right) / curvature).clip(-0.5, 0.5), 0.0)
    return grid[centre] + shift * (grid[1] - grid[0])


def _factor(paths: Iterable[LossPath]) -> float:
    """Return the c > 0 for which c times the handcrafted slope is nearest; where there is none, that of equal norms."""
    learned, own = (np.concatenate(parts) for parts in zip(*((path.slope, path.own_slope) for path in paths)))
    learned = np.where(np.isfinite(learned), learned, 0.0)
    factor = float((own @ learned) / (own @ own))
    return factor if factor > 0 else float(np.sqrt((learned @ learned) / (own @ own))) or 1.0


def plot_influence(table: InfluenceTable) -> Figure:
    """Draw how many instances have which label quality, and which influence.

    Args:
        table: Of which at least one instance was seen; a ``ValueError`` is raised if none was.
    """
    seen = table.mean("seen") > 0
    if not seen.any():
        raise ValueError("no instance was seen by a meta step; train for more than `meta_every` steps.")
    quality, influence = table.label_quality()[seen], table.mean("influence")[seen]
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        left.hist(quality, np.linspace(0, 1, 41), color="tab:blue")
        left.axvline(0.5, color="tab:red", ls="--", lw=1)
        left.set(xlabel="label quality: how likely the target is right", xlim=(0, 1))
        left.set_title(f"{(quality < 0.5).sum():,} of {seen.sum():,} seen instances below 0.5", fontsize=10)
        bound = max(float(np.quantile(np.abs(influence), 0.995)), 1e-12)
        right.hist(influence.clip(-bound, bound), 41, color="tab:blue")
        right.axvline(0, color="0.3", lw=1)
        right.set(xlabel="mean influence; right of 0 it hurts the held-out loss")
        for axes in (left, right):
            axes.set(ylabel="instances", yscale="log", ylim=(0.7, None))
        right.set_title(f"{(influence > 0).sum():,} hurt", fontsize=10)
    return figure


def plot_images(images: Values, captions: Sequence[str], quality: Sequence[float], said: str) -> Figure:
    """Draw the images with the worst targets above those with the best.

    Args:
        images: As many of the worst as of the best, the worst first, (N, 1 or 3, H, W); each has its own scale.
        captions: Of each.
        quality: The label quality of each.
        said: What the captions say, such as ``"target / prediction"``.
    """
    half = len(images) // 2
    rows = -(-half // _GRID)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(_GRID * 1.05, 2 * rows * 1.45 + 0.7), dpi=120, layout="constrained")
        parts: Any = figure.subfigures(2, 1)
        for part, first, words in zip(parts, (0, half), ("most suspicious", "most trusted")):
            part.suptitle(f"{words}: {said}, label quality", fontsize=10)
            for i, axes in enumerate(part.subplots(rows, _GRID, squeeze=False).flat):
                axes.set_axis_off()
                if i < half:
                    image = images[first + i].transpose(1, 2, 0)
                    low, high = image.min(), image.max()
                    axes.imshow((image - low) / max(high - low, 1e-12), cmap="gray")
                    axes.set_title(f"{captions[first + i]}\n{quality[first + i]:.3f}", fontsize=8)
    return figure
