"""What the benchmark trains: models, batches, and the module with the ways to train it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from torchvision.models import resnet18, resnet50

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin

LR = 0.01
BATCHES = 4
EPOCH = 25  # times that an epoch has them
Batch = tuple[Tensor, Tensor]


def lenet5() -> nn.Module:
    """Return LeNet-5 for 28 x 28 images (LeCun et al., 1998)."""
    features = (nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh())
    head = (nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10))
    return nn.Sequential(*features, nn.AvgPool2d(2), nn.Flatten(), *head)


def allcnnc() -> nn.Module:
    """Return All-CNN-C for 32 x 32 images (Springenberg et al., 2014), with BatchNorm."""
    layers: list[nn.Module] = []
    widths = [3, 96, 96, 96, 192, 192, 192, 192, 192, 10]
    for k in range(9):
        size, stride = (3 if k < 7 else 1), (2 if k in (2, 5) else 1)
        convolution = nn.Conv2d(widths[k], widths[k + 1], size, stride, size // 2)
        layers += [convolution, nn.BatchNorm2d(widths[k + 1]), nn.ReLU()]
        layers += [nn.Dropout(0.5)] if stride == 2 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the usual stem for 32 x 32 images."""
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def perceptron(classes: int) -> nn.Module:
    """Return a network of one hidden layer of 512, for many classes."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, classes))


class LanguageModel(nn.Module):
    """A causal transformer of four layers of width 320: 10 million parameters at 8,000 words."""

    def __init__(self, words: int, length: int, width: int = 320) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 5, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, words, length)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        hidden = self.layers(self.words(x) + self.places.weight[: x.shape[1]], mask=mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        model: Draws the model.
        shape: Of an input; a text is given by its length alone.
        classes: Or words.
        batch: Instances in a batch, of training and held-out.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: int
    is_text: bool = False

    def batches(self) -> list[Batch]:
        """Draw batches that can be learned: texts of a fixed grammar, or the picture of each class with noise."""
        generator = torch.Generator().manual_seed(0)
        if self.is_text:
            words = torch.randint(self.classes, (BATCHES, self.batch, *self.shape), generator=generator)
            return [(x, (7 * x + 1) % self.classes) for x in words]
        pictures = torch.randn(self.classes, *self.shape, generator=generator)
        labels = torch.randint(self.classes, (BATCHES, self.batch), generator=generator)
        return [(pictures[y] + torch.randn(self.batch, *self.shape, generator=generator), y) for y in labels]

    def loader(self) -> DataLoader[Any]:
        """Return the batches as a project would have them, in epochs whose ends do not count."""
        rows = TensorDataset(*(torch.cat(parts) for parts in zip(*self.batches())))
        return DataLoader(ConcatDataset([rows] * EPOCH), self.batch)


CASES = {
    "LeNet-5": Case(lenet5, (1, 28, 28), 10, 128),
    "AllCNN-C": Case(allcnnc, (3, 32, 32), 10, 32),
    "ResNet-18": Case(small_resnet18, (3, 32, 32), 10, 32),
    "ResNet-50": Case(lambda: resnet50(num_classes=1000), (3, 224, 224), 1000, 32),
    "MLP, 1,000 classes": Case(lambda: perceptron(1000), (256,), 1000, 128),
    "MLP, 8,000 classes": Case(lambda: perceptron(8000), (256,), 8000, 256),
    "language model": Case(lambda: LanguageModel(8000, 64), (64,), 8000, 8, is_text=True),
}


class LitModel(L.LightningModule):
    """A plain module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log and return the cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: the loader is there for the held-out batches."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)


class AdaModel(AdaLFLMixin, LitModel):
    """The same with a loss that learns."""


# How a module is trained: plain, or with these fields of AdaLFLConfig.
FITS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "defaults": {},
    "no meta step": {"meta_every": None},
    "forward": {"meta_every": 1},
    "finite_difference": {"meta_every": 1, "hypergradient": "finite_difference"},
    "reverse": {"meta_every": 1, "hypergradient": "reverse"},
}


def build_module(case: Case, fit: str) -> L.LightningModule:
    """Draw a module to be trained in one of the ways of ``FITS``, the same parameters in each."""
    torch.manual_seed(0)
    model, options = case.model(), FITS[fit]
    if options is None:
        return LitModel(model)
    module = AdaModel(model, adalfl=AdaLFLConfig(task="multiclass", **options))
    # A shape that is zero would cost nothing; here it is as if it had been learned before.
    module.adalfl.set_phi({name: value + 0.01 for name, value in module.adalfl.loss.state_dict().items()})
    return module
