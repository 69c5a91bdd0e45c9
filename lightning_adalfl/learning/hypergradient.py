"""The hypergradient ``∇_φ L_T(y_v, f_{θ_{t+1}}(x_v))`` of base steps (Eq. 8-11), without a double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD

from lightning_adalfl.learning.base_step import BaseForward, BaseStep
from lightning_adalfl.learning.jvp import run_plain
from lightning_adalfl.learning.torch_private import checkpoints_not_reentrant, dot, leaves_of_graph
from lightning_adalfl.losses.descent import Descent, precise
from lightning_adalfl.losses.training_objective import BatchLoss

AllReduce = Callable[[list[Tensor]], None]
_Direction = tuple[float, list[Tensor]]
_Part = tuple[Descent, Tensor, list[Tensor]]
Watch = Callable[[BaseStep, "Hypergradient"], None]


class Scale(Protocol):
    """A factor on the task loss against underflow of its gradient in half precision."""

    value: float

    def fits(self, gradients: Sequence[Tensor]) -> bool:
        """Return whether the gradients may be used; if not, the factor is smaller now and they are taken again."""


@dataclass
class Hypergradient:
    """What a meta step needs.

    Attributes:
        loss: ``∇_φ L_T`` by the names of the parameters of the learned loss; empty for a loss without.
        log_lr: ``∂L_T/∂log α`` of each parameter group, shape (groups,), the effect of the last step's learning rates;
            for ASGD and Rprop, which follow the rates of earlier steps, that of the step's size. ``None`` if not asked
            for.
        task_loss: L_T on the meta batch at θ_{t+1}, a scalar.
        along: The derivative of L_T at θ_{t+1} along the direction that was given, a scalar; ``None`` without one.
        half: ``∇_φ`` of the task loss of every other held-out instance alone; empty if not asked for.
        evidence: ``⟨τ, h⟩ - ⟨m, h⟩``: to first order, how much lower L_T is than with the user's loss, a scalar.
        direction: (c, w), with ``c · w = u`` over the active parameters of the last step; ``None`` once the meta step
            has ended.
    """

    loss: dict[str, Tensor]
    log_lr: Tensor | None
    task_loss: Tensor
    along: Tensor | None = None
    half: dict[str, Tensor] = field(default_factory=dict)
    evidence: Tensor | None = None
    direction: _Direction | None = None
    # What each forward has descended, the factor with which that is in the step, and h; the last step's come first.
    _parts: list[_Part] = field(default_factory=list, repr=False)
    _in_last_step: int = field(default=0, repr=False)

    @property
    def influence(self) -> list[Tensor]:
        """For each forward of the last base step, ``τ_i · h_i`` of its instances, (N,).

        It says how L_T answers to a larger weight of instance i: positive hurts.

        Raises:
            ValueError: If the loss is computed from outputs without a row for each instance.
        """
        return [descent.influence(h) * factor for descent, factor, h in self.parts]

    @property
    def parts(self) -> list[_Part]:
        """For each forward of the last base step what it has descended, the factor of that in the step, and h."""
        return self._parts[: self._in_last_step]

    def at_present(self, all_reduce: AllReduce | None = None) -> dict[str, Tensor]:
        """Return ``∇_φ L_T`` at the φ of this moment, with the same predictions and h."""
        for descent, _, _ in self._parts:
            descent.refresh()
        found = _summed(self._parts)
        if all_reduce is not None:
            all_reduce(list(found.values()))
        return found


def hypergradient(
    steps: BaseStep | Sequence[BaseStep],
    task_loss: BatchLoss,
    meta_batch: Any,
    *,
    all_reduce: AllReduce | None = None,
    loss_scale: float = 1.0,
    log_lr: bool = False,
    along: Sequence[Tensor] | None = None,
    by_forward: bool = True,
    halves: bool = False,
) -> Hypergradient:
    """Differentiate the task loss after the recorded base step(s) by the parameters φ of the loss that caused them.

    It returns gradients, writes no ``.grad``, and leaves parameters and buffers as they are. Of random numbers it draws
    what the forward on the meta batch draws.

    Args:
        steps: The base step that was just taken, or all steps of an inner loop of plain gradient descent in their order
            (S_inner > 1), each a :class:`BaseStep` of its own.
        task_loss: L_T, ``task_loss(predictions, target) -> scalar``; a third argument is the weight, where
            ``predict`` gives one.
        meta_batch: The batch (x_v, y_v), as the steps' ``predict`` takes it.
        all_reduce: Averages a list of tensors over processes in place; called for v before it is contracted, and for
            the result.
        loss_scale: A factor on L_T during its backward, taken out of v again, against underflow in half precision.
        log_lr: Whether to compute ∂L_T/∂log α, which costs a pass over the parameters.
        along: A direction in parameter space, one tensor for each of the last step's ``parameters``.
        by_forward: Whether to compute h, and from it ``loss``, ``evidence`` and ``influence``; the learning rate alone
            does not need it.
        halves: Whether to compute ``half``, which takes another backward and another J_t u.

    Raises:
        ValueError: If a step was not recorded, its forward gives another result when it is run again, or the optimizer
            of an inner loop does more than descend the gradient.
        ForwardModeError: If the model has an operation without forward-mode AD; says what works instead.
    """
    chain = [steps] if isinstance(steps, BaseStep) else list(steps)
    if not chain or not all(step.is_recorded for step in chain):
        raise ValueError("`steps` must hold recorded base steps; call `forward`, `descend` and `step` on each first.")
    if len(chain) > 1:
        _check_inner_loop(chain)
    last = chain[-1]
    # The casts that an autocast context around the base step keeps are those of θ_t.
    torch.clear_autocast_cache()
    value, vector, half = _meta_gradient(last, task_loss, meta_batch, loss_scale, halves)
    if all_reduce is not None:
        all_reduce([*vector, *half])
    result = Hypergradient({}, None, value)
    if log_lr:
        result.log_lr = _by_log_lr(last, vector)
    if along is not None:
        result.along = dot(vector, along)
    if by_forward:
        result.direction, result._parts = _through(chain, vector)
        result._in_last_step = len(last.forwards)
        result.evidence = torch.stack([descent.evidence(h) * factor for descent, factor, h in result.parts]).sum()
    result.loss, result.half = _summed(result._parts), _summed(_through(chain, half)[1] if half else [])
    if all_reduce is not None:
        scalars = [t for t in (result.log_lr, result.along, result.evidence) if t is not None]
        all_reduce([*scalars, result.task_loss, *result.loss.values(), *result.half.values()])
    return result


def _through(chain: Sequence[BaseStep], vector: Sequence[Tensor]) -> tuple[_Direction | None, list[_Part]]:
    """Return the direction in the last step of a gradient by θ after it, and the parts that it has in all forwards."""
    direction, parts = None, []
    for step in reversed(chain):
        scale, u = step.vjp([vector[i] for i in step.active])
        direction = direction or (scale, u)  # the last step comes first
        for forward in step.forwards:
            descent, factor = _descended(step, forward, scale)
            parts.append((descent, factor, step.jacobian_times(forward, u)))
        if step is not chain[0]:
            vector = _before(step, vector, scale, u)
    return direction, parts


def _meta_gradient(
    step: BaseStep, task_loss: BatchLoss, meta_batch: Any, loss_scale: float, halves: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return L_T, ``v = ∇_θ L_T(y_v, f_{θ_{t+1}}(x_v))``, one ordinary forward and backward, and v of one half."""

    def differentiated() -> tuple[Tensor, Sequence[Tensor | None]]:
        found = step.model.predict(meta_batch)
        value = task_loss(*found)
        gradients = list(step.model.gradients(value * loss_scale, step.parameters, halves))
        if halves:
            part = task_loss(*(tensor[::2] for tensor in found))
            gradients += step.model.gradients(part * loss_scale, step.parameters)
        return value.detach().reshape(()), gradients

    # Compiled parts do not know swapped buffers: here they run as the Python that they were.
    with torch.enable_grad(), checkpoints_not_reentrant(), torch.compiler.set_stance("force_eager"):
        value, gradients = step.model.run(differentiated, step.model.buffers())
    # A parameter that the meta batch did not use has the gradient zero.
    vector = [torch.zeros_like(p) if g is None else g for p, g in zip(step.parameters * 2, gradients)]
    if loss_scale != 1.0:
        torch._foreach_div_(vector, loss_scale)
    return value, vector[: len(step.parameters)], vector[len(step.parameters) :]


def _by_log_lr(step: BaseStep, vector: Sequence[Tensor]) -> Tensor:
    """Return ``∂L_T/∂log α = ⟨v, θ_{t+1} - θ_t⟩`` for each group: a step is proportional to its learning rate."""
    active = set(step.active)
    dots, start = [], 0
    with torch.no_grad():
        for group in step.groups:
            members = [i for i in range(start, start + len(group)) if i in active]
            moved = [step.parameters[i] - step.before[i] for i in members]
            dots.append(dot([vector[i] for i in members], moved, step.device))
            start += len(group)
    return torch.stack(dots)


def _summed(parts: Sequence[_Part]) -> dict[str, Tensor]:
    """Return ``Σ ∂/∂φ ⟨m(φ), h⟩``."""
    total: dict[str, Tensor] = {}
    for descent, factor, h in parts:
        weighted = [t.to(precise(t)) * factor for t in h]  # here and not at each of φ's tensors, which are more
        for name, gradient in descent.vjp(weighted).items():
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _before(step: BaseStep, vector: Sequence[Tensor], scale: float, u: Sequence[Tensor]) -> list[Tensor]:
    """Return the adjoint of θ before a plain gradient step from that after it: ``λ + (∂g/∂θ)ᵀ u``.

    Memory grows by a copy of the parameters a step of the loop, and what the way to h keeps, and not by a graph.
    """
    result = list(vector)
    for forward in step.forwards:
        _, factor = _descended(step, forward, scale)
        for i, part in zip(step.active, _curvature_times(step, forward, u)):
            result[i] = result[i] + part * factor.to(part)
    return result


def _curvature_times(step: BaseStep, forward: BaseForward, u: Sequence[Tensor]) -> list[Tensor]:
    """Return ``(∂g/∂θ)ᵀ u`` of the gradient g that one forward has given, over the active parameters."""
    objective, own_loss = forward.objective, forward.own_loss
    target, weight = forward.predicted.target, forward.predicted.weight
    if objective is None or own_loss is None:
        raise ValueError("the steps of an inner loop need the own loss as a function; pass `descend` one.")
    values = {i: p.detach().requires_grad_() for i, p in step.values_before().items()}
    theta = list(values.values())

    def of_outputs(outputs: list[Tensor]) -> list[Tensor]:
        (f,) = outputs
        own = own_loss(f.detach().requires_grad_(), target, *([] if weight is None else [weight]))
        if {id(p) for p in leaves_of_graph(own)} & {id(p) for p in (*theta, *step.parameters)}:
            raise ValueError(
                "the own loss of an inner loop depends on the parameters otherwise than by the predictions, as a "
                "penalty does, which is not followed from step to step. Leave that out of the function."
            )
        m = objective.gradient(own_loss, f, target, weight)
        gradients = torch.autograd.grad(f, theta, m, create_graph=True, allow_unused=True)
        pairs = [(g, t) for g, t in zip(gradients, u) if g is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(p) for p in theta]
        curved, weights = zip(*pairs)
        return list(torch.autograd.grad(curved, theta, weights, allow_unused=True, materialize_grads=True))

    with torch.enable_grad():
        return run_plain(step.model, forward.recorded, values, lambda kept: nullcontext(), of_outputs)


def _descended(step: BaseStep, forward: BaseForward, scale: float) -> tuple[Descent, Tensor]:
    """Return what a forward has descended, and the factor with which that is in the step."""
    descent = forward.descent
    if descent is None or descent.scale is None:
        raise ValueError("a forward of the base step has no backward; call `descend(...).backward()` on each.")
    # What the loss was multiplied by, and a scaler has not taken out again, is in the gradient.
    return descent, descent.scale / step.loss_scale * scale


def _check_inner_loop(chain: Sequence[BaseStep]) -> None:
    for step in chain:
        groups = step.optimizer.param_groups
        if type(step.optimizer) is not SGD or any(g["momentum"] or g["weight_decay"] for g in groups):
            raise ValueError(
                "the steps of an inner loop must be plain gradient descent, as Algorithm 1 has it; got "
                f"{type(step.optimizer).__name__}. Use `torch.optim.SGD` without momentum and weight decay."
            )
