"""Implicit differentiation on ridge regression, where the minimum and its derivative have closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_adalfl.hypergradient import Hypergradient, implicit_hypergradient


@dataclass
class Ridge:
    """M = ½‖Xθ - y‖² + ½ Σ_i exp(φ_i) θ_i², minimised by θ* = A⁻¹ Xᵀy with A = XᵀX + diag(exp φ); L_T = ½‖Zθ - w‖²."""

    x: Tensor
    y: Tensor
    z: Tensor
    w: Tensor
    phi: Tensor

    @classmethod
    def draw(cls) -> Ridge:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        return cls(normal(20, 6), normal(20), normal(15, 6), normal(15), normal(6).requires_grad_())

    @property
    def hessian(self) -> Tensor:
        return self.x.T @ self.x + torch.diag(self.phi.detach().exp())

    @property
    def minimum(self) -> Tensor:
        return torch.linalg.solve(self.hessian, self.x.T @ self.y)

    @property
    def task_gradient(self) -> Tensor:
        return self.z.T @ (self.z @ self.minimum - self.w)

    def closed_form(self, inverse: Tensor) -> Tensor:
        """∂²M/∂θ_i∂φ_i = exp(φ_i) θ_i, so dL_T/dφ_i = -exp(φ_i) θ*_i (H⁻¹ v)_i."""
        return -self.phi.detach().exp() * self.minimum * (inverse @ self.task_gradient)

    def solved(self, **options: Any) -> Hypergradient:
        """θ in two tensors, of two shapes."""
        first, second = (t.clone().requires_grad_() for t in self.minimum.split((2, 4)))
        second = second.detach().view(2, 2).requires_grad_()

        def theta() -> Tensor:
            return torch.cat([first, second.flatten()])

        def base_loss() -> Tensor:
            penalty = (self.phi.exp() * theta().square()).sum()
            return 0.5 * (self.x @ theta() - self.y).square().sum() + 0.5 * penalty

        def task_loss() -> Tensor:
            return 0.5 * (self.z @ theta() - self.w).square().sum()

        result = implicit_hypergradient([first, second], [self.phi], base_loss, task_loss, **options)
        assert first.grad is None
        assert second.grad is None
        assert self.phi.grad is None
        return result


def test_conjugate_gradient_gives_the_closed_form() -> None:
    ridge = Ridge.draw()
    result = ridge.solved(iterations=6, tolerance=1e-12)  # six dimensions need six iterations
    torch.testing.assert_close(result.loss[0], ridge.closed_form(ridge.hessian.inverse()), rtol=1e-8, atol=1e-10)
    expected = 0.5 * (ridge.z @ ridge.minimum - ridge.w).square().sum()
    torch.testing.assert_close(result.task_loss, expected)
    assert result.log_lr.shape == (0,)


def test_the_closed_form_is_the_slope_of_the_minimised_task_loss() -> None:
    ridge = Ridge.draw()
    hessian = ridge.x.T @ ridge.x + torch.diag(ridge.phi.exp())
    theta = torch.linalg.solve(hessian, ridge.x.T @ ridge.y)
    (slope,) = torch.autograd.grad(0.5 * (ridge.z @ theta - ridge.w).square().sum(), ridge.phi)
    torch.testing.assert_close(slope, ridge.closed_form(ridge.hessian.inverse()))


def test_neumann_series_converges_to_the_closed_form() -> None:
    ridge = Ridge.draw()
    lr = 1.0 / float(torch.linalg.eigvalsh(ridge.hessian).max())
    result = ridge.solved(solver="neumann", iterations=300, lr=lr)
    torch.testing.assert_close(result.loss[0], ridge.closed_form(ridge.hessian.inverse()), rtol=1e-8, atol=1e-10)


def test_a_neumann_series_cut_off_is_its_partial_sum() -> None:
    ridge, lr = Ridge.draw(), 0.01
    shrink = torch.eye(6, dtype=torch.float64) - lr * ridge.hessian
    partial = lr * sum(torch.linalg.matrix_power(shrink, j) for j in range(4))
    assert isinstance(partial, Tensor)
    result = ridge.solved(solver="neumann", iterations=3, lr=lr)
    torch.testing.assert_close(result.loss[0], ridge.closed_form(partial))


@pytest.mark.parametrize("solver", ["conjugate_gradient", "neumann"])
def test_damping_is_added_to_the_hessian(solver: str) -> None:
    ridge = Ridge.draw()
    damped = (ridge.hessian + 5.0 * torch.eye(6, dtype=torch.float64)).inverse()
    result = ridge.solved(solver=solver, iterations=400, tolerance=1e-12, lr=0.02, damping=5.0)
    torch.testing.assert_close(result.loss[0], ridge.closed_form(damped), rtol=1e-7, atol=1e-9)


def test_a_direct_effect_of_phi_is_added() -> None:
    theta = torch.tensor([2.0], requires_grad=True)
    phi = torch.tensor([2.0], requires_grad=True)
    # θ* = φ, so L_T = θ² + 3φ has the slope 2φ + 3.
    result = implicit_hypergradient(
        [theta], [phi], lambda: 0.5 * (theta - phi).square().sum(), lambda: (theta.square() + 3 * phi).sum()
    )
    torch.testing.assert_close(result.loss[0], torch.tensor([7.0]))


def test_conjugate_gradient_stops_where_there_is_no_curvature() -> None:
    theta = torch.tensor([1.0], requires_grad=True)
    unused = torch.tensor([1.0], requires_grad=True)
    phi = torch.tensor([1.0], requires_grad=True)
    for base_loss in (lambda: -(theta * phi).square().sum(), lambda: theta.sum()):
        result = implicit_hypergradient([theta, unused], [phi], base_loss, lambda: theta.sum())
        assert result.loss[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "`solver` must be one of 'conjugate_gradient', 'neumann'; got 'newton'"),
        ({"iterations": 0}, "`iterations` must be at least 1; got 0"),
        ({"lr": 0.0}, "`lr` must be positive; got 0.0"),
        ({"tolerance": -1.0}, "`tolerance` must be positive; got -1.0"),
        ({"damping": -1.0}, "`damping` must not be negative; got -1.0"),
    ],
)
def test_refuses_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ridge.draw().solved(**options)
