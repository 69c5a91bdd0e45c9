"""What lives for the length of one fit: the recorded base step, the meta batches, and their random stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_adalfl.adapter.distributed import broadcast, mean_over_processes
from lightning_adalfl.adapter.finite_steps import FiniteSteps
from lightning_adalfl.adapter.freed_memory import keep_freed_memory
from lightning_adalfl.adapter.loss_scale import LossScale
from lightning_adalfl.adapter.meta_batches import EndlessBatches, moved_to_device
from lightning_adalfl.adapter.meta_learner import MetaLearner
from lightning_adalfl.adapter.requirements import base_optimizer, checked_predict
from lightning_adalfl.hypergradient import BaseStep, Hypergradient, hypergradient
from lightning_adalfl.hypergradient.gradient_clipping import GradientTransform
from lightning_adalfl.hypergradient.random_state import RandomState, RandomStream
from lightning_adalfl.losses.task_losses import TaskLoss

if TYPE_CHECKING:
    from lightning_adalfl.mixin import AdaLFLMixin as AdaptiveModule


class OnlineRun:
    """Algorithm 2 over one fit: record the base step that Lightning takes, then take the meta step.

    Args:
        module: The user's module, with its trainer.
        learner: Its ``adalfl``.
    """

    def __init__(self, module: AdaptiveModule, learner: MetaLearner) -> None:
        self.module = module
        self.learner = learner
        self.trainer = module.trainer
        self.optimizer = base_optimizer(self.trainer, learner)
        config = learner.config
        self._predict = checked_predict(module)
        self.base_step = self._new_base_step()
        # The order of the data must be one over processes; the dropout masks need not.
        seed = self.trainer.strategy.broadcast(torch.initial_seed() % 2**31)
        self.batches = EndlessBatches(module.adalfl_meta_dataloader(), seed) if config.online else None
        self.stream = RandomStream(RandomState.seeded(seed + self.trainer.global_rank, module.device))
        self.transform: GradientTransform | None = None
        self.logged: dict[str, Tensor] = {}
        self._reduce = mean_over_processes(self.trainer)
        self._recorded = False
        self._scale = 1.0
        self._last_step: float | None = None
        self._meta_scale = LossScale(self.trainer)
        self._finite = FiniteSteps(self.trainer)
        keep_freed_memory(module.device)
        broadcast(learner, self.trainer)
        learner.start()

    @property
    def due(self) -> bool:
        """Whether the base step now under way is followed by a meta step."""
        config = self.learner.config
        return config.online and not self.learner.fell_back and (self.learner.base_steps + 1) % config.meta_every == 0

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Predict for the base step, recorded if a meta step is due."""
        if not self.due:
            return self._predict(batch)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        if [id(p) for p in trained] != [id(p) for p in self.base_step.parameters]:
            # A callback that unfreezes layers has given the optimizer more to train.
            self.base_step = self._new_base_step()
        return self.base_step.forward(batch)

    def _new_base_step(self) -> BaseStep:
        config = self.learner.config
        return BaseStep(
            self.module, self.optimizer, self._predict, config.hypergradient, base_fraction=config.base_fraction
        )

    def skip(self) -> None:
        """Forget the batch that was predicted last: the module's training step skips it."""
        if self.base_step.traces:
            self.base_step.traces.pop()

    def objective(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Return what the base step descends, on what was predicted last."""
        if not (predictions.is_floating_point() and predictions.requires_grad):
            raise MisconfigurationException(
                "the predictions of `adalfl_predict` must be real, floating point and depend on a parameter that is "
                f"trained; got {predictions.dtype}, {'attached to' if predictions.requires_grad else 'detached from'} "
                "the graph. Return raw logits or values, neither detached nor rounded."
            )
        if self.due and self.learner.loss is not None:
            learned = self.base_step.evaluate(self.learner.trained)  # the meta step goes on from this evaluation
        else:
            learned = self.learner.objective(predictions, target)
        self._observe(learned, predictions, target)
        if self.learner.loss is not None and not self.learner.fell_back:
            self._finite.note(predictions, target)
        return learned

    def _observe(self, learned: Tensor, predictions: Tensor, target: Tensor) -> None:
        """Note the learned loss and, where it is about to be logged, the implied learning rate (section 5.5)."""
        self.logged["adalfl/learned_loss"] = learned.detach()
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # zero for never, as in a bare run
        if "adalfl/implied_lr" in self.logged and (not every or (self.learner.base_steps + 1) % every):
            return
        scale = implied_scale(self.learner.objective, self.learner.task_loss, predictions, target)
        self.logged["adalfl/implied_lr"] = scale * float(self.optimizer.param_groups[0]["lr"]) * self.learner.lr_scale

    def gradient_norm(self) -> Tensor:
        """Return the Euclidean norm of the base gradient as it is now."""
        gradients = [p.grad for p in self.base_step.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @contextmanager
    def learned_rate(self) -> Iterator[None]:
        """Let the base optimizer step with α·exp(s) in the body; schedulers go on seeing α."""
        scale = self.learner.lr_scale
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate * scale
        yield
        # A module's own `optimizer_step` may set a rate too; the factor is taken out of that one.
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate if group["lr"] == rate * scale else group["lr"]

    def before_step(self) -> None:
        """Keep what the step is about to change; Lightning calls it after unscaling and clipping."""
        self._recorded = bool(self.base_step.traces) and self.due
        self._scale = self._loss_scale()
        if not self._finite.allow(self.base_step.parameters, self.learner.base_steps):
            self.learner.skipped_base_steps += 1
            self.logged["adalfl/skipped_base_steps"] = torch.tensor(float(self.learner.skipped_base_steps))
            self._recorded = False
            self.base_step.clear()
        if self._recorded:
            self.base_step.accumulate = self.trainer.accumulate_grad_batches
            self.base_step.before_step(self.transform)
        self.transform = None

    def after_step(self) -> None:
        """Take the meta step that is due."""
        if self._loss_scale() < self._scale:
            # The gradient overflowed and the scaler left the base step out; there is nothing to differentiate.
            self.base_step.clear()
            return
        recorded, self._recorded = self._recorded, False
        if recorded:
            learn_gain = self.learner.gain_due
            gradient = self._hypergradient(learn_gain)
            self.base_step.clear()
            self.logged["adalfl/task_loss"] = gradient.task_loss
            self.logged["adalfl/meta_grad_norm"] = self.learner.step(gradient, learn_gain)
            self.learner.guard(gradient.task_loss, self.logged["adalfl/meta_grad_norm"])
            if self.learner.fell_back:
                # There will be no other; the last ones would be logged again and again.
                del self.logged["adalfl/task_loss"], self.logged["adalfl/meta_grad_norm"]
            if self.learner.safeguard is not None:
                self.logged["adalfl/safeguard"] = torch.tensor(float(self.learner.safeguard.level))
            if self.learner.skipped_meta_steps:
                self.logged["adalfl/skipped_meta_steps"] = torch.tensor(float(self.learner.skipped_meta_steps))
            if self.learner.config.learns_lr:
                self.logged["adalfl/lr_scale"] = self.learner.log_lr_scale.detach().exp()
        self.learner.base_steps += 1
        if self.learner.learns_gain:
            self.learner.gain_horizon.add(self.base_step.parameters, self.learner.base_steps)
        now = time.perf_counter()
        if self._last_step is not None:
            self.logged["adalfl/seconds_per_step"] = torch.tensor(now - self._last_step)
        self._last_step = now

    def _hypergradient(self, learn_gain: bool) -> Hypergradient:
        learner = self.learner
        along = learner.gain_horizon.earlier_steps(self.base_step.before) if learn_gain else None
        with self.stream.drawing(), self.trainer.precision_plugin.train_step_context():
            batch = moved_to_device(self.module, next(self.batches))  # type: ignore[arg-type]
            while True:
                gradient = hypergradient(
                    self.base_step,
                    learner.task_loss if learner.loss is None else learner.trained,
                    learner.task_loss,
                    batch,
                    all_reduce=self._reduce,
                    loss_scale=self._meta_scale.value,
                    log_lr=learner.config.learns_lr,
                    along=along,
                )
                if self._meta_scale.fits([*gradient.loss, gradient.log_lr]):
                    return gradient

    def _loss_scale(self) -> float:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return where the meta batches and their random stream are."""
        batches = None if self.batches is None else self.batches.state_dict()
        return {
            "meta_batches": batches,
            "random_state": self.stream.state.to_plain(),
            "loss_scale": self._meta_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        if self.batches is not None and state["meta_batches"] is not None:
            with self.stream.drawing():
                self.batches.load_state_dict(state["meta_batches"])
        self.stream = RandomStream(RandomState.from_plain(state["random_state"], self.module.device))
        self._meta_scale.load_state_dict(state["loss_scale"])


def implied_scale(objective: TaskLoss, task_loss: TaskLoss, predictions: Tensor, target: Tensor) -> Tensor:
    """Return ``⟨m, τ⟩ / ⟨τ, τ⟩``: how far a step on the learned loss goes along the task loss's own, per unit of it.

    m and τ are the gradients of the two losses by the predictions.
    """
    with torch.enable_grad():
        leaf = predictions.detach().requires_grad_()
        (learned,) = torch.autograd.grad(objective(leaf, target), leaf)
        (handcrafted,) = torch.autograd.grad(task_loss(leaf, target), leaf)
    learned, handcrafted = learned.float(), handcrafted.float()
    return (learned * handcrafted).sum() / handcrafted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
