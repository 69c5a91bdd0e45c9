"""Meta steps that leave the gradients of wide linear layers as factors, against the unrolled reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_adalfl import BaseStep, LossNetwork, hypergradient
from lightning_adalfl.hypergradient import linear_factors
from lightning_adalfl.hypergradient.linear_factors import LinearFactors

ROWS, INPUTS, CLASSES = 5, 40, 4


def in_place() -> nn.Module:
    """An activation that overwrites the layer's output, and a layer without a bias."""
    return nn.Sequential(
        nn.Linear(INPUTS, 50), nn.ReLU(inplace=True), nn.Linear(50, 30, bias=False), nn.Tanh(), nn.Linear(30, CLASSES)
    )


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Tied(Twice):
    """A layer whose weight is used by a function that is no linear layer as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)) @ self.layer.weight)


class Checkpointed(Twice):
    """Activations that are computed again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(checkpoint(self.layer, x, use_reentrant=False)))


class PartlyUntracked(Twice):
    """A branch through which no gradient flows."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.layer(x))
        return self.head(torch.tanh(self.layer(x)) * gate)


class Sequences(Twice):
    """Inputs of three dimensions, which are not factored, before those of two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.layer(x[:, None, :]).mean(1))))


class Renamed(Twice):
    """A weight and a buffer that one module has under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Parameter(torch.randn(INPUTS, INPUTS) / INPUTS)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("calls", self.count)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        assert self.calls == self.count
        return self.head(torch.tanh(F.linear(torch.tanh(F.linear(x, self.first)), self.second)) / self.calls)


def frozen_bias() -> nn.Module:
    model = in_place()
    model[0].bias.requires_grad_(False)
    return model


def frozen_weight() -> nn.Module:
    model = in_place()
    model[2].weight.requires_grad_(False)
    return model


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.01)


def gradients(
    method: str, model: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer] = sgd, **options: Any
) -> Tensor:
    """Return the hypergradient of the second of two steps."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss = LossNetwork("multiclass").double()
        batches = [(torch.randn(ROWS, INPUTS, dtype=torch.float64), torch.randint(CLASSES, (ROWS,))) for _ in range(3)]
    step = BaseStep(model, optimizer([p for p in model.parameters() if p.requires_grad]), method=method, **options)
    for batch in batches[:2]:
        model.zero_grad()
        step.forward(batch)
        step.evaluate(loss).backward()
        step.step()
        found = hypergradient(step, loss, F.cross_entropy, batches[2], log_lr=False)
    return torch.cat([g.flatten() for g in found.loss])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 1e-6, "a reference of zero proves nothing"
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture
def factored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the weights that were left as factors."""
    counts: list[int] = []
    original = linear_factors.FactorLinear.gradients

    def counted(self: Any, value: Tensor) -> Any:
        result = original(self, value)
        counts.append(len(result[1]))
        return result

    monkeypatch.setattr(linear_factors.FactorLinear, "gradients", counted)
    return counts


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "in place": (in_place, 2),
    "twice": (Twice, 1),
    "tied": (Tied, 0),
    "checkpointed": (Checkpointed, 1),
    "partly untracked": (PartlyUntracked, 1),
    "sequences": (Sequences, 0),
    "renamed": (Renamed, 1),
    "frozen bias": (frozen_bias, 2),
    "frozen weight": (frozen_weight, 1),
}


CASES = [(name, method) for name in MODELS for method in ("forward", "finite_difference")]
CASES.remove(("partly untracked", "finite_difference"))  # a difference of two forwards sees every branch


@pytest.mark.parametrize(("name", "method"), CASES)
def test_equals_the_unrolled_step(name: str, method: str, factored: list[int]) -> None:
    build, expected = MODELS[name]
    model = build().double()
    found = gradients(method, model)
    assert factored == [expected] * 2
    assert relative_error(found, gradients("reverse", model)) < (1e-10 if method == "forward" else 1e-5)


@pytest.mark.parametrize("method", ["forward", "finite_difference"])
def test_a_weight_that_the_base_forward_uses_in_another_way(method: str, factored: list[int]) -> None:
    class Changing(Twice):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.layer(x) if x[0, 0] > 0 else x @ self.layer.weight.T + self.layer.bias
            return self.head(torch.tanh(hidden))

    torch.manual_seed(3)
    model = Changing().double()
    found = gradients(method, model)
    assert any(factored)
    assert relative_error(found, gradients("reverse", model)) < (1e-10 if method == "forward" else 1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimizers_need_the_gradient_itself(optimizer: Any, factored: list[int]) -> None:
    model = in_place().double()
    found = gradients("forward", model, optimizer)
    assert factored == []
    assert relative_error(found, gradients("reverse", model, optimizer)) < 1e-9


def test_groups_with_rates_of_their_own_need_it_too(factored: list[int]) -> None:
    def grouped(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)

    model = in_place().double()
    found = gradients("forward", model, grouped)
    assert factored == []
    assert relative_error(found, gradients("reverse", model, grouped)) < 1e-10


def test_narrow_layers_are_cheaper_as_they_are(factored: list[int]) -> None:
    gradients("forward", nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double())
    assert factored == [0, 0]


def test_factors_are_the_gradient() -> None:
    factors = LinearFactors(torch.randn(3, 7), torch.randn(3, 5))
    x, bias = torch.randn(2, 4, 7), torch.randn(5)
    product = factors.gradients.T @ factors.inputs
    torch.testing.assert_close(factors.product(), product)
    torch.testing.assert_close(factors.transposed_times(x, bias), x @ product.T + bias)
    torch.testing.assert_close(factors.squared_norm(), product.square().sum())
