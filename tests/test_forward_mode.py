"""Forward-mode AD: its rules against torch's own, its tape, and every family of torchvision's classification models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torchvision import models

from lightning_adalfl.learning import BaseStep, hypergradient
from lightning_adalfl.learning.forward_mode import PrimalTape, _RecordPrimals, _ReplayPrimals, _weight_norm
from lightning_adalfl.losses import LossNetwork
from lightning_adalfl.losses.training_objective import LearnedAlone

Function = Callable[..., Tensor]


def module(layer: nn.Module) -> Function:
    return lambda x: layer(x)


def in_place_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The ReLU overwrites what the convolution gave."""
    return F.relu(F.conv2d(x, w, b), inplace=True) * 2


def in_place_sum(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y += x.sum()
    return torch.tanh(y)


def result_used_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w, b)
    return y * torch.sigmoid(y) + F.linear(y.tanh(), w.T)


def view_overwritten(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y[:, :1].mul_(x.sum())
    return y


# Each function with the shapes of its arguments.
CASES: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((4, 3), (5, 3), (5,))),
    "linear, no bias": (F.linear, ((4, 3), (5, 3))),
    "linear, keywords": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), ((4, 3), (5, 3), (5,))),
    "linear on three dimensions": (F.linear, ((2, 4, 3), (5, 3), (5,))),
    "linear on a vector": (F.linear, ((3,), (5, 3), (5,))),
    "conv1d": (F.conv1d, ((2, 3, 7), (4, 3, 3), (4,))),
    "conv2d": (F.conv2d, ((2, 3, 6, 6), (4, 3, 3, 3), (4,))),
    "conv3d": (F.conv3d, ((2, 3, 4, 4, 4), (4, 3, 2, 2, 2), (4,))),
    "conv2d, no bias": (F.conv2d, ((2, 3, 6, 6), (4, 3, 3, 3))),
    "conv2d, positional": (lambda x, w, b: F.conv2d(x, w, b, 2, 1, 2), ((2, 3, 8, 8), (4, 3, 3, 3), (4,))),
    "conv2d, keywords": (
        lambda x, w, b: F.conv2d(x, weight=w, bias=b, stride=2, padding=1, dilation=2),
        ((2, 3, 8, 8), (4, 3, 3, 3), (4,)),
    ),
    "conv2d, same": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), ((2, 3, 6, 6), (4, 3, 3, 3), (4,))),
    "conv2d, groups": (lambda x, w, b: F.conv2d(x, w, b, groups=3), ((2, 3, 6, 6), (6, 1, 3, 3), (6,))),
    "conv1d without a batch": (F.conv1d, ((3, 4), (4, 3, 1), (4,))),
    "conv2d without a batch": (F.conv2d, ((3, 6, 6), (4, 3, 3, 3), (4,))),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((6, 3, 4, 4), (3,), (3,))),
    "batch norm on vectors": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((6, 3), (3,), (3,))),
    "batch norm on sequences": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((6, 3, 4), (3,), (3,))),
    "batch norm, not affine": (lambda x: F.batch_norm(x, None, None, training=True), ((6, 3, 4, 4),)),
    "batch norm, large epsilon": (
        lambda x, w, b: F.batch_norm(x, None, None, weight=w, bias=b, training=True, eps=0.5),
        ((6, 3, 4), (3,), (3,)),
    ),
    "batch norm, evaluating": (
        lambda x, w, b: F.batch_norm(x, torch.ones(3).double(), torch.full((3,), 2.0).double(), w, b),
        ((6, 3, 4, 4), (3,), (3,)),
    ),
    "relu": (F.relu, ((4, 3),)),
    "relu, in place": (lambda x: F.relu(x * 1, inplace=True), ((4, 3),)),
    "relu, in place, positional": (lambda x: F.relu(x * 1, True), ((4, 3),)),
    "activations": (lambda x: torch.relu(x) + x.tanh() * torch.sigmoid(x) + x.sigmoid() * x.relu(), ((4, 3),)),
    "modules": (module(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.Softplus())), ((4, 3),)),
    "average pooling": (
        lambda x: F.avg_pool2d(x, 2) + F.avg_pool2d(x, kernel_size=3, stride=2, padding=1),
        ((2, 3, 4, 4),),
    ),
    "other poolings": (lambda x: F.max_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 2), ((2, 3, 4, 4),)),
    "overwritten by a ReLU": (in_place_relu, ((2, 3, 6, 6), (4, 3, 3, 3), (4,))),
    "overwritten by a sum": (in_place_sum, ((4, 3), (5, 3))),
    "overwritten in a part": (view_overwritten, ((4, 3), (5, 3))),
    "used twice": (result_used_twice, ((4, 3), (3, 3), (3,))),
}


def replay(
    function: Function, values: list[Tensor], tangents: list[Tensor | None], tape: PrimalTape
) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level(), _ReplayPrimals(tape):
        duals = [v if t is None else forward_ad.make_dual(v, t) for v, t in zip(values, tangents)]
        primal, tangent = forward_ad.unpack_dual(function(*duals))
        return primal.clone(), torch.zeros_like(primal) if tangent is None else tangent.clone()


@pytest.mark.usefixtures("keep_all")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kept", [True, False])
def test_rules_equal_those_of_torch(case: str, kept: bool) -> None:
    """For every choice of which arguments vary: the others are frozen."""
    function, shapes = CASES[case]
    values = [torch.randn(s, dtype=torch.float64) for s in shapes]
    tape = PrimalTape()
    with _RecordPrimals(tape) if kept else torch.no_grad():
        expected = function(*(v.clone().requires_grad_() for v in values)).detach()
    for varies in itertools.product([True, False], repeat=len(values)):
        if not any(varies):
            continue
        tangents = [torch.randn_like(v) if varying else None for v, varying in zip(values, varies)]
        zeros = [torch.zeros_like(v) if t is None else t for v, t in zip(values, tangents)]
        _, tangent = torch.func.jvp(function, tuple(values), tuple(zeros))
        for _ in range(2):
            tape.next = 0
            primal, by_rules = replay(function, [v.clone() for v in values], tangents, tape)
            torch.testing.assert_close(primal, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(by_rules, tangent, rtol=1e-9, atol=1e-10)
            assert by_rules.abs().sum() > 0


@pytest.mark.parametrize("function", [F.linear, lambda x, w: F.linear(x, w).relu_()])
def test_a_kept_result_is_used_unless_it_was_overwritten(function: Function) -> None:
    x, w = torch.randn(2, 600), torch.randn(5, 600)
    tape = PrimalTape()
    with _RecordPrimals(tape):
        kept = F.linear(x, w)
    if function is not F.linear:
        kept.relu_()
    tape.next = 0
    with forward_ad.dual_level(), _ReplayPrimals(tape):
        primal, _ = forward_ad.unpack_dual(F.linear(x, forward_ad.make_dual(w, torch.ones_like(w))))
        assert (primal.data_ptr() == kept.data_ptr()) == (function is F.linear)
        torch.testing.assert_close(primal, x @ w.T, rtol=1e-4, atol=1e-4)


def test_cheap_results_are_kept_up_to_a_limit() -> None:
    """A costly result is always kept; of cheaper ones, a hundred megabytes are too many, if nobody else has them."""
    tape, alive = PrimalTape(), torch.zeros(2**18)
    for multiplications in (100, 10**5):
        for _ in range(100):
            tape.keep(torch.zeros(2**18), multiplications)
    tape.keep(alive, 1)
    cheap = [tape.take() is not None for _ in range(100)]
    assert cheap == sorted(cheap, reverse=True)
    assert 0 < sum(cheap) <= 64
    assert all(tape.take() is not None for _ in range(100))
    found = tape.take()
    assert found is not None
    assert found.data_ptr() == alive.data_ptr()
    # Beyond its end, as after a forward that went another way, there is nothing.
    assert tape.take() is None


def test_no_tangent_passes_where_the_model_forbids_gradients() -> None:
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    with forward_ad.dual_level(), _ReplayPrimals(PrimalTape()):
        dual = forward_ad.make_dual(w, torch.ones_like(w))
        with torch.no_grad():
            stopped = torch.sigmoid(F.linear(x, dual)) * dual.sum()
        assert forward_ad.unpack_dual(stopped).tangent is None
        assert forward_ad.unpack_dual(F.linear(x, dual).sum() * stopped).tangent is not None


# Models.

CLASSES = 5


def with_small_classifier(build: Callable[..., nn.Module], features: int) -> nn.Module:
    """The convolutions as they are; the classifier alone, with nine tenths of the parameters, is narrower."""
    model = build(num_classes=CLASSES)
    model.classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(features, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, CLASSES)
    )
    return model


def maxvit() -> nn.Module:
    return models.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.3,
        num_classes=CLASSES,
    )


def vision_transformer() -> nn.Module:
    transformer = models.VisionTransformer(
        image_size=64,
        patch_size=16,
        num_layers=3,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        dropout=0.1,
        num_classes=CLASSES,
    )
    # By default the head starts at zero, and the derivative by everything before it would be zero as well.
    nn.init.normal_(transformer.heads.head.weight)
    return transformer


def of(build: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return partial(build, num_classes=CLASSES, **options)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "alexnet": lambda: with_small_classifier(models.alexnet, 256 * 36),
    "convnext": of(models.convnext_tiny),
    "densenet": of(models.densenet121),
    "efficientnet": of(models.efficientnet_b0),
    "efficientnet_v2": of(models.efficientnet_v2_s),
    "googlenet": of(models.googlenet, aux_logits=True, init_weights=False),
    "inception": of(models.inception_v3, aux_logits=False, init_weights=False),
    "maxvit": maxvit,
    "mnasnet": of(models.mnasnet0_5),
    "mobilenet_v2": of(models.mobilenet_v2),
    "mobilenet_v3": of(models.mobilenet_v3_small),
    "regnet_x": of(models.regnet_x_400mf),
    "regnet_y": of(models.regnet_y_400mf),
    "resnet": of(models.resnet18),
    "resnext": of(models.resnext50_32x4d),
    "shufflenet": of(models.shufflenet_v2_x0_5),
    "squeezenet": of(models.squeezenet1_1),
    "swin": of(models.swin_t),
    "swin_v2": of(models.swin_v2_t),
    "vgg": lambda: with_small_classifier(models.vgg11, 512 * 49),
    "vgg_bn": lambda: with_small_classifier(models.vgg11_bn, 512 * 49),
    "vision_transformer": vision_transformer,
    "wide_resnet": of(models.wide_resnet50_2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_mode_equals_central_differences(name: str) -> None:
    """The derivative of the predictions along a direction in parameter space, with the same masks and statistics."""
    torch.manual_seed(0)
    model = FAMILIES[name]().double().train()
    size = 75 if name == "inception" else 64
    x = torch.randn(4 if name == "regnet_y" else 2, 3, size, size, dtype=torch.float64)

    def predict(batch: Tensor) -> tuple[Tensor, Tensor]:
        output = model(batch)
        return getattr(output, "logits", output), batch

    # What is recorded for the reverse step of SGD serves here as well: θ_t is the model's own.
    step = BaseStep(model, torch.optim.SGD(model.parameters(), lr=0.1), predict)
    with torch.no_grad():
        step.forward(x)
    recorded = step.forwards[0].recorded
    values = {i: p.detach() for i, p in enumerate(step.parameters)}
    # In proportion to the parameters, so that every layer has its share.
    direction = [torch.randn_like(p) * (p.abs().mean() + 1e-3) for p in values.values()]
    (h,) = step.jvp(step.model, recorded, values, direction)

    # Small enough to cross few kinks of the ReLUs.
    length = 1e-9
    ends = []
    for sign in (1.0, -1.0):
        moved = {i: p.add(u, alpha=sign * length) for (i, p), u in zip(values.items(), direction)}
        with torch.no_grad():
            ends += step.model.at(recorded, moved, lambda kept: step.jvp.using(None))
    assert h.shape == recorded.outputs[0].shape
    assert relative_error(h, (ends[0] - ends[1]) / (2 * length)) < 1e-4


@pytest.mark.parametrize("name", ["googlenet", "resnet", "squeezenet"])
def test_a_whole_meta_step_in_float32(name: str) -> None:
    """As a user runs it, against a double backward."""
    assert relative_error(*(meta_step(name, method, torch.float32) for method in ("forward", "reverse"))) < 1e-3


@pytest.mark.parametrize("name", ["mobilenet_v3", "vision_transformer"])
def test_a_whole_meta_step_through_a_model_that_cannot_be_unrolled(name: str) -> None:
    """Hard-swish has no second derivative."""
    results = [meta_step(name, method, torch.float64) for method in ("finite_difference", "forward")]
    assert relative_error(*results) < 1e-3
    if name == "mobilenet_v3":
        with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
            meta_step(name, "reverse", torch.float64)
    else:
        assert relative_error(meta_step(name, "reverse", torch.float64), results[1]) < 1e-9


def meta_step(name: str, method: str, dtype: torch.dtype) -> Tensor:
    """Return the hypergradient of one SGD step."""
    torch.manual_seed(0)
    model = FAMILIES[name]().train().to(dtype)
    objective = LearnedAlone(LossNetwork("multiclass").to(dtype))
    base, meta = ((torch.randn(4, 3, 64, 64).to(dtype), torch.randint(CLASSES, (4,))) for _ in range(2))

    def predict(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        output = model(batch[0])
        return getattr(output, "logits", output), batch[1]

    step = BaseStep(model, torch.optim.SGD(model.parameters(), lr=0.01), predict, method)
    step.descend(objective, F.cross_entropy(*step.forward(base))).backward()
    step.step()
    found = hypergradient(step, F.cross_entropy, meta)
    return torch.cat([g.flatten() for g in found.loss.values()])


@pytest.mark.parametrize(("dim", "shape"), [(0, (4, 1, 1)), (1, (1, 3, 1)), (-1, ())])
def test_weight_norm_along_any_dimension(dim: int, shape: tuple[int, ...]) -> None:
    v, g = torch.randn(4, 3, 2), torch.rand(shape)
    torch.testing.assert_close(_weight_norm(v, g, dim), torch._weight_norm(v, g, dim))
