"""Labels that are missing: annotators mark some of the regions that a point lies in, and forget the others.

python multilabel.py                      # half a minute on a CPU

Each of 3,000 points lies in any of five regions, and 40% of its labels were forgotten. A network is trained with the
binary cross-entropy, and with the same loss while its shape is learned from 200 points whose labels are complete. The
own loss stands in the table twice, at the end of training and at the checkpoint that is best on the complete points.
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

TRAIN, COMPLETE, TEST, REGIONS = 3000, 200, 1000, 5


def load_points(forgotten: float, seed: int) -> list[TensorDataset]:
    """Return points to train with, whose labels are partly forgotten; points to trust; and points to test with."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(TRAIN + COMPLETE + TEST, 2, generator=generator) * 2 - 1
    y = (torch.cdist(x, torch.rand(REGIONS, 2, generator=generator) * 2 - 1) < 0.7).float()
    marked = y.clone()
    marked[:TRAIN] *= torch.rand(TRAIN, REGIONS, generator=generator) > forgotten
    end = TRAIN + COMPLETE
    return [
        TensorDataset(x[:TRAIN], marked[:TRAIN]),
        TensorDataset(x[TRAIN:end], y[TRAIN:end]),
        TensorDataset(x[end:], y[end:]),
    ]


class LitTagger(L.LightningModule):
    """Predicts five independent labels; logits and targets of 0 and 1 have shape (N, 5)."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, REGIONS))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, 5)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the binary cross-entropy."""
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the share of wrong labels."""
        x, y = batch
        self.log("val_error", ((self(x) > 0) != (y > 0.5)).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the share of wrong labels."""
        x, y = batch
        self.log("test_error", ((self(x) > 0) != (y > 0.5)).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class AdaTagger(AdaLFLMixin, LitTagger):
    """The same, trained with a loss that learns."""


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both ways, and print and return the test errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=2000, help="training steps of each run")
    parser.add_argument("--forgotten", type=float, default=0.4, help="share of the labels that are missing")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec).*")
    train, complete, test = load_points(args.forgotten, args.seed)

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
        trainer.fit(kind(**options), DataLoader(train, 64, shuffle=True), DataLoader(complete, COMPLETE))
        return trainer

    def error(trainer: L.Trainer, path: str | None = None) -> float:
        return trainer.test(trainer.lightning_module, DataLoader(test, TEST), path, verbose=False)[0]["test_error"]

    best = ModelCheckpoint(monitor="val_error")
    own = fit(LitTagger, best)
    learned = fit(AdaTagger, adalfl=AdaLFLConfig(task="multilabel"))
    errors = {
        "own loss, at the end": error(own),
        "own loss, best checkpoint": error(own, best.best_model_path or None),
        "with lightning_adalfl": error(learned),
    }
    print(f"\nShare of wrong labels on {TEST:,} test points after {args.max_steps:,} steps\n")
    for name, value in errors.items():
        print(f"{name:28}{value:8.4f}")
    return errors


if __name__ == "__main__":
    main()
