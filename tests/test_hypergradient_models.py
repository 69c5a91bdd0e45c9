from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, NAdam
from whole_step import CLASSES, INPUTS, METHODS, WholeStep, images, relative_error

from lightning_adalfl.hypergradient import BaseStep, ForwardModeError, hypergradient
from lightning_adalfl.losses import LossNetwork


def cnn() -> nn.Module:
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
    ).double()


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 9), nn.GELU(), nn.Dropout(0.5), nn.Linear(9, CLASSES)).double()


def frozen_start() -> nn.Module:
    model = with_dropout()
    model[0].requires_grad_(False)
    return model


def frozen_weight() -> nn.Module:
    model = cnn()
    model[4].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    return model


class Tied(nn.Module):
    """One weight in two places, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(INPUTS, INPUTS)
        self.decode = nn.Linear(INPUTS, INPUTS)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(INPUTS, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.decode(torch.tanh(self.encode(x)))))


class Scaled(nn.Module):
    """A scalar parameter, one that no forward uses, and one that only evaluation would."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(INPUTS, CLASSES)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) * self.temperature


class OnlyInTheBaseForward(nn.Module):
    """A part that takes part in the first forward, and not in the one on the meta batch."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(INPUTS, CLASSES), nn.Linear(INPUTS, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.always(x))
        return y + self.sometimes(x) if len(x) % 2 else y


def uneven(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw 7 vectors for a base batch, 6 for a meta batch (which has the seed 3)."""
    n = 6 if generator.initial_seed() == 3 else 7
    x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=generator)


def momentum(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.3, momentum=0.9)


def head_only(model: nn.Module) -> SGD:
    return SGD(list(model.parameters())[-2:], lr=0.3)


def adam(model: nn.Module) -> Adam:
    return Adam(model.parameters(), lr=0.05, eps=1e-2, weight_decay=0.1)


def nadam(model: nn.Module) -> NAdam:
    return NAdam(model.parameters(), lr=0.05, eps=1e-2)


MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"model": cnn, "draw": images},
    "dropout": {"model": with_dropout},
    "frozen start": {"model": frozen_start},
    "frozen weights beside trained biases": {"model": frozen_weight, "draw": images},
    "tied": {"model": Tied},
    "scalar and unused": {"model": Scaled},
    "unused by the meta batch": {"model": OnlyInTheBaseForward, "draw": uneven},
}


@pytest.fixture(params=["keep_all", "keep_none"])
def primals(request: pytest.FixtureRequest) -> None:
    """Forward mode with and without the base forward's own results."""
    request.getfixturevalue(request.param)


@pytest.mark.usefixtures("primals")
@pytest.mark.parametrize("optimizer", [momentum, adam, nadam])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, optimizer: Callable[[nn.Module], Any]) -> None:
    WholeStep(**MODELS[name], optimizer=optimizer, warm=2).check()


@pytest.mark.parametrize("name", ["cnn", "dropout"])
def test_an_optimizer_of_a_part_of_the_model(name: str) -> None:
    WholeStep(**MODELS[name], optimizer=head_only).check()


def test_a_model_in_evaluation_mode() -> None:
    def evaluating() -> nn.Module:
        model = cnn()
        model(images(torch.Generator().manual_seed(9))[0])
        return model.eval()

    WholeStep(model=evaluating, draw=images).check()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_afterwards_is_that_of_plain_training(name: str, method: str) -> None:
    """Parameters, running statistics and counters, bit for bit; and the masks came from the same random numbers."""
    whole = WholeStep(**MODELS[name], optimizer=adam, warm=1)
    expected, _, random_state = whole.plain()
    model, steps = whole.recorded(method)
    assert torch.equal(torch.get_rng_state(), random_state)
    hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_counts_a_step_once(method: str) -> None:
    model, steps = WholeStep(model=cnn, draw=images).recorded(method)
    hypergradient(steps, WholeStep().loss, F.cross_entropy, WholeStep(draw=images).meta_batch)
    assert [int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_draws_the_random_numbers_of_one_forward_on_the_meta_batch(method: str) -> None:
    """The base forward's masks are replayed from their own state, so that they cost the generators nothing."""
    whole = WholeStep(model=cnn, draw=images)
    model, steps = whole.recorded(method)
    hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch)
    after = torch.get_rng_state()
    model, steps = whole.recorded(method)
    before = torch.get_rng_state()
    copy.deepcopy(model)(whole.meta_batch[0])
    assert torch.equal(after, torch.get_rng_state())
    assert not torch.equal(after, before)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["cnn", "tied", "scalar and unused"])
def test_pure(name: str, method: str, inner: int) -> None:
    """Nothing is written: parameters, buffers, `.grad`, optimizer state and φ; a second call repeats the first."""
    whole = WholeStep(**MODELS[name], optimizer=adam, warm=1, inner=inner)
    model, steps = whole.recorded(method)
    optimizer = steps[0].optimizer
    seen = [*model.parameters(), *whole.loss.parameters()]
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), whole.loss.state_dict(), [p.grad for p in seen]))
    versions = [p._version for p in [*model.parameters(), *model.buffers()]]
    gradients = [p.grad for p in seen]
    batches = copy.deepcopy((whole.batches, whole.meta_batch))

    results = []
    for _ in range(2):
        torch.manual_seed(8)
        results.append(hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch))
    first, second = results
    assert all(torch.equal(a, b) for a, b in zip(first.loss, second.loss, strict=True))
    assert torch.equal(first.log_lr, second.log_lr)
    assert torch.equal(first.task_loss, second.task_loss)
    assert not any(g.requires_grad for g in (*first.loss, first.log_lr, first.task_loss))

    now = (model.state_dict(), optimizer.state_dict(), whole.loss.state_dict(), [p.grad for p in seen])
    torch.testing.assert_close(now, state, rtol=0, atol=0)
    assert versions == [p._version for p in [*model.parameters(), *model.buffers()]]
    assert all(p.grad is g for p, g in zip(seen, gradients, strict=True))
    torch.testing.assert_close((whole.batches, whole.meta_batch), batches, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_object_serves_step_after_step(method: str) -> None:
    """The second of two steps through one object gives what a fresh object gives."""
    whole = WholeStep(model=cnn, draw=images, optimizer=adam)
    _, (step,) = whole.recorded(method)
    twin, (other,) = whole.recorded(method)
    other = BaseStep(twin, other.optimizer, method=method)
    results = []
    for s in (step, other):
        torch.manual_seed(8)
        s.optimizer.zero_grad()
        whole.loss(*s.forward(whole.meta_batch)).backward()
        s.step()
        results.append(hypergradient(s, whole.loss, whole.task_loss, whole.batches[0][0]))
    assert all(torch.equal(a, b) for a, b in zip(results[0].loss, results[1].loss, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_one_step_may_be_any_callable(method: str) -> None:
    """A handcrafted loss has no φ; the derivative by the learning rate is there all the same."""
    whole = WholeStep()
    whole.loss = F.cross_entropy
    _, steps = whole.recorded(method)
    result = hypergradient(steps, F.cross_entropy, whole.task_loss, whole.meta_batch)
    assert result.loss == ()
    assert relative_error(result.log_lr, whole.slopes_by_log_lr()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_part_of_the_loss_is_left_out(method: str) -> None:
    whole = WholeStep()
    _, steps = whole.recorded(method)
    expected = hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch).loss
    whole.loss.layers[0].weight.requires_grad_(False)
    result = hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch).loss
    assert len(result) == 2
    torch.testing.assert_close(result, expected[1:])


@pytest.mark.parametrize("method", METHODS)
def test_several_forwards_before_the_step(method: str) -> None:
    WholeStep(model=cnn, draw=images, optimizer=adam, accumulate=3, warm=1).check()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outside", [True, False])
def test_bfloat16_autocast(method: str, outside: bool) -> None:
    """Autocast around everything or in the model: the casts of θ_t that it keeps must not serve for θ_{t+1}."""

    def run(enabled: bool) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 512), nn.GELU(),
            nn.Linear(512, CLASSES),
        )  # fmt: skip
        loss = LossNetwork("multiclass")
        generator = torch.Generator().manual_seed(1)
        (x, y), (x_v, y_v) = ((x.float(), y) for x, y in (images(generator), images(generator)))

        def task_loss(predictions: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(predictions.float(), target)

        def predict(batch: Any) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return model(batch[0]), batch[1]

        step = BaseStep(model, SGD(model.parameters(), lr=0.5), predict, method)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and outside):
            loss(*step.forward((x, y))).backward()
            step.step()
            result = hypergradient(step, loss, task_loss, (x_v, y_v), epsilon=0.5)
        after = task_loss(*predict((x_v, y_v)))
        return torch.cat([g.flatten() for g in result.loss]), result.task_loss, after

    exact, _, _ = run(False)
    gradient, value, after = run(True)
    assert gradient.dtype == torch.float32
    assert relative_error(gradient, exact) < 0.1
    torch.testing.assert_close(value, after.detach(), rtol=1e-6, atol=0)


def test_the_next_step_within_the_same_autocast() -> None:
    """An inner loop inside one context: its second forward is at the stepped parameters."""
    model = nn.Linear(INPUTS, CLASSES)
    x, y = torch.randn(5, INPUTS), torch.randint(CLASSES, (5,))
    step = BaseStep(model, SGD(model.parameters(), lr=1.0), chained=True)
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = step.forward((x, y))
        F.cross_entropy(first, y).backward()
        step.step()
        second, _ = step.forward((x, y))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert torch.equal(second, expected)
    assert not torch.equal(second, first)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return NoForwardMode.apply(self.layer(x))


def test_an_operation_without_forward_mode_names_the_way_out() -> None:
    whole = WholeStep(model=Opaque)
    with pytest.raises(ForwardModeError, match=r"no forward-mode derivative .*choose `hypergradient='finite_d"):
        whole.by_engine("forward")
    whole.check(methods=("finite_difference",))


def test_an_error_of_the_model_itself_is_passed_on() -> None:
    whole = WholeStep()
    model, steps = whole.recorded("forward")
    model.forward = lambda x: (_ for _ in ()).throw(RuntimeError("out of paper"))
    with pytest.raises(RuntimeError, match="out of paper") as caught:
        hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch)
    assert not isinstance(caught.value, ForwardModeError)


def test_steps_that_were_not_recorded() -> None:
    whole = WholeStep()
    model, optimizer = whole.start()
    step = BaseStep(model, optimizer)
    for steps in (step, [step], []):
        with pytest.raises(ValueError, match="`steps` must hold at least one recorded base step"):
            hypergradient(steps, whole.loss, whole.task_loss, whole.meta_batch)
    with pytest.raises(ValueError, match="`before_step` was called without a recorded `forward`"):
        step.before_step()
    with pytest.raises(ValueError, match=r"the base step was not recorded; call `step\(\)` or `before_step\(\)` first"):
        step.transposed([])


def test_a_method_that_does_not_exist() -> None:
    with pytest.raises(
        ValueError, match="`hypergradient` must be one of 'forward', 'finite_difference', 'reverse'; got 'adjoint'"
    ):
        WholeStep().recorded("adjoint")


def test_an_optimizer_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"parameters that `model` does not own, of shapes \[\(4, 6\), \(4,\)\]"):
        BaseStep(WholeStep().start()[0], SGD(nn.Linear(6, 4).parameters(), lr=0.1))


def test_an_optimizer_without_a_trainable_parameter() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="`optimizer` holds no parameter that requires a gradient; unfreeze"):
        BaseStep(model, SGD(model.parameters(), lr=0.1))


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    step = BaseStep(model, SGD(model.parameters(), lr=0.1))
    LossNetwork("multiclass")(*step.forward((torch.tensor([0, 1]), torch.tensor([0, 1])))).backward()
    with pytest.raises(ValueError, match=r"a gradient is sparse, .*build the embedding with `sparse=False`"):
        step.step()
