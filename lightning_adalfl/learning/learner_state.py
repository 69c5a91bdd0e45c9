"""What a checkpoint holds of a learner, and how it is taken over: whole, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.training_objective import BentLoss

_UNREADABLE = (
    "the checkpoint's entry 'adalfl' cannot be read: it is damaged or of another version of lightning_adalfl. Take "
    "another checkpoint, or delete the entry to train with a new learned loss."
)
_COUNTS = ("base_steps", "meta_steps", "answered", "skipped_meta_steps")


def state_of(learner: Any) -> dict[str, Any]:
    """Return φ, the meta optimizer and counters of a learner, in plain containers."""
    loss, rate, objective = learner.loss, learner.rate, learner.objective
    return {
        "config": learner.config.to_dict(),
        "loss": None if loss is None else loss.describe(),
        "phi": {} if loss is None else {name: t.detach().clone() for name, t in loss.state_dict().items()},
        "is_zero": isinstance(objective, BentLoss) and objective.is_zero,
        "rate": None if rate is None else rate.state_dict(),
        "meta_optimizer": learner._optimizer.state_dict(),
        "base_steps": learner.base_steps,
        "meta_steps": learner.meta_steps,
        "answered": learner.answered,
        "skipped_meta_steps": int(learner.skipped),
        "is_initialised": learner.is_initialised,
    }


def take_over(learner: Any, state: Mapping[str, Any]) -> None:
    """Give a learner the state of another.

    Raises:
        ValueError: If the state is damaged, of another version, or of another kind of learned loss; nothing of it is
            taken over then.
    """
    _check(state)
    before = copy.deepcopy(state_of(learner))
    try:
        _load(learner, state)
    except Exception as error:  # whatever torch makes of entries that are not its own
        _load(learner, before)
        raise error if isinstance(error, ValueError) else ValueError(_UNREADABLE) from error


def configurations_of(state: Mapping[str, Any]) -> tuple[AdaLFLConfig, AdaLFLConfig]:
    """Return the configuration that a state was written with, and one that holds the loss that it had then.

    φ is in the state, which must load where the file that it began with is not.
    """
    _check(state)
    given, values = state["config"].get("loss"), dict(state["config"])
    if state["loss"] is not None:
        values["loss"] = LearnedLoss.rebuild(state["loss"], state["phi"])
    config = AdaLFLConfig.from_dict(values)
    return (replace(config, loss=given) if isinstance(given, str) else config), config


def _load(learner: Any, state: Mapping[str, Any]) -> None:
    loss, rate, config = learner.loss, learner.rate, learner.config
    if (loss is None) != (state["loss"] is None) or (rate is None) != (state["rate"] is None):
        raise ValueError(
            f"the checkpoint was written with `learn={state['config'].get('learn')!r}` and this learner has "
            f"`learn={config.learn!r}`; give the configuration that it was trained with."
        )
    if loss is not None:
        try:
            loss.load_state_dict(state["phi"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint's φ does not fit `loss={config.loss!r}`: {error}") from error
        if isinstance(learner.objective, BentLoss):
            learner.objective.is_zero = bool(state["is_zero"])
    if rate is not None:
        rate.load_state_dict(state["rate"])
    try:
        learner._optimizer.load_state_dict(state["meta_optimizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint's meta optimizer does not fit this learner: {error}") from error
    for name in ("base_steps", "meta_steps", "answered", "is_initialised"):
        setattr(learner, name, state[name])
    learner.skipped = torch.tensor(float(state["skipped_meta_steps"]))


def _check(state: Any) -> None:
    """Raise unless ``state`` has the structure of a learner's; shapes are left to who loads them."""
    is_whole = (
        isinstance(state, Mapping)
        and isinstance(state.get("config"), Mapping)
        and isinstance(state.get("phi"), Mapping)
        and all(isinstance(value, Tensor) for value in state["phi"].values())
        and isinstance(state.get("meta_optimizer"), Mapping)
        and {"param_groups", "state"} <= set(state["meta_optimizer"])
        and {"loss", "rate", "is_zero"} <= set(state)
        and all(type(state.get(name)) is int and state[name] >= 0 for name in _COUNTS)
        and isinstance(state.get("is_initialised"), bool)
    )
    if not is_whole:
        raise ValueError(_UNREADABLE)
