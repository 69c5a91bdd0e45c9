"""One base step θ_{t+1} = U(θ_t, s_t, g_t), with what its hypergradient needs kept on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adalfl.learning.forward_mode import ForwardMode
from lightning_adalfl.learning.jvp import DoubleBackward, FiniteDifference, JacobianProduct, ShardedModel
from lightning_adalfl.learning.optimizer_vjp import Clipping, OptimizerVJP, optimizer_vjp
from lightning_adalfl.learning.recorded_forward import Model, Predict, RecordedForward
from lightning_adalfl.learning.shadow_optimizer import steps_as_torch
from lightning_adalfl.learning.torch_private import here, is_sharded
from lightning_adalfl.losses.descent import Descent, Predicted
from lightning_adalfl.losses.training_objective import BatchLoss, TrainingObjective

WAYS: dict[str, Callable[[], JacobianProduct]] = {
    "forward": ForwardMode,
    "finite_difference": FiniteDifference,
    "reverse": DoubleBackward,
}


@dataclass
class BaseForward:
    """One of the forwards that a base step takes its gradient from.

    Attributes:
        recorded: What is needed to evaluate it again.
        predicted: Its predictions.
        descent: What its backward descends, once that is known.
        objective: What trains, and
        own_loss: L_u as a function of predictions, target and weight, where it was given as one.
        instances: Which it has seen, where somebody wants to know.
    """

    recorded: RecordedForward
    predicted: Predicted
    descent: Descent | None = None
    objective: TrainingObjective | None = None
    own_loss: BatchLoss | None = None
    instances: Any = None


class BaseStep:
    """Records a base step of ``optimizer`` on ``model``; reusable, step after step.

    The order of use, in a loop of one's own::

        step = BaseStep(model, optimizer)
        for x, y in batches:
            predictions, target = step.forward((x, y))
            optimizer.zero_grad()
            step.descend(objective, own_loss(predictions, target)).backward()
            step.step()
            found = hypergradient(step, task_loss, held_out_batch)

    To accumulate gradients, call ``forward`` and ``descend`` several times before ``step``.

    Args:
        model: The base model f_θ.
        optimizer: The base optimizer U, any of ``torch.optim`` whose step is a function of one gradient.
        predict: ``predict(batch)``, which returns (predictions, target) or (predictions, target, weight); by default
            ``x, y = batch; return model(x), y``.
        jvp: How the hypergradient will be computed: ``"forward"`` (exact, forward-mode AD), ``"finite_difference"``
            (one more forward, no AD), ``"reverse"`` (exact, a double backward), or a :class:`JacobianProduct`.
        check: Called with what the first forward predicts, before it has any part in training.

    Attributes:
        forwards: Since the last step.
        loss_scale: What a gradient scaler has put on the losses and taken out of the gradient again.
        overwrites_gradient: Whether the optimizer's step is not torch's own, so that it may change the gradient in
            place; :meth:`after_step` then needs the gradient as it was.
        at_rate: Returns a context for :meth:`step`, in which the optimizer has the learned rate, where one is learned.

    Raises:
        ValueError: For an unknown way, or an optimizer that it cannot see through.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        predict: Predict | None = None,
        jvp: str | JacobianProduct = "forward",
        check: Callable[[Predicted], None] | None = None,
    ) -> None:
        if not isinstance(jvp, JacobianProduct) and jvp not in WAYS:
            known = ", ".join(map(repr, WAYS))
            raise ValueError(f"`jvp` must be one of {known}, or a JacobianProduct; got {jvp!r}.")
        self.jvp = jvp if isinstance(jvp, JacobianProduct) else WAYS[jvp]()
        self.optimizer = optimizer
        self._make_vjp = optimizer_vjp(optimizer, self.jvp.is_exact)
        self.overwrites_gradient = not steps_as_torch(optimizer)
        self.groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self.parameters = [p for group in self.groups for p in group]
        if not self.parameters:
            raise ValueError("`optimizer` holds no parameter that requires a gradient; unfreeze a part of the model.")
        self.module = model
        sharded = [is_sharded(p) for p in self.parameters]
        mixes = type(optimizer).__name__ in ("Muon", "Adafactor")
        if any(sharded) and (mixes or not all(sharded) or not isinstance(self.jvp, FiniteDifference)):
            raise ValueError(
                "`optimizer` holds sharded parameters: apply `fully_shard` to all of the model, choose "
                "`hypergradient='finite_difference'`, and an optimizer that steps each element by itself; got "
                f"{sum(sharded)} of {len(sharded)} sharded, {type(self.jvp).__name__} and {type(optimizer).__name__}."
            )
        kind = ShardedModel if any(sharded) else Model
        self.model = kind(model, self.parameters, predict or _first_and_second(model))
        self.device = self.parameters[0].device
        self.forwards: list[BaseForward] = []
        self.loss_scale: Tensor | float = 1.0
        self.active: list[int] = []
        self.before: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._clipping: Clipping | None = None
        self._vjp: OptimizerVJP | None = None
        self._check = check
        self.at_rate: Callable[[Optimizer], AbstractContextManager[Any]] = nullcontext
        self._is_repeatable = False

    def forward(self, batch: Any) -> tuple[Tensor, ...]:
        """Predict on ``batch`` at θ_t.

        Returns:
            What ``predict`` returns, (predictions, target) or those and a weight, with the graph for the base backward.

        Raises:
            ValueError: If a first batch does not fit the task, or its forward cannot be recorded.
        """
        # Autocast keeps its casts of the parameters until its outermost context ends; those of the last step are stale.
        torch.clear_autocast_cache()
        with self.jvp.keeping(self.module) as kept:
            recorded, found = self.model.record(batch, self.device, kept)
        predicted = Predicted.direct(*found)
        if self._check is not None:
            self._check(predicted)
            self._check = None
        self.forwards.append(BaseForward(recorded, predicted))
        return found

    def descend(self, objective: TrainingObjective, own_loss: Tensor | BatchLoss) -> Tensor:
        """Return what the backward of the last forward is to start from.

        Args:
            objective: What trains.
            own_loss: L_u, with its graph to what :meth:`forward` returned; or a function of predictions, target and,
                where there is one, weight, as inner loops need it: there of nothing else.

        Raises:
            ValueError: If there was no forward since the last call.
        """
        if not self.forwards or self.forwards[-1].descent is not None:
            raise ValueError("`descend` was called without a `forward` before it; predict through this object first.")
        last = self.forwards[-1]
        predicted = last.predicted
        if not isinstance(own_loss, Tensor):
            last.objective, last.own_loss = objective, own_loss
            weight = [] if predicted.weight is None else [predicted.weight]
            own_loss = own_loss(predicted.outputs[0], predicted.target, *weight)
        last.descent = objective.descend(own_loss, predicted)
        return last.descent.loss

    def before_step(self, clipping: Clipping | None = None) -> None:
        """Keep θ_t and what the derivative of the step needs; call it before the optimizer steps.

        Args:
            clipping: What the gradient has been through, where that is known already.

        Raises:
            ValueError: If the optimizer has parameters that were frozen, or not its own, when this object was made.
        """
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        if trained - {id(p) for p in self.parameters}:
            raise ValueError(
                "`optimizer` has parameters that it did not train when the base step was made: a part of the model was "
                "unfrozen, or a group added. Make a new one, by `MetaLearner.new_base_step` or `BaseStep`."
            )
        with torch.no_grad():
            # One buffer is kept over the steps: allocating it anew costs as much as filling it.
            if len(self.before) != len(self.parameters):
                self.before = [torch.empty_like(p) for p in self.parameters]
            torch._foreach_copy_(here(self.before), here(self.parameters))
        self._clipping = clipping
        self._vjp = self._make_vjp(self.optimizer, self.parameters)

    def after_step(self, clipping: Clipping | None = None, gradients: Sequence[Tensor] | None = None) -> None:
        """Take in the gradient that was applied; call it after the optimizer has stepped.

        Args:
            clipping: What the gradient has been through, where that was not known before.
            gradients: As they went into the step, where that has changed them in place.

        Raises:
            ValueError: If a gradient is sparse, or the loss does not depend on the predictions.
        """
        self._clipping = clipping or self._clipping
        found = self.gradients()
        self.active = list(found)
        self._gradients = list(found.values() if gradients is None else gradients)
        # A forward whose loss was not descended has no part in the step.
        self.keep(True)

    def gradients(self) -> dict[int, Tensor]:
        """Return the gradients that there are, by the index of the parameter, unless nothing can be learned of them."""
        found = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        if any(gradient.is_sparse for gradient in found.values()):
            raise ValueError(
                "a gradient is sparse, which has no hypergradient; build the embedding with `sparse=False`."
            )
        descents = [f.descent for f in self.forwards if f.descent is not None and f.descent.scale is not None]
        if descents and not any(descent.is_reached for descent in descents):
            raise ValueError(
                "the loss does not depend on the predictions of `adalfl_predict`, or of `BaseStep.forward`, so that "
                "nothing can be learned from them. Return those that it is computed from, or compute it from them."
            )
        return found

    def step(self, clipping: Clipping | None = None) -> None:
        """Take the base step, recorded.

        Args:
            clipping: What the gradient has been through.
        """
        with self.at_rate(self.optimizer):
            self.before_step(clipping)
            gradients = None
            if clipping is not None or self.overwrites_gradient:
                # The optimizer may write over them, or the next step of an inner loop.
                gradients = [p.grad.clone() for p in self.parameters if p.grad is not None]
            self.optimizer.step()
        self.after_step(gradients=gradients)

    @property
    def is_recorded(self) -> bool:
        """Whether there is a step to differentiate."""
        return bool(self.forwards) and self._vjp is not None and bool(self.active)

    def values_before(self) -> dict[int, Tensor]:
        """Return θ_t of the parameters that the step moved, by their index in ``parameters``."""
        return {i: self.before[i] for i in self.active}

    def vjp(self, vector: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return ``(c, w)`` with ``c · w = (∂θ_{t+1}/∂g_t)ᵀ vector`` over the active parameters, clipping included."""
        if self._vjp is None:
            raise ValueError("the base step was not recorded; call `step()`, or `before_step()` and `after_step()`.")
        scale, direction = self._vjp(self.active, [self.before[i] for i in self.active], self._gradients, vector)
        if not self.jvp.is_exact and self._vjp.is_adaptive:
            # Where a gradient is zero the predictions do not depend on the weight, yet an adaptive step is at its
            # steepest: such elements would take up all of the move along u.
            direction = [u * (g != 0) for u, g in zip(direction, self._gradients)]
        if self._clipping is not None:
            direction = self._clipping.vjp(self._gradients, direction)
        return scale, direction

    def jacobian_times(self, forward: BaseForward, direction: Sequence[Tensor]) -> list[Tensor]:
        """Return ``h = J_t u`` of one forward, one tensor for each of its outputs.

        Raises:
            ValueError: If the forward cannot be run again with the same result.
        """
        if not self._is_repeatable:
            self.jvp.check(self.model, forward.recorded, self.values_before())
            self._is_repeatable = True
        return self.jvp(self.model, forward.recorded, self.values_before(), direction)

    def keep(self, descended: bool | None) -> None:
        """Let go of all forwards but those whose loss was descended, or was not: graph and hooks hold each other."""
        forwards, self.forwards = self.forwards, []
        for forward in forwards:
            if (forward.descent is not None and forward.descent.scale is not None) is descended:
                self.forwards.append(forward)
            elif forward.descent is not None:
                forward.descent.release()

    def clear(self) -> None:
        """Forget the recorded step; the copy of θ_t stays as a buffer."""
        self.keep(None)
        self.active = []
        self._gradients = []
        self._clipping = None
        self._vjp = None


def _first_and_second(model: nn.Module) -> Predict:
    def predict(batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return model(x), y

    return predict
