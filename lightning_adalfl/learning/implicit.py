"""Implicit differentiation (Lorraine et al., 2020), the paper's alternative to long inner loops (section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_adalfl.checks import one_of, positive_number, whole_number
from lightning_adalfl.learning.hypergradient import Hypergradient

SOLVERS = ("conjugate_gradient", "neumann")
Product = Callable[[Sequence[Tensor]], list[Tensor]]


def implicit_hypergradient(
    parameters: Sequence[Tensor],
    phi: Mapping[str, Tensor],
    base_loss: Callable[[], Tensor],
    task_loss: Callable[[], Tensor],
    *,
    solver: str = "conjugate_gradient",
    iterations: int = 20,
    tolerance: float = 1e-6,
    lr: float = 0.01,
    damping: float = 0.0,
) -> Hypergradient:
    """Differentiate the task loss at a minimum θ*(φ) of the base loss by φ, whatever path led to it.

    With H the Hessian of the base loss M by θ and v the gradient of the task loss L_T, the implicit function theorem
    gives

    ``dL_T/dφ = ∂L_T/∂φ - (∂²M/∂θ∂φ)ᵀ (H + damping · I)⁻¹ v``.

    It is exact where ``∂M/∂θ = 0``, and costs one Hessian-vector product an iteration instead of a backward through
    the inner loop. Like the rest of this package it returns gradients and writes no ``.grad``.

    Args:
        parameters: θ, leaves that require a gradient.
        phi: φ by name, likewise.
        base_loss: Returns M as a scalar that depends on θ and φ, twice differentiable; called once.
        task_loss: Returns L_T as a scalar that depends on θ, and maybe on φ; called once.
        solver: ``"conjugate_gradient"``, for a positive definite H; it stops at a direction of no curvature. Or
            ``"neumann"``, the series ``lr · Σ_j (I - lr · H)ʲ v``, which converges for ``lr`` below 2 over the largest
            curvature; cut off, it equals the gradient through that many last steps of gradient descent.
        iterations: Hessian-vector products at most.
        tolerance: Of conjugate gradients: stop at a residual of so much times ‖v‖.
        lr: Of the Neumann series.
        damping: Added to the diagonal of H, for one that is not positive definite.

    Returns:
        The hypergradient, without a part for the learning rate.

    Raises:
        ValueError: For an unknown solver, or a number out of range.
    """
    one_of("solver", solver, SOLVERS)
    whole_number("iterations", iterations)
    positive_number("lr", lr)
    positive_number("tolerance", tolerance)
    if not damping >= 0:
        raise ValueError(f"`damping` must not be negative; got {damping}.")
    theta, learned = list(parameters), list(phi.values())
    with torch.enable_grad():
        value = task_loss()
        vector, direct = _split(torch.autograd.grad(value, [*theta, *learned], allow_unused=True), theta, learned)
        slope = torch.autograd.grad(base_loss(), theta, create_graph=True, allow_unused=True)
    # A parameter without a part in the base loss, or with a linear one, has no curvature.
    curved = [i for i, g in enumerate(slope) if g is not None and g.requires_grad]
    outputs = [slope[i] for i in curved]

    def transposed(direction: Sequence[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        if not outputs:
            return [torch.zeros_like(p) for p in inputs]
        weights = [direction[i] for i in curved]
        products = torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, products)]

    def curvature(direction: Sequence[Tensor]) -> list[Tensor]:
        return list(torch._foreach_add(transposed(direction, theta), list(direction), alpha=damping))

    with torch.no_grad():
        if solver == "neumann":
            solution = _neumann_series(curvature, vector, iterations, lr)
        else:
            solution = _conjugate_gradient(curvature, vector, iterations, tolerance)
    by_phi = torch._foreach_sub(direct, transposed(solution, learned))
    return Hypergradient(dict(zip(phi, by_phi)), None, value.detach())


def _neumann_series(curvature: Product, vector: list[Tensor], iterations: int, lr: float) -> list[Tensor]:
    """Return ``lr · Σ_{j ≤ iterations} (I - lr · H)ʲ vector``, near ``H⁻¹ vector``."""
    term = [v.clone() for v in vector]
    total = [v.clone() for v in vector]
    for _ in range(iterations):
        torch._foreach_add_(term, curvature(term), alpha=-lr)
        torch._foreach_add_(total, term)
    torch._foreach_mul_(total, lr)
    return total


def _conjugate_gradient(curvature: Product, vector: list[Tensor], iterations: int, tolerance: float) -> list[Tensor]:
    """Return x with ``H x ≈ vector``."""
    solution = [torch.zeros_like(v) for v in vector]
    residual = [v.clone() for v in vector]
    direction = [v.clone() for v in vector]
    size = _dot(residual, residual)
    goal = tolerance**2 * size
    for _ in range(iterations):
        if size <= goal:
            break
        product = curvature(direction)
        bend = _dot(direction, product)
        if bend <= 0:
            break
        torch._foreach_add_(solution, direction, alpha=size / bend)
        torch._foreach_add_(residual, product, alpha=-size / bend)
        before, size = size, _dot(residual, residual)
        torch._foreach_mul_(direction, size / before)
        torch._foreach_add_(direction, residual)
    return solution


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(torch.stack([torch.sum(x * y, dtype=torch.float64) for x, y in zip(a, b)]).sum())


def _split(
    gradients: Sequence[Tensor | None], theta: list[Tensor], phi: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    known = [torch.zeros_like(p) if g is None else g for p, g in zip([*theta, *phi], gradients)]
    return known[: len(theta)], known[len(theta) :]
