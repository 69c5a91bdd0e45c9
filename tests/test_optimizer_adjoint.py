from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RMSprop,
    SparseAdam,
)
from torch.optim.optimizer import _use_grad_for_differentiable
from whole_step import INPUTS, METHODS, WholeStep, by_half, mlp, relative_error, vectors

from lightning_adalfl.hypergradient import BaseStep, OptimizerError, hypergradient
from lightning_adalfl.hypergradient.optimizer_adjoint import (
    _AdamAdjoint,
    _DifferenceAdjoint,
    _SGDAdjoint,
    _ShadowAdjoint,
    optimizer_adjoint,
)


class Lion(Optimizer):
    """As its users write it: by the sign, so that it has no derivative."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    p.add_(torch.lerp(p.grad, average, 0.9).sign_(), alpha=-group["lr"])
                    average.lerp_(p.grad, 0.01)


class Softened(Optimizer):
    """Element by element, with a state; overwrites the gradient, as many an optimizer does."""

    def __init__(self, params: Any, lr: float = 0.3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.mul_(0.5).add_(p.grad)
                    p.grad.copy_(average).add_(p, alpha=0.01)
                    p.sub_(torch.tanh(p.grad * 5), alpha=group["lr"])


class Overriding(SGD):
    """Inherits the option `differentiable`, and has a step that is not."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.tanh(), alpha=group["lr"])


CLOSED_FORMS: dict[str, tuple[type[Optimizer], dict[str, Any], type]] = {
    "sgd": (SGD, {"lr": 0.1}, _SGDAdjoint),
    "sgd_maximize": (SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.1}, _SGDAdjoint),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, _SGDAdjoint),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, _SGDAdjoint),
    "adam": (Adam, {"lr": 0.1}, _AdamAdjoint),
    "adam_l2": (Adam, {"lr": 0.1, "weight_decay": 0.1, "betas": (0.5, 0.7)}, _AdamAdjoint),
    "adam_decoupled": (Adam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}, _AdamAdjoint),
    "adamw": (AdamW, {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-3}, _AdamAdjoint),
    "tensor lr": (Adam, {"lr": torch.tensor(0.1), "foreach": False}, _AdamAdjoint),
}


def stepped(
    kind: type[Optimizer], options: dict[str, Any], warm: int, make: Callable[..., Any], dtype: torch.dtype
) -> tuple[list[Tensor], float, list[Tensor]]:
    """Return u of one step in two groups, one of whose parameters has been stepped less often than the others."""
    generator = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    parameters = [nn.Parameter(draw(3, 2).to(dtype)), nn.Parameter(draw(4).to(dtype)), nn.Parameter(draw(()).to(dtype))]
    optimizer = kind([{"params": parameters[:1], "lr": 0.02}, {"params": parameters[1:]}], **options)
    for k in range(warm):
        for p in parameters[: 2 if k == 0 else 3]:
            p.grad = draw(p.shape).to(dtype)
        optimizer.step()
    for p in parameters:
        p.grad = draw(p.shape).to(dtype)
    before = [p.detach().clone() for p in parameters]
    adjoint = make(optimizer, parameters, [p.grad for p in parameters])
    optimizer.step()
    vector = [draw(p.shape).to(dtype) for p in parameters]
    scale, direction = adjoint.transposed(before, [v.clone() for v in vector])
    return vector, scale, [scale * u for u in direction]


@pytest.mark.parametrize("warm", [0, 1, 4])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_equal_the_differentiated_step(name: str, warm: int) -> None:
    kind, options, expected_class = CLOSED_FORMS[name]
    made: list[Any] = []

    def chosen(*args: Any) -> Any:
        made.append(optimizer_adjoint(*args, "forward"))
        return made[0]

    _, _, closed = stepped(kind, options, warm, chosen, torch.float64)
    _, _, shadow = stepped(kind, options, warm, _ShadowAdjoint, torch.float64)
    assert type(made[0]) is expected_class
    for u, expected in zip(closed, shadow, strict=True):
        # Adam's first step is all but flat: there u is a small difference of large numbers.
        torch.testing.assert_close(u, expected, rtol=1e-6, atol=1e-13)
        assert expected.abs().sum() > 0


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_in_float32(name: str) -> None:
    kind, options, _ = CLOSED_FORMS[name]
    make = functools.partial(optimizer_adjoint, method="forward")
    _, _, single = stepped(kind, options, 4, make, torch.float32)
    _, _, double = stepped(kind, options, 4, make, torch.float64)
    flat = [torch.cat([u.flatten().double() for u in us]) for us in (single, double)]
    assert relative_error(*flat) < 1e-5


@pytest.mark.parametrize("kind", [RMSprop, Adagrad, NAdam, Adadelta, Adamax, Adam])
def test_the_shadow_in_float32(kind: type[Optimizer]) -> None:
    """The differentiable step corrects its bias as exactly as the plain one does."""
    for warm in (0, 1, 4):
        options = {"lr": 0.1, "eps": 1e-2}
        _, _, single = stepped(kind, options, warm, _ShadowAdjoint, torch.float32)
        _, _, double = stepped(kind, options, warm, _ShadowAdjoint, torch.float64)
        flat = [torch.cat([u.flatten().double() for u in us]) for us in (single, double)]
        assert relative_error(*flat) < 1e-5


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop])
def test_the_difference_of_two_steps_equals_the_differentiated_step(kind: type[Optimizer], warm: int) -> None:
    options = {"lr": 0.1} if kind is SGD else {"lr": 0.1, "eps": 1e-2}
    _, _, difference = stepped(kind, options, warm, _DifferenceAdjoint, torch.float64)
    _, _, shadow = stepped(kind, options, warm, _ShadowAdjoint, torch.float64)
    flat = [torch.cat([u.flatten() for u in us]) for us in (difference, shadow)]
    assert relative_error(*flat) < 1e-6


@pytest.mark.parametrize("warm", [0, 2])
def test_an_optimizer_of_ones_own(warm: int) -> None:
    WholeStep(optimizer=lambda model: Softened(by_half(model, 0.3)), warm=warm).check(methods=("finite_difference",))


def test_a_sign_has_no_hypergradient() -> None:
    """Lion's step does not change with a small change of its gradient; the learning rate's derivative is there."""
    whole = WholeStep(optimizer=lambda model: Lion(model.parameters()), warm=1)
    result = whole.by_engine("finite_difference")
    assert all((g == 0).all() for g in result.loss)
    assert relative_error(result.log_lr, whole.slopes_by_log_lr()) < 1e-5


@pytest.mark.parametrize("method", ["forward", "reverse"])
@pytest.mark.parametrize("kind", [Lion, Softened])
def test_no_differentiable_step(kind: type[Optimizer], method: str) -> None:
    model = nn.Linear(INPUTS, 4, bias=False)
    message = (
        f"`optimizer` is {kind.__name__}, which has no differentiable step .*Choose `hypergradient='finite_difference'`"
    )
    with pytest.raises(OptimizerError, match=message):
        BaseStep(model, kind(model.parameters(), lr=0.1), method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LBFGS, "evaluates the loss several times and is no function of one gradient"),
        # A difference of two such steps would be silently wrong, since their derivative is not its own transpose.
        (Adafactor, "mixes the elements of a gradient"),
        (Muon, "mixes the elements of a gradient"),
        (SparseAdam, "takes sparse gradients"),
    ],
)
def test_no_method_sees_through(kind: type[Optimizer], reason: str, method: str) -> None:
    model = nn.Linear(INPUTS, 4, bias=False)
    with pytest.raises(OptimizerError, match=f"`optimizer` is {kind.__name__}, whose step {reason}; use SGD, Adam"):
        BaseStep(model, kind(model.parameters(), lr=0.1), method=method)


def test_an_inner_loop_needs_a_differentiable_step() -> None:
    """Later inner steps are differentiated whatever the method."""
    model = mlp()
    with pytest.raises(OptimizerError, match=r"`optimizer` is Softened, .*inner loop"):
        BaseStep(model, Softened(model.parameters()), method="finite_difference", chained=True)


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_of_ones_own_after_a_resume(method: str) -> None:
    """Loading a state makes torch add `differentiable` to the defaults of any optimizer."""
    model = mlp()
    optimizer = Softened(model.parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    if method == "finite_difference":
        BaseStep(model, optimizer, method=method)
    else:
        with pytest.raises(OptimizerError, match="`optimizer` is Softened, which has no differentiable step"):
            BaseStep(model, optimizer, method=method)


class Honest(SGD):
    """A subclass with a step of its own that can be differentiated."""

    @_use_grad_for_differentiable
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.tanh(), alpha=group["lr"])


def test_a_subclass_with_a_differentiable_step_of_its_own() -> None:
    WholeStep(optimizer=lambda model: Honest(by_half(model, 0.3), lr=0.3), inner=2).check()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_claims_to_be_differentiable(method: str) -> None:
    """A subclass that overrides the step of a torch optimizer: the exact methods refuse it rather than return zeros."""
    whole = WholeStep(optimizer=lambda model: Overriding(model.parameters(), lr=0.3))
    if method == "finite_difference":
        whole.check(methods=("finite_difference",))
    else:
        with pytest.raises(OptimizerError, match=r"`optimizer` is Overriding, .*finite_difference"):
            whole.by_engine(method)


class DeadInputs(nn.Module):
    """Inputs that are zero throughout a batch give weights a gradient of exactly zero, as a border of pixels does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def with_dead_inputs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a batch; all but the meta batch (seed 3) lack the first inputs."""
    x, y = vectors(generator)
    if generator.initial_seed() != 3:
        x[:, :2] = 0
    return x, y


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, Adagrad, NAdam, Adadelta, Adamax])
def test_a_gradient_of_exactly_zero(kind: type[Optimizer], warm: int, inner: int) -> None:
    """There a root has no derivative; these weights do not reach the predictions, so they must not reach ∇_φ either."""
    options: dict[str, Any] = {"lr": 0.05, "eps": 1e-2}
    if kind is Adam:
        options["amsgrad"] = True
    whole = WholeStep(
        model=DeadInputs,
        optimizer=lambda model: kind(model.parameters(), **options),
        draw=with_dead_inputs,
        warm=warm,
        inner=inner,
    )
    whole.check()


@pytest.mark.parametrize("kind", [Adam, RMSprop])
def test_finite_difference_is_not_led_astray_by_zero_gradients(kind: type[Optimizer]) -> None:
    """At the default ε, u would be many orders larger at such weights, and the move along it would go nowhere else."""
    whole = WholeStep(model=DeadInputs, optimizer=lambda model: kind(model.parameters()), draw=with_dead_inputs, warm=3)
    forward, difference = (
        torch.cat([g.flatten() for g in whole.by_engine(m, epsilon=1e-3).loss])
        for m in ("forward", "finite_difference")
    )
    assert relative_error(difference, forward) < 1e-2


@pytest.mark.parametrize(("kind", "inner"), [(SGD, 3), (Adam, 1), (Adam, 3), (RMSprop, 3), (Softened, 1)])
def test_gradients_zeroed_in_place(kind: type[Optimizer], inner: int) -> None:
    """`zero_grad(set_to_none=False)` overwrites the gradients of the step before."""
    method = "finite_difference" if kind is Softened else "forward"
    results = []
    for to_none in (True, False):
        whole = WholeStep(optimizer=lambda model: kind(model.parameters(), lr=0.1), inner=inner, warm=1)
        model, optimizer = whole.start()
        steps = []
        for ((x, y),) in whole.batches:
            step = BaseStep(model, optimizer, method=method, chained=inner > 1)
            optimizer.zero_grad(set_to_none=to_none)
            whole.loss(*step.forward((x, y))).backward()
            step.step()
            steps.append(step)
        result = hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch)
        results.append(torch.cat([g.flatten() for g in result.loss]))
    assert relative_error(results[1], results[0]) < 1e-12
