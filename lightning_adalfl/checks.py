"""Checks of numbers and names that users give; each returns what is right, or raises and names value and remedy."""

from __future__ import annotations

import math
from collections.abc import Collection


def whole_number(name: str, value: object, least: int = 1) -> int:
    """Return ``value``, a whole number that is ``least`` or more."""
    message = f"`{name}` must be a whole number, {least} or more; got {value!r}."
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)
    return value


def finite_number(name: str, value: object) -> float:
    """Return ``value``, a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number; got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite; got {value}.")
    return float(value)  # NumPy's would stand in a checkpoint that `weights_only` does not read


def positive_number(name: str, value: object) -> float:
    """Return ``value``, a number that is positive and finite."""
    number = finite_number(name, value)
    if number <= 0:
        raise ValueError(f"`{name}` must be positive; got {value}.")
    return number


def one_of(name: str, value: object, choices: Collection[str]) -> str:
    """Return ``value``, one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")
    return value
