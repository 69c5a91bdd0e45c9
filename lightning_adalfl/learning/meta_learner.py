"""Who learns: φ, the rate, the meta optimizer, and one meta step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.learning.base_step import BaseStep
from lightning_adalfl.learning.consensus import EVERY, Consensus
from lightning_adalfl.learning.hypergradient import AllReduce, Hypergradient, Scale, Watch, hypergradient
from lightning_adalfl.learning.learned_rate import LearnedRate
from lightning_adalfl.learning.learner_state import Undo, configuration_of, new_optimizer, state_of, take_over
from lightning_adalfl.learning.recorded_forward import Predict, RandomState
from lightning_adalfl.learning.torch_private import norm
from lightning_adalfl.losses.descent import Descent, Predicted
from lightning_adalfl.losses.tasks import check_task_loss, task_named
from lightning_adalfl.losses.training_objective import BentLoss, OwnLoss, initial_objective

RATE_HORIZON = 100  # base steps


class MetaLearner:
    """What is meta-learned, and how.

    In a loop of one's own it gives what the mixin gives, a learned rate included::

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
        task_loss, objective: L_T of predictions, target and, if there is one, weight; what trains the base model.
        loss: The learned loss, part of the objective; ``None`` if the learning rate alone is learned, or nothing.
        rate: The learned rate, or ``None``.
        consensus: Whether held-out instances agree on how φ is to move.
        base_steps, answered, meta_steps: Base steps, those up to the last that a meta step followed, and meta steps.
        skipped: Meta steps left out, since the hypergradient or the task loss was not finite.
        is_initialised: Whether φ needs no offline phase, since one has run or φ was given.
        last_step: The newest hypergradient.

    Raises:
        ValueError: If the file of ``config.loss`` cannot be read, or holds a loss for another task.
    """

    def __init__(self, config: AdaLFLConfig) -> None:
        self.config = config
        self.task = task_named(config.task, config.ignore_index)
        known = {"bounded": self.task.bounded_loss, "handcrafted": self.task.loss}
        self.task_loss = known[config.task_loss] if isinstance(config.task_loss, str) else config.task_loss
        given = config.loss if config.learns_loss else None
        self.objective, self.is_initialised = initial_objective(given, self.task, config.own_loss)
        self.loss = self.objective.loss
        self.rate = LearnedRate(RATE_HORIZON if config.own_loss else 1) if config.learns_lr else None
        self.consensus = Consensus()
        self.base_steps = self.answered = self.meta_steps = 0
        self._scalars: dict[str, Tensor] = {}
        self.last_step: Hypergradient | None = None
        self._descent: Descent | None = None
        self.skipped, self._has_warned = torch.zeros(()), False
        self.start()

    def new_base_step(self, model: nn.Module, optimizer: Optimizer, predict: Predict | None = None) -> BaseStep:
        """Return what records base steps of ``optimizer``; φ moves to the device of the model."""
        step = BaseStep(model, optimizer, predict, self.config.hypergradient, self.check)
        step.at_rate = step.at_rate if self.rate is None else self.rate.applied_to
        self.to(step.device)
        return step

    @property
    def is_due(self) -> bool:
        """Whether the base step now under way is followed by a meta step."""
        every = self.config.meta_every
        return every is not None and (self.base_steps + 1) % every == 0

    def check(self, predicted: Predicted) -> None:
        """Raise a ``ValueError`` unless a first batch of predictions and targets fits the task and the task loss."""
        try:
            if self.loss is not None or isinstance(self.config.task_loss, str):
                self.task.check_values(predicted.predictions.detach(), predicted.target, predicted.weight)
        except ValueError as error:
            if isinstance(self.config.task_loss, str) or not self.config.own_loss:
                raise
            self.objective = OwnLoss()  # the task loss knows what to make of them
            warnings.warn(
                f"No shape is learned: {error} Training goes on with your own loss alone. To learn its shape, return "
                "from `adalfl_predict` the output that is compared with the target, and a `task_loss` of that.",
                stacklevel=2,
            )
        check_task_loss(self.task_loss, predicted.predictions, predicted.target, predicted.weight)

    def end_base_step(self, step: BaseStep, meta_batches: Any = None) -> None:
        """Count a base step that has been taken; take the meta step if one is due.

        Args:
            step: The base step, recorded.
            meta_batches: An iterator over held-out batches that does not end; one is drawn if it is needed.

        Raises:
            TypeError: If a meta step is due, and that is no iterator.
        """
        if self.is_due and step.is_recorded:
            if not isinstance(meta_batches, Iterator):
                kind = type(meta_batches).__name__
                raise TypeError(f"`meta_batches` must be an iterator, as `itertools.cycle(loader)` is one; got {kind}.")
            batch = next(meta_batches)
            with RandomState.capture(step.device).replayed():  # else training would draw other numbers than without it
                self.meta_step(step, batch)
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
        watch: Watch | None = None,
    ) -> Hypergradient:
        """Take a meta step (Eq. 8): as many steps of the meta optimizer as base steps have passed.

        A hypergradient or a task loss that is not finite leaves everything as it is, and is counted.

        Args:
            steps: The base step that was just taken, or those of an inner loop.
            meta_batch: Held-out instances.
            all_reduce: Averages a list of tensors over processes in place.
            scale: In half precision.
            watch: Called with the last step and its hypergradient, before anything moves.
        """
        last = steps if isinstance(steps, BaseStep) else steps[-1]
        if self.objective.is_zero:
            self.objective.take_units([f.descent for f in last.forwards if f.descent], all_reduce)
        along = None if self.rate is None else self.rate.along(last.before)
        while True:
            found = hypergradient(
                steps,
                self.objective.judged(self.task_loss, all_reduce),
                meta_batch,
                all_reduce=all_reduce,
                loss_scale=1.0 if scale is None else scale.value,
                log_lr=self.rate is not None,
                along=along,
                by_forward=self.config.learn != "lr" or watch is not None,
                halves=isinstance(self.objective, BentLoss) and (self.base_steps + 1) // EVERY > self.answered // EVERY,
            )
            tensors = [*found.loss.values(), *(t for t in (found.log_lr, found.along) if t is not None)]
            if scale is None or scale.fits(tensors):
                break
        self._scalars["adalfl/task_loss"] = found.task_loss
        if found.evidence is not None and self.config.own_loss:
            self._scalars["adalfl/evidence"] = found.evidence
        self._descent, self._base_lr = last.forwards[-1].descent, last.optimizer.param_groups[0]["lr"]
        if watch is not None:
            watch(last, found)
        found.direction = None  # as large as θ
        self._move(found, max(1, self.base_steps + 1 - self.answered), all_reduce)
        self.answered = self.base_steps + 1  # the step under way is counted when it ends
        self.meta_steps, self.last_step = self.meta_steps + 1, found
        return found

    def _move(self, found: Hypergradient, moves: int, all_reduce: AllReduce | None) -> None:
        learned, gradients = self.learned, dict(found.loss)
        if self.rate is not None:
            gradients["log_lr_scale"] = self.rate.gradient(found)
        if not gradients:
            return
        size, held = norm(list(gradients.values())), dict[str, Tensor]()
        if isinstance(self.objective, BentLoss):
            self._scalars["adalfl/consensus"] = self.consensus.look(found.loss, found.half, self.objective.loss)
            held = self.objective.loss.phi()
        undo = Undo(self._optimizer)
        for k in range(moves):
            if k:
                gradients.update(found.at_present(all_reduce))
            for name, gradient in gradients.items():
                learned[name].grad = gradient.to(learned[name])
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.objective.is_zero = self.objective.loss is None
        moved = norm([p.detach() for p in learned.values()])
        is_finite = torch.isfinite(size + found.task_loss.to(size) + moved.to(size))
        undo.unless(is_finite, (self.consensus.mean >= 0).to(is_finite.device), held.values())
        self.skipped = self.skipped.to(is_finite.device) + (~is_finite).float()
        self._scalars |= {"adalfl/meta_grad_norm": size, "adalfl/skipped_meta_steps": self.skipped}

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The newest values of what is logged, by name; what costs a pass over predictions is computed here, once."""
        scale = torch.ones(()) if self.rate is None else self.rate.log_scale.detach().exp()
        descent, self._descent = self._descent, None
        if descent is not None and self.learned:
            self._scalars["adalfl/implied_lr"] = descent.implied_scale() * self._base_lr * scale
        if descent is not None and self.loss is not None:
            self._scalars["adalfl/learned_loss"] = descent.value()
        return {**self._scalars, **({} if self.rate is None else {"adalfl/lr_scale": scale})}

    def warn_of_skipped(self) -> None:
        """Warn once if a meta step was left out; it reads a number from the device."""
        if not self._has_warned and int(self.skipped):
            self._has_warned = True
            warnings.warn(
                f"A meta step before base step {self.base_steps} was left out, since the hypergradient or the task "
                "loss on the meta batch was not finite. Look for such values in the data, lower the base learning "
                "rate, or clip the gradient. Further ones are counted in `adalfl/skipped_meta_steps`.",
                stacklevel=2,
            )

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """φ and s, by the names of a hypergradient."""
        learned: dict[str, Any] = {} if self.loss is None else dict(self.loss.phi())
        return {**learned, "log_lr_scale": self.rate.log_scale} if self.rate is not None else learned

    @property
    def lr_scale(self) -> float:
        """exp(s), on the base optimizer's learning rates."""
        return 1.0 if self.rate is None else self.rate.scale

    def start(self, lr: float | None = None) -> None:
        """Make a fresh meta optimizer, with ``lr`` or the rates of training."""
        groups: list[dict[str, Any]] = []
        if self.loss is not None and self.loss.phi():
            groups.append({"params": list(self.loss.phi().values()), "lr": lr or self.config.meta_lr})
        if self.rate is not None:
            groups.append({"params": [self.rate.log_scale], "lr": lr or self.config.lr_meta_lr})
        # The held-out loss is in the project's units, on which steps of φ must not depend.
        self._optimizer = new_optimizer(self.config.meta_optimizer, groups, is_free=self.config.own_loss)

    def finish_offline(self) -> None:
        """Take over what an offline phase has learned: training begins with fresh moments, and counts from zero."""
        self.start()
        self.is_initialised, self.meta_steps, self.answered = True, 0, 0
        self._scalars, self._descent, self.consensus = {}, None, Consensus()

    @torch.no_grad()
    def set_phi(self, values: Mapping[str, Tensor]) -> None:
        """Put φ in place, by name; it needs no offline phase then."""
        if self.loss is None:
            raise ValueError("there is no learned loss to set: `learn` is neither 'loss' nor 'both'.")
        self.loss.load_state_dict(dict(values))
        self.objective.is_zero, self.is_initialised = False, True

    def to(self, device: torch.device | str) -> MetaLearner:
        """Move all that is learned, and the moments of the meta optimizer."""
        self._scalars = self.scalars  # of predictions that stay where they are
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
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: If the state is damaged, or of another kind of learned loss; nothing is taken over then.
        """
        take_over(self, state)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> MetaLearner:
        """Return the learner that :meth:`state_dict` was called on."""
        learner, given = cls(AdaLFLConfig.from_dict(configuration_of(state))), state["config"].get("loss")
        if isinstance(given, str):
            learner.config = replace(learner.config, loss=given)
        learner.load_state_dict(state)
        return learner

    def __getstate__(self) -> dict[str, Any]:  # a copy has no part in the step that is under way
        return {**self.__dict__, "last_step": None, "_scalars": {}, "_descent": None}
