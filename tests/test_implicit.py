"""Implicit differentiation on ridge regression, where the minimum and its derivative have closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_adalfl.learning import Hypergradient
from lightning_adalfl.learning.implicit import implicit_hypergradient


class Ridge:
    """M = ½‖Xθ - y‖² + ½ Σ_i exp(φ_i) θ_i², minimised by θ* = A⁻¹ Xᵀy with A = XᵀX + diag(exp φ); L_T = ½‖Zθ - w‖²."""

    def __init__(self) -> None:
        self.x, self.z = torch.randn(20, 6, dtype=torch.float64), torch.randn(15, 6, dtype=torch.float64)
        self.y, self.w = torch.randn(20, dtype=torch.float64), torch.randn(15, dtype=torch.float64)
        self.phi = torch.randn(6, dtype=torch.float64, requires_grad=True)
        self.hessian = self.x.T @ self.x + torch.diag(self.phi.exp())
        self.minimum = torch.linalg.solve(self.hessian, self.x.T @ self.y)
        self.task_loss = 0.5 * (self.z @ self.minimum - self.w).square().sum()

    def closed_form(self, inverse: Tensor) -> Tensor:
        """∂²M/∂θ_i∂φ_i = exp(φ_i) θ_i, so dL_T/dφ_i = -exp(φ_i) θ*_i (H⁻¹ v)_i."""
        v = self.z.T @ (self.z @ self.minimum - self.w)
        return (-self.phi.exp() * self.minimum * (inverse @ v)).detach()

    def solved(self, **options: Any) -> Hypergradient:
        """With θ in two tensors, of two shapes."""
        first, second = (t.detach().clone() for t in self.minimum.split((2, 4)))
        theta = [first.requires_grad_(), second.view(2, 2).requires_grad_()]

        def joined() -> Tensor:
            return torch.cat([t.flatten() for t in theta])

        def base_loss() -> Tensor:
            penalty = (self.phi.exp() * joined().square()).sum()
            return 0.5 * (self.x @ joined() - self.y).square().sum() + 0.5 * penalty

        def task_loss() -> Tensor:
            return 0.5 * (self.z @ joined() - self.w).square().sum()

        found = implicit_hypergradient(theta, {"phi": self.phi}, base_loss, task_loss, **options)
        assert all(t.grad is None for t in (*theta, self.phi))
        return found


@pytest.fixture
def ridge() -> Ridge:
    return Ridge()


def test_conjugate_gradient_gives_the_closed_form(ridge: Ridge) -> None:
    found = ridge.solved(iterations=6, tolerance=1e-12)  # six dimensions need six iterations
    expected = ridge.closed_form(ridge.hessian.inverse())
    torch.testing.assert_close(found.loss["phi"], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.task_loss, ridge.task_loss.detach())
    assert found.log_lr is None
    torch.testing.assert_close(torch.autograd.grad(ridge.task_loss, ridge.phi)[0], expected)


def test_the_neumann_series_converges_to_it_and_cut_off_is_a_partial_sum(ridge: Ridge) -> None:
    lr = 1.0 / float(torch.linalg.eigvalsh(ridge.hessian.detach()).max())
    found = ridge.solved(solver="neumann", iterations=300, lr=lr)
    torch.testing.assert_close(found.loss["phi"], ridge.closed_form(ridge.hessian.inverse()), rtol=1e-8, atol=1e-10)
    shrink = torch.eye(6, dtype=torch.float64) - 0.01 * ridge.hessian
    partial = 0.01 * torch.stack([torch.linalg.matrix_power(shrink, j) for j in range(4)]).sum(0)
    found = ridge.solved(solver="neumann", iterations=3, lr=0.01)
    torch.testing.assert_close(found.loss["phi"], ridge.closed_form(partial))


@pytest.mark.parametrize("solver", ["conjugate_gradient", "neumann"])
def test_damping_is_added_to_the_hessian(ridge: Ridge, solver: str) -> None:
    damped = (ridge.hessian + 5.0 * torch.eye(6, dtype=torch.float64)).inverse()
    found = ridge.solved(solver=solver, iterations=400, tolerance=1e-12, lr=0.02, damping=5.0)
    torch.testing.assert_close(found.loss["phi"], ridge.closed_form(damped), rtol=1e-7, atol=1e-9)


def test_a_direct_effect_of_phi_is_added() -> None:
    theta, phi = (torch.tensor([2.0], requires_grad=True) for _ in range(2))
    # θ* = φ, so L_T = θ² + 3φ has the slope 2φ + 3.
    found = implicit_hypergradient(
        [theta], {"phi": phi}, lambda: 0.5 * (theta - phi).square().sum(), lambda: (theta.square() + 3 * phi).sum()
    )
    torch.testing.assert_close(found.loss["phi"], torch.tensor([7.0]))


def test_conjugate_gradient_stops_where_there_is_no_curvature() -> None:
    theta, unused, phi = (torch.ones(1, requires_grad=True) for _ in range(3))
    for base_loss in (lambda: -(theta * phi).square().sum(), lambda: theta.sum()):
        assert implicit_hypergradient([theta, unused], {"phi": phi}, base_loss, lambda: theta.sum()).loss["phi"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "`solver` must be one of 'conjugate_gradient', 'neumann'; got 'newton'"),
        ({"iterations": 0}, "`iterations` must be a whole number, 1 or more; got 0"),
        ({"lr": 0.0}, "`lr` must be positive; got 0.0"),
        ({"tolerance": -1.0}, "`tolerance` must be positive; got -1.0"),
        ({"damping": -1.0}, "`damping` must not be negative; got -1.0"),
    ],
)
def test_refuses_numbers_out_of_range(ridge: Ridge, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ridge.solved(**options)
