"""The hypergradient ``∇_φ L_T(y_v, f_{θ_{t+1}}(x_v))`` of base steps (Eq. 8-11), without a double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_adalfl.hypergradient.base_sample import BaseSample
from lightning_adalfl.hypergradient.base_step import BaseStep
from lightning_adalfl.hypergradient.directional_derivative import finite_difference, forward_mode, moved_parameters
from lightning_adalfl.hypergradient.forward_trace import ForwardTrace
from lightning_adalfl.hypergradient.linear_factors import FactorLinear, LinearFactors
from lightning_adalfl.hypergradient.loss_slope import Objective, phi_of
from lightning_adalfl.hypergradient.slope_choice import loss_slope
from lightning_adalfl.hypergradient.unrolled import adjoint_of_later_steps, transposed_first_step, unrolled

AllReduce = Callable[[list[Tensor]], None]


@dataclass(frozen=True)
class Hypergradient:
    """What a meta step needs.

    Attributes:
        loss: ``∇_φ L_T``, one tensor for each parameter of the learned loss; empty for a loss without parameters.
        log_lr: ``∂L_T/∂log α`` of each parameter group, shape (groups,), the effect of the last step's learning rates;
            for ASGD and Rprop, which follow the rates of earlier steps, that of the step's size. Shape (0,) if not
            asked for.
        task_loss: L_T on the meta batch at θ_{t+1}, a scalar.
        along: The derivative of L_T at θ_{t+1} along the direction that was given, a scalar; ``None`` without one.
    """

    loss: tuple[Tensor, ...]
    log_lr: Tensor
    task_loss: Tensor
    along: Tensor | None = None


def hypergradient(
    steps: BaseStep | Sequence[BaseStep],
    loss: Objective,
    task_loss: Objective,
    meta_batch: Any,
    *,
    all_reduce: AllReduce | None = None,
    epsilon: float | None = None,
    loss_scale: float = 1.0,
    log_lr: bool = True,
    along: Sequence[Tensor] | None = None,
) -> Hypergradient:
    """Differentiate the task loss after the recorded base step(s) by the parameters φ of the loss that caused them.

    A pure function: it returns gradients, writes no ``.grad``, and leaves parameters and buffers as they are.

    Args:
        steps: The base step that was just taken, or all steps of an inner loop in their order (S_inner > 1). The steps
            of an inner loop are made with ``chained=True``; each holds a copy of the parameters, of their gradients and
            of the optimizer's state.
        loss: The learned loss M_φ, or any callable; the hypergradient is by its parameters if it is a module.
        task_loss: L_T, ``task_loss(predictions, target) -> scalar``.
        meta_batch: The batch (x_v, y_v), as the steps' ``predict`` takes it.
        all_reduce: Averages a list of tensors over processes in place; called for v before it is contracted, and for
            the result.
        epsilon: For ``"finite_difference"``: how far the parameters are moved, in Euclidean norm; by default the square
            root of the precision of the predictions, 3e-4 in float32, which balances rounding and curvature.
        loss_scale: A factor on L_T during its backward, taken out of v again, against underflow in half precision.
        log_lr: Whether to compute ∂L_T/∂log α, which costs a pass over the parameters.
        along: A direction in parameter space, one tensor for each of the last step's ``parameters``.

    Raises:
        ValueError: If a step was not recorded.
        ForwardModeError: If the model has an operation without forward-mode AD; says what works instead.
    """
    chain = [steps] if isinstance(steps, BaseStep) else list(steps)
    if not chain or not all(step.traces and step.before for step in chain):
        raise ValueError("`steps` must hold at least one recorded base step; call `forward` and `step` on it first.")
    phi = phi_of(loss)
    first, last = chain[0], chain[-1]
    # The casts that an autocast context around the base step keeps are those of θ_t.
    torch.clear_autocast_cache()
    if first.method == "reverse":
        by_phi, by_log_lr, value, vector = unrolled(chain, loss, phi, task_loss, meta_batch)
        by_along = None if along is None else _inner_product(vector, along)
        return _reduced(Hypergradient(by_phi, by_log_lr if log_lr else by_log_lr[:0], value, by_along), all_reduce)

    # Where v is asked for by itself, it has to be formed.
    asked = all_reduce is not None or log_lr or along is not None
    whole = asked or loss_scale != 1.0 or len(chain) > 1 or not first.takes_factors
    value, vector, factors = _meta_gradient(last, task_loss, meta_batch, loss_scale, whole)
    if all_reduce is not None:
        all_reduce(vector)
    by_log_lr = _by_log_lr(last, vector) if log_lr else torch.zeros(0, dtype=torch.float64, device=value.device)
    by_along = None if along is None else _inner_product(vector, along)
    total = [torch.zeros_like(p) for p in phi]
    if phi:
        if len(chain) > 1:
            vector, state_adjoint, total = adjoint_of_later_steps(chain[1:], loss, phi, vector)
            scale, u = 1.0, transposed_first_step(first, vector, state_adjoint)
        else:
            scale, u = first.transposed([vector[i] for i in first.active])
        torch._foreach_add_(total, _by_phi(first, loss, phi, u, factors, epsilon), alpha=scale)
    return _reduced(Hypergradient(tuple(total), by_log_lr, value, by_along), all_reduce)


def _meta_gradient(
    step: BaseStep, task_loss: Objective, meta_batch: Any, loss_scale: float, whole: bool
) -> tuple[Tensor, list[Tensor], dict[int, LinearFactors]]:
    """Return L_T and ``v = ∇_θ L_T(y_v, f_{θ_{t+1}}(x_v))``: one ordinary forward and backward.

    Unless v is to be ``whole``, its elements for wide linear layers are empty, and factors by their index.
    """
    factors: dict[int, LinearFactors] = {}
    with torch.enable_grad(), nullcontext() if whole else FactorLinear(step.parameters) as linear:
        predictions, target = step.model(meta_batch, step.model.buffers())
        value = task_loss(predictions, target)
        if linear is None:
            gradients = torch.autograd.grad(value * loss_scale, step.parameters, allow_unused=True)
        else:
            gradients, factors = linear.gradients(value)
    vector = [_empty(p) if i in factors else g for i, (p, g) in enumerate(zip(step.parameters, gradients))]
    # A parameter that the meta batch did not use has the gradient zero.
    vector = [torch.zeros_like(p) if g is None else g for p, g in zip(step.parameters, vector)]
    if loss_scale != 1.0:
        torch._foreach_div_(vector, loss_scale)
    return value.detach(), vector, factors


def _empty(parameter: Tensor) -> Tensor:
    return parameter.detach().new_empty(0)


def _by_log_lr(step: BaseStep, vector: Sequence[Tensor]) -> Tensor:
    """Return ``∂L_T/∂log α = ⟨v, θ_{t+1} - θ_t⟩`` for each group: a step is proportional to its learning rate."""
    active = set(step.active)
    dots, start = [], 0
    with torch.no_grad():
        for group in step.groups:
            members = [i for i in range(start, start + len(group)) if i in active]
            moved = [step.parameters[i] - step.before[i] for i in members]
            dots.append(_inner_product([vector[i] for i in members], moved, vector[0].device))
            start += len(group)
    return torch.stack(dots)


def _inner_product(a: Sequence[Tensor], b: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """Return ``⟨a, b⟩`` over lists of tensors, in double precision."""
    zero = torch.zeros((), dtype=torch.float64, device=device or a[0].device)
    return sum((_dot(x, y) for x, y in zip(a, b)), zero)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.flatten().to(dtype), b.flatten().to(dtype)
    # torch's gradient by a complex parameter is that of both its parts.
    return (torch.vdot(a, b).real if dtype.is_complex else torch.dot(a, b)).double()


def _by_phi(
    step: BaseStep,
    loss: Objective,
    phi: list[Tensor],
    direction: Sequence[Tensor],
    factors: dict[int, LinearFactors],
    epsilon: float | None,
) -> list[Tensor]:
    """Return ``∂/∂φ ⟨m_t(φ), J_t u⟩``, the mean over the step's forward passes."""
    before = step.values_before()
    if step.method == "finite_difference":
        default = torch.finfo(step.traces[0].predictions.dtype).eps ** 0.5
        moved, size = moved_parameters(before, direction, default if epsilon is None else epsilon, factors)

    def derivative(trace: ForwardTrace) -> Tensor:
        if step.method == "forward":
            return forward_mode(step.model, trace, before, direction, factors)
        return finite_difference(step.model, trace, moved, size, factors)

    total = [torch.zeros_like(p) for p in phi]
    for trace in step.traces:
        if step.base_fraction < 1.0:
            sample = BaseSample.draw(trace, step.base_fraction)
            with_own = step.method == "finite_difference"
            h = sample.spread(derivative(sample.evaluated(step.model, before) if with_own else sample.trace))
        else:
            h = derivative(trace)
        slope = trace.slope
        if slope is None or not slope.holds_for(loss, phi):
            slope = loss_slope(loss, trace.predictions, trace.target)
        torch._foreach_add_(total, slope.contracted(phi, h), alpha=1.0 / step.divisor)
    return total


def _reduced(result: Hypergradient, all_reduce: AllReduce | None) -> Hypergradient:
    if all_reduce is None:
        return result
    along = [] if result.along is None else [result.along]
    tensors = [*along, result.log_lr, result.task_loss, *result.loss]
    all_reduce(tensors)
    log_lr, task_loss, *by_phi = tensors[len(along) :]
    return Hypergradient(tuple(by_phi), log_lr, task_loss, tensors[0] if along else None)
