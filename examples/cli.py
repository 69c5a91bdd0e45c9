"""Train from the command line with LightningCLI: every hyper-parameter is an option, or a line of YAML.

python examples/cli.py fit --config examples/configs/mnist5k.yaml
python examples/cli.py fit --config examples/configs/mnist5k.yaml --model.adalfl.meta_lr 1e-3 --trainer.max_steps 200
python examples/cli.py fit --config examples/configs/mnist5k.yaml --print_config
python examples/cli.py test --config examples/configs/mnist5k.yaml --ckpt_path lightning_logs/….ckpt
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from base_models import build_model
from lightning.pytorch.cli import LightningCLI
from tasks import Loaders, load_task, loaders
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_adalfl import AdaLFLMixin


class TaskData(L.LightningDataModule):
    """The data of one of the paper's tasks.

    Args:
        name: Of the task, such as ``mnist5k``.
        root: Where data sets are kept.
        batch_size: Instances in a batch.
        seed: Of the split and of the order.
    """

    def __init__(self, name: str = "mnist5k", root: Path = Path("data"), batch_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters({"name": name, "batch_size": batch_size, "seed": seed})
        self.root = root
        self.loaders: Loaders | None = None

    def setup(self, stage: str) -> None:
        """Load the task."""
        task = load_task(self.hparams["name"], self.root, self.hparams["seed"])
        self.loaders = loaders(task, self.hparams["batch_size"], self.hparams["seed"])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training instances, shuffled."""
        return self.loaders.train

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation instances, which the meta-objective uses too."""
        return self.loaders.val

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test instances."""
        return self.loaders.test


class Classifier(L.LightningModule):
    """One of the paper's base models as a classifier.

    Args:
        model: Its name, such as ``lenet5``.
        inputs: Channels, height and width of an image.
        classes: Number of classes.
    """

    def __init__(self, model: str = "lenet5", inputs: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model(model, tuple(inputs), classes)
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (N, classes)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Log and return the cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the errors."""
        x, y = batch
        self.log("val_error", 1 - self.accuracy(self(x), y), on_step=False, on_epoch=True, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count the errors."""
        x, y = batch
        self.log("test_error", 1 - self.accuracy(self(x), y), on_step=False, on_epoch=True)


class AdaClassifier(AdaLFLMixin, Classifier):
    """The same, trained with a loss that learns."""


def main() -> LightningCLI:
    """Run the command line."""
    # The optimizer of the command line is the only one that there is.
    warnings.filterwarnings("ignore", message=".*configure_optimizers` will be overridden by `LightningCLI")
    return LightningCLI(AdaClassifier, TaskData, seed_everything_default=0, auto_configure_optimizers=True)


if __name__ == "__main__":
    main()
