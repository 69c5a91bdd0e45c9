"""A learner's state: what a checkpoint holds of it, taken over whole or not at all, and steps that are taken back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adalfl.losses.learned_loss import LearnedLoss

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
        "learns": [] if loss is None else list(loss.phi()),
        "phi": {} if loss is None else {name: t.detach().clone() for name, t in loss.state_dict().items()},
        "is_zero": objective.is_zero,
        "rate": None if rate is None else rate.state_dict(),
        "meta_optimizer": learner._optimizer.state_dict(),
        "base_steps": learner.base_steps,
        "meta_steps": learner.meta_steps,
        "answered": learner.answered,
        "skipped_meta_steps": int(learner.skipped),
        "consensus": float(learner.consensus.mean),
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


def configuration_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the configuration that a state was written with, with the loss that it had then."""
    _check(state)
    values = dict(state["config"])
    if state["loss"] is not None:
        # φ is in the state, which must load where the file that it began with is not.
        values["loss"] = loss = LearnedLoss.rebuild(state["loss"], state["phi"])
        for name, p in loss.named_parameters():
            p.requires_grad_(name in state["learns"])
    return values


def _load(learner: Any, state: Mapping[str, Any]) -> None:
    loss, rate, config = learner.loss, learner.rate, learner.config
    learns_alike = (loss is None) == (state["loss"] is None) and (rate is None) == (state["rate"] is None)
    moves_alike = state["config"].get("meta_optimizer") == config.meta_optimizer
    for name, fits in (("learn", learns_alike), ("meta_optimizer", moves_alike)):
        if not fits:
            raise ValueError(
                f"the checkpoint was written with `{name}={state['config'].get(name)!r}` and this learner has "
                f"`{name}={getattr(config, name)!r}`; give what it was trained with."
            )
    if loss is not None:
        try:
            if loss.describe() != state["loss"]:
                raise RuntimeError(f"it is of {state['loss']}, and this learner's is {loss.describe()}.")
            loss.load_state_dict(state["phi"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint's φ does not fit `loss={config.loss!r}`: {error}") from error
        learner.objective.is_zero = bool(state["is_zero"])
    if rate is not None:
        rate.load_state_dict(state["rate"])
    try:
        learner._optimizer.load_state_dict(state["meta_optimizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint's meta optimizer does not fit this learner: {error}") from error
    rates = [getattr(config, name) for name, has in (("meta_lr", loss and loss.phi()), ("lr_meta_lr", rate)) if has]
    written = [state["config"].get(name) for name in ("meta_lr", "lr_meta_lr")]
    if written != [config.meta_lr, config.lr_meta_lr]:  # else they may be those of an offline phase
        for group, lr in zip(learner._optimizer.param_groups, rates):
            group["lr"] = lr
    for name in ("base_steps", "meta_steps", "answered", "is_initialised"):
        setattr(learner, name, state[name])
    learner.skipped = torch.tensor(float(state["skipped_meta_steps"]))
    learner.consensus.mean = torch.tensor(state["consensus"], dtype=torch.float64)


def _check(state: Any) -> None:
    """Raise unless ``state`` has the structure of a learner's; shapes are left to who loads them."""
    is_whole = (
        isinstance(state, Mapping)
        and isinstance(state.get("config"), Mapping)
        and isinstance(state.get("phi"), Mapping)
        and all(isinstance(value, Tensor) for value in state["phi"].values())
        and isinstance(state.get("meta_optimizer"), Mapping)
        and {"param_groups", "state"} <= set(state["meta_optimizer"])
        and {"loss", "rate", "is_zero", "learns"} <= set(state)
        and all(type(state.get(name)) is int and state[name] >= 0 for name in _COUNTS)
        and isinstance(state.get("is_initialised"), bool)
        and isinstance(state.get("consensus"), float)
    )
    if not is_whole:
        raise ValueError(_UNREADABLE)


def new_optimizer(name: str, groups: list[dict[str, Any]], is_free: bool) -> Optimizer:
    """Return a meta optimizer, if asked for one that is free of the size of gradients.

    Raises:
        ValueError: If it has no use for such parameters.
    """
    kind = getattr(torch.optim, name)
    eps = getattr(inspect.signature(kind).parameters.get("eps"), "default", None)
    options = {"eps": 1e-15} if is_free and isinstance(eps, float) else {}
    try:
        return kind(groups or [{"params": [nn.Parameter()]}], **options)
    except ValueError as error:
        raise ValueError(f"`meta_optimizer={name!r}` cannot move this learned loss or rate: {error}") from error


class Undo:
    """What the steps of an optimizer change, kept from before them.

    Args:
        optimizer: Before its steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before = {key: value.detach().clone() for key, value in self._tensors().items()}

    @torch.no_grad()
    def unless(self, keep: Tensor, moves: Tensor, parameters: Iterable[Tensor]) -> None:
        """Put everything back where ``keep``, a scalar, is false; state that there was not yet is zero then.

        Put some parameters back where ``moves`` is false, too; their state goes on.
        """
        held, moves = {(id(p), "") for p in parameters}, keep & moves
        for key, value in self._tensors().items():
            before = self._before[key] if key in self._before else torch.zeros_like(value)
            value.copy_(torch.where(moves if key in held else keep, value, before))

    def _tensors(self) -> dict[tuple[int, str], Tensor]:
        """Return parameters and state; counters of some optimizers lie on another device, and go on."""
        found: dict[tuple[int, str], Tensor] = {}
        for p in (p for group in self._optimizer.param_groups for p in group["params"]):
            state = {**self._optimizer.state.get(p, {}), "": p}
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            found.update({(id(p), key): value for key, value in tensors.items() if value.device == p.device})
        return found
