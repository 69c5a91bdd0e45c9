"""What every method trains: a model, an optimizer, batches in an order that is the seed's, and a curve of errors."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from contaminated_tasks import Loss, Rows, Task
from torch import Tensor

CURVE_POINTS = 20


class Run:
    """One training run.

    Args:
        task: What is learned.
        train: The training rows, whose targets are partly wrong.
        trusted: The trusted rows.
        validation: The trusted rows that the curve has errors of, by name; the first decides which step is best.
        test: The test rows.
        seed: Of the order of the batches.
        steps: Base steps; by default the task's.

    Attributes:
        model: The model, drawn from torch's global random state.
        optimizer: Of its parameters.
        curve: Steps, test errors, and by the names of the trusted rows their errors and losses.
        looking: Seconds that the curve has taken.
        rate: The learning rate at the end, where the method finds it.
    """

    def __init__(
        self,
        task: Task,
        train: Rows,
        trusted: Rows,
        validation: Mapping[str, Rows],
        test: Rows,
        seed: int,
        steps: int | None = None,
    ) -> None:
        self.task, self.train, self.trusted, self.test, self.seed = task, train, trusted, test, seed
        self.validation = dict(validation)
        self.steps = task.steps if steps is None else steps
        self.model = task.build()
        self.optimizer = task.optimizer(self.model.parameters())
        self.curve: dict[str, Any] = {"step": [], "test": []}
        self.curve |= {kind: {name: [] for name in validation} for kind in ("val", "val_loss")}
        self.looking = 0.0
        self.rate: float | None = None
        self.step = 0
        self.keeps_best = False
        self._best: tuple[tuple[float, float], dict[str, Tensor]] | None = None

    def batches(self, rows: Rows, stream: int = 0) -> Iterator[Rows]:
        """Yield batches without end, pass after pass in another order.

        Args:
            rows: x and y.
            stream: Tells streams of one seed apart.
        """
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + stream)
        while True:
            for index in torch.randperm(len(rows[1]), generator=generator).split(self.task.batch):
                yield rows[0][index], rows[1][index]

    def ended(self) -> None:
        """Count a base step; look where it is time to."""
        self.step += 1
        if self.step % max(1, self.steps // CURVE_POINTS) == 0:
            self.look()

    @torch.no_grad()
    def look(self) -> None:
        """Add a point to the curve, unless the newest one is of this step."""
        if self.curve["step"][-1:] == [self.step]:
            return
        start = time.process_time()
        was_training = self.model.training
        self.model.eval()
        averages: Any = self.optimizer if hasattr(self.optimizer, "eval") else None  # as Schedule-Free's do
        if averages is not None:
            averages.eval()
        outputs = torch.cat([self.model(part) for part in self.test[0].split(1000)])
        self.curve["step"].append(self.step)
        self.curve["test"].append(number(self.task.error(outputs, self.test[1])))
        for name, (x, y) in self.validation.items():
            held_out = self.model(x)
            self.curve["val"][name].append(number(self.task.error(held_out, y)))
            self.curve["val_loss"][name].append(number(float(self.task.own_loss(held_out, y))))
        self.model.train(was_training)
        if self.keeps_best:
            self._keep_best()
        if averages is not None:
            averages.train()
        self.looking += time.process_time() - start

    def _keep_best(self) -> None:
        now = badness(self.curve, next(iter(self.validation)), -1)
        if self._best is None or now < self._best[0]:
            self._best = (now, {k: v.clone() for k, v in self.model.state_dict().items()})

    def go_back_to_best(self) -> None:
        """Put the parameters of the best step so far in place."""
        if self._best is not None:
            self.model.load_state_dict(self._best[1])

    def descend(self, loss: Loss, batches: Iterator[Rows], steps: int | None = None) -> None:
        """Train on batches in the ordinary way."""
        for _ in range(self.steps - self.step if steps is None else steps):
            x, y = next(batches)
            self.optimizer.zero_grad()
            loss(self.model(x), y).backward()
            self.optimizer.step()
            self.ended()


def number(value: float) -> float | None:
    """Return the value to five digits, or ``None``, which JSON can hold, where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def badness(curve: Mapping[str, Any], name: str, point: int) -> tuple[float, float]:
    """Return the error on trusted rows at a point of a curve, and their loss, which decides between equal errors."""
    found = [curve[kind][name][point] for kind in ("val", "val_loss")]
    return tuple(math.inf if value is None else value for value in found)  # type: ignore[return-value]
