"""Values of any kind for every public argument: the right result, or an error that names the argument."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_adalfl import (
    AdaLFLConfig,
    AdaLFLInit,
    LossHistory,
    LossNetwork,
    LossShapeLogger,
    SmoothLeakyReLU,
    TaylorLoss,
)

CASES = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TASKS = ("multiclass", "binary", "multilabel", "regression")
# What a typo, a YAML file or a wrong variable may bring.
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["sum", "train", "Adam", "Optimizer", "SGD", "lr", "reverse", "network", "softplus", "relu"]),
    st.lists(st.integers(-2, 50), max_size=3),
    st.just({}),
    st.just(torch.ones(())),
    st.just(torch.ones(2)),
    st.just(object),
    st.just(len),
)


def refused(build: Any, *names: str) -> Any:
    """Return what ``build`` makes, or ``None`` where it names one of its arguments in a TypeError or ValueError."""
    try:
        return build()
    except (TypeError, ValueError) as error:
        if not any(name in str(error) for name in names):
            raise RuntimeError(f"{error!r} names none of {names}") from error
        return None


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(AdaLFLConfig)])
@CASES
@given(value=anything)
def test_every_field_of_the_configuration(field: str, value: Any) -> None:
    config = refused(lambda: AdaLFLConfig(**{"task": "regression", field: value}), field)
    if config is None:
        return
    written = config.to_dict()
    objects = [name for name, plain in written.items() if isinstance(plain, dict)]
    again = refused(lambda: AdaLFLConfig.from_dict(written), *objects)
    assert (again is None) is bool(objects)
    assert again is None or again == config


ARGUMENTS: list[tuple[Any, dict[str, Any], str]] = [
    *((AdaLFLInit, {}, name) for name in ("steps", "lr", "inner_steps", "reset", "save_every")),
    *(
        (LossShapeLogger, {}, name)
        for name in ("every_n_steps", "max_snapshots", "figure_every", "resolution", "targets", "error_range")
    ),
    *((LossHistory, {}, name) for name in ("every_n_steps", "max_snapshots")),
    *(
        (LossNetwork, {"task": "binary"}, name)
        for name in ("task", "hidden", "activation", "output_activation", "weight_init", "reduction")
    ),
    *((TaylorLoss, {"task": "binary"}, name) for name in ("task", "order", "form", "reduction")),
    *((SmoothLeakyReLU, {}, name) for name in ("gamma", "beta")),
]


@pytest.mark.parametrize(("kind", "others", "name"), ARGUMENTS, ids=lambda v: getattr(v, "__name__", str(v)))
@CASES
@given(value=anything)
def test_every_argument_of_the_public_classes(kind: Any, others: dict[str, Any], name: str, value: Any) -> None:
    if name == "resolution" and isinstance(value, int) and value > 10_000:
        return  # which takes its time, and is right
    refused(lambda: kind(**{**others, name: value}), name)


dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool, torch.complex64]
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
fills = st.sampled_from([0.0, 1.0, -1.0, 2.0, 7.0, 0.5, 1e30, float("nan"), float("inf")])


@st.composite
def tensors(draw: Any) -> Tensor:
    shape, dtype, fill = draw(shapes), draw(dtypes), draw(fills)
    if not (dtype.is_floating_point or dtype.is_complex):
        fill = max(-2.0, min(fill if fill == fill else 0.0, 7.0))
    return torch.full(shape, fill).to(dtype)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", [LossNetwork, TaylorLoss])
@settings(CASES, max_examples=200)
@given(predictions=tensors(), target=tensors())
def test_every_pair_of_predictions_and_target(task: str, kind: Any, predictions: Tensor, target: Tensor) -> None:
    loss = kind(task)
    # Labels are looked at once, where training begins; later torch itself speaks of them.
    is_label = task == "multiclass" and not (target.is_floating_point() or target.is_complex())
    if is_label and target.numel() and predictions.ndim > 1 and not 0 <= target.max() < predictions.shape[1]:
        return
    value = refused(lambda: loss(predictions, target), "predictions", "target")
    if value is None:
        return
    assert value.shape == ()
    assert value.dtype == torch.float32
    moderate = all(
        bool(t.isfinite().all()) and float(t.to(torch.complex64).abs().max()) < 100 for t in (predictions, target)
    )
    assert not moderate or bool(value.isfinite())


@pytest.mark.parametrize("task", TASKS)
def test_tensors_without_values_are_left_to_torch(task: str) -> None:
    loss = LossNetwork(task).to("meta")
    target = (
        torch.zeros(3, dtype=torch.int64, device="meta") if task == "multiclass" else torch.zeros(3, 2, device="meta")
    )
    assert loss(torch.zeros(3, 2, device="meta"), target).shape == ()
