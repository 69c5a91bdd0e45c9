"""One training step of each method that the benchmark compares, as a user of it would write the step.

Every step moves the base model, and the learned loss if it has one; the next step starts from the new parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import higher
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn

from lightning_adalfl import BaseStep, LossNetwork, hypergradient

BASE_LR = 0.01
META_LR = 1e-5
Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch, Batch], None]


def handcrafted(model: nn.Module, loss: LossNetwork) -> Step:
    """Ordinary training with cross-entropy, which every other step is compared with."""
    return _ordinary(model, F.cross_entropy)


def between(model: nn.Module, loss: LossNetwork) -> Step:
    """A base step on the learned loss without a meta step, as it lies between meta steps where `meta_every` > 1."""
    return _ordinary(model, loss)


def _ordinary(model: nn.Module, objective: Callable[[Tensor, Tensor], Tensor]) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_LR)

    def step(batch: Batch, meta_batch: Batch) -> None:
        optimizer.zero_grad()
        objective(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def adalfl(model: nn.Module, loss: LossNetwork, method: str) -> Step:
    """The base step and the meta step of this package."""
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_LR)
    meta_optimizer = torch.optim.Adam(loss.parameters(), lr=META_LR, fused=True)
    base_step = BaseStep(model, optimizer, method=method)

    def step(batch: Batch, meta_batch: Batch) -> None:
        optimizer.zero_grad()
        base_step.forward(batch)
        base_step.evaluate(loss).backward()
        base_step.step()
        gradient = hypergradient(base_step, loss, F.cross_entropy, meta_batch, log_lr=False)
        _meta_step(meta_optimizer, loss, gradient.loss)

    return step


def with_higher(model: nn.Module, loss: LossNetwork) -> Step:
    """The same algorithm on `higher`: an inner loop of one step whose result is copied back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_LR)
    meta_optimizer = torch.optim.Adam(loss.parameters(), lr=META_LR, fused=True)

    def step(batch: Batch, meta_batch: Batch) -> None:
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (unrolled, inner):
            inner.step(loss(unrolled(batch[0]), batch[1]))
            value = F.cross_entropy(unrolled(meta_batch[0]), meta_batch[1])
            gradient = torch.autograd.grad(value, list(loss.parameters()))
            with torch.no_grad():
                for old, new in zip(model.parameters(), unrolled.parameters()):
                    old.copy_(new)
                for old, new in zip(model.buffers(), unrolled.buffers()):
                    old.copy_(new)
        _meta_step(meta_optimizer, loss, gradient)

    return step


def with_torchopt(model: nn.Module, loss: LossNetwork) -> Step:
    """The same algorithm on TorchOpt: a differentiable step inside the model, cut from its graph afterwards."""
    optimizer = torchopt.MetaSGD(model, lr=BASE_LR)
    meta_optimizer = torch.optim.Adam(loss.parameters(), lr=META_LR, fused=True)
    phi = list(loss.parameters())

    def step(batch: Batch, meta_batch: Batch) -> None:
        optimizer.step(loss(model(batch[0]), batch[1]))
        value = F.cross_entropy(model(meta_batch[0]), meta_batch[1])
        gradient = torch.autograd.grad(value, phi)
        torchopt.stop_gradient(model)
        torchopt.stop_gradient(optimizer)
        _meta_step(meta_optimizer, loss, gradient)

    return step


def _meta_step(meta_optimizer: torch.optim.Optimizer, loss: LossNetwork, gradient: tuple[Tensor, ...]) -> None:
    for parameter, value in zip(loss.parameters(), gradient):
        parameter.grad = value
    meta_optimizer.step()


ENGINES: Mapping[str, Callable[[nn.Module, LossNetwork], Step]] = {
    "handcrafted": handcrafted,
    "forward": partial(adalfl, method="forward"),
    "finite_difference": partial(adalfl, method="finite_difference"),
    "reverse": partial(adalfl, method="reverse"),
    "higher": with_higher,
    "torchopt": with_torchopt,
}
