"""``u = (∂U/∂g)ᵀ v``: how the base step answers to its gradient, for every kind of optimizer, clipping included.

SGD's derivative is a constant and Adam's follows from the state after the step, so neither needs a copy of its state.
Every other optimizer is stepped once more as a differentiable shadow.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_adalfl.learning.matrix_steps import CHANGES
from lightning_adalfl.learning.shadow_optimizer import ShadowOptimizer, check_optimizer, has_differentiable_step
from lightning_adalfl.learning.torch_private import dot


class OptimizerVJP(ABC):
    """The vector-Jacobian product of one step with its gradient; made before the step, asked after it.

    Args:
        optimizer: The base optimizer, before its step.
        parameters: θ, those that may have a gradient.

    Attributes:
        is_adaptive: Whether the derivative depends on the gradient.
    """

    is_adaptive = True

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)

    @abstractmethod
    def __call__(
        self, active: Sequence[int], before: Sequence[Tensor], gradients: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        """Return ``(c, w)`` with ``c · w = (∂U/∂g)ᵀ vector``; the factor is kept apart so that it can scale h instead.

        Args:
            active: Which of the parameters had a gradient.
            before: θ_t of these.
            gradients: g, as it went into the step.
            vector: v, one tensor for each; w may be these very tensors.
        """


def optimizer_vjp(optimizer: Optimizer, is_exact: bool = True) -> type[OptimizerVJP]:
    """Return the cheapest way for ``optimizer``, to be made anew for each step.

    Args:
        optimizer: The base optimizer.
        is_exact: Whether a difference of two steps will not do.

    Raises:
        OptimizerError: If there is none.
    """
    # Exact types, since a subclass may step differently.
    if type(optimizer) in CHANGES:
        return _MatrixStep
    check_optimizer(optimizer, is_exact)
    if type(optimizer) is SGD:
        return _SGD
    is_plain = not any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups)
    # Adam scales the two parts of a complex number separately.
    is_real = not any(p.is_complex() for group in optimizer.param_groups for p in group["params"])
    if type(optimizer) in (Adam, AdamW) and is_plain and is_real:
        return _Adam
    return _Shadow if has_differentiable_step(optimizer) else _Difference


class _SGD(OptimizerVJP):
    """``∂θ'/∂g = -α (1 - τ)``, with Nesterov momentum ``-α (1 + μ (1 - τ))``; the first step has no dampening τ."""

    is_adaptive = False

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        super().__init__(optimizer, parameters)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._slopes = []
        for p in self.parameters:
            group = group_of[id(p)]
            slope = 1.0
            if group["momentum"]:
                first = optimizer.state.get(p, {}).get("momentum_buffer") is None
                slope = 1.0 if first else 1.0 - group["dampening"]
                slope = 1.0 + group["momentum"] * slope if group["nesterov"] else slope
            self._slopes.append(float(group["lr"]) * slope * (1.0 if group["maximize"] else -1.0))

    def __call__(
        self, active: Sequence[int], before: Sequence[Tensor], gradients: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        slopes = [self._slopes[i] for i in active]
        if len(set(slopes)) == 1:
            return slopes[0], list(vector)
        return 1.0, list(torch._foreach_mul(list(vector), slopes))


class _MatrixStep(OptimizerVJP):
    """By autograd, through the step written as a function of the gradient."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        super().__init__(optimizer, parameters)
        self._change = CHANGES[type(optimizer)]
        groups = {id(p): {**group, "params": []} for group in optimizer.param_groups for p in group["params"]}
        self._groups = [groups[id(p)] for p in self.parameters]
        states = [optimizer.state.get(p, {}) for p in self.parameters]
        self._states = [{k: t.clone() if isinstance(t, Tensor) else t for k, t in s.items()} for s in states]

    def __call__(
        self, active: Sequence[int], before: Sequence[Tensor], gradients: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        found = []
        for i, p, g, v in zip(active, before, gradients, vector):
            g = g.detach().to(torch.promote_types(g.dtype, torch.float32)).requires_grad_()
            with torch.enable_grad():
                change = self._change(p.detach().to(g.dtype), g, self._states[i], self._groups[i])
            found.append(torch.autograd.grad(change, g, v.to(g.dtype))[0].to(v.dtype))
        return 1.0, found


class _Adam(OptimizerVJP):
    """``∂θ'/∂g = -(α / b₁) [(1 - β₁) - m (1 - β₂) g / (√b₂ √q D)] / D``.

    m and q are the moments after step k, b the bias corrections, and D = √(q / b₂) + ε.
    """

    def __call__(
        self, active: Sequence[int], before: Sequence[Tensor], gradients: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        result: dict[int, Tensor] = {}
        place = {id(self.parameters[i]): k for k, i in enumerate(active)}
        state = self.optimizer.state
        for group in self.optimizer.param_groups:
            members = [p for p in group["params"] if id(p) in place]
            steps = {p: float(state[p]["step"]) for p in members}
            for step, same in itertools.groupby(sorted(members, key=steps.__getitem__), key=steps.__getitem__):
                chosen = list(same)
                at = [place[id(p)] for p in chosen]
                values = ([t[k] for k in at] for t in (before, gradients, vector))
                result.update(zip(at, self._times(group, step, chosen, *values)))
        return 1.0, [result[k] for k in range(len(active))]

    def _times(
        self,
        group: dict[str, Any],
        step: float,
        parameters: list[Tensor],
        before: list[Tensor],
        gradients: list[Tensor],
        vector: list[Tensor],
    ) -> list[Tensor]:
        beta1, beta2 = (float(b) for b in group["betas"])
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        states = [self.optimizer.state[p] for p in parameters]
        # AdamW is an Adam with this switch; its decay does not pass through the gradient.
        if group["weight_decay"] and not group.get("decoupled_weight_decay", type(self.optimizer) is AdamW):
            gradients = list(torch._foreach_add(gradients, before, alpha=group["weight_decay"]))
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
        torch._foreach_mul_(slope, vector)
        return list(slope)


class _Shadow(OptimizerVJP):
    """Steps a differentiable copy of the optimizer and differentiates that."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        super().__init__(optimizer, parameters)
        self._shadow = ShadowOptimizer(optimizer, parameters)

    def __call__(
        self, active: Sequence[int], before: Sequence[Tensor], gradients: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        with torch.enable_grad():
            inputs = [g.detach().clone().requires_grad_() for g in gradients]
            moved = self._shadow.step(active, before, inputs)
            product = torch.autograd.grad(moved, inputs, list(vector), allow_unused=True, materialize_grads=True)
        return 1.0, list(product)


class _Difference(_Shadow):
    """A central difference of two plain steps: for an element-wise step the derivative is its own transpose."""

    def __call__(
        self, active: Sequence[int], before: Sequence[Tensor], gradients: Sequence[Tensor], vector: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        # The cube root of the precision balances rounding against curvature in a central difference.
        relative = torch.finfo(gradients[0].dtype).eps ** (1 / 3)
        sizes = [torch.nn.utils.get_total_norm(list(t)) for t in (gradients, vector)]
        step = relative * sizes[0] / sizes[1].clamp_min(torch.finfo(sizes[1].dtype).tiny)
        with torch.no_grad():
            shift = torch._foreach_mul(list(vector), step)
            ends = []
            for sign in (1.0, -1.0):
                moved = torch._foreach_add(list(gradients), shift, alpha=sign)
                ends.append(self._shadow.step(active, before, moved, differentiable=False))
            difference = torch._foreach_sub(*ends)
            torch._foreach_div_(difference, (2 * step).clamp_min(torch.finfo(step.dtype).tiny))
        return 1.0, list(difference)


class Clipping(ABC):
    """A map g -> ĝ that the gradient went through between backward and step."""

    @abstractmethod
    def vjp(self, clipped: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return ``(∂ĝ/∂g)ᵀ`` times ``vector``, given ĝ."""


class ClipByNorm(Clipping):
    """``ĝ = g · min(1, c / (‖g‖ + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` does it.

    Args:
        max_norm: c.
        total_norm: ‖g‖, a scalar tensor, as that function returns it.
    """

    def __init__(self, max_norm: float | Tensor, total_norm: Tensor) -> None:
        self.max_norm = max_norm
        self.total_norm = total_norm

    def vjp(self, clipped: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return ``s (w - ĝ ⟨ĝ, w⟩ / (s² ‖g‖ (‖g‖ + 1e-6)))`` with ``s = c / (‖g‖ + 1e-6)``, or w."""
        norm = self.total_norm
        factor = self.max_norm / (norm + 1e-6)
        slope = dot(clipped, vector) / (factor**2 * norm * (norm + 1e-6))
        active = factor < 1.0
        slope = torch.where(active, slope, torch.zeros_like(slope))
        factor = torch.where(active, factor, torch.ones_like(factor))
        return [torch.addcmul(w, g, slope.to(g.dtype), value=-1).mul_(factor) for g, w in zip(clipped, vector)]


class ClipByValue(Clipping):
    """``ĝ = clamp(g, -c, c)`` element-wise; the derivative is one inside the bounds and zero where it was cut.

    Args:
        max_value: c.
    """

    def __init__(self, max_value: float) -> None:
        self.max_value = max_value

    def vjp(self, clipped: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return ``vector`` with zeros where the gradient was cut."""
        return [w * (g.abs() < self.max_value) for g, w in zip(clipped, vector)]
