"""Rivals that train with the own loss and need no tuned learning rate, or no schedule: packages, each with one setting.

The setting is what the package's README recommends; where that leaves a choice, the docstring says which.
"""

from __future__ import annotations

import importlib
from typing import Any

from training import Run

WARMUP = 0.05  # of the steps, for Schedule-Free: its README recommends one, its paper has this
# Of the rate that plain SGD would have: Schedule-Free's README says 10 to 50.
SGD_FACTOR = 10.0


def prodigy(run: Run) -> None:
    """Train with Prodigy (Mishchenko & Defazio, 2024): ``lr=1``, no weight decay and no schedule."""
    optimizer = installed("prodigyopt", "prodigyopt").Prodigy(run.model.parameters(), lr=1.0)
    _train(run, optimizer)
    run.rate = float(optimizer.param_groups[0]["d"])


def mechanic(run: Run) -> None:
    """Train with the task's optimizer, wrapped by Mechanic (Cutkosky et al., 2023): ``lr=1`` and its defaults."""
    mechanize = installed("mechanic_pytorch", "mechanic-pytorch").mechanize
    optimizer = mechanize(type(run.optimizer))(run.model.parameters(), lr=1.0)
    _train(run, optimizer)
    run.rate = float(optimizer.state["_mechanic"]["s"].sum())


def schedule_free_sgd(run: Run) -> None:
    """Train with Schedule-Free SGD (Defazio et al., 2024) at ten times the task's rate; β = 0.9, its default."""
    rate = SGD_FACTOR * run.optimizer.param_groups[0]["lr"]
    kind = installed("schedulefree", "schedulefree").SGDScheduleFree
    _train(run, kind(run.model.parameters(), lr=rate, warmup_steps=round(WARMUP * run.steps)))


def schedule_free_adamw(run: Run) -> None:
    """Train with Schedule-Free AdamW at its default rate, 0.0025, which is the same for every task."""
    kind = installed("schedulefree", "schedulefree").AdamWScheduleFree
    _train(run, kind(run.model.parameters(), warmup_steps=round(WARMUP * run.steps)))


def _train(run: Run, optimizer: Any) -> None:
    run.optimizer = optimizer
    if hasattr(optimizer, "train"):
        optimizer.train()
    run.descend(run.task.own_loss, run.batches(run.train))


def installed(module: str, package: str) -> Any:
    """Return a module.

    Raises:
        ModuleNotFoundError: If its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this method needs the package {package}; `pip install {package}`.") from error
