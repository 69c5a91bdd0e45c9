from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from whole_step import METHODS, WholeStep, by_half

# The larger ε keeps the step smooth where a gradient is small: without it Adam's first step is all but its sign.
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.3}),
    "sgd_maximize": (SGD, {"lr": 0.3, "maximize": True}),
    "sgd_decay": (SGD, {"lr": 0.3, "weight_decay": 0.1}),
    "momentum": (SGD, {"lr": 0.3, "momentum": 0.9}),
    "dampening": (SGD, {"lr": 0.3, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": (SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (Adam, {"lr": 0.05, "eps": 1e-2}),
    "adam_l2": (Adam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "amsgrad": (Adam, {"lr": 0.05, "eps": 1e-2, "amsgrad": True}),
    "adam_maximize": (Adam, {"lr": 0.05, "eps": 1e-2, "maximize": True}),
    "adamw": (AdamW, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "adamw_amsgrad": (AdamW, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    "rmsprop": (RMSprop, {"lr": 0.05, "eps": 1e-2}),
    "rmsprop_centered": (RMSprop, {"lr": 0.05, "eps": 1e-2, "momentum": 0.5, "centered": True, "weight_decay": 0.1}),
    "adagrad": (Adagrad, {"lr": 0.05, "eps": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1}),
    "nadam": (NAdam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "nadam_decoupled": (NAdam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (RAdam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "adadelta": (Adadelta, {"lr": 0.5, "eps": 1e-2, "weight_decay": 0.1}),
    "adamax": (Adamax, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "asgd": (ASGD, {"lr": 0.05, "weight_decay": 0.1}),
}


def build(name: str, groups: int, model: torch.nn.Module) -> Optimizer:
    kind, options = OPTIMIZERS[name]
    return kind(by_half(model, options["lr"]) if groups == 2 else model.parameters(), **options)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_methods_agree_and_equal_central_differences_of_the_whole_step(name: str, warm: int, groups: int) -> None:
    WholeStep(optimizer=functools.partial(build, name, groups), warm=warm).check(lr=name != "asgd")


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, Adagrad, NAdam, Adadelta, Adamax])
def test_methods_agree_with_the_default_epsilon(kind: type[Optimizer], warm: int) -> None:
    """The first step is nearly the gradient's sign, too steep for differences, but the two exact methods must agree."""
    whole = WholeStep(optimizer=lambda model: kind(model.parameters()), warm=warm)
    forward, reverse = (torch.cat([g.flatten() for g in whole.by_engine(m).loss]) for m in ("forward", "reverse"))
    assert reverse.norm() > 0
    torch.testing.assert_close(forward, reverse, rtol=1e-6, atol=1e-9 * float(reverse.norm()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("warm", [0, 3])
def test_a_step_by_the_sign_has_no_hypergradient(method: str, warm: int) -> None:
    """Rprop's step does not change with the size of a gradient."""
    result = WholeStep(optimizer=lambda model: Rprop(model.parameters(), lr=0.01), warm=warm).by_engine(method)
    assert all((g == 0).all() for g in result.loss)
