"""Algorithm 1: learn the loss on single steps from fresh parameters, before training begins (ML³)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_adalfl.adapter.distributed import broadcast, mean_over_processes
from lightning_adalfl.adapter.loss_scale import LossScale
from lightning_adalfl.adapter.meta_batches import EndlessBatches, moved_to_device
from lightning_adalfl.adapter.requirements import base_optimizer, checked_predict
from lightning_adalfl.hypergradient import BaseStep, hypergradient
from lightning_adalfl.hypergradient.random_state import RandomState

if TYPE_CHECKING:
    from lightning_adalfl.mixin import AdaLFLMixin


class OfflinePhase:
    """The steps of Algorithm 1 (Algorithm 3 where the learning rate is learned), one by one.

    Each inner step is plain gradient descent at the base optimizer's learning rates, as the algorithm has it: a loss
    learned through a single first step of an adaptive optimizer, which has the size α whatever the gradient, would
    learn nothing.

    Args:
        module: The user's module, under :func:`untouched`.
        train_loader: Where the base batches come from.
        meta_loader: Where the meta batches come from.
        lr: η.
        inner_steps: S_inner.
        fresh: Draw base parameters anew before each meta step, or go back to the initial ones.
        seed: Of the order of both kinds of batches and of the draws.
    """

    def __init__(
        self,
        module: AdaLFLMixin,
        train_loader: Any,
        meta_loader: Any,
        lr: float,
        inner_steps: int,
        fresh: bool,
        seed: int,
    ) -> None:
        self.module = module
        self.learner = module.adalfl
        self.trainer = module.trainer
        self.train_batches = EndlessBatches(train_loader, seed)
        self.meta_batches = EndlessBatches(meta_loader, seed + 1)
        self._fresh = fresh
        self._draws = torch.Generator().manual_seed(seed)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in group["params"] if p.requires_grad], "lr": float(group["lr"])}
            for group in base_optimizer(self.trainer, self.learner).param_groups
        ]
        self._rates: list[float] = [group["lr"] for group in groups]
        self._sgd = torch.optim.SGD(groups, lr=self._rates[0])
        method = self.learner.config.hypergradient
        self._steps = [
            BaseStep(module, self._sgd, checked_predict(module), method, chained=inner_steps > 1)
            for _ in range(inner_steps)
        ]
        self._initial = {name: tensor.detach().clone() for name, tensor in base_state(module).items()}
        self._reduce = mean_over_processes(self.trainer)
        self._base_scale, self._meta_scale = LossScale(self.trainer), LossScale(self.trainer)
        broadcast(self.learner, self.trainer)
        self._lr = lr
        self.learner.start(lr)

    def step(self) -> float:
        """Take one meta step (lines 3 to 10); return the task loss after the inner steps."""
        self._reset()
        with self.trainer.precision_plugin.train_step_context():
            for step in self._steps:
                self._inner_step(step)
            batch = moved_to_device(self.module, next(self.meta_batches))
            while True:
                gradient = hypergradient(
                    self._steps,
                    self.learner.task_loss if self.learner.loss is None else self.learner.trained,
                    self.learner.task_loss,
                    batch,
                    all_reduce=self._reduce,
                    loss_scale=self._meta_scale.value,
                    log_lr=self.learner.config.learns_lr,
                )
                if self._meta_scale.fits([*gradient.loss, gradient.log_lr]):
                    break
        for step in self._steps:
            step.clear()
        # Without the gain: what is best for a first step from fresh parameters ruins a model whose rate is right.
        self.learner.step(gradient)
        return float(gradient.task_loss)

    def _inner_step(self, step: BaseStep) -> None:
        predictions, target = step.forward(moved_to_device(self.module, next(self.train_batches)))
        objective = self.learner.objective(predictions, target)
        while True:
            scale = self._base_scale.value
            scaled = objective * scale
            gradients = list(torch.autograd.grad(scaled, step.parameters, allow_unused=True, retain_graph=scale > 1))
            known = [g for g in gradients if g is not None]
            if scale != 1.0:
                torch._foreach_div_(known, scale)
            if self._reduce is not None:
                self._reduce(known)
            if self._base_scale.fits(known):
                break
        for parameter, gradient in zip(step.parameters, gradients):
            parameter.grad = gradient
        for group, rate in zip(self._sgd.param_groups, self._rates):
            group["lr"] = rate * self.learner.lr_scale
        step.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, in plain containers; call it between two steps."""
        return {
            "learner": {name: tensor.detach().clone() for name, tensor in self.learner.state_dict().items()},
            "progress": self.learner.progress(),
            "train_batches": self.train_batches.state_dict(),
            "meta_batches": self.meta_batches.state_dict(),
            "draws": self._draws.get_state(),
            "loss_scales": [self._base_scale.state_dict(), self._meta_scale.state_dict()],
            "random_state": RandomState.capture(self.module.device).to_plain(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.learner.load_state_dict(state["learner"])
        self.learner.load_progress(state["progress"])
        self.learner.start(self._lr)
        self.train_batches.load_state_dict(state["train_batches"])
        self.meta_batches.load_state_dict(state["meta_batches"])
        self._draws.set_state(state["draws"].cpu())
        for scale, saved in zip((self._base_scale, self._meta_scale), state["loss_scales"]):
            scale.load_state_dict(saved)
        # Last, since drawing batches again has moved the generators.
        RandomState.from_plain(state["random_state"], self.module.device).restore()

    @torch.no_grad()
    def _reset(self) -> None:
        for name, tensor in base_state(self.module).items():
            tensor.copy_(self._initial[name])
        if self._fresh:
            # A seed of its own for each draw, the same on every process.
            seed = int(torch.randint(2**31, (), generator=self._draws))
            with RandomState.seeded(seed, self.module.device).replayed():
                self.module.adalfl_reset_parameters()


def base_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base model's parameters and buffers, without the learned loss."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("adalfl.")}


def draw_parameters(module: nn.Module, excluded: nn.Module) -> None:
    """Call ``reset_parameters`` of every submodule that has one, but for those of ``excluded``."""
    left_out = set(excluded.modules())
    for submodule in module.modules():
        reset = getattr(submodule, "reset_parameters", None) or getattr(submodule, "_reset_parameters", None)
        if submodule not in left_out and callable(reset):
            reset()


@contextmanager
def untouched(module: AdaLFLMixin) -> Iterator[None]:
    """Give back base parameters, buffers, gradients, modes and every random state as they were before the body."""
    with torch.no_grad():
        before = {name: tensor.detach().clone() for name, tensor in base_state(module).items()}
    gradients = [(p, p.grad) for p in module.parameters()]
    modes = [(m, m.training) for m in module.modules()]
    module.train()
    try:
        with RandomState.capture(module.device).replayed():
            yield
    finally:
        with torch.no_grad():
            for name, tensor in base_state(module).items():
                tensor.copy_(before[name])
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for submodule, mode in modes:
            submodule.training = mode
