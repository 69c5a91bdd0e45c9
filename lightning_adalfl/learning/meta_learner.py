"""Who learns: φ, the rate, the meta optimizer, and one meta step."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.learning.base_step import BaseStep
from lightning_adalfl.learning.hypergradient import AllReduce, Hypergradient, hypergradient
from lightning_adalfl.learning.learned_rate import LearnedRate
from lightning_adalfl.learning.recorded_forward import Predict
from lightning_adalfl.learning.torch_private import norm
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.predicted import Predicted
from lightning_adalfl.losses.tasks import task_named
from lightning_adalfl.losses.training_objective import BentLoss, LearnedAlone, OwnLoss, TrainingObjective

RATE_HORIZON = 100  # base steps


class Scale(Protocol):
    """A factor on the task loss against underflow of its gradient in half precision."""

    value: float

    def fits(self, gradients: Sequence[Tensor]) -> bool:
        """Return whether the gradients may be used; if not, the factor is smaller now and they are taken again."""


class MetaLearner:
    """What is meta-learned, and how.

    In a loop of one's own it gives what the mixin gives::

        learner = MetaLearner(AdaLFLConfig("multiclass"))
        step = learner.new_base_step(model, optimizer)
        for batch in train:
            predictions, target = step.forward(batch)
            optimizer.zero_grad()
            step.descend(learner.objective, own_loss(predictions, target)).backward()
            step.step()
            learner.end_base_step(step, held_out)

    Args:
        config: The hyper-parameters.

    Attributes:
        objective: What trains the base model.
        loss: The learned loss, part of the objective; ``None`` if the learning rate alone is learned, or nothing.
        rate: The learned rate, or ``None``.
        base_steps: Base steps taken.
        meta_steps: Meta steps taken in training.
        is_initialised: Whether φ needs no offline phase, since one has run or φ was given.
        scalars: The newest values of what is logged, by name.
        last_step: The newest hypergradient.

    Raises:
        ValueError: If the file of ``config.loss`` cannot be read, or holds a loss for another task.
    """

    def __init__(self, config: AdaLFLConfig) -> None:
        self.config = config
        self.task = task_named(config.task, config.ignore_index)
        self.loss: LearnedLoss | None = None
        self.is_initialised = False
        begins_at_zero = False
        if config.learns_loss:
            # φ has random numbers of its own, so that everything else is drawn as without it.
            with torch.random.fork_rng(devices=[]):
                self.loss, self.is_initialised = self._given_or_fresh()
            is_instance = isinstance(config.loss, LearnedLoss)  # which is used as it is
            begins_at_zero = config.own_loss and not self.is_initialised and not is_instance
            if begins_at_zero:
                self.loss.start_at_zero()
            self.loss.pairing = self.task  # which knows what is to be left out
        self.objective = self._objective(begins_at_zero)
        self.rate = LearnedRate(RATE_HORIZON if config.own_loss else 1) if config.learns_lr else None
        self.base_steps = 0
        self.meta_steps = 0
        self.scalars: dict[str, Tensor] = {}
        self.last_step: Hypergradient | None = None
        self._answered = 0  # base steps, counted up to the last one that a meta step followed
        self._skipped = torch.zeros(())
        self._has_warned = False
        self.start()

    def _given_or_fresh(self) -> tuple[LearnedLoss, bool]:
        given, task = self.config.loss, self.config.task
        if isinstance(given, LearnedLoss):
            return copy.deepcopy(given), False  # the configuration's may serve another learner
        path = os.fspath(given)
        if "." not in os.path.basename(path):
            return LearnedLoss.named(path, task), False
        try:
            loss = LearnedLoss.load(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"`loss` {path!r} cannot be used: {error}") from error
        if loss.task != task:
            raise ValueError(
                f"`loss` {path!r} is for task {loss.task!r} and `task` is {task!r}: its predictions are of another "
                "kind. Give a loss that was learned on the same kind of task."
            )
        return loss, True

    def _objective(self, is_zero: bool) -> TrainingObjective:
        if self.loss is None:
            return OwnLoss()
        return BentLoss(self.loss, is_zero) if self.config.own_loss else LearnedAlone(self.loss)

    # One step.

    def new_base_step(self, model: nn.Module, optimizer: Optimizer, predict: Predict | None = None) -> BaseStep:
        """Return what records base steps of ``optimizer``; φ moves to the device of the model."""
        step = BaseStep(model, optimizer, predict, self.config.hypergradient)
        self.to(step.device)
        return step

    @property
    def is_due(self) -> bool:
        """Whether the base step now under way is followed by a meta step."""
        every = self.config.meta_every
        return every is not None and (self.base_steps + 1) % every == 0

    def task_loss(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return L_T, a scalar."""
        chosen = self.config.task_loss
        if chosen == "bounded":
            return self.task.bounded_loss(predictions, target, weight)
        if chosen == "handcrafted":
            return self.task.loss(predictions, target, weight)
        return chosen(predictions, target) if weight is None else chosen(predictions, target, weight)  # type: ignore

    def check(self, predicted: Predicted) -> None:
        """Raise a ``ValueError`` unless a first batch of predictions and targets fits the task and the task loss."""
        if self.loss is not None:
            self._check_pairs(predicted)
        leaf = predicted.predictions.detach().requires_grad_()
        with torch.enable_grad():
            value = self.task_loss(leaf, predicted.target, predicted.weight)
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`task_loss` must return a scalar, the mean over the batch; got {kind}.")
        if not value.requires_grad:
            raise ValueError(
                "`task_loss` cannot be differentiated: its value does not depend on the predictions by operations "
                "that torch differentiates. Leave out `argmax`, rounding, `detach` and NumPy."
            )

    def _check_pairs(self, predicted: Predicted) -> None:
        predictions = predicted.predictions.detach()
        try:
            self.task.check_values(predictions, predicted.target)
            self.task.pairs(predictions, predicted.target, predicted.weight)
        except ValueError as error:
            if isinstance(self.config.task_loss, str) or not self.config.own_loss:
                raise
            # The task loss knows what to make of them, and the learned loss has no pairs.
            self.objective = OwnLoss()
            warnings.warn(
                f"No shape is learned: {error} Training goes on with your own loss alone. To learn its shape, return "
                "from `adalfl_predict` the output that is compared with the target, and a `task_loss` of that.",
                stacklevel=2,
            )

    def end_base_step(self, step: BaseStep, meta_batches: Any = None) -> None:
        """Count a base step that has been taken; take the meta step if one is due.

        Args:
            step: The base step, recorded.
            meta_batches: An iterator over held-out batches; one is drawn if it is needed.
        """
        if self.is_due and step.is_recorded:
            self.meta_step(step, next(meta_batches))
        step.clear()
        self.count_base_step(step.parameters)

    def count_base_step(self, parameters: Sequence[Tensor]) -> None:
        """Count a base step, whose meta step, if one was due, has been taken; ``parameters`` are θ after it."""
        self.base_steps += 1
        if self.rate is not None:
            self.rate.add(parameters, self.base_steps)

    def meta_step(
        self,
        steps: BaseStep | Sequence[BaseStep],
        meta_batch: Any,
        *,
        all_reduce: AllReduce | None = None,
        scale: Scale | None = None,
    ) -> Hypergradient:
        """Take a meta step (Eq. 8): as many steps of the meta optimizer as base steps have passed.

        A hypergradient or a task loss that is not finite leaves everything as it is, and is counted.

        Args:
            steps: The base step that was just taken, or those of an inner loop.
            meta_batch: Held-out instances.
            all_reduce: Averages a list of tensors over processes in place.
            scale: In half precision.
        """
        last = steps if isinstance(steps, BaseStep) else steps[-1]
        along = self.rate.along(last.before) if self.rate is not None else None
        while True:
            found = hypergradient(
                steps,
                self.task_loss,
                meta_batch,
                all_reduce=all_reduce,
                loss_scale=1.0 if scale is None else scale.value,
                log_lr=self.rate is not None,
                along=along,
                by_forward=self.config.learn != "lr",
            )
            tensors = [*found.loss.values(), *(t for t in (found.log_lr, found.along) if t is not None)]
            if scale is None or scale.fits(tensors):
                break
        self._note(found, last)
        if self.learned:
            self._move(found, max(1, self.base_steps + 1 - self._answered), all_reduce)
        if self.rate is not None:
            self.scalars["adalfl/lr_scale"] = self.rate.log_scale.detach().exp()
        self._answered = self.base_steps + 1  # the step under way is counted when it ends
        self.meta_steps += 1
        self.last_step = found
        return found

    def _move(self, found: Hypergradient, moves: int, all_reduce: AllReduce | None) -> None:
        learned, gradients = self.learned, dict(found.loss)
        if self.rate is not None:
            gradients["log_lr_scale"] = self.rate.gradient(found)
        size = norm(list(gradients.values()))
        is_finite = torch.isfinite(size + found.task_loss.to(size))
        self.scalars["adalfl/meta_grad_norm"] = size
        before = [p.detach().clone() for p in learned.values()]
        moments = self._moments()
        for k in range(moves):
            if k and self.loss is not None:
                again = found.at_present()
                if all_reduce is not None:
                    all_reduce(list(again.values()))
                gradients.update(again)
            for name, gradient in gradients.items():
                learned[name].grad = gradient.to(learned[name])
            self._optimizer.step()
            self._optimizer.zero_grad()
            if isinstance(self.objective, BentLoss):
                self.objective.is_zero = False
        with torch.no_grad():
            is_finite = is_finite & torch.isfinite(norm([p.detach() for p in learned.values()]))
            for p, old in zip(learned.values(), before):
                p.copy_(torch.where(is_finite, p, old))
            for key, new in self._moments().items():
                new.copy_(torch.where(is_finite, new, moments.get(key, torch.zeros_like(new))))
            self._skipped = self._skipped.to(is_finite.device) + (~is_finite).float()
        self.scalars["adalfl/skipped_meta_steps"] = self._skipped

    def _moments(self) -> dict[tuple[int, str], Tensor]:
        """Return the meta optimizer's state that lies beside φ; its counters may lie elsewhere."""
        device = next(iter(self.learned.values())).device
        return {
            (id(p), key): value
            for p, state in self._optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.device == device and value.is_floating_point()
        }

    def _note(self, found: Hypergradient, step: BaseStep) -> None:
        """Take in the scalars that are logged."""
        self.scalars["adalfl/task_loss"] = found.task_loss
        if found.evidence is not None and self.config.own_loss:
            self.scalars["adalfl/evidence"] = found.evidence
        descent = step.forwards[-1].descent
        if descent is not None and self.loss is not None:
            self.scalars["adalfl/learned_loss"] = descent.value()
            lr = step.optimizer.param_groups[0]["lr"]
            self.scalars["adalfl/implied_lr"] = descent.implied_scale() * lr

    def warn_of_skipped(self) -> None:
        """Warn once if a meta step was left out; it reads a number from the device."""
        if not self._has_warned and int(self._skipped):
            self._has_warned = True
            warnings.warn(
                f"A meta step before base step {self.base_steps} was left out, since the hypergradient or the task "
                "loss on the meta batch was not finite. Look for such values in the data, lower the base learning rate, or "
                "clip the gradient. Further ones are counted in `adalfl/skipped_meta_steps`.",
                stacklevel=2,
            )

    # What is learned.

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """φ and s, by the names of a hypergradient."""
        learned: dict[str, Any] = {} if self.loss is None else dict(self.loss.phi())
        return {**learned, "log_lr_scale": self.rate.log_scale} if self.rate is not None else learned

    @property
    def lr_scale(self) -> float:
        """exp(s), the factor on the base optimizer's learning rates."""
        return 1.0 if self.rate is None else self.rate.scale

    def start(self, lr: float | None = None) -> None:
        """Make a fresh meta optimizer, with ``lr`` or the rates of training."""
        groups: list[dict[str, Any]] = []
        if self.loss is not None and self.loss.phi():
            groups.append({"params": list(self.loss.phi().values()), "lr": lr or self.config.meta_lr})
        if self.rate is not None:
            groups.append({"params": [self.rate.log_scale], "lr": lr or self.config.lr_meta_lr})
        self._optimizer: Optimizer = getattr(torch.optim, self.config.meta_optimizer)(
            groups or [{"params": [nn.Parameter(torch.zeros(0))]}]
        )

    def finish_offline(self) -> None:
        """Take over what an offline phase has learned: training begins with fresh moments, and counts from zero."""
        self.start()
        self.is_initialised = True
        self.meta_steps = self._answered = 0
        self.scalars = {}

    @torch.no_grad()
    def set_phi(self, values: Mapping[str, Tensor]) -> None:
        """Put φ in place, by name."""
        if self.loss is None:
            raise ValueError("there is no learned loss to set: `learn` is neither 'loss' nor 'both'.")
        self.loss.load_state_dict(dict(values))
        if isinstance(self.objective, BentLoss):
            self.objective.is_zero = False

    def to(self, device: torch.device | str) -> MetaLearner:
        """Move all that is learned, and the moments of the meta optimizer."""
        if self.loss is not None:
            self.loss.to(device)
        if self.rate is not None:
            self.rate.log_scale.data = self.rate.log_scale.data.to(device)
        if isinstance(self.config.task_loss, nn.Module):
            self.config.task_loss.to(device)
        self._optimizer.load_state_dict(self._optimizer.state_dict())  # it follows its parameters
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return φ, the meta optimizer and counters, in plain containers."""
        return {
            "config": self.config.to_dict(),
            "loss": None if self.loss is None else self.loss.describe(),
            "phi": {} if self.loss is None else {n: t.detach().clone() for n, t in self.loss.state_dict().items()},
            "is_zero": isinstance(self.objective, BentLoss) and self.objective.is_zero,
            "rate": None if self.rate is None else self.rate.state_dict(),
            "meta_optimizer": self._optimizer.state_dict(),
            "base_steps": self.base_steps,
            "meta_steps": self.meta_steps,
            "answered": self._answered,
            "skipped_meta_steps": int(self._skipped),
            "is_initialised": self.is_initialised,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is damaged, of another version, or of another kind of learned loss; nothing of it
                is taken over then.
        """
        _check_state(state)
        before = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except Exception as error:  # whatever torch makes of entries that are not its own
            self._load(before)
            raise error if isinstance(error, ValueError) else ValueError(_UNREADABLE) from error

    def _load(self, state: Mapping[str, Any]) -> None:
        if (self.loss is None) != (state["loss"] is None) or (self.rate is None) != (state["rate"] is None):
            raise ValueError(
                f"the checkpoint was written with `learn={state['config'].get('learn')!r}` and this learner has "
                f"`learn={self.config.learn!r}`; give the configuration that it was trained with."
            )
        if self.loss is not None:
            try:
                self.loss.load_state_dict(state["phi"])
            except RuntimeError as error:
                raise ValueError(f"the checkpoint's φ does not fit `loss={self.config.loss!r}`: {error}") from error
            if isinstance(self.objective, BentLoss):
                self.objective.is_zero = bool(state["is_zero"])
        if self.rate is not None:
            self.rate.load_state_dict(state["rate"])
        try:
            self._optimizer.load_state_dict(state["meta_optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint's meta optimizer does not fit this learner: {error}") from error
        self.base_steps, self.meta_steps = state["base_steps"], state["meta_steps"]
        self._answered = state["answered"]
        self._skipped = torch.tensor(float(state["skipped_meta_steps"]))
        self.is_initialised = state["is_initialised"]

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> MetaLearner:
        """Return the learner that :meth:`state_dict` was called on."""
        _check_state(state)
        values = dict(state["config"])
        if state["loss"] is not None:
            # φ is in the state, which must load where the file that it began with is not.
            values["loss"] = LearnedLoss.rebuild(state["loss"], state["phi"])
        learner = cls(AdaLFLConfig.from_dict(values))
        if isinstance(state["config"].get("loss"), str):
            learner.config = replace(learner.config, loss=state["config"]["loss"])
        learner.load_state_dict(state)
        return learner

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module, as weight averaging makes one, has no part in the step that is under way.
        return {**self.__dict__, "last_step": None, "scalars": {}}


_UNREADABLE = (
    "the checkpoint's entry 'adalfl' cannot be read: it is damaged or of another version of lightning_adalfl. Take "
    "another checkpoint, or delete the entry to train with a new learned loss."
)
_COUNTS = ("base_steps", "meta_steps", "answered", "skipped_meta_steps")


def _check_state(state: Any) -> None:
    """Raise unless ``state`` has the structure of a learner's; shapes are left to who loads them."""
    is_whole = (
        isinstance(state, Mapping)
        and isinstance(state.get("config"), Mapping)
        and isinstance(state.get("phi"), Mapping)
        and all(isinstance(value, Tensor) for value in state["phi"].values())
        and isinstance(state.get("meta_optimizer"), Mapping)
        and {"param_groups", "state"} <= set(state["meta_optimizer"])
        and {"loss", "rate", "is_zero"} <= set(state)
        and all(type(state.get(name)) is int and state[name] >= 0 for name in _COUNTS)
        and isinstance(state.get("is_initialised"), bool)
    )
    if not is_whole:
        raise ValueError(_UNREADABLE)
