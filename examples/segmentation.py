"""Segmentation with void pixels: the outlines belong to no class, and of some objects the annotators knew nothing.

python segmentation.py                    # a minute on a CPU

A small network finds discs and squares in noisy images. Pixels on an outline are marked 255 and do not count, as in
the usual data sets; `ignore_index=255` says so to the library as it does to the cross-entropy. In the training images
60% of the objects were overlooked, and are marked as background. 64 images can be trusted.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin

SIZE, VOID = 24, 255


def draw_images(count: int, overlooked: float, seed: int) -> TensorDataset:
    """Return images (N, 1, H, W), and the class of each pixel (N, H, W): background 0, disc 1, square 2, void 255."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    centres = torch.randint(6, SIZE - 6, (2, count, 2, 1, 1), generator=generator)
    to_disc, to_square = (grid - centres[0]).square().sum(1).sqrt(), (grid - centres[1]).abs().amax(1)
    target = torch.where(to_square < 4, 2, (to_disc < 5).long())
    images = (target > 0).float() + 0.3 * torch.randn(target.shape, generator=generator)
    for kind in (1, 2):
        is_overlooked = torch.rand(count, 1, 1, generator=generator) < overlooked
        target = torch.where(is_overlooked & (target == kind), 0, target)
    target[(to_square == 3) | ((to_disc - 4.5).abs() < 0.5) & (to_square > 3)] = VOID
    return TensorDataset(images.unsqueeze(1), target)


class LitSegmenter(L.LightningModule):
    """A small convolutional network with an output for each class."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = []
        for inputs, dilation in ((1, 1), (24, 2), (24, 2)):
            convolution = nn.Conv2d(inputs, 24, 5, padding=2 * dilation, dilation=dilation)
            layers += [convolution, nn.BatchNorm2d(24), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(24, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, 3, H, W)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of the pixels that count."""
        x, y = batch
        return F.cross_entropy(self(x), y, ignore_index=VOID)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the error."""
        self.log("val_error", self._error(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the error."""
        self.log("test_error", self._error(batch))

    def _error(self, batch: Any) -> Tensor:
        """Return what the intersection over union lacks to one, the mean of three classes."""
        x, y = batch
        predicted, counts = self(x).argmax(1), y != VOID
        both = [((predicted == kind) & (y == kind))[counts].sum() for kind in range(3)]
        either = [((predicted == kind) | (y == kind))[counts].sum() for kind in range(3)]
        return 1 - torch.stack([part / whole for part, whole in zip(both, either)]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class AdaSegmenter(AdaLFLMixin, LitSegmenter):
    """The same, trained with a loss that learns."""


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both ways, and print and return the test errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=400, help="training steps of each run")
    parser.add_argument("--overlooked", type=float, default=0.6, help="share of the objects that are not marked")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec).*")
    train = DataLoader(draw_images(512, args.overlooked, 3 * args.seed), 32, shuffle=True)
    trusted, test = (DataLoader(draw_images(64 + 192 * k, 0.0, 3 * args.seed + 1 + k), 256) for k in (0, 1))

    def fit(kind: type[L.LightningModule], checkpoint: ModelCheckpoint | None = None, **options: Any) -> L.Trainer:
        L.seed_everything(args.seed, verbose=False)
        trainer = L.Trainer(
            max_steps=args.max_steps,
            callbacks=[checkpoint] if checkpoint else [],
            enable_checkpointing=checkpoint is not None,
            enable_model_summary=False,
            enable_progress_bar=False,
            log_every_n_steps=10,
        )
        trainer.fit(kind(**options), train, trusted)
        return trainer

    def error(trainer: L.Trainer, path: str | None = None) -> float:
        return trainer.test(trainer.lightning_module, test, path, verbose=False)[0]["test_error"]

    best = ModelCheckpoint(monitor="val_error")
    own = fit(LitSegmenter, best)
    learned = fit(AdaSegmenter, adalfl=AdaLFLConfig(task="multiclass", ignore_index=VOID))
    errors = {
        "own loss, at the end": error(own),
        "own loss, best checkpoint": error(own, best.best_model_path or None),
        "with lightning_adalfl": error(learned),
    }
    print(f"\nOne minus the intersection over union on 256 test images after {args.max_steps:,} steps\n")
    for name, value in errors.items():
        print(f"{name:28}{value:8.4f}")
    return errors


if __name__ == "__main__":
    main()
