"""A small training run with everything on, which goes on from whatever an earlier one that was killed has left."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin, LossShapeLogger, TrajectoryRecorder


@dataclass(frozen=True)
class Settings:
    """What a run does."""

    steps: int = 60
    offline_steps: int = 40
    batches: int = 17  # of an epoch: no multiple of the checkpoints' interval
    snapshot_every: int = 7
    checkpoint_every: int = 10


class Batches:
    """Training batches that depend on nothing but their position, which a checkpoint keeps."""

    def __init__(self, count: int, size: int = 16) -> None:
        self.count, self.size = count, size
        self.epoch, self.drawn = 0, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.drawn < self.count:
            self.drawn += 1
            yield points(self.size, 1000 * self.epoch + self.drawn)
        self.epoch, self.drawn = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"epoch": self.epoch, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position."""
        self.epoch, self.drawn = state["epoch"], state["drawn"]


def points(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points in four dimensions and their classes, of three."""
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Classifier(L.LightningModule):
    """Dropout, BatchNorm and momentum: a resumed run must find all their states again."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, 3)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log and return the cross-entropy."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the cross-entropy."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Return momentum SGD with a decaying rate."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class AdaClassifier(AdaLFLMixin, Classifier):
    """The same, trained with a loss that learns."""


def train(root: Path, settings: Settings, *callbacks: L.Callback) -> L.Trainer:
    """Train to the end in ``root``, from the newest checkpoint there if there is one."""
    quiet()
    L.seed_everything(1, verbose=False)
    offline = DataLoader(TensorDataset(*points(160, -1)), 16, shuffle=True)
    trainer = L.Trainer(
        max_steps=settings.steps,
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        logger=TensorBoardLogger(root, name="logs"),
        callbacks=[
            AdaLFLInit(steps=settings.offline_steps, train_dataloader=offline, save_every=5),
            LossShapeLogger(every_n_steps=settings.snapshot_every),
            TrajectoryRecorder(every_n_steps=settings.snapshot_every),
            *callbacks,
            ModelCheckpoint(
                root / "checkpoints",
                "{step}",
                monitor="step",
                mode="max",
                save_top_k=2,
                every_n_train_steps=settings.checkpoint_every,
            ),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    # A window longer than the run: the loss goes on learning to the end.
    module = AdaClassifier(adalfl=AdaLFLConfig(task="multiclass", meta_lr=1e-3, safeguard_window=10**6))
    validation = DataLoader(TensorDataset(*points(64, -2)), 32)
    trainer.fit(module, Batches(settings.batches), validation, ckpt_path=newest_checkpoint(root))
    return trainer


def newest_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint of the largest step."""
    found = (root / "checkpoints").glob("step=*.ckpt")
    return max(found, key=lambda path: int(path.stem.split("=")[1]), default=None)


def quiet() -> None:
    """Let a run say nothing but what it means to warn of."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for message in (".*does not have many workers.*", ".*log_every_n_steps.*", ".*LeafSpec.*", ".*`meta_data='val'`.*"):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists.*")


def run_child(root: Path, settings: Settings, moment: str, seed: int) -> None:
    """Train in a process of its own and keep the end state; die at a moment of the kind ``moment`` on the way.

    Args:
        root: The run's folder.
        settings: What it does.
        moment: ``""`` for none, ``"backward"``, ``"optimizer"``, or a part of the name of a file that is being written.
        seed: Which of these moments.
    """
    (root / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(root / "tmp")  # where checkpoints are written first
    callbacks = [Deadly(moment, seed)] if moment in ("backward", "optimizer") else []
    if moment and not callbacks:
        die_while_writing(moment, random.Random(seed))
    trainer = train(root, settings, *callbacks)
    trainer.save_checkpoint(root / "end.ckpt")


class Deadly(L.Callback):
    """Kills its own process in the middle of a step."""

    def __init__(self, moment: str, seed: int) -> None:
        self.moment = moment
        self.calls = random.Random(seed).randrange(1, 60)

    def _count(self, *_: Any) -> None:
        self.calls -= 1
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the backward of a layer, in the base step or in the meta step, or for the base optimizer."""
        if self.moment == "backward":
            pl_module.model[4].register_full_backward_hook(self._count)
        else:
            trainer.optimizers[0].register_step_pre_hook(self._count)


def die_while_writing(name: str, generator: random.Random) -> None:
    """Kill this process some thousandths of a second after it has opened a file with ``name`` in its path."""
    left = [generator.randrange(1, 6)]
    delay = generator.random() * 0.004

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and name in arguments[0] and "w" in str(arguments[1]):
            left[0] -= 1
            if left[0] == 0:
                threading.Thread(target=die, daemon=True).start()

    sys.addaudithook(hook)
