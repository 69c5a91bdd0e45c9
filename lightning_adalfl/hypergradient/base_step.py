"""One base step θ_{t+1} = U(θ_t, s_t, g_t), with what its hypergradient needs kept on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adalfl.config import check_method
from lightning_adalfl.hypergradient.forward_trace import ForwardTrace
from lightning_adalfl.hypergradient.functional import FunctionalModel, Predict
from lightning_adalfl.hypergradient.gradient_clipping import GradientTransform
from lightning_adalfl.hypergradient.loss_slope import Objective
from lightning_adalfl.hypergradient.optimizer_adjoint import OptimizerAdjoint, optimizer_adjoint
from lightning_adalfl.hypergradient.random_state import RandomState
from lightning_adalfl.hypergradient.shadow_optimizer import OptimizerSnapshot, check_optimizer, has_differentiable_step
from lightning_adalfl.hypergradient.slope_choice import loss_slope
from lightning_adalfl.hypergradient.tangent_rules import PrimalTape, RecordPrimals


class BaseStep:
    """Records a base step of ``optimizer`` on ``model``; reusable, step after step.

    The order of use, with ``loss`` a learned loss::

        step = BaseStep(model, optimizer)
        predictions, target = step.forward(batch)      # k times to accumulate gradients, of loss / k
        step.evaluate(loss).backward()                 # or loss(predictions, target).backward(), which is slower
        step.step()                                    # or step.before_step() and the step itself
        gradient = hypergradient(step, loss, task_loss, meta_batch)

    Args:
        model: The base model f_θ.
        optimizer: The base optimizer U, any of ``torch.optim`` whose step is a function of one gradient.
        predict: ``predict(batch) -> (predictions, target)``; by default ``x, y = batch; return model(x), y``.
        method: How the hypergradient will be computed: ``"forward"`` (exact, forward-mode AD), ``"finite_difference"``
            (one more forward, no AD) or ``"reverse"`` (the unrolled reference).
        chained: Keep the optimizer's state too, as the steps of an inner loop (S_inner > 1) need it.
        base_fraction: The part of the base batch on which h is evaluated, in (0, 1]: a random sample of its instances,
            weighted so that the expected hypergradient stays the same. That holds where a prediction depends on its own
            instance alone; BatchNorm in training mode and dropout make it an approximation. The instances are
            dimension 0 of every tensor in the batch and of the predictions.

    Attributes:
        accumulate: What the loss of each accumulated forward is divided by; by default their number.

    Raises:
        ValueError: For an unknown method, or an optimizer that it cannot see through; for a ``base_fraction`` out of
            range, or where there is no h.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        predict: Predict | None = None,
        method: str = "forward",
        chained: bool = False,
        base_fraction: float = 1.0,
    ) -> None:
        check_method(method)
        if not 0.0 < base_fraction <= 1.0:
            raise ValueError(f"`base_fraction` must lie in (0, 1], the part of the base batch; got {base_fraction}.")
        if base_fraction < 1.0 and method == "reverse":
            raise ValueError(
                "`base_fraction` is for `method='forward'` and 'finite_difference';"
                " 'reverse' differentiates whole batches."
            )
        check_optimizer(optimizer, method, chained)
        self.method = method
        self.optimizer = optimizer
        self.chained = chained
        self.base_fraction = base_fraction
        self.groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self.parameters = [p for group in self.groups for p in group]
        if not self.parameters:
            raise ValueError("`optimizer` holds no parameter that requires a gradient; unfreeze a part of the model.")
        self.model = FunctionalModel(model, self.parameters, predict or _default_predict(model))
        self.accumulate: int | None = None
        self.traces: list[ForwardTrace] = []
        self.active: list[int] = []
        self.before: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.snapshot: OptimizerSnapshot | None = None
        self.transform: GradientTransform | None = None
        self._adjoint: OptimizerAdjoint | None = None
        self._predictions: Tensor | None = None
        self._predict = predict or _default_predict(model)
        self._device = self.parameters[0].device
        # The compiler does not trace the recording, so a compiled model's forward is computed again; so is that of an
        # inner loop, whose steps would keep activations otherwise.
        keeps = method == "forward" and not chained and base_fraction == 1.0
        self._records = keeps and not any(_is_compiled(m) for m in model.modules())

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Predict on ``batch`` at θ_t; the predictions carry the graph for the base backward."""
        if self._adjoint is not None or self.snapshot is not None:
            self.clear()
        # Autocast keeps its casts of the parameters until its outermost context ends; those of the last step are stale.
        torch.clear_autocast_cache()
        random_state = RandomState.capture(self._device)
        buffers = self.model.copied_buffers()
        tape = PrimalTape() if self._records else None
        if tape is None:
            predictions, target = self._predict(batch)
        else:
            with RecordPrimals(tape):
                predictions, target = self._predict(batch)
        self.traces.append(ForwardTrace(batch, random_state, buffers, predictions.detach(), target, tape))
        self._predictions = predictions
        return predictions, target

    def evaluate(self, loss: Objective) -> Tensor:
        """Return M_φ(y, f) of the last forward, a scalar whose backward reaches θ and leaves φ alone.

        The hypergradient goes on from what is computed here, so that M_φ is evaluated once a step.

        Raises:
            ValueError: If there was no forward since the last call.
        """
        if self._predictions is None:
            raise ValueError("`evaluate` was called without a `forward` before it; predict through this object first.")
        predictions, self._predictions = self._predictions, None
        trace = self.traces[-1]
        trace.slope = loss_slope(loss, predictions, trace.target)
        return trace.slope.at(predictions)

    def before_step(self, transform: GradientTransform | None = None) -> None:
        """Keep θ_t and what the derivative of the step needs; call it between backward (or clipping) and step.

        Args:
            transform: The clipping that the gradient has been through.

        Raises:
            ValueError: If no forward was recorded, or a gradient is sparse.
        """
        if not self.traces:
            raise ValueError("`before_step` was called without a recorded `forward`; predict with `forward` first.")
        gradients = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        self.active, self.gradients = list(gradients), list(gradients.values())
        stepped = [self.parameters[i] for i in self.active]
        if any(gradient.is_sparse for gradient in self.gradients):
            raise ValueError(
                "a gradient is sparse, which has no hypergradient here; build the embedding with `sparse=False`."
            )
        with torch.no_grad():
            # One buffer is kept over the steps: allocating it anew costs as much as filling it.
            if len(self.before) != len(self.parameters):
                self.before = [torch.empty_like(p) for p in self.parameters]
            torch._foreach_copy_(self.before, self.parameters)
        self.transform = transform
        if self.chained or not has_differentiable_step(self.optimizer):
            # The next step's backward, or an optimizer of one's own, may write into the very same tensors.
            self.gradients = [gradient.clone() for gradient in self.gradients]
        if self.method == "reverse" or self.chained:
            self.snapshot = OptimizerSnapshot(self.optimizer, stepped)
        if self.method != "reverse":
            self._adjoint = optimizer_adjoint(self.optimizer, stepped, self.gradients, self.method)
        if not self.chained and transform is None and not (self._adjoint and self._adjoint.gradients):
            # Nothing asks for them any more: a `zero_grad` before the hypergradient gives their memory back.
            self.gradients = []

    def step(self, transform: GradientTransform | None = None) -> None:
        """Take the base step, recorded."""
        self.before_step(transform)
        self.optimizer.step()

    @property
    def divisor(self) -> int:
        """What each forward's loss is divided by before its gradient is accumulated."""
        return self.accumulate or len(self.traces)

    def values_before(self) -> dict[int, Tensor]:
        """Return θ_t of the parameters that the step moved, by their index in ``parameters``."""
        return {i: self.before[i] for i in self.active}

    def transposed(self, vector: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return ``(c, w)`` with ``c · w = (∂θ_{t+1}/∂g_t)ᵀ vector`` over the active parameters, clipping included."""
        if self._adjoint is None:
            raise ValueError("the base step was not recorded; call `step()` or `before_step()` first.")
        scale, direction = self._adjoint.transposed([self.before[i] for i in self.active], vector)
        if self.method == "finite_difference" and self._adjoint.adaptive:
            # Where a gradient is zero the predictions do not depend on the weight, yet an adaptive step is at its
            # steepest: such elements would take up all of the move along u.
            direction = [u * (g != 0) for u, g in zip(direction, self.gradients)]
        if self.transform is not None:
            direction = self.transform.transposed(self.gradients, direction)
        return scale, direction

    @property
    def takes_factors(self) -> bool:
        """Whether u is v times a number, and h is linear in it: then v may be given as factors."""
        plain = self.transform is None and self._adjoint is not None and self._adjoint.is_number
        return plain and self.method != "reverse" and not torch.is_autocast_enabled(self._device.type)

    def clear(self) -> None:
        """Forget the recorded step; the copy of θ_t stays as a buffer."""
        self.traces = []
        self._predictions = None
        self.active = []
        self.gradients = []
        self.snapshot = None
        self.transform = None
        self._adjoint = None


def _default_predict(model: nn.Module) -> Predict:
    def predict(batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return model(x), y

    return predict


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
