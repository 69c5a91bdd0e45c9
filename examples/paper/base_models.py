"""The base models f_θ of the paper's experiments (section 4.3), and a small vision transformer.

They return predictions without an output activation: logits of shape (N, outputs), or regression values. The
convolutional models are the usual adaptations to 32x32 images of architectures that were published for larger ones.

The first draw of θ decides much, and the paper does not state it. Each model has the usual draw under which the
handcrafted loss comes out nearest to the paper's, and the large ones, which were not run, Kaiming-normal weights; see
docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models import VisionTransformer, squeezenet1_0
from torchvision.models import resnet18 as torchvision_resnet18
from torchvision.models.squeezenet import Fire
from torchvision.models.vgg import cfgs as vgg_configurations
from torchvision.models.vgg import make_layers as vgg_features
from wide_resnet import WideResNet


def logistic(inputs: Sequence[int], outputs: int) -> nn.Module:
    """Logistic regression: one linear layer on the flattened input."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(inputs), outputs))


def mlp(inputs: Sequence[int], outputs: int, hidden: int = 1000) -> nn.Module:
    """The multi-layer perceptron of Baydin et al. (2018): two hidden layers of 1000 ReLUs."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(inputs), hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


def lenet5(inputs: Sequence[int], outputs: int, padding: int = 2, modern: bool = False) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with tanh and average pooling, for 28x28 images padded to its 32x32.

    Two common variants leave the images unpadded (``padding=0``), and have ReLU and max pooling (``modern=True``).
    """
    _require_shape("lenet5", inputs, (1, 28, 28))
    activation, pooling = (nn.ReLU, nn.MaxPool2d) if modern else (nn.Tanh, nn.AvgPool2d)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=padding),
        activation(),
        pooling(2),
        nn.Conv2d(6, 16, 5),
        activation(),
        pooling(2),
        nn.Flatten(),
        nn.Linear(16 * (4 + padding // 2) ** 2, 120),
        activation(),
        nn.Linear(120, 84),
        activation(),
        nn.Linear(84, outputs),
    )


def vgg16(inputs: Sequence[int], outputs: int) -> nn.Module:
    """VGG-16 (Simonyan & Zisserman, 2015) with BatchNorm; its five poolings leave 1x1 maps for one linear layer."""
    _require_shape("vgg16", inputs, (3, 32, 32))
    return nn.Sequential(vgg_features(vgg_configurations["D"], batch_norm=True), nn.Flatten(), nn.Linear(512, outputs))


def allcnnc(inputs: Sequence[int], outputs: int, dropout: float = 0.5) -> nn.Module:
    """All-CNN-C (Springenberg et al., 2014) with BatchNorm after every convolution.

    The dropout follows the two strided convolutions that stand in for pooling.
    """
    _require_shape("allcnnc", inputs, (3, 32, 32))

    def block(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        # BatchNorm takes the mean away, and with it any bias of the convolution.
        convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(3, 96),
        *block(96, 96),
        *block(96, 96, stride=2),
        nn.Dropout(dropout),
        *block(96, 192),
        *block(192, 192),
        *block(192, 192, stride=2),
        nn.Dropout(dropout),
        *block(192, 192),
        *block(192, 192, kernel=1),
        *block(192, outputs, kernel=1)[:-1],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def resnet18(inputs: Sequence[int], outputs: int) -> nn.Module:
    """ResNet-18 (He et al., 2016) with the stem for 32x32 images: a 3x3 convolution of stride 1, no max pooling."""
    _require_shape("resnet18", inputs, (3, 32, 32))
    model = torchvision_resnet18(num_classes=outputs)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def squeezenet(inputs: Sequence[int], outputs: int) -> nn.Module:
    """SqueezeNet 1.0 (Iandola et al., 2016) with a 3x3 stem of stride 1 and BatchNorm in every Fire module.

    Without BatchNorm the signal of its eighteen layers fades under torch's default initialisation. The ReLU after the
    last convolution is left out, so that logits can be negative.
    """
    _require_shape("squeezenet", inputs, (3, 32, 32))
    model = squeezenet1_0(num_classes=outputs)
    model.features[0] = nn.Sequential(nn.Conv2d(3, 96, 3, padding=1), nn.BatchNorm2d(96))
    for fire in model.features:
        if isinstance(fire, Fire):
            for name in ("squeeze", "expand1x1", "expand3x3"):
                convolution = getattr(fire, name)
                setattr(fire, name, nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels)))
    model.classifier[2] = nn.Identity()
    return model


def wide_resnet(inputs: Sequence[int], outputs: int, depth: int, widen: int) -> nn.Module:
    """A wide ResNet (Zagoruyko & Komodakis, 2016): `depth` layers, `widen` times the channels of a plain ResNet."""
    _require_shape("a wide ResNet", inputs, (3, 32, 32))
    return WideResNet(depth, widen, outputs)


class SmallVisionTransformer(VisionTransformer):
    """A vision transformer for 32x32 images in 4x4 patches: 6 blocks of width 192 with 3 heads, about 2.7M parameters.

    Args:
        outputs: The number of classes.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__(
            image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=outputs
        )

    def reset_parameters(self) -> None:
        """Draw the parameters that belong to no layer with a `reset_parameters` of its own."""
        nn.init.zeros_(self.class_token)
        nn.init.normal_(self.encoder.pos_embedding, std=0.02)
        for attention in self.modules():
            if isinstance(attention, nn.MultiheadAttention):
                nn.init.xavier_uniform_(attention.in_proj_weight)
                nn.init.zeros_(attention.in_proj_bias)


def vit_small(inputs: Sequence[int], outputs: int) -> nn.Module:
    """The small vision transformer; see :class:`SmallVisionTransformer`."""
    _require_shape("vit_small", inputs, (3, 32, 32))
    return SmallVisionTransformer(outputs)


def lecun_draw(model: nn.Module) -> None:
    """Draw weights from N(0, 1 / inputs of a unit) (LeCun et al., 1998), and biases zero."""
    _draw(model, partial(nn.init.kaiming_normal_, nonlinearity="linear"))


def xavier_draw(model: nn.Module) -> None:
    """Draw weights Xavier-uniform (Glorot & Bengio, 2010), and biases zero."""
    _draw(model, nn.init.xavier_uniform_)


def kaiming_draw(model: nn.Module) -> None:
    """Draw weights from N(0, 2 / inputs of a unit) (He et al., 2015), and biases zero."""
    _draw(model, partial(nn.init.kaiming_normal_, nonlinearity="relu"))


def wide_resnet_draw(model: nn.Module) -> None:
    """Draw convolutions from N(0, 2/n), n = k²·channels_out, the linear layer Xavier-uniform, and biases zero."""
    _draw(model, nn.init.xavier_uniform_)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def torch_draw(model: nn.Module) -> None:
    """Draw as torch does: every submodule's own `reset_parameters`, in the order of `model.modules()`."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


@torch.no_grad()
def _draw(model: nn.Module, weights: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch_draw(model)  # for BatchNorm
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weights(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


DRAWS: Mapping[str, Callable[[nn.Module], None]] = {
    "lecun": lecun_draw,
    "xavier": xavier_draw,
    "kaiming": kaiming_draw,
    "wide_resnet": wide_resnet_draw,
    "torch": torch_draw,
}


class _Entry(NamedTuple):
    build: Callable[[Sequence[int], int], nn.Module]
    draw: str


MODELS: Mapping[str, _Entry] = {
    "logistic": _Entry(logistic, "xavier"),
    "mlp": _Entry(mlp, "lecun"),
    "lenet5": _Entry(lenet5, "xavier"),
    "lenet5_unpadded": _Entry(partial(lenet5, padding=0), "xavier"),
    "lenet5_relu": _Entry(partial(lenet5, padding=0, modern=True), "xavier"),
    "vgg16": _Entry(vgg16, "kaiming"),
    "allcnnc": _Entry(allcnnc, "kaiming"),
    "resnet18": _Entry(resnet18, "kaiming"),
    "squeezenet": _Entry(squeezenet, "kaiming"),
    "wrn28_10": _Entry(partial(wide_resnet, depth=28, widen=10), "wide_resnet"),
    "wrn16_8": _Entry(partial(wide_resnet, depth=16, widen=8), "wide_resnet"),
    "vit_small": _Entry(vit_small, "torch"),
}


def build_model(name: str, inputs: Sequence[int], outputs: int, draw: str | None = None) -> nn.Module:
    """Build a base model and draw its parameters with the global random state.

    Args:
        name: A key of `MODELS`.
        inputs: The shape of one input, such as (3, 32, 32) or (10,).
        outputs: The number of outputs: classes, or regression targets.
        draw: A key of `DRAWS`; by default the model's own.

    Returns:
        The model, which maps (N, *inputs) to (N, outputs).

    Raises:
        ValueError: For an unknown name, an input shape that the model does not take, or no outputs.
    """
    if name not in MODELS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, MODELS))}; got {name!r}.")
    if outputs < 1:
        raise ValueError(f"`outputs` must be at least 1; got {outputs}.")
    model = MODELS[name].build(tuple(inputs), outputs)
    draw_parameters(model, draw or MODELS[name].draw)
    return model


def draw_parameters(model: nn.Module, draw: str) -> None:
    """Draw θ afresh, in place; equal random states give equal draws.

    Raises:
        ValueError: For an unknown draw.
    """
    if draw not in DRAWS:
        raise ValueError(f"`draw` must be one of {', '.join(map(repr, DRAWS))}; got {draw!r}.")
    DRAWS[draw](model)


def _require_shape(name: str, inputs: Sequence[int], expected: tuple[int, ...]) -> None:
    if tuple(inputs) != expected:
        raise ValueError(f"`inputs` of {name} must be {expected}; got {tuple(inputs)}. Resize the images or use mlp.")
