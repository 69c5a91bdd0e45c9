"""Watch over a learned loss: where it stops helping, go back to the last good one, and then to the task loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_adalfl.config import AdaLFLConfig

PATIENCE = 0.5  # of the meta steps up to the best window: a fixed number is too long here and too short there
LEAST = 2  # windows
START = 10  # windows at least as long as the task loss has not fallen yet: training may begin on a plateau
FALL = 0.99  # times the best so far is a new best
RISE = 3.0  # times the best: the base model is running away, and the window's end is too far
UNUSABLE = 10  # meta steps in a row
SAMPLES = 10  # meta steps in a window at least: the mean of fewer batches is too noisy
_MEMORY = 0.9  # of the running mean that a rise is judged by


def safeguard_meta_steps(config: AdaLFLConfig) -> int:
    """Return the meta steps in a window of ``safeguard_window`` base steps; a base model overfits by the latter."""
    window = config.safeguard_window
    return max(window // config.meta_every, min(window, SAMPLES))


class Safeguard:
    """Judges a learned loss by the task loss on meta batches, which are held out with ``meta_data="val"``.

    It trips when a half as many meta steps again as there were up to the best window bring no other whose mean is 1%
    below it (ten windows at least, if that is the very first), when a running mean over ten meta steps is three times
    the best, or when ten hypergradients in a row are not finite. The first time, φ goes back to where it was at the
    best window and the gain is 1 from then on; the second time, the task loss takes over for good and the meta steps
    end.

    Args:
        window: Meta steps in a window.

    Attributes:
        level: How often it has tripped: 0, 1 or 2.
        best_values: What was learned, at the end of the best window.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.level = 0
        self._steps = 0
        self.best_values: list[Tensor] | None = None
        self._begin()

    def _begin(self) -> None:
        self._best = math.inf
        self._falls = 0
        self._sum = 0.0
        self._count = 0
        self._best_at = self._steps
        self._unusable = 0
        self._recent: float | None = None
        self._first: float | None = None

    def observe(self, task_loss: float, norm: float, learned: Sequence[Tensor]) -> str | None:
        """Take in a meta step; return why it trips, or ``None``.

        Args:
            task_loss: L_T on the meta batch after the base step.
            norm: Of the hypergradient.
            learned: φ and what else is learned, as they are now.
        """
        if self.level > 1:
            return None
        self._steps += 1
        finite = math.isfinite(task_loss) and math.isfinite(norm)
        self._unusable = 0 if finite else self._unusable + 1
        if self._unusable == UNUSABLE:
            return self._trip(f"{UNUSABLE} hypergradients in a row were not finite")
        if not finite:
            return None
        self._recent = task_loss if self._recent is None else _MEMORY * self._recent + (1 - _MEMORY) * task_loss
        self._first = task_loss if self._first is None else self._first
        # Both: the running mean lags behind a loss that falls fast, and one batch alone may be a hard one.
        if min(self._recent, task_loss) > RISE * min(self._best, self._first):
            return self._trip(f"the task loss on meta batches rose to {RISE:g} times its best")
        self._sum += task_loss
        self._count += 1
        if self._count < self.window:
            return None
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        if mean < FALL * self._best:
            self._best, self._best_at = mean, self._steps
            self._falls += 1
            if self.level == 0:
                self.best_values = [tensor.detach().clone() for tensor in learned]
            return None
        since = self._steps - self._best_at
        least = START if self.level == 0 and self._falls == 1 else LEAST
        if since < max(least * self.window, PATIENCE * self._best_at):
            return None
        return self._trip(f"the task loss on meta batches has not fallen for {since} meta steps")

    def _trip(self, reason: str) -> str:
        self.level += 1
        self._begin()
        return reason

    def state_dict(self) -> dict[str, Any]:
        """Return everything, in plain containers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        vars(self).update(state)
