"""Learn a loss once, and train others with it: without held-out data, and without meta steps.

python replay.py                          # a minute on a CPU

Forty in a hundred training labels are flipped to any other class. A small network learns its loss from 100 digits that
can be trusted, and its history is kept. A wider network is trained with that history, from other initial parameters and
on other digits with wrong labels, beside its own loss and beside a loss that it learns itself. A history need not carry
over to another network or other data: compare, as here.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, LossReplay, LossShapeLogger

TRAIN, TRUSTED = 1000, 100  # the other 697 test


def load_rows(seed: int) -> list[TensorDataset]:
    """Return digits to train with, of which 40% have another class, digits to trust, and digits to test with."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.from_numpy(images)[order].float() / 16, torch.from_numpy(labels)[order].long()
    is_wrong = torch.rand(TRAIN, generator=generator) < 0.4
    noisy = (y[:TRAIN] + is_wrong * torch.randint(1, 10, (TRAIN,), generator=generator)) % 10
    end = TRAIN + TRUSTED
    return [
        TensorDataset(x[:TRAIN], noisy),
        TensorDataset(x[TRAIN:end], y[TRAIN:end]),
        TensorDataset(x[end:], y[end:]),
    ]


class LitDigits(L.LightningModule):
    """A network of two hidden layers.

    Args:
        width: Of the hidden layers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.model = nn.Sequential(*hidden, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, 10)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the share of wrong answers."""
        x, y = batch
        self.log("test_error", (self(x).argmax(1) != y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class AdaDigits(AdaLFLMixin, LitDigits):
    """The same, trained with a loss that learns, or one that is replayed."""


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Record, replay, and print and return the test errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=2000, help="training steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the recording; the others have the next one")
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs"), help="where the history is kept")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec).*")

    def fit(width: int, seed: int, how: str, *callbacks: L.Callback) -> float:
        train, trusted, test = load_rows(seed)
        L.seed_everything(seed, verbose=False)
        if how == "own":
            module = LitDigits(width)
        elif how == "learned":
            held_out = DataLoader(trusted, 64, shuffle=True)
            module = AdaDigits(width, adalfl=AdaLFLConfig(task="multiclass", meta_data=held_out))
        else:
            module = AdaDigits(width, adalfl=AdaLFLConfig(task="multiclass", meta_every=None))
        trainer = L.Trainer(
            max_steps=args.max_steps,
            callbacks=list(callbacks),
            default_root_dir=args.folder,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        began = time.perf_counter()
        trainer.fit(module, DataLoader(train, 64, shuffle=True))
        seconds.append(time.perf_counter() - began)
        return trainer.test(module, DataLoader(test, 697), verbose=False)[0]["test_error"]

    seconds: list[float] = []
    recorded = fit(64, args.seed, "learned", LossShapeLogger(every_n_steps=50))
    print(f"\nA network of width 64 has learned its loss; it ends with a test error of {recorded:.3f}\n")
    replay = LossReplay(args.folder / "loss_history.safetensors")
    errors = {
        "own loss": fit(256, args.seed + 1, "own"),
        "own loss, its shape learned": fit(256, args.seed + 1, "learned"),
        "own loss, its shape replayed": fit(256, args.seed + 1, "replayed", replay),
    }
    print(f"{'A network of width 256, on other digits':42}{'test error':>10}{'seconds':>9}")
    for (name, error), spent in zip(errors.items(), seconds[1:]):
        print(f"{name:42}{error:10.3f}{spent:9.1f}")
    return errors


if __name__ == "__main__":
    main()
