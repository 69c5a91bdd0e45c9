"""Multilabel: which of five overlapping regions a point lies in.

python examples/multilabel.py --steps 400
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelF1Score

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin, LossShapeLogger

LABELS = 5


class Tagger(L.LightningModule):
    """Predicts independent labels; logits and 0/1 targets have shape (N, labels)."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, LABELS))
        self.val_f1 = MultilabelF1Score(LABELS)
        self.test_f1 = MultilabelF1Score(LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (N, labels)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the binary cross-entropy."""
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the F1 score."""
        x, y = batch
        self.val_f1(self(x), y.int())
        self.log("val_f1", self.val_f1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the F1 score."""
        x, y = batch
        self.test_f1(self(x), y.int())
        self.log("test_f1", self.test_f1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"] / 10)


class AdaTagger(AdaLFLMixin, Tagger):
    """The same with a loss that learns."""


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--init-steps", type=int, default=0, help="meta steps of an offline phase")
    args = parser.parse_args()

    L.seed_everything(0)
    x = torch.rand(3000, 2) * 2 - 1
    centres = torch.rand(LABELS, 2) * 2 - 1
    y = (torch.cdist(x, centres) < 0.8).float()
    bounds = [(0, 2000), (2000, 2500), (2500, 3000)]
    parts = [DataLoader(TensorDataset(x[a:b], y[a:b]), 64, shuffle=a == 0) for a, b in bounds]
    model = AdaTagger(adalfl=AdaLFLConfig(task="multilabel"))
    trainer = L.Trainer(
        max_steps=args.steps,
        log_every_n_steps=10,
        enable_checkpointing=False,
        callbacks=[AdaLFLInit(steps=args.init_steps), LossShapeLogger(every_n_steps=20)],
    )
    trainer.fit(model, parts[0], parts[1])
    trainer.test(model, parts[2])


if __name__ == "__main__":
    main()
