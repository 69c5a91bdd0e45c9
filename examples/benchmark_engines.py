"""One training step of each method that the benchmark compares, as a user of it would write the step.

Every step moves the base model, and the learned loss if it has one; the next step starts from the new parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil

import higher
import torch
import torch.nn.functional as F
import torchopt
from benchmark_cases import Batch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_adalfl import BaseStep, LossNetwork, hypergradient

BASE_LR = 0.01
META_LR = 1e-5
Step = Callable[[Batch, Batch], None]
Engine = Callable[[nn.Module, LossNetwork], Step]


def handcrafted(model: nn.Module, loss: LossNetwork) -> Step:
    """Ordinary training with cross-entropy, which every other step is compared with."""
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_LR)

    def step(batch: Batch, meta_batch: Batch) -> None:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def between(model: nn.Module, loss: LossNetwork) -> Step:
    """A base step on the learned loss without a meta step, as it lies between meta steps where `meta_every` > 1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_LR)
    loss.requires_grad_(False)

    def step(batch: Batch, meta_batch: Batch) -> None:
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adalfl(
    model: nn.Module, loss: LossNetwork, method: str, meta_fraction: float = 1.0, base_fraction: float = 1.0
) -> Step:
    """The base step and the meta step of this package, the latter on a part of its batches if it is to be cheaper."""
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_LR)
    meta_optimizer = _meta_optimizer(loss)
    base_step = BaseStep(model, optimizer, method=method, base_fraction=base_fraction)

    def step(batch: Batch, meta_batch: Batch) -> None:
        base_step.forward(batch)
        base_step.evaluate(loss).backward()
        base_step.step()
        optimizer.zero_grad()  # before the meta step, which can use the memory
        count = ceil(meta_fraction * len(meta_batch[0]))
        part = (meta_batch[0][:count], meta_batch[1][:count])
        gradient = hypergradient(base_step, loss, F.cross_entropy, part, log_lr=False)
        _meta_step(meta_optimizer, loss, gradient.loss)

    return step


def inner_loop(model: nn.Module, loss: LossNetwork, method: str, inner_steps: int) -> Step:
    """One meta step after several base steps (S_inner of the paper's Table 3)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_LR)
    meta_optimizer = _meta_optimizer(loss)
    base_steps = [BaseStep(model, optimizer, method=method, chained=inner_steps > 1) for _ in range(inner_steps)]

    def step(batch: Batch, meta_batch: Batch) -> None:
        for base_step in base_steps:
            base_step.forward(batch)
            base_step.evaluate(loss).backward()
            base_step.step()
            optimizer.zero_grad()
        gradient = hypergradient(base_steps, loss, F.cross_entropy, meta_batch, log_lr=False)
        for base_step in base_steps:
            base_step.clear()
        _meta_step(meta_optimizer, loss, gradient.loss)

    return step


def with_higher(model: nn.Module, loss: LossNetwork) -> Step:
    """The same algorithm on `higher`: an inner loop of one step whose result is copied back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_LR)
    meta_optimizer = _meta_optimizer(loss)

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
    meta_optimizer = _meta_optimizer(loss)
    phi = list(loss.parameters())

    def step(batch: Batch, meta_batch: Batch) -> None:
        optimizer.step(loss(model(batch[0]), batch[1]))
        value = F.cross_entropy(model(meta_batch[0]), meta_batch[1])
        gradient = torch.autograd.grad(value, phi)
        torchopt.stop_gradient(model)
        torchopt.stop_gradient(optimizer)
        _meta_step(meta_optimizer, loss, gradient)

    return step


def twice_differentiable(engine: Engine) -> Engine:
    """Let an engine that unrolls the step use plain attention: the fused kernels have no double backward."""

    def build(model: nn.Module, loss: LossNetwork) -> Step:
        step = engine(model, loss)

        def with_plain_attention(batch: Batch, meta_batch: Batch) -> None:
            with sdpa_kernel(SDPBackend.MATH):
                step(batch, meta_batch)

        return with_plain_attention

    return build


def _meta_optimizer(loss: LossNetwork) -> torch.optim.Optimizer:
    return torch.optim.Adam(loss.parameters(), lr=META_LR, fused=True)


def _meta_step(meta_optimizer: torch.optim.Optimizer, loss: LossNetwork, gradient: Sequence[Tensor]) -> None:
    for parameter, value in zip(loss.parameters(), gradient):
        parameter.grad = value
    meta_optimizer.step()


ENGINES: dict[str, Engine] = {
    "handcrafted": handcrafted,
    "forward": partial(adalfl, method="forward"),
    "finite_difference": partial(adalfl, method="finite_difference"),
    "reverse": twice_differentiable(partial(adalfl, method="reverse")),
    "higher": twice_differentiable(with_higher),
    "torchopt": twice_differentiable(with_torchopt),
}
# Meta steps on a quarter of a batch: of the meta batch, of the base batch for h, of both.
CHEAPER: dict[str, Engine] = {
    "forward_meta_quarter": partial(adalfl, method="forward", meta_fraction=0.25),
    "forward_base_quarter": partial(adalfl, method="forward", base_fraction=0.25),
    "forward_both_quarter": partial(adalfl, method="forward", meta_fraction=0.25, base_fraction=0.25),
}
INNER_LOOPS: dict[str, Engine] = {
    f"{method}_inner_{count}": partial(inner_loop, method=method, inner_steps=count)
    for method in ("forward", "reverse")
    for count in (1, 5, 10, 20)
}
ALL_ENGINES: dict[str, Engine] = {"between": between, **ENGINES, **CHEAPER, **INNER_LOOPS}
