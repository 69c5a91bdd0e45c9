"""Base steps as one differentiable graph: the reverse-mode reference, and the adjoint of inner loops step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_adalfl.hypergradient.base_step import BaseStep
from lightning_adalfl.hypergradient.shadow_optimizer import COUNTERS, OptimizerSnapshot, State

Objective = Callable[[Tensor, Tensor], Tensor]
# The adjoint of entry `key` of parameter `index`'s optimizer state, by (index, key).
StateAdjoint = dict[tuple[int, str], Tensor]


def unrolled(
    steps: Sequence[BaseStep], loss: Objective, phi: list[Tensor], task_loss: Objective, meta_batch: Any
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, list[Tensor]]:
    """Return ``∇_φ L_T``, ``∂L_T/∂log α``, L_T and ``∇_θ L_T`` by a double backward through all steps at once.

    The reference for the other methods, and what the paper's own implementation computes (section 2.4).
    """
    first, last = steps[0], steps[-1]
    with torch.enable_grad():
        values = {i: first.before[i].detach().clone().requires_grad_() for i in range(len(first.parameters))}
        states: dict[int, dict[str, Any]] = {}
        for step in steps:
            states = _states(step) if step is first else {i: states.get(i, s) for i, s in _states(step).items()}
            if step is last:
                log_scale = values[0].new_zeros(len(step.groups), dtype=torch.float64).requires_grad_()
                values, states = _differentiable_step(step, loss, values, states, log_scale)
            else:
                values, states = _differentiable_step(step, loss, values, states)
        predictions, target = last.model(meta_batch, last.model.buffers(), values)
        value = task_loss(predictions, target)
        inputs = [*phi, log_scale, *values.values()]
        gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, gradients)]
    return tuple(found[: len(phi)]), found[len(phi)], value.detach(), found[len(phi) + 1 :]


def adjoint_of_later_steps(
    steps: Sequence[BaseStep], loss: Objective, phi: list[Tensor], vector: Sequence[Tensor]
) -> tuple[list[Tensor], StateAdjoint, list[Tensor]]:
    """Go backwards through stored iterates, one step's graph at a time.

    With λ the adjoint of (θ, s) after step k, a vector-Jacobian product of that step alone gives its part of
    ``∇_φ L_T`` and λ before it. The memory is that of one step and the stored iterates, and not one graph a step.

    Args:
        steps: The inner steps but the first, in their order.
        loss: M_φ.
        phi: φ.
        vector: v, the adjoint of θ after the last step.

    Returns:
        The adjoints of θ and of the optimizer's state before these steps, and their part of ``∇_φ L_T``.
    """
    adjoint = list(vector)
    state_adjoint: StateAdjoint = {}
    total = [torch.zeros_like(p) for p in phi]
    for step in reversed(steps):
        with torch.enable_grad():
            values = {i: step.before[i].detach().clone().requires_grad_() for i in range(len(step.parameters))}
            states = {i: _requiring_grad(s) for i, s in _states(step).items()}
            moved, new_states = _differentiable_step(step, loss, values, states)
            outputs, weights = _with_state([moved[i] for i in range(len(values))], adjoint, new_states, state_adjoint)
            tensors = {(i, k): v for i, s in states.items() for k, v in s.items() if isinstance(v, Tensor)}
            inputs = {key: v for key, v in tensors.items() if v.requires_grad}
            gradients = torch.autograd.grad(
                outputs, [*values.values(), *phi, *inputs.values()], weights, allow_unused=True
            )
        adjoint = [torch.zeros_like(p) if g is None else g for p, g in zip(step.parameters, gradients)]
        by_phi = gradients[len(values) : len(values) + len(phi)]
        for accumulated, g in zip(total, by_phi):
            if g is not None:
                accumulated += g
        by_state = gradients[len(values) + len(phi) :]
        state_adjoint = {key: g for key, g in zip(inputs, by_state) if g is not None}
    return adjoint, state_adjoint, total


def transposed_first_step(step: BaseStep, vector: Sequence[Tensor], state_adjoint: StateAdjoint) -> list[Tensor]:
    """Return u of an inner loop's first step, ``(∂θ_1/∂g_0)ᵀ λ_θ + (∂s_1/∂g_0)ᵀ λ_s`` over its active parameters."""
    snapshot = _snapshot(step)
    with torch.enable_grad():
        gradients = [g.detach().clone().requires_grad_() for g in step.gradients]
        moved, new_state = snapshot.step([step.before[i] for i in step.active], gradients, snapshot.state)
        outputs, weights = _with_state(
            moved, [vector[i] for i in step.active], dict(zip(step.active, new_state)), state_adjoint
        )
        product = torch.autograd.grad(outputs, gradients, weights, allow_unused=True)
    result = [torch.zeros_like(g) if u is None else u for g, u in zip(gradients, product)]
    return result if step.transform is None else step.transform.transposed(step.gradients, result)


def _with_state(
    outputs: list[Tensor],
    weights: Sequence[Tensor],
    new_states: Mapping[int, dict[str, Any]],
    state_adjoint: StateAdjoint,
) -> tuple[list[Tensor], list[Tensor]]:
    """Append the state's outputs and adjoints to those of the parameters, where the state depends on the inputs."""
    pairs = list(zip(outputs, weights))
    for (index, key), weight in state_adjoint.items():
        new = new_states.get(index, {}).get(key)
        if isinstance(new, Tensor) and new.requires_grad:
            pairs.append((new, weight))
    return [new for new, _ in pairs], [weight for _, weight in pairs]


def _differentiable_step(
    step: BaseStep,
    loss: Objective,
    values: Mapping[int, Tensor],
    states: Mapping[int, dict[str, Any]],
    log_scale: Tensor | None = None,
) -> tuple[dict[int, Tensor], dict[int, dict[str, Any]]]:
    """Return θ_{k+1} and s_{k+1} as differentiable functions of θ_k, s_k, φ and ``log_scale``, of the groups' log α."""
    snapshot = _snapshot(step)
    inner = [values[i] for i in step.active]
    gradients: list[Tensor] = [torch.zeros_like(v) for v in inner]
    for trace in step.traces:
        with trace.random_state.replayed():
            predictions, target = step.model(trace.batch, trace.buffers, values)
        objective = loss(predictions, target) / step.divisor
        parts = torch.autograd.grad(objective, inner, create_graph=True, allow_unused=True)
        gradients = [total if part is None else total + part for total, part in zip(gradients, parts)]
    if step.transform is not None:
        gradients = step.transform.forward(gradients)
    state: State = [states.get(i, {}) for i in step.active]
    moved, new_state = snapshot.step(inner, gradients, state)
    if log_scale is not None:
        factors = log_scale.exp()
        moved = [old + factors[g].to(old.dtype) * (new - old) for old, new, g in zip(inner, moved, snapshot.group_of)]
    result = dict(values)
    result.update(zip(step.active, moved))
    return result, dict(zip(step.active, new_state))


def _snapshot(step: BaseStep) -> OptimizerSnapshot:
    if step.snapshot is None:
        raise ValueError(
            "an inner step was recorded without its optimizer state; make it with `BaseStep(..., chained=True)`."
        )
    return step.snapshot


def _states(step: BaseStep) -> dict[int, dict[str, Any]]:
    return dict(zip(step.active, _snapshot(step).state))


def _requiring_grad(state: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.detach().clone().requires_grad_()
        if isinstance(v, Tensor) and v.is_floating_point() and k not in COUNTERS
        else v
        for k, v in state.items()
    }
