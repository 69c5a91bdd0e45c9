"""A base optimizer's step as a differentiable function of parameters, state and gradient."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# State that counts steps and depends on no gradient.
COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})

DIFFERENTIABLE_OPTIMIZERS = (
    "SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adadelta, Adamax, ASGD, Rprop, Muon or Adafactor"
)


class OptimizerError(ValueError):
    """The base optimizer's step cannot be differentiated in the way that was asked for."""


# Optimizers of torch that no method sees through, and why.
_OPAQUE = {
    "LBFGS": "evaluates the loss several times and is no function of one gradient",
    "Adafactor": "mixes the elements of a gradient, and may be another than torch's",
    "Muon": "mixes the elements of a gradient, and may be another than torch's",
    "SparseAdam": "takes sparse gradients",
}


def check_optimizer(optimizer: Optimizer, is_exact: bool) -> None:
    """Raise an :class:`OptimizerError` if nothing sees through ``optimizer``, or no exact way where that is wanted."""
    name = type(optimizer).__name__
    for base in type(optimizer).__mro__:
        if base.__module__.startswith("torch.optim") and base.__name__ in _OPAQUE:
            raise OptimizerError(
                f"`optimizer` is {name}, whose step {_OPAQUE[base.__name__]}; use {DIFFERENTIABLE_OPTIMIZERS}."
            )
    if is_exact and not has_differentiable_step(optimizer):
        raise OptimizerError(
            f"`optimizer` is {name}, which has no differentiable step (no `differentiable` option that works). Choose "
            "`hypergradient='finite_difference'`, which holds for steps that act on each gradient element by itself, "
            f"or use {DIFFERENTIABLE_OPTIMIZERS}."
        )
    if not steps_as_torch(optimizer) and _probed(optimizer, differentiable=False) is None:
        raise OptimizerError(
            f"`optimizer` is {name}, whose step cannot be taken by itself, as where it calls a closure; use "
            f"{DIFFERENTIABLE_OPTIMIZERS}."
        )


def has_differentiable_step(optimizer: Optimizer) -> bool:
    """Return whether ``optimizer`` honours ``differentiable=True``."""
    # The defaults would not do: loading a state adds the option to those of any optimizer.
    if not all("differentiable" in group for group in optimizer.param_groups):
        return False
    if steps_as_torch(optimizer):
        return True
    # A subclass has inherited the option; whether its own step heeds it shows when it is taken.
    moved = _probed(optimizer, differentiable=True)
    return moved is not None and moved.requires_grad


def _probed(optimizer: Optimizer, differentiable: bool) -> Tensor | None:
    """Return what a step makes of one weight, or ``None`` where it fails without what else it waits for."""
    weight = torch.zeros(1)
    probe = ShadowOptimizer(optimizer, [weight])
    try:
        with torch.enable_grad():
            (moved,) = probe.step([0], [weight], [torch.ones(1, requires_grad=differentiable)], differentiable)
    except Exception:  # a user's step may raise anything
        return None
    return moved


def steps_as_torch(optimizer: Optimizer) -> bool:
    """Return whether the step is one of torch's own, and not that of a user's class."""
    return type(optimizer).step.__module__.startswith("torch.optim")


class ShadowOptimizer:
    """What an optimizer's next step depends on besides parameters and gradient: its options and its state s_t.

    Args:
        optimizer: The base optimizer, before its step.
        parameters: The parameters θ whose step is of interest, in the order in which values are given later.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self.optimizer_class = type(optimizer)
        self.defaults = dict(optimizer.defaults)
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.group_of = [group_of.get(id(p), 0) for p in parameters]
        self.state = [_copied(optimizer.state.get(p, {})) for p in parameters]

    def step(
        self,
        active: Sequence[int],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        differentiable: bool = True,
    ) -> list[Tensor]:
        """Return ``θ' = U(θ, s, g)``, with a graph to every gradient that requires one.

        Args:
            active: Which of the parameters have a gradient.
            parameters: θ of these; not changed.
            gradients: g, one for each.
            differentiable: ``False`` for a plain step without gradients.
        """
        moved = [p.clone() for p in parameters]
        copied = [_copied(self.state[i]) for i in active]
        chosen = [self.group_of[i] for i in active]
        shadow: Optimizer = object.__new__(self.optimizer_class)
        options = {"foreach": False, "fused": False, "capturable": False, "differentiable": differentiable}
        groups = [{**g, **{k: v for k, v in options.items() if k in g}, "params": []} for g in self.groups]
        for parameter, gradient, index, entry in zip(moved, gradients, chosen, copied):
            parameter.grad = gradient
            if gradient.requires_grad:
                gradient.register_hook(functools.partial(_without_roots_at_zero, gradient.detach()))
            groups[index]["params"].append(parameter)
            self._complete_momentum(groups[index], entry, parameter, gradient)
        shadow.__setstate__(
            {
                "defaults": {**self.defaults, "differentiable": differentiable},
                "state": _DefaultState({p: s for p, s in zip(moved, copied) if s}),
                "param_groups": groups,
            }
        )
        # A user's step may ask for a closure, which Lightning always gives.
        takes_closure = "closure" in inspect.signature(self.optimizer_class.step).parameters
        shadow.step(**({"closure": None} if takes_closure else {}))
        return moved

    def _complete_momentum(
        self, group: dict[str, Any], entry: dict[str, Any], parameter: Tensor, gradient: Tensor
    ) -> None:
        # SGD's first momentum buffer is a detached copy of the gradient; this one gives the same value with its graph.
        is_sgd = issubclass(self.optimizer_class, torch.optim.SGD)
        if is_sgd and group["momentum"] and entry.get("momentum_buffer") is None:
            decayed = (-gradient if group["maximize"] else gradient) + group["weight_decay"] * parameter
            entry["momentum_buffer"] = decayed * (group["dampening"] / group["momentum"])


def _without_roots_at_zero(gradient: Tensor, adjoint: Tensor) -> Tensor:
    """Return zero where the root of a squared gradient of zero has made NaN of its adjoint."""
    return torch.where((gradient.square() == 0) & ~adjoint.isfinite(), torch.zeros_like(adjoint), adjoint)


class _DefaultState(dict[Tensor, "_Entry"]):
    """Optimizers expect a state that creates the entry of a new parameter."""

    def __missing__(self, key: Tensor) -> _Entry:
        return self.setdefault(key, _Entry())


class _Entry(dict[str, Any]):
    """The state of one parameter, with counters in double precision.

    A plain step corrects its bias in Python's doubles, a differentiable one in the precision of its counters.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        is_count = key in COUNTERS and isinstance(value, Tensor) and value.device.type == "cpu"
        super().__setitem__(key, value.double() if is_count and value.is_floating_point() else value)


def _copied(state: dict[str, Any]) -> _Entry:
    copies = _Entry()
    for key, value in state.items():
        copies[key] = value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
    return copies
