"""u = (∂U/∂g)ᵀ v: every optimizer's step against its own differentiable one, clipping, and optimizers of users."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import (
    INPUTS,
    METHODS,
    OPTIMIZERS,
    Batch,
    Problem,
    by_half,
    differentiable_step,
    flat,
    mlp,
    relative_error,
    vectors,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
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

from lightning_adalfl import AdaLFLConfig, MetaLearner
from lightning_adalfl.learning import BaseStep, hypergradient
from lightning_adalfl.learning.optimizer_vjp import (
    _SGD,
    ClipByNorm,
    ClipByValue,
    Clipping,
    _Adam,
    _Difference,
    _Shadow,
    optimizer_vjp,
)
from lightning_adalfl.learning.shadow_optimizer import OptimizerError
from lightning_adalfl.losses.training_objective import OwnLoss

STEPS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    **OPTIMIZERS,
    "adam sharp": (Adam, {"lr": 0.1, "weight_decay": 0.1, "betas": (0.5, 0.7)}),
    "adam decoupled": (Adam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "tensor lr": (Adam, {"lr": torch.tensor(0.1), "foreach": False}),
}


def way_of(name: str) -> type:
    """Return the cheapest way to the derivative."""
    kind, options = STEPS[name]
    is_plain = not options.get("amsgrad") and not options.get("maximize")
    return _SGD if kind is SGD else _Adam if kind in (Adam, AdamW) and is_plain else _Shadow


def stepped(name: str, warm: int, dtype: torch.dtype, way: type | None = None) -> tuple[Tensor, Tensor]:
    """Return u of one step in two groups, one of whose parameters has been stepped less often, and the reference's."""
    kind, options = STEPS[name]
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = [nn.Parameter(draw(shape).to(dtype)) for shape in ((3, 2), (4,), ())]
    optimizer = kind([{"params": parameters[:1], "lr": 0.02}, {"params": parameters[1:]}], **options)
    for k in range(warm):
        for p in parameters[: 2 if k == 0 else 3]:
            p.grad = draw(p.shape).to(dtype)
        optimizer.step()
    for p in parameters:
        p.grad = draw(p.shape).to(dtype)
    before = [p.detach().clone() for p in parameters]
    vector = [draw(p.shape).to(dtype) for p in parameters]
    inputs = [p.grad.clone().requires_grad_() for p in parameters]
    moved = differentiable_step(optimizer, parameters, [p.clone().requires_grad_() for p in before], inputs)
    expected = torch.autograd.grad(moved, inputs, vector)

    found_way = optimizer_vjp(optimizer)
    assert found_way is way_of(name)
    vjp = (way or found_way)(optimizer, parameters)
    optimizer.step()
    for p, m in zip(parameters, moved):
        torch.testing.assert_close(p.detach(), m.detach(), rtol=1e-5, atol=1e-7)
    scale, u = vjp([0, 1, 2], before, [p.grad for p in parameters], [v.clone() for v in vector])
    return torch.cat([scale * t.flatten().double() for t in u]), torch.cat([t.flatten().double() for t in expected])


@pytest.mark.parametrize("warm", [0, 1, 4])
@pytest.mark.parametrize("name", STEPS)
def test_the_vjp_is_that_of_the_differentiable_step(name: str, warm: int) -> None:
    found, expected = stepped(name, warm, torch.float64)
    # Adam's first step is all but flat: there u is a small difference of large numbers.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)
    assert expected.norm() > 0
    # In single precision it is as good as rounding allows; where ε is small the first step has lost its digits.
    if warm or way_of(name) is not _Adam:
        assert relative_error(stepped(name, warm, torch.float32)[0], expected) < 1e-5


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("name", ["sgd", "rmsprop", "amsgrad"])
def test_the_difference_of_two_steps(name: str, warm: int) -> None:
    assert relative_error(*stepped(name, warm, torch.float64, _Difference)) < 1e-6


@pytest.mark.parametrize("warm", [0, 3])
def test_a_shadow_of_sgd_takes_its_first_momentum_alone_from_the_gradient(warm: int) -> None:
    """As that of a user's subclass does."""
    assert relative_error(*stepped("dampening", warm, torch.float64, _Shadow)) < 1e-6


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, Adagrad, NAdam, Adadelta, Adamax])
def test_the_whole_step_with_the_default_epsilon(kind: type[Optimizer], warm: int) -> None:
    """The first step is nearly the gradient's sign, too steep for differences; the unrolled step sees it."""
    problem = Problem(optimizer=lambda model: kind(model.parameters()), warm=warm)
    found, expected = flat(problem.by_engine("forward").loss), flat(problem.unrolled().loss)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-8 * float(expected.norm()))


# A gradient of exactly zero.


def with_dead_inputs(generator: torch.Generator) -> Batch:
    """Inputs that are zero throughout a batch, as a border of pixels, in all but the meta batch (seed 3)."""
    x, y = vectors(generator)
    if generator.initial_seed() != 3:
        x[:, :2] = 0
    return x, y


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, Adagrad, NAdam, Adadelta, Adamax])
def test_a_gradient_of_exactly_zero(kind: type[Optimizer], warm: int) -> None:
    """There a root has no derivative; these weights do not reach the predictions, so they must not reach ∇_φ either."""
    options: dict[str, Any] = {"lr": 0.05, "eps": 1e-2, **({"amsgrad": True} if kind is Adam else {})}
    problem = Problem(optimizer=lambda model: kind(model.parameters(), **options), draw=with_dead_inputs, warm=warm)
    problem.check(unrolled=False)


@pytest.mark.parametrize("way", METHODS)
def test_an_exact_way_keeps_elements_of_zero_gradient(way: str) -> None:
    """The gradient may be zero where predictions do depend on the weight."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    model = nn.Module()
    model.weight = weight
    optimizer = Adam([weight], eps=1e-2)
    step = BaseStep(model, optimizer, lambda batch: (batch * weight, batch), way)
    predictions, _ = step.forward(torch.ones(3, 2))
    step.descend(OwnLoss(), predictions[:, 1].sum()).backward()
    step.step()
    _, (u,) = step.vjp([torch.ones(2)])
    assert (bool(u[0]), bool(u[1])) == (way != "finite_difference", True)


@pytest.mark.parametrize("kind", [Adam, RMSprop])
def test_a_difference_is_not_led_astray_by_zero_gradients(kind: type[Optimizer]) -> None:
    """At the default ε, u would be many orders larger at such weights, and the move along it would go nowhere else."""
    problem = Problem(optimizer=lambda model: kind(model.parameters()), draw=with_dead_inputs, warm=3)
    assert relative_error(*(flat(problem.by_engine(m).loss) for m in ("finite_difference", "forward"))) < 1e-4


@pytest.mark.parametrize(("gradient", "vector"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_difference_of_two_steps_stays_finite_where_there_is_nothing_to_see(gradient: float, vector: float) -> None:
    p = nn.Parameter(torch.ones(3))
    vjp = _Difference(RMSprop([p]), [p])
    _, (u,) = vjp([0], [p.detach()], [torch.full((3,), gradient)], [torch.full((3,), vector)])
    assert torch.isfinite(u).all()


# Optimizers of a user's own.


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

    def move(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.tanh(), alpha=group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.move()


class Honest(Overriding):
    """A subclass with a step of its own that can be differentiated."""

    steps = 0

    @_use_grad_for_differentiable
    def step(self, closure: Any = None) -> None:
        Honest.steps += 1
        self.move()


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("kind", [Softened, Overriding])
def test_steps_without_a_derivative_go_by_differences(kind: Any, warm: int) -> None:
    problem = Problem(optimizer=lambda model: kind(by_half(model, 0.3), lr=0.3), warm=warm)
    problem.check(methods=("finite_difference",), unrolled=False)


def test_a_subclass_with_a_differentiable_step_costs_one_more_step() -> None:
    problem = Problem(optimizer=lambda model: Honest(by_half(model, 0.3), lr=0.3))
    problem.check(unrolled=False)
    _, (step,) = problem.recorded("forward")
    Honest.steps = 0
    hypergradient(step, problem.task_loss, problem.meta_batch)
    assert Honest.steps == 1


def test_a_sign_has_no_hypergradient() -> None:
    """Lion's step does not change with a small change of its gradient; the learning rate's derivative is there."""
    problem = Problem(optimizer=lambda model: Lion(model.parameters()), warm=1)
    found = problem.by_engine("finite_difference")
    assert (flat(found.loss) == 0).all()
    assert relative_error(found.log_lr, problem.slopes_by_log_lr()) < 1e-5


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("method", ["forward", "reverse"])
@pytest.mark.parametrize("kind", [Lion, Softened, Overriding])
def test_exact_ways_refuse_them(kind: Any, method: str, resumed: bool) -> None:
    """Loading a state makes torch add `differentiable` to the defaults of any optimizer."""
    model = mlp()
    optimizer = kind(model.parameters(), lr=0.1)
    if resumed:
        optimizer.load_state_dict(optimizer.state_dict())
    message = f"`optimizer` is {kind.__name__}, which has no differentiable step .*`hypergradient='finite_difference'`"
    with pytest.raises(OptimizerError, match=message):
        BaseStep(model, optimizer, jvp=method)
    BaseStep(model, optimizer, jvp="finite_difference")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LBFGS, "evaluates the loss several times and is no function of one gradient"),
        # A difference of two such steps would be silently wrong, since their derivative is not its own transpose.
        (type("MyAdafactor", (Adafactor,), {}), "mixes the elements of a gradient, and may be another than torch's"),
        (type("MyMuon", (Muon,), {}), "mixes the elements of a gradient, and may be another than torch's"),
        (SparseAdam, "takes sparse gradients"),
    ],
)
def test_no_way_sees_through(kind: Any, reason: str, method: str) -> None:
    model = nn.Linear(INPUTS, 4, bias=False)
    with pytest.raises(OptimizerError, match=f"`optimizer` is {kind.__name__}, whose step {reason}; use SGD, Adam"):
        BaseStep(model, kind(model.parameters(), lr=0.1), jvp=method)


MATRIX_STEPS: list[tuple[Any, dict[str, Any]]] = [
    (Muon, {"lr": 0.1}),
    (Muon, {"lr": 0.1, "nesterov": False, "momentum": 0.5, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}),
    (Adafactor, {"lr": 0.1}),
    (Adafactor, {"lr": 0.9}),
    (Adafactor, {"lr": 0.1, "d": 1.0, "beta2_decay": -0.3, "weight_decay": 0.2, "maximize": True}),
]


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("shape", [(3, 5), (6, 2)])
@pytest.mark.parametrize(("kind", "options"), MATRIX_STEPS)
def test_steps_that_mix_elements_as_functions_of_the_gradient(kind: Any, options: Any, shape: Any, warm: int) -> None:
    """What is added to θ is what torch's step adds, to Muon's own rounding; u by central differences."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, shapes = nn.Parameter(draw(shape)), [shape, (4,)] if kind is Adafactor else [shape]
    parameters = [p, *(nn.Parameter(draw(s)) for s in shapes[1:])]
    optimizer = kind(parameters, **options)
    for _ in range(warm):
        for q in parameters:
            q.grad = draw(q.shape)
        optimizer.step()
    way = optimizer_vjp(optimizer)(optimizer, parameters)
    for i, q in enumerate(parameters):
        before, g, v = q.detach().clone(), draw(q.shape), draw(q.shape)

        def change(gradient: Tensor, i: int = i, before: Tensor = before) -> Tensor:
            return way._change(before, gradient, way._states[i], way._groups[i])

        factor, (u,) = way([i], [before], [g], [v])
        size, e = 1e-5, torch.zeros_like(g)
        for place in range(g.numel()):
            e.view(-1)[place] = size
            slope = ((change(g + e) - change(g - e)) * v).sum() / (2 * size)
            torch.testing.assert_close(factor * u.view(-1)[place], slope, rtol=1e-6, atol=1e-9)
            e.zero_()
        for other in parameters:
            other.grad = g if other is q else None
        optimizer.step()
        rounding = 2e-2 if kind is Muon else 1e-10
        torch.testing.assert_close(q.detach() - before, change(g), rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("kind", "options"), MATRIX_STEPS)
def test_they_learn(kind: Any, options: Any) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    learner = MetaLearner(AdaLFLConfig("multiclass", meta_every=1))
    step = learner.new_base_step(model, kind(model.parameters(), **options))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        (x, y), held_out = vectors(generator), itertools.repeat(vectors(generator))
        f, target = step.forward((x, y))
        step.optimizer.zero_grad()
        step.descend(learner.objective, F.cross_entropy(f, target)).backward()
        step.step()
        learner.end_base_step(step, held_out)
    assert learner.meta_steps == 3
    assert float(learner.scalars["adalfl/meta_grad_norm"]) > 0
    assert float(learner.skipped) == 0


# Clipping.


@pytest.mark.parametrize("max_norm", [0.7, 1e3, None])
def test_the_vjp_of_clipping(max_norm: float | None) -> None:
    """By norm, where it cuts and where it does not, and by value."""
    gradients = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (4,))]
    vector = [torch.randn_like(g) for g in gradients]
    clipping: Clipping = ClipByValue(0.5)
    clipped = [g.clamp(-0.5, 0.5) for g in gradients]
    if max_norm is not None:
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        clipping = ClipByNorm(max_norm, norm.detach())
        clipped = [g * (max_norm / (norm + 1e-6)).clamp(max=1.0) for g in gradients]
    expected = torch.autograd.grad(clipped, gradients, vector)
    found = clipping.vjp([g.detach() for g in clipped], vector)
    torch.testing.assert_close(found, list(expected), rtol=1e-10, atol=1e-12)


def test_clipping_a_gradient_of_zero_stays_finite() -> None:
    (found,) = ClipByNorm(1.0, torch.tensor(0.0)).vjp([torch.zeros(3)], [torch.ones(3)])
    assert torch.equal(found, torch.ones(3))


@pytest.mark.parametrize(("build", "inner"), [(SGD, 3), (Adam, 1), (RMSprop, 1), (Softened, 1)])
def test_gradients_zeroed_in_place(build: Callable[..., Optimizer], inner: int) -> None:
    """`zero_grad(set_to_none=False)` overwrites the gradients of the step before, which clipping looks at."""
    problem = Problem(optimizer=lambda model: build(model.parameters(), lr=0.1), inner=inner, warm=1)
    results = []
    for to_none in (True, False):
        model, optimizer = problem.start()
        steps = []
        for (batch,) in problem.batches:
            step = BaseStep(model, optimizer, jvp="finite_difference" if build is Softened else "forward")
            optimizer.zero_grad(set_to_none=to_none)
            step.forward(batch)
            step.descend(problem.trained, F.cross_entropy).backward()
            step.step(ClipByNorm(0.05, clip_grad_norm_(model.parameters(), 0.05)))
            steps.append(copy.copy(step))
        results.append(flat(hypergradient(steps, problem.task_loss, problem.meta_batch).loss))
    assert relative_error(results[1], results[0]) < 1e-12
