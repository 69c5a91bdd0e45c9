"""A short closed form of a learned loss: a Taylor polynomial, with the handcrafted loss as one more term."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_adalfl.loss_shape import CLASSIFICATION_TASKS, LossShape

_GOOD_ENOUGH = 0.01  # of the range of the loss
_DEGREES = (1, 2, 3, 4)


@dataclass(frozen=True)
class ClosedForm:
    """``ℓ(f) ≈ a·h(f) + c0 + c1 u + c2 u² + …`` for one target, by least squares over the grid.

    Attributes:
        target: y.
        handcrafted: a, or ``None`` where the polynomial does without h, -log of the target's probability.
        coefficients: c0, c1, …
        centre: Where u = 0: the probability 0.5, or the error 0.
        rms_error: The root of the mean squared difference, as a part of the range of ℓ.
        max_error: The largest difference, as a part of that range.
    """

    target: float
    handcrafted: float | None
    coefficients: tuple[float, ...]
    centre: float
    rms_error: float
    max_error: float


def fit_closed_form(shape: LossShape) -> tuple[ClosedForm, ...]:
    """Return the shortest closed form for each target that is good to 1% of the range, or else the best."""
    grid = shape.grid.numpy().astype(float)
    classifies = shape.task in CLASSIFICATION_TASKS
    forms = []
    for target, loss in zip(shape.targets.numpy(), shape.loss.numpy().astype(float), strict=True):
        x, values = (grid[1:-1], loss[1:-1]) if classifies else (grid, loss)
        likelihood = x if target == 1 else 1 - x
        handcrafted = -np.log(likelihood) if classifies else None
        forms.append(_shortest(x, values, float(target), 0.5 if classifies else 0.0, handcrafted))
    return tuple(forms)


def _shortest(
    x: NDArray[np.float64],
    values: NDArray[np.float64],
    target: float,
    centre: float,
    handcrafted: NDArray[np.float64] | None,
) -> ClosedForm:
    candidates = [_fit(x, values, target, centre, degree, None) for degree in _DEGREES]
    if handcrafted is not None:
        candidates += [_fit(x, values, target, centre, degree, handcrafted) for degree in _DEGREES[:3]]
    candidates.sort(key=lambda form: len(form.coefficients) + (form.handcrafted is not None))
    good = [form for form in candidates if form.rms_error < _GOOD_ENOUGH]
    return good[0] if good else min(candidates, key=lambda form: form.rms_error)


def _fit(
    x: NDArray[np.float64],
    values: NDArray[np.float64],
    target: float,
    centre: float,
    degree: int,
    handcrafted: NDArray[np.float64] | None,
) -> ClosedForm:
    powers = np.vander(x - centre, degree + 1, increasing=True)
    terms = powers if handcrafted is None else np.column_stack([powers, handcrafted])
    solution = np.linalg.lstsq(terms, values, rcond=None)[0]
    error = terms @ solution - values
    size = max(float(np.ptp(values)), np.finfo(float).tiny)
    return ClosedForm(
        target,
        None if handcrafted is None else float(solution[-1]),
        tuple(float(value) for value in solution[: degree + 1]),
        centre,
        float(np.sqrt(np.mean(error**2))) / size,
        float(np.abs(error).max()) / size,
    )
