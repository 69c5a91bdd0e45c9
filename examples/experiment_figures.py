"""The paper's figures from the records: learning curves, training dynamics, and learned losses over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lightning_adalfl.plotting import plot_loss_shapes
from lightning_adalfl.snapshots import LossShapeHistory

Record = dict[str, Any]
LABELS = {"val": "error on validation data", "test": "error on test data", "implied_lr": "implied learning rate"}


def draw_figures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw all figures for one task and model.

    Args:
        records: Runs of one task and model.
        folder: Where the figures go, and where the runs have left their snapshots of the learned losses.

    Returns:
        The files.
    """
    if not records:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{records[0]['task']}_{records[0]['model']}"
    title = f"{records[0]['task']}, {records[0]['model']}"
    files = {
        folder / f"{name}_learning_curves.png": curves(records, ("test",), f"{title}: learning curves"),
        folder / f"{name}_dynamics.png": curves(records, ("val", "implied_lr"), f"{title}: training dynamics"),
        folder / f"{name}_cost.png": error_against_time(records, f"{title}: what a method costs and brings"),
    }
    for record in records:
        snapshots = snapshot_folder(folder, record) / "loss_shape.npz"
        if snapshots.exists():
            history = LossShapeHistory.load(snapshots)
            figure = plot_loss_shapes(history, title=f"{title}: {record['method']}, seed {record['seed']}")
            files[folder / f"{snapshots.parent.name}.png"] = figure
    for path, figure in files.items():
        figure.savefig(path)
    return list(files)


def snapshot_folder(folder: Path, record: Record) -> Path:
    """Return where a run leaves the snapshots of its learned loss."""
    method = record["method"].replace(" ", "_").replace("=", "-")
    return folder / f"{record['task']}_{record['model']}_{method}_{record['seed']}"


def curves(records: Sequence[Record], quantities: Sequence[str], title: str) -> Figure:
    """Draw quantities over the base steps, a line for each method: the mean over seeds, and all of them as a band."""
    figure = Figure(figsize=(1.5 + 5.0 * len(quantities), 4.2), dpi=110, layout="constrained")
    for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities):
        draw_methods(axes, records, lambda point, quantity=quantity: point[quantity])
        axes.set(xlabel="base step", ylabel=LABELS[quantity], yscale="log")
        write_plain_numbers(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def error_against_time(records: Sequence[Record], title: str) -> Figure:
    """Draw the test error over the seconds since the start, the offline phase included, a line for each run."""
    figure = Figure(figsize=(9.2, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(record["method"] for record in records))
    for index, method in enumerate(methods):
        runs = [record for record in records if record["method"] == method]
        for run in runs:
            # What is left over went before: for a tuned rate, the runs with the other rates.
            before = run["seconds"] - run["curve"][-1]["seconds"]
            shown = [(before + p["seconds"], p["test"]) for p in run["curve"] if p["test"] is not None]
            if shown:
                label = method if run is runs[0] else None
                axes.plot(*zip(*shown), color=f"C{index}", lw=1.4, label=label)
                axes.plot(*shown[-1], "o", color=f"C{index}", ms=5)
    axes.set(xlabel="seconds, offline phase included", ylabel=LABELS["test"], yscale="log")
    write_plain_numbers(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set_title(title, loc="left", fontsize=11)  # over the axes, clear of the legend beside them
    return figure


def write_plain_numbers(axes: Axes) -> None:
    """Label a logarithmic axis with 0.2 and not with a power of ten."""
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(StrMethodFormatter("{x:g}"))


def draw_methods(axes: Axes, records: Sequence[Record], value: Callable[[dict[str, Any]], float | None]) -> None:
    """Draw a line for each method."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    for index, method in enumerate(methods):
        runs = [record["curve"] for record in records if record["method"] == method]
        length = min(len(run) for run in runs)
        steps = [point["step"] for point in runs[0][:length]]
        rows = np.array([[np.nan if (v := value(point)) is None else v for point in run[:length]] for run in runs])
        finite = np.isfinite(rows).all(axis=0)  # a line ends where one of its runs diverged
        if not finite.any():
            continue
        shown = np.where(finite, rows, np.nan)
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--"}
        axes.plot(steps, shown.mean(axis=0), label=method, lw=1.5, **style)
        axes.fill_between(steps, shown.min(axis=0), shown.max(axis=0), alpha=0.15, lw=0, color=style["color"])
