from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from base_models import MODELS, build_model, draw_parameters
from torch import nn
from wide_resnet import WideResNet

SHAPES = dict.fromkeys(("logistic", "mlp", "lenet5", "lenet5_unpadded", "lenet5_relu"), (1, 28, 28))
IMAGE_32 = (3, 32, 32)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def step(model: nn.Module, inputs: tuple[int, ...], outputs: int) -> None:
    """One SGD step on two random inputs; every parameter must get a finite gradient."""
    x, y = torch.randn(2, *inputs), torch.randint(outputs, (2,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    predictions = model(x)
    assert predictions.shape == (2, outputs)
    nn.functional.cross_entropy(predictions, y).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("wrn28_10", "wrn16_8")])
def test_takes_a_training_step(name: str) -> None:
    torch.manual_seed(0)
    inputs = SHAPES.get(name, IMAGE_32)
    step(build_model(name, inputs, 10), inputs, 10)


@pytest.mark.parametrize("depth", [16, 28])
def test_narrow_wide_resnet_takes_a_training_step(depth: int) -> None:
    torch.manual_seed(0)
    step(WideResNet(depth, widen=1, outputs=10), IMAGE_32, 10)


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "expected"),
    [
        ("logistic", (1, 28, 28), 10, 784 * 10 + 10),
        ("mlp", (10,), 1, 11 * 1000 + 1001 * 1000 + 1001),
        ("lenet5", (1, 28, 28), 10, 61_706),  # LeCun et al. (1998), with every map of C3 connected
        ("lenet5_unpadded", (1, 28, 28), 10, 61_706 - 120 * 16 * (5 * 5 - 4 * 4)),
        ("vgg16", IMAGE_32, 10, 14_728_266),  # 14,714,688 of the published features, BatchNorm, one linear layer
        # 1,369,738 of Springenberg et al. (2014), 1,258 biases exchanged for two BatchNorm parameters a channel
        ("allcnnc", IMAGE_32, 10, 1_369_738 + 1_258),
        ("resnet18", IMAGE_32, 10, 11_173_962),
        # torchvision's 1,248,424 with 10 classes for 1000, a 3x3 stem for 7x7, and 2 x 2,976 BatchNorm parameters
        ("squeezenet", IMAGE_32, 10, 1_248_424 - 990 * 513 - 3 * 96 * 40 + 2 * 2_976),
        ("wrn28_10", IMAGE_32, 10, 36_479_194),  # Zagoruyko & Komodakis (2016): 36.5M
        ("wrn28_10", IMAGE_32, 100, 36_536_884),
        ("wrn16_8", IMAGE_32, 10, 10_961_370),  # 11.0M
        ("vit_small", IMAGE_32, 10, 2_693_578),
    ],
)
def test_parameter_count(name: str, inputs: tuple[int, ...], outputs: int, expected: int) -> None:
    with torch.device("meta"):
        model = build_model(name, inputs, outputs)
    assert parameter_count(model) == expected


@pytest.mark.parametrize("name", ["allcnnc", "resnet18", "squeezenet", "vgg16"])
def test_stem_keeps_the_resolution(name: str) -> None:
    """32x32 images must not be shrunk by the stem as ImageNet's are."""
    model = build_model(name, IMAGE_32, 10)
    sizes: list[torch.Size] = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: sizes.append(output.shape[2:]))
    model(torch.randn(2, *IMAGE_32))
    assert sizes == [torch.Size([32, 32])]


@pytest.mark.parametrize("name", ["lenet5", "allcnnc", "squeezenet", "wrn16_8", "vit_small"])
def test_a_draw_reaches_every_parameter_and_repeats_by_seed(name: str) -> None:
    """Spoil all parameters; a draw must restore exactly what building under the same seed gives."""
    inputs = SHAPES.get(name, IMAGE_32)
    model = build_model(name, inputs, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(123.0)
    torch.manual_seed(3)
    draw_parameters(model, MODELS[name].draw)
    drawn = {key: value.clone() for key, value in model.named_parameters()}
    for key, value in drawn.items():
        assert not (value == 123.0).any(), key
    torch.manual_seed(3)
    draw_parameters(model, MODELS[name].draw)
    assert all(torch.equal(drawn[key], value) for key, value in model.named_parameters())
    torch.manual_seed(4)
    draw_parameters(model, MODELS[name].draw)
    assert any(not torch.equal(drawn[key], value) for key, value in model.named_parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("wrn28_10",)])
def test_signal_reaches_the_output_of_a_fresh_draw(name: str) -> None:
    """Different inputs give visibly different predictions."""
    torch.manual_seed(0)
    inputs = SHAPES.get(name, IMAGE_32)
    model = build_model(name, inputs, 10)
    with torch.no_grad():
        predictions = model(torch.randn(8, *inputs))
    assert predictions.std(dim=0).mean() > 1e-3


@pytest.mark.parametrize(
    ("name", "layer", "deviation"),
    [
        ("logistic", nn.Linear, (2 / (784 + 10)) ** 0.5),  # Glorot & Bengio (2010): variance 2 / (in + out)
        ("lenet5", nn.Conv2d, (2 / (25 + 6 * 25)) ** 0.5),
        ("mlp", nn.Linear, (1 / 784) ** 0.5),  # LeCun et al. (1998): variance 1 / in
        ("allcnnc", nn.Conv2d, (2 / (3 * 9)) ** 0.5),  # He et al. (2015): variance 2 / in
        ("wrn16_8", nn.Conv2d, (2 / (16 * 9)) ** 0.5),  # Zagoruyko & Komodakis (2016): variance 2 / (k² out)
    ],
)
def test_the_first_layer_is_drawn_as_published(name: str, layer: type[nn.Module], deviation: float) -> None:
    torch.manual_seed(0)
    model = build_model(name, SHAPES.get(name, IMAGE_32), 10)
    weight = next(module.weight for module in model.modules() if isinstance(module, layer))
    assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    ("draw", "variance"),
    [("lecun", 1 / 10), ("xavier", 2 / 1010), ("kaiming", 2 / 10), ("torch", 1 / 30)],
)
def test_other_draws_are_at_hand(draw: str, variance: float) -> None:
    torch.manual_seed(0)
    layer = build_model("mlp", (10,), 1, draw)[1]
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
    assert layer.bias.any().item() is (draw == "torch")


def test_an_unknown_draw_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`draw` must be one of 'lecun', .*; got 'zeros'"):
        build_model("mlp", (10,), 1, "zeros")


def test_allcnnc_has_batch_norm_after_every_convolution() -> None:
    layers = list(build_model("allcnnc", IMAGE_32, 10).children())
    following = [after for before, after in pairwise(layers) if isinstance(before, nn.Conv2d)]
    assert len(following) == 9
    assert all(isinstance(layer, nn.BatchNorm2d) for layer in following)
    assert [layer.p for layer in layers if isinstance(layer, nn.Dropout)] == [0.5, 0.5]


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"`name` must be one of 'logistic', .*'vit_small'; got 'alexnet'"):
        build_model("alexnet", IMAGE_32, 10)


def test_no_outputs() -> None:
    with pytest.raises(ValueError, match=r"`outputs` must be at least 1; got 0"):
        build_model("mlp", (10,), 0)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("logistic", "mlp")])
def test_other_input_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"`inputs` of .* must be \(\d, \d\d, \d\d\); got \(3, 64, 64\)"):
        build_model(name, (3, 64, 64), 10)


def test_wide_resnet_depth_and_factor() -> None:
    with pytest.raises(ValueError, match=r"`depth` must be 6n \+ 4 .*; got 20"):
        WideResNet(20, 1, 10)
    with pytest.raises(ValueError, match=r"`widen` must be at least 1; got 0"):
        WideResNet(16, 0, 10)
