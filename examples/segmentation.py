"""Segmentation: find discs and squares in small noisy images; logits (N, C, H, W), targets (N, H, W).

python examples/segmentation.py --steps 200
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin, LossShapeLogger

SIZE = 24


def draw_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, H, W) and the class of each pixel (N, H, W): background, disc, square."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    centre = torch.randint(6, SIZE - 6, (count, 2, 2, 1, 1), generator=generator)
    distance = torch.stack([rows, columns]) - centre.transpose(0, 1)[:, :, :, 0, 0, None, None].transpose(0, 1)
    disc = distance[:, 0].square().sum(1) < 16
    square = distance[:, 1].abs().amax(1) < 4
    target = torch.where(square, 2, disc.long())
    images = (target > 0).float() + 0.5 * torch.randn(target.shape, generator=generator)
    return images.unsqueeze(1), target


class Segmenter(L.LightningModule):
    """A small convolutional network with one output channel a class."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = [1, 16, 16, 16]
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 5, padding=2), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)
        ]
        self.model = nn.Sequential(*blocks, nn.Conv2d(16, 3, 1))
        self.val_iou = MulticlassJaccardIndex(3)
        self.test_iou = MulticlassJaccardIndex(3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, 3, H, W)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of the pixels."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the intersection over union."""
        x, y = batch
        self.val_iou(self(x), y)
        self.log("val_iou", self.val_iou)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the intersection over union."""
        x, y = batch
        self.test_iou(self(x), y)
        self.log("test_iou", self.test_iou)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


class AdaSegmenter(AdaLFLMixin, Segmenter):
    """The same with a loss that learns."""


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--init-steps", type=int, default=0, help="meta steps of an offline phase")
    args = parser.parse_args()

    L.seed_everything(0)
    generator = torch.Generator().manual_seed(0)
    train, val, test = (
        DataLoader(TensorDataset(*draw_images(count, generator)), 32, shuffle=count == 512) for count in (512, 128, 256)
    )
    model = AdaSegmenter(adalfl=AdaLFLConfig(task="multiclass"))
    trainer = L.Trainer(
        max_steps=args.steps,
        log_every_n_steps=10,
        enable_checkpointing=False,
        callbacks=[AdaLFLInit(steps=args.init_steps), LossShapeLogger(every_n_steps=20)],
    )
    trainer.fit(model, train, val)
    trainer.test(model, test)


if __name__ == "__main__":
    main()
