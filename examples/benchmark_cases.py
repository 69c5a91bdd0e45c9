"""What the benchmark trains: a base model, a learned loss and batches, the same in every process."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from base_models import build_model
from torch import Tensor, nn

from lightning_adalfl import LossNetwork

CLASSES = 10
Batch = tuple[Tensor, Tensor]

# The shape of an input and the batch size of each model.
SETTINGS: dict[str, tuple[tuple[int, ...], int]] = {
    "lenet5": ((1, 28, 28), 128),
    "mlp": ((1, 28, 28), 128),
    "allcnnc": ((3, 32, 32), 32),
    "resnet18": ((3, 32, 32), 32),
    "vit_small": ((3, 32, 32), 32),
}


@dataclass(frozen=True)
class Case:
    """A model with its loss and batches; take copies before training them.

    Attributes:
        name: A key of `SETTINGS`.
        batch_size: Of the base batch and of the meta batch.
        model: The base model f_θ.
        loss: The learned loss M_φ.
        batches: Images with labels, each a picture of its class with noise: something that can be learned, since
            the hypergradient of labels at random is little more than rounding.
    """

    name: str
    batch_size: int
    model: nn.Module
    loss: LossNetwork
    batches: list[Batch]

    def copies(self) -> tuple[nn.Module, LossNetwork]:
        """Return the model and the loss as they were drawn, to be spoilt."""
        return copy.deepcopy(self.model), copy.deepcopy(self.loss)


def build_case(name: str, batch_size: int | None = None) -> Case:
    """Draw a case from a fixed seed; by default with the batch size of `SETTINGS`."""
    shape, default = SETTINGS[name]
    size = batch_size or default
    torch.manual_seed(0)
    model, loss = build_model(name, shape, CLASSES), LossNetwork("multiclass")
    pictures = torch.randn(CLASSES, *shape)
    labels = [torch.randint(0, CLASSES, (size,)) for _ in range(4)]
    batches = [(pictures[y] + torch.randn(size, *shape), y) for y in labels]
    return Case(name, size, model, loss, batches)
