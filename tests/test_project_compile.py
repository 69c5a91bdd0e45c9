"""Compiled modules: the base step runs what was compiled, the meta step what it was compiled from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from projects import INERT, Ada, Plain, base_tensors, config, learned_tensors, loaders, make, trainer

# Of torch itself, where it traces.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning", "ignore:Dynamo"
)


class Backend:
    """A compiler that runs graphs as they are, and counts."""

    def __init__(self) -> None:
        self.compiled = self.called = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1

        def run(*arguments: Any) -> Any:
            self.called += 1
            return graph.forward(*arguments)

        return run


def submodule(module: Any, backend: Any) -> Any:
    module.model = torch.compile(module.model, backend=backend)
    return module


def in_place(module: Any, backend: Any) -> Any:
    module.model.compile(backend=backend)
    return module


def whole(module: Any, backend: Any) -> Any:
    return torch.compile(module, backend=backend)


def fit(tmp_path: Path, kind: Any, compiled: Any, backend: Any, **arguments: Any) -> Any:
    torch._dynamo.reset()
    module = make(kind, **arguments)
    trainer(tmp_path).fit(compiled(module, backend), *loaders())
    return module


@pytest.mark.parametrize("compiled", [submodule, in_place, whole])
def test_a_compiled_module_trains_as_the_plain_one_and_runs_compiled(tmp_path: Path, compiled: Any) -> None:
    plain = make(Plain)
    trainer(tmp_path).fit(plain, *loaders())
    backend = Backend()
    inert = fit(tmp_path, Ada, compiled, backend, adalfl=INERT)
    for expected, found in zip(plain.parameters(), inert.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    # 12 batches of training and 6 of validation; a graph for each of the two modes, and not one for each batch.
    assert backend.called >= 18
    assert backend.compiled <= (2 if compiled is not whole else 8)


@pytest.mark.parametrize("compiled", [submodule, in_place, whole])
@pytest.mark.parametrize("method", ["forward", "finite_difference", "reverse"])
def test_the_loss_learns_through_it_what_it_learns_without(tmp_path: Path, compiled: Any, method: str) -> None:
    options = config(hypergradient=method, meta_optimizer="SGD", meta_lr=0.1)
    expected = make(Ada, adalfl=options)
    trainer(tmp_path).fit(expected, *loaders())
    module = fit(tmp_path, Ada, compiled, Backend(), adalfl=options)
    assert module.adalfl.meta_steps == 12
    for name, value in learned_tensors(expected).items():
        torch.testing.assert_close(learned_tensors(module)[name], value, rtol=1e-4, atol=1e-5)


def test_with_a_backend_of_torch(tmp_path: Path) -> None:
    expected = make(Ada, dropout=0.0, adalfl=config())
    trainer(tmp_path).fit(expected, *loaders())
    module = fit(tmp_path, Ada, in_place, "aot_eager", dropout=0.0, adalfl=config())
    for name, value in base_tensors(expected).items():
        torch.testing.assert_close(base_tensors(module)[name], value, rtol=1e-4, atol=1e-5)
