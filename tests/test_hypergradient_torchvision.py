"""Forward mode through every family of torchvision's classification models, in training mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from whole_step import relative_error

from lightning_adalfl.hypergradient import BaseStep, hypergradient
from lightning_adalfl.hypergradient.directional_derivative import forward_mode
from lightning_adalfl.losses import LossNetwork

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
    "inception": of(models.inception_v3, aux_logits=True, init_weights=False),
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
# The auxiliary head of Inception needs images of this size.
SIZES = {"inception": 299}
BATCHES = {"inception": 2}


def parameterised(names: Mapping[str, Any]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in ("inception", "wide_resnet") else n for n in names]


@pytest.mark.parametrize("name", parameterised(FAMILIES))
def test_forward_mode_equals_central_differences(name: str) -> None:
    """The derivative of the predictions along a direction in parameter space, with the same masks and statistics."""
    torch.manual_seed(0)
    model = FAMILIES[name]().double().train()
    x = torch.randn(BATCHES.get(name, 4), 3, SIZES.get(name, 64), SIZES.get(name, 64), dtype=torch.float64)

    def predict(batch: Tensor) -> tuple[Tensor, Tensor]:
        output = model(batch)
        return getattr(output, "logits", output), batch

    # What is recorded for the reverse step of SGD serves here as well: θ_t is the model's own.
    step = BaseStep(model, torch.optim.SGD(model.parameters(), lr=0.1), predict)
    with torch.no_grad():
        step.forward(x)
    (trace,) = step.traces
    values = {i: p.detach() for i, p in enumerate(step.parameters)}
    # In proportion to the parameters, so that every layer has its share.
    direction = [torch.randn_like(p) * (p.abs().mean() + 1e-3) for p in values.values()]
    h = forward_mode(step.model, trace, values, direction)

    # Small enough to cross few kinks of the ReLUs.
    size = 1e-9
    ends = []
    for sign in (1.0, -1.0):
        moved = {i: p.add(u, alpha=sign * size) for (i, p), u in zip(values.items(), direction)}
        with torch.no_grad(), trace.random_state.replayed():
            ends.append(step.model(trace.batch, trace.buffers, moved)[0])
        del moved
    assert h.shape == trace.predictions.shape
    assert relative_error(h, (ends[0] - ends[1]) / (2 * size)) < 1e-4


@pytest.mark.parametrize("name", ["googlenet", "maxvit", "resnet", "shufflenet", "squeezenet"])
def test_a_whole_meta_step_in_float32(name: str) -> None:
    """As a user runs it, against the unrolled reference."""
    results = [meta_step(name, method, torch.float32) for method in ("forward", "reverse")]
    assert relative_error(*results) < 1e-3


@pytest.mark.parametrize("name", ["mobilenet_v3", "vision_transformer"])
def test_a_whole_meta_step_through_a_model_that_cannot_be_unrolled(name: str) -> None:
    """Hard-swish has no second derivative, nor has the fused attention of CPUs."""
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        meta_step(name, "reverse", torch.float64)
    results = [meta_step(name, method, torch.float64) for method in ("finite_difference", "forward")]
    assert relative_error(*results) < 1e-3


def meta_step(name: str, method: str, dtype: torch.dtype) -> Tensor:
    """Return the hypergradient of one SGD step."""
    torch.manual_seed(0)
    model = FAMILIES[name]().train().to(dtype)
    loss = LossNetwork("multiclass").to(dtype)
    base, meta = ((torch.randn(4, 3, 64, 64).to(dtype), torch.randint(CLASSES, (4,))) for _ in range(2))

    def predict(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        output = model(batch[0])
        return getattr(output, "logits", output), batch[1]

    step = BaseStep(model, torch.optim.SGD(model.parameters(), lr=0.01), predict, method)
    loss(*step.forward(base)).backward()
    step.step()
    result = hypergradient(step, loss, F.cross_entropy, meta, epsilon=1e-7)
    return torch.cat([g.flatten() for g in result.loss])
