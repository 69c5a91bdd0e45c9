"""One step of the paper's algorithm in a loop of one's own: with this package, and with what stands in for it.

The base step descends the learned loss alone, and the meta step follows each; that is what the others can do.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_cases import LR, Batch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from lightning_adalfl import AdaLFLConfig, LearnedLoss, LossNetwork, MetaLearner

META_LR = 1e-5
Step = Callable[[Batch, Batch], None]


def plain(model: nn.Module) -> Step:
    """Ordinary training with the cross-entropy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step(batch: Batch, held_out: Batch) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def learner(model: nn.Module, way: str) -> Step:
    """This package's ``MetaLearner``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    meta = MetaLearner(AdaLFLConfig.paper("multiclass", loss=_network(), hypergradient=way, meta_lr=META_LR))
    base = meta.new_base_step(model, optimizer)

    def step(batch: Batch, held_out: Batch) -> None:
        predictions, y = base.forward(batch)
        optimizer.zero_grad()
        base.descend(meta.objective, F.cross_entropy(predictions, y)).backward()
        base.step()
        meta.end_base_step(base, repeat(held_out))

    return step


def with_higher(model: nn.Module) -> Step:
    """An inner loop of one step on `higher`, whose result is copied back."""
    import higher

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loss, meta_optimizer = _learned(model)

    def step(batch: Batch, held_out: Batch) -> None:
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (unrolled, inner):
            inner.step(loss(unrolled(batch[0]), batch[1]))
            value = F.cross_entropy(unrolled(held_out[0]), held_out[1])
            _meta_step(meta_optimizer, loss, value)
            with torch.no_grad():
                for old, new in zip(_tensors(model), _tensors(unrolled)):
                    old.copy_(new)

    return step


def with_torchopt(model: nn.Module) -> Step:
    """A differentiable step of TorchOpt inside the model, cut from its graph afterwards."""
    import torchopt

    optimizer = torchopt.MetaSGD(model, lr=LR)
    loss, meta_optimizer = _learned(model)

    def step(batch: Batch, held_out: Batch) -> None:
        optimizer.step(loss(model(batch[0]), batch[1]))
        _meta_step(meta_optimizer, loss, F.cross_entropy(model(held_out[0]), held_out[1]))
        torchopt.stop_gradient(model)
        torchopt.stop_gradient(optimizer)

    return step


def with_boat(model: nn.Module) -> Step:
    """BOAT's naive gradient descent with reverse differentiation, which are `higher`'s with two more forward passes."""
    import boat_torch

    loss, meta_optimizer = _learned(model)
    losses = {f"{level}_level_loss": {"function": f"{__name__}.boat_{level}_loss"} for level in ("lower", "upper")}
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": ["RAD"],
        "lower_iters": 1,
        "lower_level_model": model,
        "lower_level_var": list(model.parameters()),
        "lower_level_opt": torch.optim.SGD(model.parameters(), lr=LR),
        "upper_level_model": loss,
        "upper_level_var": list(loss.parameters()),
        "upper_level_opt": meta_optimizer,
        "copy_last_param": True,
        "accumulate_grad": False,
        "return_grad": False,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
        "RGT": {"truncate_iter": 0},
        "device": next(model.parameters()).device,
        "loss_log_path": os.devnull,
    }
    problem = boat_torch.Problem(config, losses)
    problem.build_ll_solver()
    problem.build_ul_solver()

    def step(batch: Batch, held_out: Batch) -> None:
        problem.run_iter({"batch": batch}, {"batch": held_out}, current_iter=0)

    return step


def boat_lower_loss(feed: Any, loss: nn.Module, model: nn.Module) -> Tensor:
    """Return the learned loss; BOAT wants its name."""
    x, y = feed["batch"]
    return loss(model(x), y)


def boat_upper_loss(feed: Any, loss: nn.Module, model: Any, params: Any = None) -> Tensor:
    """Return the cross-entropy; BOAT wants its name."""
    x, y = feed["batch"]
    return F.cross_entropy(model(x) if params is None else model(x, params=params), y)


def with_forward_ad(model: nn.Module) -> Step:
    """The same product by torch's forward mode, which runs the base batch again: a script for one model.

    Dropout is drawn anew, and what BatchNorm counts is counted twice.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loss, meta_optimizer = _learned(model)

    def step(batch: Batch, held_out: Batch) -> None:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
        value = F.cross_entropy(model(held_out[0]), held_out[1])
        u = torch.autograd.grad(value, list(model.parameters()))
        with forward_ad.dual_level(), torch.no_grad():
            duals = {name: forward_ad.make_dual(p, t) for (name, p), t in zip(before.items(), u)}
            f, moved = forward_ad.unpack_dual(functional_call(model, duals, (batch[0],)))
        f = f.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(f, batch[1]), f, create_graph=True)
        _meta_step(meta_optimizer, loss, -LR * (gradient * moved.detach()).sum())

    return step


def _network() -> LossNetwork:
    torch.manual_seed(0)
    return LossNetwork("multiclass")


def _learned(model: nn.Module) -> tuple[LearnedLoss, torch.optim.Optimizer]:
    loss = _network().to(next(model.parameters()).device)
    return loss, torch.optim.Adam(loss.parameters(), lr=META_LR)


def _meta_step(optimizer: torch.optim.Optimizer, loss: LearnedLoss, value: Tensor) -> None:
    parameters = list(loss.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters)):
        parameter.grad = gradient
    optimizer.step()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


STEPS: dict[str, Callable[[nn.Module], Step]] = {
    "plain loop": plain,
    "MetaLearner, forward": partial(learner, way="forward"),
    "MetaLearner, finite_difference": partial(learner, way="finite_difference"),
    "MetaLearner, reverse": partial(learner, way="reverse"),
    "forward mode, by hand": with_forward_ad,
}
_PACKAGES = {"higher": with_higher, "torchopt": with_torchopt, "boat_torch": with_boat}
STEPS |= {f"{name}, unrolled": build for name, build in _PACKAGES.items() if importlib.util.find_spec(name)}
