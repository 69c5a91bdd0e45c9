"""The paper's figures from the records: learning curves, implied learning rates, and learned losses over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from experiment_tables import LABELS, ROWS, Record, Runs
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

QUANTITIES = {
    "train": "training error",
    "test": "test error",
    "implied_lr": "implied learning rate",
}


def learning_curves(runs: Runs, rows: Sequence[str], methods: Sequence[str], quantity: str) -> Figure:
    """Draw a quantity over the base steps, a panel for each row and a line for each method (Figures 3 and 8).

    A line is the mean over seeds and a band their range; a line ends where one of its runs diverged.
    """
    columns = min(3, len(rows))
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(3.6 * columns + 1.8, 3.0 * height + 0.3), dpi=110, layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, row in zip(panels, rows):
        for index, method in enumerate(methods):
            records = runs.of(row, method)
            if records:
                handles[LABELS[method]] = _draw_method(axes, records, quantity, f"C{index}")
        axes.set(title=ROWS[row], yscale="log")
        axes.title.set_fontsize(10)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if _spans_little(axes) else NullFormatter())
        axes.tick_params(labelsize=8, which="both")
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("base step", fontsize=10)
    figure.supylabel(QUANTITIES[quantity], fontsize=10)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=9)
    return figure


def learned_losses(runs: Runs, rows: Sequence[str], method: str = "adalfl", seed: int = 0) -> Figure:
    """Draw ℓ_φ against the prediction at equispaced steps, a line of panels for each row (Figures 4 and 9 to 13).

    A constant added to a loss changes nothing, so each curve is shown less its value at the correct prediction.
    """
    found = [next((r for r in runs.of(row, method) if r["seed"] == seed and "losses" in r), None) for row in rows]
    shown = [(row, record) for row, record in zip(rows, found) if record is not None]
    if not shown:
        raise ValueError(f"no record of {method!r} with seed {seed} keeps its learned loss for {list(rows)}.")
    columns = max(len(record["losses"]["target"]) for _, record in shown)
    figure = Figure(figsize=(3.1 * columns + 1.4, 2.7 * len(shown) + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(len(shown), columns, squeeze=False)
    colours = Normalize(0, max(record["losses"]["step"][-1] for _, record in shown))
    for line, (row, record) in zip(panels, shown):
        _draw_losses(line, record["losses"], colours)
        line[0].set_ylabel(f"{ROWS[row]}\nlearned loss", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("prediction", fontsize=9)
    figure.colorbar(ScalarMappable(colours, colormaps["viridis"]), ax=panels, label="base step", aspect=40)
    return figure


def _draw_losses(line: Sequence[Axes], losses: dict[str, Any], colours: Normalize) -> None:
    predictions = np.array(losses["prediction"])
    for column, target in enumerate(losses["target"]):
        axes = line[column]
        correct = int(np.abs(predictions - target).argmin())
        for step, value in zip(losses["step"], losses["value"]):
            curve = np.array(value[column], dtype=float)
            axes.plot(predictions, curve - curve[correct], color=colormaps["viridis"](colours(step)), lw=1.4)
        axes.axvline(target, color="0.6", lw=0.8, ls="--")
        axes.set_title(f"target {target:g}", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in line[len(losses["target"]) :]:
        axes.set_visible(False)


def _draw_method(axes: Axes, records: Sequence[Record], quantity: str, colour: str) -> Any:
    length = min(len(record["curve"]["step"]) for record in records)
    steps = records[0]["curve"]["step"][:length]
    values = np.array([record["curve"][quantity][:length] for record in records], dtype=float)
    finite = np.isfinite(values).all(axis=0)
    shown = np.where(finite, values, np.nan)
    (handle,) = axes.plot(steps, shown.mean(axis=0), lw=1.5, color=colour)
    axes.fill_between(steps, shown.min(axis=0), shown.max(axis=0), alpha=0.15, lw=0, color=colour)
    return handle


def _spans_little(axes: Axes) -> bool:
    """Whether a logarithmic axis has too few powers of ten to be read by them alone."""
    low, high = axes.get_ylim()
    return low > 0 and high / low < 30
