"""The figure of a report: the loss, its closed form, and how hard it pulls, along each path of predictions."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_adalfl.inspection.closed_form import ClosedForm
from lightning_adalfl.inspection.paths import LossPath
from lightning_adalfl.inspection.report import LossReport, PathReport

_LEARNED, _FORM, _GREY = "tab:blue", "tab:orange", "0.35"


def plot_inspection(report: LossReport, *, title: str | None = None) -> Figure:
    """Draw a learned loss along each path of predictions.

    The upper row shows the loss less its value at the right prediction (or the last point before it), its closed form,
    and the handcrafted loss times the strength. The lower row shows how many times as hard the loss pulls as the
    handcrafted one; grey is flat, red pulls away from the target.

    Args:
        report: What :func:`~lightning_adalfl.inspection.inspect_shape` found.
        title: Replaces the default title.
    """
    columns = len(report.paths)
    figure = Figure(figsize=(max(6.4, 3.9 * columns), 6.0), dpi=110, layout="constrained")
    axes = figure.subplots(2, columns, sharex=True, sharey="row", squeeze=False)
    for column, item in enumerate(report.paths):
        _draw_loss(axes[0, column], report, column)
        _draw_rate(axes[1, column], item, report.strength)
        for row in (0, 1):
            _shade(axes[row, column], item)
        axes[0, column].set_title(item.path.name, fontsize=10)
        axes[1, column].set_xlabel(item.path.label)
    _limit(axes[0, 0], [item.path for item in report.paths])
    axes[0, 0].set_ylabel("loss, less its value\nat the right prediction")
    axes[1, 0].set_ylabel("pull towards the target,\nhandcrafted loss = 1")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    more, names = axes[1, 0].get_legend_handles_labels()
    known = dict(zip([*labels, *names], [*handles, *more]))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title or f"Learned loss at base step {report.shape.step:,} ({report.shape.task})", fontsize=11)
    return figure


def _draw_loss(axes: Axes, report: LossReport, column: int) -> None:
    path = report.paths[column].path
    strength = report.strength if report.strength > 0 else 1.0
    zero = int(np.abs(path.x - path.correct).argmin())
    learned, form = path.loss - path.loss[zero], _form_along(path, report, column)
    axes.plot(path.x, strength * (path.handcrafted - path.handcrafted[zero]), "--", color=_GREY, lw=1.3)
    axes.lines[-1].set_label(f"handcrafted loss × {strength:.3g}")
    axes.plot(path.x, learned, color=_LEARNED, lw=2.2, label="learned loss")
    axes.plot(path.x, form - path.loss[zero], ":", color=_FORM, lw=2.0, label="its closed form")


def _limit(axes: Axes, paths: list[LossPath]) -> None:
    """Show all of the learned loss, whatever the handcrafted one does at its ends; the row shares its axis."""
    relative = [path.loss - path.loss[np.abs(path.x - path.correct).argmin()] for path in paths]
    low, high = min(float(loss.min()) for loss in relative), max(float(loss.max()) for loss in relative)
    margin = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _draw_rate(axes: Axes, item: PathReport, strength: float) -> None:
    axes.axhline(0, color="0.6", lw=0.8)
    axes.axhline(strength, color=_GREY, ls="--", lw=1.0, label=f"strength, {strength:.3g}")
    axes.plot(item.path.x, item.path.rate, color=_LEARNED, lw=2.2)
    if item.turn is not None:
        axes.axvline(item.turn, color="tab:red", lw=1.2, label=f"turns at {item.turn:.3g}")


def _shade(axes: Axes, item: PathReport) -> None:
    for intervals, colour, label in ((item.flat, "0.85", "flat"), (item.away, "#f6c9c5", "pulls away from the target")):
        for low, high in intervals:
            axes.axvspan(low, high, color=colour, lw=0, zorder=0, label=label)


def _form_along(path: LossPath, report: LossReport, column: int) -> NDArray[np.float64]:
    forms = {form.target: form for form in report.closed_forms}
    if report.shape.task == "regression":
        return _values(report.closed_forms[column], path.x)
    if report.shape.task != "multiclass":
        return _values(forms[path.correct], path.x)
    others = report.classes - 1
    total = _values(forms[1.0], path.x) + others * _values(forms[0.0], (1 - path.x) / others)
    return total / report.classes if report.reduction == "mean" else total


def _values(form: ClosedForm, x: NDArray[np.float64]) -> NDArray[np.float64]:
    values = np.vander(x - form.centre, len(form.coefficients), increasing=True) @ np.array(form.coefficients)
    if form.handcrafted is not None:
        values = values - form.handcrafted * np.log(x if form.target == 1 else 1 - x)
    return values
