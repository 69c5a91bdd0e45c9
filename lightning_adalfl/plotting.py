"""Figures of a learned loss from its snapshots; no trainer, no pyplot state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, MaxNLocator
from torch import Tensor

from lightning_adalfl.loss_shape import CLASSIFICATION_TASKS, LossShape
from lightning_adalfl.losses.handcrafted import handcrafted_pairwise

_COLOURS = colormaps["viridis"]
_GREY = "0.25"
_NAMES = {
    "multiclass": "multiclass classification",
    "binary": "binary classification",
    "multilabel": "multilabel classification",
    "regression": "regression",
}


def plot_loss_shapes(history: Iterable[LossShape], *, title: str | None = None) -> Figure:
    """Draws how a learned loss changed over training, with the handcrafted loss beside it.

    The upper row shows ℓ_φ against the prediction for a target of 1 and of 0 (regression: against the error, for each
    target of the snapshots), the lower row its slope ∂ℓ_φ/∂f. A constant added to a loss changes nothing, so each curve
    is shown less its value at the correct prediction; slopes are shown as they are. The handcrafted loss of each output
    (-log f, and for a target of 0 nothing, or -log(1 - f) where outputs are independent; squared error) is dashed,
    times the one factor that fits it best to the newest curves (least squares over all targets), which the legend
    names: about how many times harder the learned loss pulls.

    Args:
        history: Snapshots, oldest first; a `LossShapeHistory` or any iterable of `LossShape`.
        title: Replaces the default title.

    Returns:
        A figure of its own, to be saved with `figure.savefig(path)`.

    Raises:
        ValueError: If there is no snapshot.

    Example::

        plot_loss_shapes(LossShapeHistory.load("loss_shape.npz")).savefig("loss_shape.png")
    """
    shapes = list(history)
    if not shapes:
        raise ValueError("the history is empty; append a snapshot before drawing it.")
    newest = shapes[-1]
    steps = np.array([shape.step for shape in shapes])
    targets, grid = newest.targets.numpy(), newest.grid.numpy().astype(float)
    loss = np.stack([_relative_loss(shape) for shape in shapes])  # (snapshots, targets, grid)
    slope = np.stack([_drawable(shape.slope) for shape in shapes])
    handcrafted, handcrafted_slope = _handcrafted(newest)
    factor = _fit_factor(handcrafted, loss[-1])

    columns = len(targets)
    layout = ConstrainedLayoutEngine(wspace=0.05)  # room between a 1.0 and the next panel's -1.0
    figure = Figure(figsize=(max(8.0, 2.7 * columns + 1.2), 5.8), dpi=110, layout=layout)
    axes = figure.subplots(2, columns, sharex=True, sharey="row", squeeze=False)
    colours = Normalize(steps[0], max(steps[-1], steps[0] + 1))
    for column, target in enumerate(targets):
        upper, lower = axes[:, column]
        _draw_curves(upper, grid, loss[:, column], factor * handcrafted[column], steps, colours)
        _draw_curves(lower, grid, slope[:, column], factor * handcrafted_slope[column], steps, colours)
        _label_column(upper, lower, newest.task, float(target), factor)
    _limit(axes[0], loss, factor * handcrafted)
    _limit(axes[1], slope, factor * handcrafted_slope)
    axes[0, 0].set_ylabel(r"loss $\ell_\phi$ less its value" "\nat the correct prediction")
    axes[1, 0].set_ylabel(r"slope $\partial\ell_\phi/\partial f$")
    bar = figure.colorbar(ScalarMappable(colours, _COLOURS), ax=axes, label="base step", pad=0.015, aspect=35)
    bar.locator = MaxNLocator(6, integer=True) if len(shapes) > 1 else FixedLocator([newest.step])
    bar.update_ticks()
    figure.suptitle(title or f"Learned loss up to base step {newest.step:,} ({_NAMES[newest.task]})", fontsize=11)
    return figure


def plot_loss_heatmap(shape: LossShape, *, title: str | None = None) -> Figure:
    """Draws ℓ_φ over (prediction, target) for regression, less its value at the correct prediction of each target.

    The dashed line is the correct prediction; the solid one is the prediction that the learned loss likes best for
    each target. Where they part, the learned loss pulls the base model away from the target.

    Args:
        shape: A snapshot of a regression loss.
        title: Replaces the default title.

    Raises:
        ValueError: If the snapshot has no (prediction, target) grid, as for classification.
    """
    if shape.heat_loss is None or shape.heat_targets is None or shape.heat_predictions is None:
        raise ValueError(
            f"the snapshot of task={shape.task!r} has no (prediction, target) grid; a heat map is for regression, use "
            "plot_loss_shapes for classification."
        )
    targets, predictions = shape.heat_targets.numpy(), shape.heat_predictions.numpy()
    values = _drawable(shape.heat_loss)
    values = values - _at(predictions, values, targets)[:, None]
    figure = Figure(figsize=(6.4, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(predictions, targets, np.ma.masked_invalid(values), cmap=_COLOURS, shading="gouraud")
    if np.isfinite(values).all() and np.ptp(values) > 0:
        levels = np.linspace(values.min(), values.max(), 10)[2:-1]  # the lowest would only trace the valley's floor
        axes.contour(predictions, targets, values, levels=levels, colors="white", linewidths=0.6, alpha=0.6)
        axes.plot(_lowest(predictions, values), targets, color="tab:red", lw=1.8, label="lowest learned loss")
    axes.plot(targets, targets, "--", color="white", lw=1.6, label="correct prediction, f = y")
    axes.set(xlabel="prediction f", ylabel="target y", xlim=predictions[[0, -1]], ylim=targets[[0, -1]])
    legend = axes.legend(loc="upper left", fontsize=8, framealpha=0.85, facecolor="0.35", labelcolor="white")
    legend.get_frame().set_edgecolor("none")
    figure.colorbar(mesh, ax=axes, label=r"$\ell_\phi(y, f) - \ell_\phi(y, y)$", pad=0.02)
    axes.set_title(title or f"Learned loss at base step {shape.step:,}", fontsize=11)
    return figure


def _relative_loss(shape: LossShape) -> np.ndarray:
    """ℓ_φ less its value at the correct prediction: f = y for classification, an error of 0 for regression; (T, G)."""
    grid, loss = shape.grid.numpy(), _drawable(shape.loss)
    correct = shape.targets.numpy() if shape.task in CLASSIFICATION_TASKS else np.zeros(len(loss))
    return loss - _at(grid, loss, correct)[:, None]


def _drawable(values: Tensor) -> np.ndarray:
    """In double precision, with a gap where a value is not finite."""
    array = values.numpy().astype(float)
    return np.where(np.isfinite(array), array, np.nan)


def _at(grid: np.ndarray, rows: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.array([np.interp(point, grid, row) for point, row in zip(where, rows, strict=True)])


def _lowest(grid: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where each row is lowest, to less than a grid step: the vertex of the parabola through its lowest points."""
    centre = rows.argmin(axis=1)
    inner = centre.clip(1, len(grid) - 2)
    left, middle, right = (np.take_along_axis(rows, (inner + i)[:, None], axis=1)[:, 0] for i in (-1, 0, 1))
    curvature = np.maximum(left - 2 * middle + right, 1e-12)
    shift = np.where(centre == inner, (0.5 * (left - right) / curvature).clip(-0.5, 0.5), 0.0)
    return grid[centre] + shift * (grid[1] - grid[0])


def _handcrafted(shape: LossShape) -> tuple[np.ndarray, np.ndarray]:
    """The handcrafted loss of the task and its slope on the grid of a snapshot, each (T, G)."""
    targets = shape.targets.double()[:, None].expand(-1, len(shape.grid))
    grid = shape.grid.double().expand_as(targets)
    predictions = (grid if shape.task in CLASSIFICATION_TASKS else targets + grid).clone().requires_grad_()
    with torch.enable_grad():
        loss = handcrafted_pairwise(shape.task, predictions, targets)
        (slope,) = torch.autograd.grad(loss.sum(), predictions)
    return loss.detach().numpy(), slope.numpy()


def _fit_factor(handcrafted: np.ndarray, learned: np.ndarray) -> float:
    """The factor c > 0 that minimises |c · handcrafted - learned|²; if there is none, the one of equal norms."""
    inner = slice(len(learned[0]) // 50, -(len(learned[0]) // 50) or None)  # the ends would outweigh all the rest
    handcrafted, learned = handcrafted[:, inner], learned[:, inner]
    seen = np.isfinite(learned)
    size = float((handcrafted[seen] ** 2).sum())
    if size == 0 or not learned[seen].any():
        return 1.0
    factor = float((handcrafted[seen] * learned[seen]).sum() / size)
    return factor if factor > 0 else float(np.sqrt((learned[seen] ** 2).sum() / size))


def _draw_curves(
    axes: Axes, grid: np.ndarray, curves: np.ndarray, dashed: np.ndarray, steps: np.ndarray, colours: Normalize
) -> None:
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    lines = [np.column_stack([grid, curve]) for curve in curves]
    axes.add_collection(LineCollection(lines, array=steps, cmap=_COLOURS, norm=colours, linewidths=1.5))
    # the newest is the one that trains the model; its outline keeps the light end of the map apart from the paper
    outline = [Stroke(linewidth=3.0, foreground=_GREY), Normal()]
    axes.plot(grid, curves[-1], color=_COLOURS(colours(steps[-1])), lw=1.9, path_effects=outline, label="newest")
    axes.plot(grid, dashed, "--", color=_GREY, lw=1.4, zorder=3)


def _label_column(upper: Axes, lower: Axes, task: str, target: float, factor: float) -> None:
    corner: Literal["upper left", "upper center", "upper right"]
    if task in CLASSIFICATION_TASKS:
        formula, corner = (r"$-\log f$", "upper right") if target == 1 else (r"$-\log(1-f)$", "upper left")
        lower.set(xlabel="predicted probability f", xlim=(0, 1))
    else:
        formula, corner = r"$(f-y)^2$", "upper center"
        lower.set(xlabel="error f − y", xlim=lower.dataLim.intervalx)
    upper.set_title(f"target y = {target:g}", fontsize=10)
    nothing = task == "multiclass" and target == 0  # the cross-entropy sees the other classes through the softmax
    upper.lines[-1].set_label("handcrafted: 0" if nothing else f"handcrafted: {formula} × {factor:.3g}")
    upper.legend(loc=corner, fontsize=8, framealpha=0.9, handlelength=2.6)


def _but_for_ends(curves: np.ndarray) -> np.ndarray:
    flat = curves.reshape(-1, curves.shape[-1])
    bounds = [np.quantile(row[np.isfinite(row)], [0.06, 0.94]) for row in flat if np.isfinite(row).any()]
    return np.concatenate(bounds) if bounds else np.zeros(1)


def _limit(row: Iterable[Axes], curves: np.ndarray, dashed: np.ndarray) -> None:
    """Shows the curves but for their ends, where a logarithm goes to infinity."""
    finite = np.append(_but_for_ends(curves), np.quantile(dashed, [0.15, 0.85], axis=1))
    low, high = float(finite.min()), float(finite.max())
    margin = 0.06 * (high - low) or 1.0
    for axes in row:
        axes.set_ylim(low - margin, high + margin)
