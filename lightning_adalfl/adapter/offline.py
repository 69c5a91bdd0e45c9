"""Algorithm 1: learn on single steps from fresh parameters, before training begins (ML³)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adalfl.adapter.lightning_private import transferred
from lightning_adalfl.adapter.meta_batches import (
    DRAWS,
    OFFLINE_BASE,
    OFFLINE_META,
    EndlessBatches,
    derived_seed,
    transferred_meta_batch,
)
from lightning_adalfl.adapter.module_state import ModuleState, unlogged
from lightning_adalfl.adapter.plugins import LossScale, broadcast, mean_over_processes
from lightning_adalfl.learning.base_step import BaseStep
from lightning_adalfl.learning.meta_learner import MetaLearner
from lightning_adalfl.learning.recorded_forward import Predict, RandomState
from lightning_adalfl.learning.torch_private import checkpoints_not_reentrant


class OfflinePhase:
    """The steps of Algorithm 1 (Algorithm 3 where the learning rate is learned), one by one.

    Each inner step is plain gradient descent at the base optimizer's learning rates, as the algorithm has it. The
    user's ``training_step`` is not run, since nothing may be logged before training; the task's handcrafted loss stands
    for theirs.

    Args:
        module: The user's module, under :func:`untouched`.
        learner: Its learner.
        optimizer: The base optimizer, whose learning rates are taken.
        predict: ``adalfl_predict``, checked.
        train_loader: Makes the loader of base batches.
        meta_loader: Makes the loader of meta batches.
        lr: η.
        inner_steps: S_inner.
        is_fresh: Draw base parameters anew before each meta step, or go back to the initial ones.
        seed: Of the order of both kinds of batches and of the draws.
    """

    def __init__(
        self,
        module: Any,
        learner: MetaLearner,
        optimizer: Optimizer,
        predict: Predict,
        train_loader: Callable[[], Any],
        meta_loader: Callable[[], Any],
        lr: float,
        inner_steps: int,
        is_fresh: bool,
        seed: int,
    ) -> None:
        self.module = module
        self.learner = learner
        self.trainer = module.trainer
        # Made once, since nothing is reloaded before training, and a user's loaders may take long to make.
        self.train_batches = EndlessBatches(_made_once(train_loader), seed, OFFLINE_BASE)
        self.meta_batches = EndlessBatches(_made_once(meta_loader), seed, OFFLINE_META)
        self._is_fresh = is_fresh
        self._draws = torch.Generator().manual_seed(derived_seed(DRAWS, seed))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in group["params"] if p.requires_grad], "lr": float(group["lr"])}
            for group in optimizer.param_groups
        ]
        self._sgd = torch.optim.SGD(groups, lr=groups[0]["lr"])
        self._steps = [learner.new_base_step(module, self._sgd, predict) for _ in range(inner_steps)]
        self._initial = {name: tensor.detach().clone() for name, tensor in _state(module).items()}
        # What the module keeps beside them, such as a hidden state.
        self._attributes = ModuleState(module.modules())
        self._initial_attributes = self._attributes.capture()
        self._is_first = True
        self._reduce = mean_over_processes(self.trainer)
        self._base_scale, self._meta_scale = LossScale(self.trainer), LossScale(self.trainer)
        broadcast(learner, self.trainer)
        learner.start(lr)

    def step(self) -> Tensor:
        """Take one meta step (lines 3 to 10); return the task loss after the inner steps."""
        self._reset()
        with self.trainer.precision_plugin.train_step_context(), unlogged(self.module):
            for step in self._steps:
                self._inner_step(step)
            batch = transferred_meta_batch(self.module, next(self.meta_batches), self.learner.config)
            found = self.learner.meta_step(self._steps, batch, all_reduce=self._reduce, scale=self._meta_scale)
        for step in self._steps:
            step.clear()
        return found.task_loss

    def _inner_step(self, step: BaseStep) -> None:
        before = self._attributes.capture()
        # No `backward`: a distributed module, which is about to train, would take the gradients for its own.
        with checkpoints_not_reentrant():
            step.forward(transferred(self.module, next(self.train_batches), True))
            self._take_gradients(step)
        if self._is_first:
            self._attributes.find_changing(before)
            self._is_first = False
        recorded = step.forwards[-1].recorded
        recorded.replay = self._attributes.replayed(recorded.replay, before)
        step.step()

    def _take_gradients(self, step: BaseStep) -> None:
        while True:
            loss, scale = step.descend(self.learner.objective, self.learner.task.loss), self._base_scale.value
            gradients = torch.autograd.grad(
                loss * scale, step.parameters, retain_graph=self._base_scale.is_needed, allow_unused=True
            )
            known = [gradient for gradient in gradients if gradient is not None]
            if scale != 1.0:
                torch._foreach_div_(known, scale)
            if self._reduce is not None:
                self._reduce(known)
            if self._base_scale.fits(known):
                break
            step.forwards[-1].descent = None
        step.loss_scale = scale
        for parameter, gradient in zip(step.parameters, gradients):
            parameter.grad = gradient

    @torch.no_grad()
    def _reset(self) -> None:
        for name, tensor in _state(self.module).items():
            tensor.copy_(self._initial[name])
        self._attributes.restore(self._attributes.narrowed(self._initial_attributes))
        if self._is_fresh:
            # A seed of its own for each draw, the same on every process.
            seed = int(torch.randint(2**31, (), generator=self._draws))
            with RandomState.seeded(seed, self.module.device).replayed():
                self.module.adalfl_reset_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, in plain containers; call it between two steps."""
        return {
            "learner": copy.deepcopy(self.learner.state_dict()),
            "train_batches": self.train_batches.state_dict(),
            "meta_batches": self.meta_batches.state_dict(),
            "draws": self._draws.get_state(),
            "loss_scales": [self._base_scale.state_dict(), self._meta_scale.state_dict()],
            "random_state": RandomState.capture(self.module.device).to_plain(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.learner.load_state_dict(state["learner"])
        self.train_batches.load_state_dict(state["train_batches"])
        self.meta_batches.load_state_dict(state["meta_batches"])
        self._draws.set_state(state["draws"].cpu())
        for scale, saved in zip((self._base_scale, self._meta_scale), state["loss_scales"]):
            scale.load_state_dict(saved)
        # Last, since drawing batches again has moved the generators.
        RandomState.from_plain(state["random_state"], self.module.device).restore()


def _made_once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def loader() -> Any:
        if not made or hasattr(made[0], "__next__"):  # which is used up by one pass
            made[:] = [make()]
        return made[0]

    return loader


def draw_parameters(module: nn.Module) -> None:
    """Call ``reset_parameters`` of every submodule that has one."""
    for submodule in module.modules():
        reset = getattr(submodule, "reset_parameters", None) or getattr(submodule, "_reset_parameters", None)
        if callable(reset):
            reset()


@contextmanager
def untouched(module: Any) -> Iterator[None]:
    """Give back parameters, buffers, gradients, modes, attributes and random states as they were before the body."""
    before = {name: tensor.detach().clone() for name, tensor in _state(module).items()}
    gradients = [(p, p.grad) for p in module.parameters()]
    modes = [(m, m.training) for m in module.modules()]
    kept = ModuleState(module.modules())
    attributes = kept.capture()
    module.train()
    try:
        with RandomState.capture(module.device).replayed():
            yield
    finally:
        with torch.no_grad():
            for name, tensor in _state(module).items():
                tensor.copy_(before[name])
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for submodule, mode in modes:
            submodule.training = mode
        kept.restore(attributes)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
