"""The paths of predictions along which a learned loss is looked at, and how hard it pulls along them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_adalfl.loss_shape import LossShape

Values = NDArray[np.float64]


@dataclass(frozen=True)
class LossPath:
    """A learned loss along one path of predictions, from which training moves.

    Attributes:
        name: What it is of, such as "target 1".
        label: What x is.
        correct: The x of the right prediction.
        x: Ascending, without the ends at which the handcrafted loss or its slope is infinite or 0/0.
        loss: The learned loss, of one instance.
        handcrafted: The handcrafted loss.
        rate: The slope of the learned loss by that of the handcrafted one: how many times as hard it pulls towards the
            target; negative where it pulls away.
        handcrafted_pull: The size of the handcrafted loss's gradient by the model's raw output.
    """

    name: str
    label: str
    correct: float
    x: Values
    loss: Values
    handcrafted: Values
    rate: Values
    handcrafted_pull: Values


def loss_paths(shape: LossShape, classes: int, reduction: str) -> tuple[LossPath, ...]:
    """Return the paths of a task.

    Multiclass: the true class has probability x, and the others share the rest evenly. There the gradients of the
    learned and the handcrafted loss by the logits are parallel, and what the softmax takes no notice of, a slope common
    to both targets, drops out. Binary and multilabel: x is the predicted probability, one path for each target.
    Regression: x is the error, of both signs, one path for each target.
    """
    grid = shape.grid.numpy().astype(float)
    loss, slope = (rows.numpy().astype(float) for rows in (shape.loss, shape.slope))
    if shape.task == "regression":
        x = grid[np.abs(grid) > 1e-3 * grid[-1]]
        return tuple(
            LossPath(
                f"target {target:g}",
                "error f − y",
                0.0,
                x,
                np.interp(x, grid, loss[row]),
                x**2,
                np.interp(x, grid, slope[row]) / (2 * x),
                2 * np.abs(x),
            )
            for row, target in enumerate(shape.targets.numpy())
        )
    x = grid[1:-1]
    of = {float(target): row for row, target in enumerate(shape.targets.numpy())}
    hit, miss = of[1.0], of[0.0]
    if shape.task == "multiclass":
        share = (1 - x) / (classes - 1)
        outputs = classes if reduction == "mean" else 1
        # At 0 itself a logarithm has no slope, so shares below the first step take the slope of that step.
        total = loss[hit][1:-1] + (classes - 1) * np.interp(share, x, loss[miss][1:-1])
        by_x = slope[hit][1:-1] - np.interp(share, x, slope[miss][1:-1])
        label = "probability of the true class"
        return (LossPath("the true class", label, 1.0, x, total / outputs, -np.log(x), -x * by_x / outputs, 1 - x),)
    label = "predicted probability f"
    return (
        LossPath("target 1", label, 1.0, x, loss[hit][1:-1], -np.log(x), -x * slope[hit][1:-1], 1 - x),
        LossPath("target 0", label, 0.0, x, loss[miss][1:-1], -np.log(1 - x), (1 - x) * slope[miss][1:-1], x),
    )
