"""Train from the command line with LightningCLI: every hyper-parameter is an option, or a line of YAML.

python cli.py fit --config configs/digits.yaml                                # twenty seconds on a CPU
python cli.py fit --config configs/digits.yaml --model.adalfl.meta_every 5 --trainer.max_steps 200
python cli.py fit --config configs/digits.yaml --print_config
python cli.py test --config configs/digits.yaml --ckpt_path lightning_logs/….ckpt
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLMixin

TRAIN, TRUSTED = 1000, 100  # the other 697 test


class Digits(L.LightningDataModule):
    """The digits of scikit-learn; a part of those to train with has the label of the next class.

    Args:
        flipped: The share of wrong labels.
        batch_size: Instances in a batch.
        seed: Of the split, and of which labels are wrong.
    """

    def __init__(self, flipped: float = 0.4, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Read, split and contaminate."""
        images, labels = load_digits(return_X_y=True)
        generator = torch.Generator().manual_seed(self.hparams["seed"])
        order = torch.randperm(len(labels), generator=generator)
        x, y = torch.from_numpy(images)[order].float() / 16, torch.from_numpy(labels)[order].long()
        is_wrong = torch.rand(TRAIN, generator=generator) < self.hparams["flipped"]
        noisy = torch.where(is_wrong, (y[:TRAIN] + 1) % 10, y[:TRAIN])
        end = TRAIN + TRUSTED
        self.rows = {"train": (x[:TRAIN], noisy), "val": (x[TRAIN:end], y[TRAIN:end]), "test": (x[end:], y[end:])}

    def _loader(self, name: str) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.rows[name]), self.hparams["batch_size"], shuffle=name == "train")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the digits with wrong labels among them."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the digits that can be trusted, which the meta-objective uses too."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return digits with right labels."""
        return self._loader("test")


class LitDigits(L.LightningModule):
    """A network of two hidden layers.

    Args:
        width: Of the hidden layers.
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.save_hyperparameters()
        hidden = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.model = nn.Sequential(*hidden, nn.Linear(width, 10))

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


class AdaDigits(AdaLFLMixin, LitDigits):
    """The same, trained with a loss that learns."""


def main(arguments: list[str] | None = None) -> LightningCLI:
    """Run the command line."""
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec).*")
    return LightningCLI(AdaDigits, Digits, args=arguments, seed_everything_default=0)


if __name__ == "__main__":
    main()
