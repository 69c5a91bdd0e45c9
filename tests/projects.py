"""Lightning projects as users write them, and their subclasses with a learned loss."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin

CLASSES = 3
# Everything is observed and differentiated at every step, and nothing is learned: training must equal the plain one's.
WATCHING = AdaLFLConfig("multiclass", learn="nothing", meta_every=1)


def points(size: int = 96, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Return points in four dimensions, in three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    return TensorDataset(x.to(dtype), (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def loaders(batch_size: int = 16, shuffle: bool = True, dtype: torch.dtype = torch.float32) -> list[DataLoader]:
    """Return a training loader of six batches and a validation loader of two."""
    train = DataLoader(points(dtype=dtype), batch_size, shuffle=shuffle)
    return [train, DataLoader(points(32, 1, dtype), 16)]


class Plain(L.LightningModule):
    """A classifier with BatchNorm and dropout, as it might be in any project."""

    def __init__(self, lr: float = 0.1, dropout: float = 0.2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.model = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES)
        )
        self.accuracy = MulticlassAccuracy(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("train_loss", loss)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Ada(AdaLFLMixin, Plain):
    """The same with a learned loss."""


class Smooth(Plain):
    """Without BatchNorm and dropout: every instance by itself, so that batches may be cut and joined."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class AdaSmooth(AdaLFLMixin, Smooth):
    """The same with a learned loss."""


def config(**options: Any) -> AdaLFLConfig:
    """Return a configuration whose meta steps are many, and large enough to see."""
    return AdaLFLConfig(**{"task": "multiclass", "meta_lr": 1e-2, "meta_every": 1, **options})


def adaptive(kind: type[L.LightningModule]) -> type[Any]:
    """Return the subclass with a learned loss of any module."""
    return type(f"Ada{kind.__name__}", (AdaLFLMixin, kind), {})


def make(kind: type[L.LightningModule], seed: int = 0, **arguments: Any) -> Any:
    """Make a module from a seed of its own; a module with a learned loss has the base parameters of the plain one."""
    torch.manual_seed(seed)
    return kind(**arguments)


def trainer(tmp_path: Any, **options: Any) -> L.Trainer:
    """Return a quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in options.get("callbacks", ())),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "max_epochs": 2,
    }
    return L.Trainer(**{**quiet, **options})


def tensors(module: L.LightningModule) -> dict[str, Tensor]:
    """Return copies of parameters and buffers."""
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def phi(module: Any) -> dict[str, Tensor]:
    """Return copies of what is learned."""
    return {name: t.detach().clone() for name, t in module.adalfl.learned.items()}


def loss_state(module: Any) -> dict[str, Tensor]:
    """Return copies of φ, and of the units that it is in."""
    return {name: t.detach().clone() for name, t in module.adalfl.loss.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Demand equal tensors, to the bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


class RateTrace(Callback):
    """Keeps the learning rates of every group at the end of each batch and epoch."""

    def __init__(self) -> None:
        self.rates: list[tuple[str, list[float]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rates.append(("batch", [group["lr"] for group in trainer.optimizers[0].param_groups]))

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.rates.append(("epoch", [group["lr"] for group in trainer.optimizers[0].param_groups]))


class Keep(Checkpoint):
    """Saves a checkpoint after given steps, and at every epoch's end unless steps are given."""

    def __init__(self, folder: Path, steps: Collection[int] = ()) -> None:
        self.folder = folder
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt", weights_only=False)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.steps:
            trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt", weights_only=False)
