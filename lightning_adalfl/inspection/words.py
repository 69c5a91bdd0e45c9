"""A report on a learned loss, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_adalfl.inspection.closed_form import ClosedForm
from lightning_adalfl.inspection.report import Interval, LossReport, PathReport

_NAMES = {
    "multiclass": "cross-entropy",
    "binary": "the binary cross-entropy",
    "multilabel": "the binary cross-entropy",
    "regression": "the squared error",
}
_STATIONS = {"classification": (0.1, 0.25, 0.5, 0.75, 0.9, 0.98), "regression": (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)}


def in_words(report: LossReport, gain: float | None = None) -> str:
    """Return a report as text: strength, shape, flat regions, regions that pull away, and a closed form.

    Args:
        report: The report.
        gain: The learned gain, if the loss trained within bounds.
    """
    parts = [_strength(report, gain), _rates(report), _flat(report), _away(report), _closed_forms(report.closed_forms)]
    return "\n\n".join(parts)


def _strength(report: LossReport, gain: float | None) -> str:
    name = _NAMES[report.shape.task]
    classes = f" for {report.classes} classes" if report.shape.task == "multiclass" else ""
    lines = [
        f"Strength (section 5.5). It pulls {report.strength:.3g} times as hard as {name}{classes}: the implied "
        f"learning rate is {report.strength:.3g} times the optimizer's.",
        f"The cosine between its gradient and that of {name} is {report.alignment:.3f}; "
        + (
            "it is that loss but for strength, which a learning rate does as well."
            if report.alignment > 0.995
            else "the rest is shape, which no learning rate gives."
        ),
    ]
    if gain is not None:
        lines.append(
            f"It trained within bounds, where the strength is the learned gain, {gain:.3g}, whatever that of the loss "
            "itself; all that is shown here is times the gain."
        )
    if report.strength <= 0:
        lines.append("Not above zero: on the whole it drives predictions away from the targets.")
    elif report.strength < 0.05 and gain is None:
        lines.append("That is next to nothing: the loss has flattened, which stops training early (section 5.6).")
    return "\n".join(lines)


def _rates(report: LossReport) -> str:
    regression = report.shape.task == "regression"
    ends = report.paths[0].path.x[[0, -1]]
    stations = np.array(_STATIONS["regression" if regression else "classification"])
    stations = stations * ends[1] if regression else stations
    width = max(len(item.path.name) for item in report.paths)
    head = report.paths[0].path.label
    lines = ["Shape. How many times as hard it pulls, by " + head + ":"]
    lines.append(" " * (width + 2) + "".join(f"{station:>9.3g}" for station in stations))
    for item in report.paths:
        rates = np.interp(stations, item.path.x, item.path.rate)
        lines.append(f"  {item.path.name:{width}}" + "".join(f"{rate:9.3g}" for rate in rates))
    return "\n".join(lines)


def _flat(report: LossReport) -> str:
    found = [f"for {item.path.name} at {_listed(item.flat)}" for item in report.paths if item.flat]
    if not found:
        return "Flat regions (section 5.6). None."
    return (
        f"Flat regions (section 5.6). {report.flatness:.0%} of the predictions hardly move, less than a tenth as "
        "hard as by a handcrafted loss of the same size: " + "; ".join(found) + "."
    )


def _away(report: LossReport) -> str:
    lines = [line for item in report.paths for line in _away_on(item, report.shape.task)]
    if not lines:
        return "Non-monotone regions. None: it pulls towards the target everywhere."
    return "Non-monotone regions.\n" + "\n".join(lines)


def _away_on(item: PathReport, task: str) -> list[str]:
    name = item.path.name
    lines = [f"  For {name} it pulls away from the target at {_listed(item.away)}."] if item.away else []
    if item.turn is None:
        return lines
    if task == "regression":
        return [
            *lines,
            f"  For {name} it is lowest at an error of {item.turn:.3g}, and so pulls predictions off the target.",
        ]
    return [
        *lines,
        f"  For {name} it turns up at the confident end, beyond {item.turn:.3g}: label smoothing (section 5.7), as "
        f"with ε = {item.smoothing:.2g}.",
    ]


def _closed_forms(forms: Sequence[ClosedForm]) -> str:
    lines = ["Closed form, but for a constant (least squares; errors in percent of the range of the loss):"]
    for form in forms:
        lines.append(
            f"  target {form.target:g}: ℓ ≈ {formula(form)}    "
            f"(root mean square {form.rms_error:.1%}, largest {form.max_error:.1%})"
        )
    return "\n".join(lines)


def formula(form: ClosedForm) -> str:
    """Return a closed form as text, less its constant and what is next to nothing."""
    base = f"(f − {form.centre:g})" if form.centre else "(f − y)"
    powers = {1: "", 2: "²", 3: "³", 4: "⁴"}
    terms = [(value, f"{base}{powers[power]}") for power, value in enumerate(form.coefficients) if power]
    if form.handcrafted is not None:
        terms.insert(0, (form.handcrafted, "(−log f)" if form.target == 1 else "(−log(1 − f))"))
    least = 1e-3 * max(abs(value) for value, _ in terms)
    terms = [(value, name) for value, name in terms if abs(value) >= least]
    text = " ".join(f"{'−' if value < 0 else '+'} {abs(value):.3g} {name}" for value, name in terms)
    return text.removeprefix("+ ")


def _listed(intervals: Sequence[Interval]) -> str:
    return ", ".join(f"{low:.2f} to {high:.2f}" for low, high in intervals)
