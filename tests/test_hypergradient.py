"""The hypergradient: every problem by every way, against the unrolled step and differences of plain training."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import (
    CLASSES,
    INPUTS,
    METHODS,
    OBJECTIVES,
    OPTIMIZERS,
    Batch,
    Problem,
    adam,
    build,
    by_half,
    flat,
    images,
    mlp,
    momentum,
    relative_error,
    vectors,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations
from torch.optim import SGD, Optimizer, Rprop
from torch.utils.checkpoint import checkpoint

from lightning_adalfl.learning import BaseStep, DoubleBackward, ForwardModeError, JacobianProduct, hypergradient
from lightning_adalfl.learning.optimizer_vjp import ClipByNorm, ClipByValue
from lightning_adalfl.losses.descent import LearnedGradient

EXACT = ("forward", "reverse")


@pytest.mark.parametrize(("warm", "groups"), [(0, 1), (3, 2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, warm: int, groups: int) -> None:
    Problem(optimizer=functools.partial(build, name, groups), warm=warm).check(lr=name != "asgd")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("warm", [0, 3])
def test_a_step_by_the_sign_has_no_hypergradient(method: str, warm: int) -> None:
    """Rprop's step does not change with the size of a gradient."""
    found = Problem(optimizer=lambda model: Rprop(model.parameters(), lr=0.01), warm=warm).by_engine(method)
    assert (flat(found.loss) == 0).all()


def weight_decay(parameters: Sequence[Tensor], outputs: Sequence[Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], y) + 0.05 * torch.stack([p.square().sum() for p in parameters]).sum()


def smoothed(parameters: Sequence[Tensor], outputs: Sequence[Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], y, weight=torch.tensor([1.0, 3, 2, 0.5]).double(), label_smoothing=0.1)


def entropy_bonus(parameters: Sequence[Tensor], outputs: Sequence[Tensor], y: Tensor) -> Tensor:
    p = outputs[0].softmax(1)
    return F.cross_entropy(outputs[0], y) + 0.2 * (p * p.log()).sum(1).mean()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("own_loss", [weight_decay, smoothed, entropy_bonus])
def test_objectives(objective: str, own_loss: Any) -> None:
    """What the user adds to the loss stays in the step, and a factor on the loss goes through to φ."""
    problem = Problem(objective=objective, own_loss=own_loss, factor=0.7, optimizer=adam, warm=1)
    problem.check()
    if objective in ("bent", "cut"):
        (descent,) = (f.descent for f in problem.recorded("forward")[1][0].forwards)
        rho = LearnedGradient(descent._learned_loss, descent.predicted, by_outputs=False).value
        assert (descent.applied()[0].norm() < 0.999 * (descent.own[0] + rho).norm()) == (objective == "cut")


def by_norm(bound: float, parameters: list[Tensor]) -> ClipByNorm:
    return ClipByNorm(bound, clip_grad_norm_(parameters, bound))


def by_value(bound: float, parameters: list[Tensor]) -> ClipByValue:
    clip_grad_value_(parameters, bound)
    return ClipByValue(bound)


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop"])
@pytest.mark.parametrize("clip", [by_norm, by_value])
@pytest.mark.parametrize("bound", [0.05, 1e3])
def test_clipping(name: str, clip: Callable[..., object], bound: float) -> None:
    """Where some of the gradient is cut, and where nothing is; over two forwards."""
    problem = Problem(
        optimizer=functools.partial(build, name, 2), clip=functools.partial(clip, bound), warm=1, accumulate=2
    )
    problem.check()
    unclipped = Problem(optimizer=problem.optimizer, warm=1, accumulate=2).recorded("forward")[1][0]
    gradients = torch.cat([p.grad.flatten() for p in unclipped.parameters if p.grad is not None]).abs()
    assert (0.1 < (gradients > 0.05).double().mean() < 0.9) and 0.05 < gradients.norm() < 1e3  # noqa: PT018


# Models.


class Tied(nn.Module):
    """One weight in two layers; with ``twice``, under two names of one module, and in a product as well."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.decode.weight = self.encode.weight
        if twice:
            self.first = self.second = self.encode.weight
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))
            self.register_buffer("calls", self.count)
        self.head = nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.decode(torch.tanh(self.encode(x))))
        if hasattr(self, "first"):
            self.count += 1
            assert self.calls == self.count
            x = torch.tanh(F.linear(x, self.first) @ self.second) / self.calls.clone()
        return self.head(x)


class Scaled(nn.Module):
    """A scalar parameter, one that no forward uses, and a part that the held-out batch does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.sometimes = nn.Linear(INPUTS, CLASSES), nn.Linear(INPUTS, CLASSES)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.body(x)) * self.temperature
        return y + self.sometimes(x) if len(x) % 2 else y


class Recurrent(nn.Module):
    """A GRU over the inputs, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.view(len(x), -1, 2))[0].mean(1))


class Attending(nn.Module):
    """Token embeddings and a transformer layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed((4 * x).long().clamp(-4, 4) + 4)).mean(1))


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward, by either kind of checkpoint or none."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(INPUTS, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.dropout, self.reentrant = nn.Dropout(0.3), reentrant

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(self.block(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.head(x)


class Gated(nn.Module):
    """A branch through which no gradient flows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.layer(x))
        return self.head(torch.tanh(self.layer(x)) * gate)


def cnn() -> nn.Sequential:
    """BatchNorm, dropout and an in-place ReLU that overwrites a convolution's result."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(5, momentum=None, affine=False),
        nn.Flatten(),
        nn.Linear(5 * 16, CLASSES),
    )


def evaluating() -> nn.Module:
    model = cnn().double()
    model(images(torch.Generator().manual_seed(9))[0])
    return model.eval()


def frozen() -> nn.Module:
    """Frozen weights beside trained biases."""
    model = cnn()
    model[4].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    return model


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 9), nn.GELU(), nn.Dropout(0.5), nn.Linear(9, CLASSES))


def frozen_start() -> nn.Module:
    model = with_dropout()
    model[0].requires_grad_(False)
    return model


def weight_norms() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(INPUTS, 8), dim=None), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(8, CLASSES)),
    )  # fmt: skip


def compiled() -> nn.Module:
    model = with_dropout()
    model[0] = torch.compile(nn.Sequential(nn.Linear(INPUTS, 9), nn.Tanh()), backend="aot_eager")
    return model


def uncompiled() -> nn.Module:
    model = with_dropout()
    model[0] = nn.ModuleDict({"_orig_mod": nn.Sequential(nn.Linear(INPUTS, 9), nn.Tanh())})
    model[0].forward = model[0]["_orig_mod"].forward
    return model


def uneven(generator: torch.Generator) -> Batch:
    """Draw 7 vectors for a base batch, 6 for a meta batch (which has the seed 3)."""
    x, y = vectors(generator)
    return (x[:6], y[:6]) if generator.initial_seed() == 3 else (x, y)


def head_only(model: nn.Module) -> Optimizer:
    return SGD(list(model.parameters())[-2:], lr=0.3)


MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"model": cnn, "draw": images},
    "evaluating": {"model": evaluating, "draw": images},
    "frozen weights": {"model": frozen, "draw": images},
    "dropout": {"model": with_dropout},
    "frozen start": {"model": frozen_start},
    "tied": {"model": Tied},
    "tied and renamed": {"model": functools.partial(Tied, True)},
    "scalar and unused": {"model": Scaled, "draw": uneven},
    "gru": {"model": Recurrent},
    "transformer": {"model": Attending},
    "weight norm": {"model": weight_norms},
    "checkpoint": {"model": functools.partial(Checkpointed, False), "twin": functools.partial(Checkpointed, None)},
    "reentrant": {"model": functools.partial(Checkpointed, True), "twin": functools.partial(Checkpointed, None)},
    "compiled": {"model": compiled, "twin": uncompiled},
    "gated": {"model": Gated},
}


@pytest.mark.parametrize("optimizer", [momentum, adam])
@pytest.mark.parametrize("kept", ["keep_all", "keep_none"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, kept: str, optimizer: Any, request: pytest.FixtureRequest) -> None:
    """Forward mode with all results of the base forward, and with none of them."""
    request.getfixturevalue(kept)
    # A difference of two forwards sees the branches that a gradient does not.
    is_seen = name != "gated"
    problem = Problem(**MODELS[name], optimizer=optimizer, warm=2, accumulate=2)
    problem.check(METHODS if is_seen else EXACT, differences=is_seen)


@pytest.mark.parametrize("name", ["cnn", "dropout"])
def test_an_optimizer_of_a_part_of_the_model(name: str) -> None:
    Problem(**MODELS[name], optimizer=head_only).check()


class TwoHeads(nn.Module):
    """Two outputs, of which the loss sees both, and the predictions a part."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.wide, self.narrow = nn.Linear(INPUTS, 7), nn.Linear(7, CLASSES + 1), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.wide(hidden).unsqueeze(1), self.narrow(hidden)


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """P: a squeeze, a slice, a product of both outputs and a cast."""
    wide, narrow = outputs
    return (wide.squeeze(1)[:, 1:] * torch.sigmoid(narrow)).to(torch.float64)


def of_both(parameters: Sequence[Tensor], outputs: Sequence[Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(joined(outputs), y) + 0.1 * F.cross_entropy(outputs[1], y) + outputs[0].square().mean()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predictions_that_are_made_of_two_outputs(objective: str) -> None:
    """The slope is bent, and its length kept, at each output."""
    problem = Problem(
        model=TwoHeads, outputs=lambda model, x: list(model(x)), post=joined, own_loss=of_both, objective=objective,
        optimizer=adam, warm=1, accumulate=2,
    )  # fmt: skip
    problem.check()


# Inner loops.


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("inner", [2, 5])
def test_inner_loops(objective: str, inner: int) -> None:
    def rates(model: nn.Module) -> Optimizer:
        return SGD(by_half(model, 0.3))

    Problem(optimizer=rates, objective=objective, inner=inner, accumulate=2, own_loss=smoothed, factor=0.7).check()


# A gate hides what a difference sees. Torch's own second derivative of a fused weight norm is wrong (`gradgradcheck`).
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gated", "weight norm")])
def test_inner_loops_of_models(name: str) -> None:
    """BatchNorm's statistics move on from step to step, every step has masks of its own."""
    Problem(**MODELS[name], inner=3).check()


@pytest.mark.parametrize("clip", [by_norm, by_value])
@pytest.mark.parametrize("is_none", [True, False])
def test_an_inner_loop_with_clipping(clip: Any, is_none: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next step of the loop clears the gradient in place."""
    monkeypatch.setattr(SGD, "zero_grad", functools.partialmethod(SGD.zero_grad, set_to_none=is_none))
    Problem(inner=3, clip=functools.partial(clip, 0.05)).check()


@pytest.mark.parametrize("name", ["decay", "momentum", "adam"])
def test_an_inner_loop_is_plain_descent(name: str) -> None:
    with pytest.raises(ValueError, match=r"inner loop must be plain gradient descent, .*; got \w+. Use `torch.optim.S"):
        Problem(optimizer=functools.partial(build, name, 1), inner=2).by_engine("forward")


def test_an_inner_loop_needs_the_own_loss_as_a_function_of_the_predictions_alone() -> None:
    with pytest.raises(ValueError, match="depends on the parameters otherwise than by the predictions, as a p"):
        Problem(inner=2, own_loss=weight_decay).by_engine("forward")
    problem = Problem(inner=2)
    _, steps = problem.recorded("forward")
    for step in steps:
        step.forwards[0].own_loss = None
    with pytest.raises(ValueError, match="need the own loss as a function; pass `descend` one"):
        hypergradient(steps, problem.task_loss, problem.meta_batch)


# What a meta step leaves as it was.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_afterwards_is_that_of_plain_training(name: str, method: str) -> None:
    """Parameters, running statistics and counters, bit for bit; and the masks came from the same random numbers."""
    problem = Problem(**{**MODELS[name], "twin": None}, optimizer=adam, warm=1, objective="own")
    model, optimizer = problem.start()
    torch.manual_seed(5)
    cross_entropy_of(model, problem.batches[0][0]).backward()
    optimizer.step()
    random_state, expected = torch.get_rng_state(), copy.deepcopy(model)
    expected(problem.meta_batch[0])  # draws what the held-out forward draws
    after = torch.get_rng_state()

    found, steps = problem.recorded(method)
    assert torch.equal(torch.get_rng_state(), random_state)
    hypergradient(steps, problem.task_loss, problem.meta_batch)
    assert torch.equal(torch.get_rng_state(), after)
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def cross_entropy_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["cnn", "tied", "scalar and unused"])
def test_pure(name: str, method: str, inner: int) -> None:
    """Nothing is written: parameters, buffers, `.grad`, optimizer state and φ; a second call repeats the first."""
    problem = Problem(**MODELS[name], optimizer=adam if inner == 1 else Problem.optimizer, warm=1, inner=inner)
    model, steps = problem.recorded(method)
    held = [*model.parameters(), *problem.loss.parameters()]
    gradients, versions = [p.grad for p in held], [t._version for t in [*held, *model.buffers()]]

    def state() -> Any:
        now = (model.state_dict(), steps[0].optimizer.state_dict(), problem.loss.state_dict(), gradients)
        return copy.deepcopy((*now, problem.batches, problem.meta_batch))

    before, results = state(), []
    for _ in range(2):
        torch.manual_seed(8)
        results.append(hypergradient(steps, problem.task_loss, problem.meta_batch, log_lr=True))
    first, second = results
    assert torch.equal(flat(first.loss), flat(second.loss))
    assert torch.equal(first.log_lr, second.log_lr)
    assert torch.equal(first.task_loss, second.task_loss)
    assert not any(g.requires_grad for g in (*first.loss.values(), first.log_lr, first.task_loss, first.evidence))
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert versions == [t._version for t in [*held, *model.buffers()]]
    assert all(p.grad is g for p, g in zip(held, gradients, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_object_serves_step_after_step(method: str) -> None:
    """The second of two steps through one object gives what a fresh object gives, with gradients zeroed in place."""
    problem = Problem(**MODELS["cnn"], optimizer=adam)
    _, (step,) = problem.recorded(method)
    step.clear()
    with pytest.raises(ValueError, match="`steps` must hold recorded base steps"):
        hypergradient(step, problem.task_loss, problem.meta_batch)
    twin, (other,) = problem.recorded(method)
    results = []
    for s in (step, BaseStep(twin, other.optimizer, jvp=method)):
        torch.manual_seed(8)
        s.optimizer.zero_grad(set_to_none=s is not step)
        s.descend(problem.trained, F.cross_entropy(*s.forward(problem.meta_batch))).backward()
        s.step()
        results.append(hypergradient(s, problem.task_loss, problem.batches[0][0]))
    assert torch.equal(flat(results[0].loss), flat(results[1].loss))


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_part_of_the_loss_is_left_out_by_name(method: str) -> None:
    problem = Problem()
    expected = problem.by_engine(method).loss
    problem.loss.linear[0].weight.requires_grad_(False)
    found = problem.by_engine(method).loss
    assert found.keys() == expected.keys() - {"linear.0.weight"}
    torch.testing.assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_over_processes_it_is_the_mean_and_along_a_direction_a_derivative(method: str, inner: int) -> None:
    """Two processes with the same batches, simulated by a mean that doubles and halves."""
    problem, averaged = Problem(inner=inner), []
    model, steps = problem.recorded(method)
    along = [torch.randn_like(p) for p in steps[-1].parameters]

    def mean(tensors: list[Tensor]) -> None:
        averaged.append(len(tensors))
        for tensor in tensors:
            tensor.copy_((tensor + tensor) / 2)

    options: dict[str, Any] = {"along": along, "log_lr": True}
    alone, both, scaled = (
        hypergradient(steps, problem.task_loss, problem.meta_batch, **options, **more)
        for more in ({}, {"all_reduce": mean}, {"loss_scale": 2.0**10})
    )
    assert averaged == [len(along), 4 + len(alone.loss)]
    for other in (both, scaled):
        for name in ("loss", "log_lr", "along", "evidence", "task_loss"):
            torch.testing.assert_close(getattr(other, name), getattr(alone, name), rtol=1e-12, atol=0)
    values = []
    for size in (1e-6, -1e-6):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            torch._foreach_add_(list(moved.parameters()), along, alpha=size)
            values.append(float(problem.task_loss(*problem.predicted(moved, problem.meta_batch))))
    assert float(alone.along) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)
    by_rate = hypergradient(steps, problem.task_loss, problem.meta_batch, log_lr=True, by_forward=False)
    assert (by_rate.loss, by_rate.influence, by_rate.evidence, by_rate.along) == ({}, [], None, None)
    assert torch.equal(by_rate.log_lr, alone.log_lr)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast(method: str, outside: bool) -> None:
    """Autocast around everything or in the model: the casts of θ_t that it keeps must not serve for θ_{t+1}."""

    def run(enabled: bool) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 256), nn.GELU(),
            nn.Linear(256, CLASSES),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        (x, y), (x_v, y_v) = ((x.float(), y) for x, y in (images(generator), images(generator)))
        trained = Problem(objective="cut").trained
        trained.loss.float()

        def predict(batch: Any) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return model(batch[0]), batch[1]

        def task_loss(f: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(f.float(), y)

        step = BaseStep(model, SGD(model.parameters(), lr=0.5), predict, method)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and outside):
            f, y = step.forward((x, y))
            step.descend(trained, task_loss(f, y)).backward()
            step.step()
            found = hypergradient(step, task_loss, (x_v, y_v))
        return flat(found.loss), found.task_loss, task_loss(*predict((x_v, y_v))).detach()

    exact, _, _ = run(False)
    gradient, value, after = run(True)
    assert gradient.dtype == torch.float32
    assert relative_error(gradient, exact) < 0.1
    torch.testing.assert_close(value, after, rtol=1e-6, atol=0)


def test_the_next_step_within_the_same_autocast() -> None:
    """An inner loop inside one context: its second forward is at the stepped parameters."""
    model = nn.Linear(INPUTS, CLASSES)
    x, y = torch.randn(5, INPUTS), torch.randint(CLASSES, (5,))
    step = BaseStep(model, SGD(model.parameters(), lr=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = step.forward((x, y))
        F.cross_entropy(first, y).backward()
        step.step()
        second, _ = step.forward((x, y))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert torch.equal(second, expected)
    assert not torch.equal(second, first)


# What else a meta step says.


@pytest.mark.parametrize("objective", ["bent", "own"])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
def test_influence_is_the_derivative_by_the_weight_of_an_instance(name: str, objective: str) -> None:
    """By central differences of training with that instance's loss weighted; with r_φ at zero, where m is τ."""
    problem = Problem(optimizer=functools.partial(build, name, 2), warm=2, objective=objective, factor=0.7)
    problem.loss.scale_(0.0)
    found = problem.by_engine("forward")
    (influence,) = found.influence
    slopes = []
    for i in range(len(problem.batches[0][0][1])):
        values = []
        for shift in (1e-5, -1e-5):
            weight = torch.ones(7, dtype=torch.float64).index_fill(0, torch.tensor(i), 1 + shift)

            def weighted(parameters: Any, outputs: Any, y: Tensor, weight: Tensor = weight) -> Tensor:
                return (F.cross_entropy(outputs[0], y, reduction="none") * weight).mean()

            moved = Problem(optimizer=problem.optimizer, warm=2, objective="own", factor=0.7, own_loss=weighted)
            values.append(moved.plain()[1])
        slopes.append((values[0] - values[1]) / 2e-5)
    assert relative_error(influence, torch.tensor(slopes, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("objective", ["bent", "cut"])
def test_evidence_is_what_the_bend_has_gained_to_first_order(objective: str) -> None:
    """For a small step it is the difference of the held-out losses."""

    def slow(model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=1e-5)

    problem, own = (Problem(optimizer=slow, objective=o) for o in (objective, "own"))
    evidence = problem.by_engine("forward").evidence
    assert float(evidence) == pytest.approx(own.plain()[1] - problem.plain()[1], rel=1e-3)
    assert float(own.by_engine("forward").evidence) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_equals_higher(name: str) -> None:
    """The library by which the paper's authors unroll."""
    import higher

    problem = Problem(optimizer=functools.partial(build, name, 1), objective="alone", warm=2)
    model, optimizer = problem.start()
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=True, track_higher_grads=True) as (fast, inner):
        for batch in problem.batches[0]:
            inner.step(problem.loss(*problem.predicted(fast, batch)))
        value = problem.task_loss(*problem.predicted(fast, problem.meta_batch))
        expected = torch.autograd.grad(value, list(problem.loss.parameters()))
    found = problem.by_engine("forward")
    assert relative_error(flat(found.loss), torch.cat([g.flatten() for g in expected])) < 1e-6
    torch.testing.assert_close(found.task_loss, value.detach())


class Doubling(torch.autograd.Function):
    """Without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Recomputing(torch.autograd.Function):
    """A checkpoint of a user's own: the parameters are no inputs of it, so that no tangent passes."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor, gradient_wanted: Tensor) -> Tensor:
        ctx.layer, ctx.x = layer, x
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        with torch.enable_grad():
            ctx.layer(ctx.x).backward(grad)
        return None, None, None


class Opaque(nn.Module):
    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        self.layer, self.recomputes = nn.Linear(INPUTS, CLASSES), recomputes

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes:
            return Recomputing.apply(self.layer, x, torch.ones((), requires_grad=True))
        return Doubling.apply(self.layer(x))


@pytest.mark.parametrize(
    ("recomputes", "message"),
    [
        (False, r"no forward-mode derivative .*choose `hypergradient='reverse'`, a second backward"),
        (True, r"no derivative reached them in forward mode: .*Write its `jvp`, or choose `hypergradient='reverse'`"),
    ],
)
def test_an_operation_without_forward_mode_names_the_way_out(recomputes: bool, message: str) -> None:
    problem = Problem(model=functools.partial(Opaque, recomputes))
    with pytest.raises(ForwardModeError, match=message):
        problem.by_engine("forward")
    if not recomputes:
        problem.check(methods=("finite_difference", "reverse"))


class Drifting(nn.Module):
    """Keeps something outside of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(INPUTS, CLASSES), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (1 + 0.1 * self.calls)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_that_does_not_repeat_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"gives another result when it is run again, .*Or set `meta_every=None`"):
        Problem(model=Drifting).by_engine(method)


def test_an_error_of_the_model_itself_is_passed_on() -> None:
    problem = Problem()
    model, steps = problem.recorded("forward")
    model.forward = lambda x: (_ for _ in ()).throw(RuntimeError("out of paper"))
    with pytest.raises(RuntimeError, match="out of paper") as caught:
        hypergradient(steps, problem.task_loss, problem.meta_batch)
    assert not isinstance(caught.value, ForwardModeError)


def test_a_step_is_used_in_its_order() -> None:
    problem = Problem()
    model, optimizer = problem.start()
    step = BaseStep(model, optimizer)
    for steps in (step, [step], []):
        with pytest.raises(ValueError, match="`steps` must hold recorded base steps; call `forward`, `descend` and"):
            hypergradient(steps, problem.task_loss, problem.meta_batch)
    with pytest.raises(ValueError, match="`descend` was called without a `forward` before it; predict through this"):
        step.descend(problem.trained, F.cross_entropy)
    with pytest.raises(ValueError, match=r"the base step was not recorded; call `step\(\)`, or `before_step\(\)` and"):
        step.vjp([])
    first = step.forward(problem.meta_batch)
    step.descend(problem.trained, F.cross_entropy(*first)).backward()
    step.forward(problem.meta_batch)
    step.step()  # a forward that is not descended has no part in the step
    assert len(step.forwards) == 1
    with torch.no_grad():
        found = hypergradient(step, problem.task_loss, problem.meta_batch)
    torch.testing.assert_close(found.loss, hypergradient(step, problem.task_loss, problem.meta_batch).loss)
    other = BaseStep(model, optimizer)
    for is_backward in (False, True):
        loss = other.descend(problem.trained, F.cross_entropy(*other.forward(problem.meta_batch)))
        if is_backward:
            loss.backward()
            optimizer.zero_grad()
        other.step()
        assert not other.is_recorded
        other.clear()
    step.forwards[0].descent.scale = None
    with pytest.raises(ValueError, match=r"has no backward; call `descend\(...\).backward\(\)` on each"):
        hypergradient(step, problem.task_loss, problem.meta_batch)


def test_what_holds_of_a_first_step_is_not_looked_at_again() -> None:
    """A check of the predictions reads them, and one of the forward costs another."""
    problem, checks = Problem(), []

    class Counted(DoubleBackward):
        def check(self, *given: Any) -> None:
            checks.append("forward")
            super().check(*given)

    model, optimizer = problem.start()
    step = BaseStep(model, optimizer, jvp=Counted(), check=lambda predicted: checks.append("predictions"))
    for _ in range(2):
        step.descend(problem.trained, F.cross_entropy(*step.forward(problem.meta_batch))).backward()
        step.step()
        hypergradient(step, problem.task_loss, problem.meta_batch)
        step.clear()
    assert checks == ["predictions", "forward"]


def test_models_and_optimizers_that_do_not_fit() -> None:
    model = mlp()
    with pytest.raises(
        ValueError, match=r"`jvp` must be one of 'forward', 'finite_.*', 'reverse', or .*; got 'adjoint'"
    ):
        BaseStep(model, momentum(model), jvp="adjoint")
    with pytest.raises(ValueError, match=r"parameters that `model` does not own, of shapes \[\(4, 6\), \(4,\)\]"):
        BaseStep(model, momentum(nn.Linear(6, 4)))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="`optimizer` holds no parameter that requires a gradient; unfreeze"):
        BaseStep(model, momentum(model))
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    step = BaseStep(model, momentum(model))
    F.cross_entropy(*step.forward((torch.tensor([0, 1]), torch.tensor([0, 1])))).backward()
    with pytest.raises(ValueError, match=r"a gradient is sparse, .*build the embedding with `sparse=False`"):
        step.step()


class TwoForwards(JacobianProduct):
    """A way of a contributor's own: a central difference, of order two where the package's is of order one."""

    is_exact = False

    def __call__(self, model: Any, forward: Any, before: Any, direction: Any) -> list[Tensor]:
        with torch.no_grad():
            ends = []
            for size in (1e-4, -1e-4):
                values = {i: p + size * u for (i, p), u in zip(before.items(), direction)}
                ends.append(model.at(forward, values, self.using))
        return [(up - down) / 2e-4 for up, down in zip(*ends)]


def test_a_way_of_ones_own() -> None:
    problem = Problem(optimizer=momentum, warm=1)
    assert relative_error(flat(problem.by_engine(TwoForwards()).loss), flat(problem.unrolled().loss)) < 1e-6


def bytes_alive(seen: set[int]) -> int:
    """Return the storage of all live tensors that are not in ``seen``, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in seen)


@pytest.mark.parametrize("method", METHODS)
def test_memory_grows_by_copies_of_the_parameters(method: str) -> None:
    """A stored step of an inner loop holds θ, its gradient and slopes of the predictions, and no graph."""
    width, batch = 62, 4096  # one more, and forward mode would keep the small model's costly results

    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))

    def draw(generator: torch.Generator) -> Batch:
        return torch.randn(batch, 6, generator=generator, dtype=torch.float64), torch.arange(batch) % 4

    problem = Problem(model=wide, draw=draw, inner=4)
    parameter_bytes = 8 * sum(p.numel() for p in wide().parameters())
    # What the caller holds anyway is not counted.
    held = {t.untyped_storage().data_ptr() for batches in problem.batches for pair in batches for t in pair}
    _, steps = problem.recorded(method)
    total = bytes_alive(held)
    steps.pop().optimizer.zero_grad()
    growth = total - bytes_alive(held)
    allowed = 2 * parameter_bytes + 12 * 8 * batch * 4 + 20_000
    assert parameter_bytes < growth < allowed
    # One kept activation would be noticed.
    assert width * batch * 8 > allowed
