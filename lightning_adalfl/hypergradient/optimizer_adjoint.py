"""``u = (∂U/∂g)ᵀ v``: how the base step answers to its gradient, for every kind of base optimizer.

SGD's derivative is a constant and Adam's follows from the state after the step, so neither needs a copy of its state.
Every other optimizer is stepped once more as a differentiable shadow.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_adalfl.hypergradient.shadow_optimizer import OptimizerSnapshot, check_optimizer, has_differentiable_step


class OptimizerAdjoint(ABC):
    """The transposed derivative of one step; made before the step, asked after it.

    Attributes:
        adaptive: Whether the derivative depends on the gradient.
        is_number: Whether it is one number times the identity.

    Args:
        optimizer: The base optimizer, before its step.
        parameters: θ, those with a gradient.
        gradients: g, as it goes into the step.
    """

    adaptive = True
    is_number = False

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self.gradients = list(gradients)

    @abstractmethod
    def transposed(self, before: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return ``(c, w)`` with ``c · w = (∂U/∂g)ᵀ vector``; the factor is kept apart so that it can scale h instead.

        Args:
            before: θ_t.
            vector: v, one tensor for each parameter; w may be these very tensors.
        """


def optimizer_adjoint(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor], method: str
) -> OptimizerAdjoint:
    """Return the cheapest exact adjoint for ``optimizer``.

    Raises:
        OptimizerError: If there is none for ``method``.
    """
    check_optimizer(optimizer, method)
    # Exact types, since a subclass may step differently.
    if type(optimizer) is SGD:
        return _SGDAdjoint(optimizer, parameters, gradients)
    plain = not any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups)
    # Adam scales the two parts of a complex number separately.
    if type(optimizer) in (Adam, AdamW) and plain and not any(p.is_complex() for p in parameters):
        return _AdamAdjoint(optimizer, parameters, gradients)
    if has_differentiable_step(optimizer):
        return _ShadowAdjoint(optimizer, parameters, gradients)
    return _DifferenceAdjoint(optimizer, parameters, gradients)


class _SGDAdjoint(OptimizerAdjoint):
    """``∂θ'/∂g = -α (1 - τ)``, with Nesterov momentum ``-α (1 + μ (1 - τ))``; the first step has no dampening τ."""

    adaptive = False

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        super().__init__(optimizer, parameters, [])  # it asks for no gradient, and so holds none
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.slopes = []
        for p in self.parameters:
            group = group_of[id(p)]
            slope = 1.0
            if group["momentum"]:
                first = optimizer.state.get(p, {}).get("momentum_buffer") is None
                slope = 1.0 if first else 1.0 - group["dampening"]
                slope = 1.0 + group["momentum"] * slope if group["nesterov"] else slope
            self.slopes.append(float(group["lr"]) * slope * (1.0 if group["maximize"] else -1.0))

        self.is_number = len(set(self.slopes)) == 1

    def transposed(self, before: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        if self.is_number:
            return self.slopes[0], list(vector)
        return 1.0, list(torch._foreach_mul(list(vector), self.slopes))


class _AdamAdjoint(OptimizerAdjoint):
    """``∂θ'/∂g = -(α / b₁) [(1 - β₁) - m (1 - β₂) g / (√b₂ √q D)] / D``.

    m and q are the moments after step k, b the bias corrections, and D = √(q / b₂) + ε.
    """

    def transposed(self, before: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        result: dict[int, Tensor] = {}
        index = {id(p): i for i, p in enumerate(self.parameters)}
        for group in self.optimizer.param_groups:
            members = [index[id(p)] for p in group["params"] if id(p) in index]
            steps = {i: float(self.optimizer.state[self.parameters[i]]["step"]) for i in members}
            for step, same in itertools.groupby(sorted(members, key=steps.__getitem__), key=steps.__getitem__):
                chosen = list(same)
                result.update(zip(chosen, self._slopes_times(group, step, chosen, before, vector)))
        return 1.0, [result[i] for i in range(len(self.parameters))]

    def _slopes_times(
        self, group: dict, step: float, members: list[int], before: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> list[Tensor]:
        beta1, beta2 = (float(b) for b in group["betas"])
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        parameters = [self.parameters[i] for i in members]
        states = [self.optimizer.state[p] for p in parameters]
        gradients = [self.gradients[i] for i in members]
        # AdamW is an Adam with this switch; its decay does not pass through the gradient.
        if group["weight_decay"] and not group.get("decoupled_weight_decay", type(self.optimizer) is AdamW):
            gradients = list(torch._foreach_add(gradients, [before[i] for i in members], alpha=group["weight_decay"]))
        root = torch._foreach_sqrt([s["exp_avg_sq"] for s in states])
        denominator = torch._foreach_div(root, correction2**0.5)
        torch._foreach_add_(denominator, group["eps"])
        # Where q is zero so is g, and the quotient's limit is zero.
        torch._foreach_clamp_min_(root, torch.finfo(root[0].dtype).tiny)
        slope = torch._foreach_div(gradients, root)
        torch._foreach_mul_(slope, [s["exp_avg"] for s in states])
        torch._foreach_div_(slope, denominator)
        torch._foreach_mul_(slope, -(1 - beta2) / correction2**0.5)
        torch._foreach_add_(slope, 1 - beta1)
        torch._foreach_div_(slope, denominator)
        torch._foreach_mul_(slope, -float(group["lr"]) / correction1)
        torch._foreach_mul_(slope, [vector[i] for i in members])
        return list(slope)


class _ShadowAdjoint(OptimizerAdjoint):
    """Steps a differentiable copy of the optimizer and differentiates that."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        super().__init__(optimizer, parameters, gradients)
        self.snapshot = OptimizerSnapshot(optimizer, parameters)

    def transposed(self, before: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        with torch.enable_grad():
            gradients = [g.detach().clone().requires_grad_() for g in self.gradients]
            moved, _ = self.snapshot.step([p.detach() for p in before], gradients, self.snapshot.state)
            product = torch.autograd.grad(moved, gradients, list(vector), allow_unused=True)
        return 1.0, [torch.zeros_like(v) if u is None else u for u, v in zip(product, vector)]


class _DifferenceAdjoint(OptimizerAdjoint):
    """A central difference of two plain steps: for an element-wise step the derivative is its own transpose."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        super().__init__(optimizer, parameters, gradients)
        self.snapshot = OptimizerSnapshot(optimizer, parameters)

    def transposed(self, before: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        gradients = self.gradients
        # The cube root of the precision balances rounding against curvature in a central difference.
        relative = torch.finfo(gradients[0].dtype).eps ** (1 / 3)
        sizes = [torch.stack(torch._foreach_norm(list(t))).norm() for t in (gradients, vector)]
        step = float(relative * sizes[0] / sizes[1].clamp_min(torch.finfo(sizes[1].dtype).tiny))
        with torch.no_grad():
            ends = []
            for sign in (1.0, -1.0):
                moved = torch._foreach_add(gradients, list(vector), alpha=sign * step)
                ends.append(self.snapshot.step(before, moved, self.snapshot.state, differentiable=False)[0])
            difference = torch._foreach_sub(ends[0], ends[1])
            torch._foreach_div_(difference, max(2 * step, torch.finfo(gradients[0].dtype).tiny))
        return 1.0, list(difference)
