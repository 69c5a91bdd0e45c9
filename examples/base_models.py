"""The base models f_θ of the paper's experiments (section 4.3), and a small vision transformer.

They return predictions without an output activation: logits of shape (N, outputs), or regression values. The
convolutional models are the usual adaptations to 32x32 images of architectures that were published for larger ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod

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


def lenet5(inputs: Sequence[int], outputs: int) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with tanh and average pooling, for 28x28 images padded to its 32x32."""
    _require_shape("lenet5", inputs, (1, 28, 28))
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
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


MODELS: Mapping[str, Callable[[Sequence[int], int], nn.Module]] = {
    "logistic": logistic,
    "mlp": mlp,
    "lenet5": lenet5,
    "vgg16": vgg16,
    "allcnnc": allcnnc,
    "resnet18": resnet18,
    "squeezenet": squeezenet,
    "wrn28_10": partial(wide_resnet, depth=28, widen=10),
    "wrn16_8": partial(wide_resnet, depth=16, widen=8),
    "vit_small": vit_small,
}


def build_model(name: str, inputs: Sequence[int], outputs: int) -> nn.Module:
    """Build a base model, drawn from torch's default initialisation with the global random state.

    Args:
        name: A key of `MODELS`.
        inputs: The shape of one input, such as (3, 32, 32) or (10,).
        outputs: The number of outputs: classes, or regression targets.

    Returns:
        The model, which maps (N, *inputs) to (N, outputs).

    Raises:
        ValueError: For an unknown name, an input shape that the model does not take, or no outputs.
    """
    if name not in MODELS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, MODELS))}; got {name!r}.")
    if outputs < 1:
        raise ValueError(f"`outputs` must be at least 1; got {outputs}.")
    model = MODELS[name](tuple(inputs), outputs)
    draw_parameters(model)
    return model


@torch.no_grad()
def draw_parameters(model: nn.Module) -> None:
    """Draw θ afresh, in place: every submodule's own `reset_parameters`, in the order of `model.modules()`."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _require_shape(name: str, inputs: Sequence[int], expected: tuple[int, ...]) -> None:
    if tuple(inputs) != expected:
        raise ValueError(f"`inputs` of {name} must be {expected}; got {tuple(inputs)}. Resize the images or use mlp.")
