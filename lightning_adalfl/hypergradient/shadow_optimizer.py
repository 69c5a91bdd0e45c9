"""A base optimizer's step as a differentiable function of parameters, state and gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

State = list[dict[str, Any]]

# State that counts steps and depends on no gradient.
COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})

DIFFERENTIABLE_OPTIMIZERS = "SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adadelta, Adamax, ASGD or Rprop"


class OptimizerError(ValueError):
    """The base optimizer's step cannot be differentiated in the way that was asked for."""


# Optimizers of torch that no method sees through, and why.
_OPAQUE = {
    "LBFGS": "evaluates the loss several times and is no function of one gradient",
    "Adafactor": "mixes the elements of a gradient",
    "Muon": "mixes the elements of a gradient",
    "SparseAdam": "takes sparse gradients",
}


def check_optimizer(optimizer: Optimizer, method: str, chained: bool = False) -> None:
    """Raise an :class:`OptimizerError` if ``method`` cannot see through ``optimizer`` (``chained``: in inner loops)."""
    name = type(optimizer).__name__
    for base in type(optimizer).__mro__:
        if base.__module__.startswith("torch.optim") and base.__name__ in _OPAQUE:
            raise OptimizerError(
                f"`optimizer` is {name}, whose step {_OPAQUE[base.__name__]}; use {DIFFERENTIABLE_OPTIMIZERS}."
            )
    if has_differentiable_step(optimizer):
        return
    if method != "finite_difference":
        raise OptimizerError(
            f"`optimizer` is {name}, which has no differentiable step (no `differentiable` option that works), so "
            f"`hypergradient={method!r}` cannot see through it. Choose `hypergradient='finite_difference'`, which "
            f"holds for steps that act on each gradient element by itself, or use {DIFFERENTIABLE_OPTIMIZERS}."
        )
    if chained:
        raise OptimizerError(
            f"`optimizer` is {name}, which has no differentiable step, as the later steps of an inner loop need it; "
            f"take one inner step, or use {DIFFERENTIABLE_OPTIMIZERS}."
        )


def has_differentiable_step(optimizer: Optimizer) -> bool:
    """Return whether ``optimizer`` honours ``differentiable=True``."""
    # The defaults would not do: loading a state adds the option to those of any optimizer.
    if not all("differentiable" in group for group in optimizer.param_groups):
        return False
    if type(optimizer).step.__module__.startswith("torch.optim"):
        return True
    # A subclass has inherited the option; whether its own step heeds it shows when it is taken.
    probe = OptimizerSnapshot(optimizer, [])
    probe.group_of = [0]
    with torch.enable_grad():
        (moved,), _ = probe.step([torch.zeros(1)], [torch.ones(1, requires_grad=True)], [{}])
    return moved.requires_grad


class OptimizerSnapshot:
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
        self.group_of = [group_of[id(p)] for p in parameters]
        self.state: State = [_copy_state(optimizer.state.get(p, {})) for p in parameters]

    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], state: State, differentiable: bool = True
    ) -> tuple[list[Tensor], State]:
        """Return ``θ' = U(θ, s, g)`` and the new state, with gradients to every input that requires one.

        Args:
            parameters: θ; not changed.
            gradients: g, one for each parameter.
            state: s, as :attr:`state` holds it; not changed.
            differentiable: ``False`` for a plain step without gradients.
        """
        moved = [p.clone() for p in parameters]
        copied = [_copy_state(s, keep_graph=True) for s in state]
        shadow: Optimizer = object.__new__(self.optimizer_class)
        options = {"foreach": False, "fused": False, "capturable": False, "differentiable": differentiable}
        groups: list[dict[str, Any]] = []
        for group in self.groups:
            known = {k: v for k, v in options.items() if k in group}
            groups.append({**group, **known, "params": []})
        for parameter, gradient, index, entry in zip(moved, gradients, self.group_of, copied):
            if parameter.requires_grad:
                parameter.retain_grad()  # a non-leaf's `.grad` may be read without a warning
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
        with _counting_in_double():
            shadow.step()
        return moved, [shadow.state.get(p, {}) for p in moved]

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


class _DefaultState(dict[Tensor, dict[str, Any]]):
    """Optimizers expect a state that creates the entry of a new parameter."""

    def __missing__(self, key: Tensor) -> dict[str, Any]:
        return self.setdefault(key, {})


@contextmanager
def _counting_in_double() -> Iterator[None]:
    """Let an optimizer without state create its counters in double precision; all else has its parameter's dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _copy_state(state: dict[str, Any], keep_graph: bool = False) -> dict[str, Any]:
    copied = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            copied[key] = copy.copy(value)
        else:
            # A plain step corrects its bias in Python's doubles, a differentiable one in the precision of its counters.
            double = key in COUNTERS and value.is_floating_point() and value.device.type == "cpu"
            value = value if keep_graph else value.detach()
            copied[key] = value.to(torch.float64, copy=True) if double else value.clone()
    return copied
