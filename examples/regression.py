"""Regression: the disease progression of scikit-learn's diabetes data, targets scaled to [0, 1].

python examples/regression.py --steps 500
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from base_models import build_model
from tasks import load_task, loaders

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin, LossShapeLogger


class Regressor(L.LightningModule):
    """Predicts one value an instance; predictions and targets have shape (N, 1)."""

    def __init__(self, lr: float = 0.001) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model("mlp", (10,), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return values of shape (N, 1)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Log and return the squared error."""
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.log("train_error", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the squared error."""
        x, y = batch
        self.log("val_error", F.mse_loss(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the squared error."""
        x, y = batch
        self.log("test_error", F.mse_loss(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class AdaRegressor(AdaLFLMixin, Regressor):
    """The same with a loss that learns."""


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--init-steps", type=int, default=0, help="meta steps of an offline phase")
    args = parser.parse_args()

    L.seed_everything(0)
    data = loaders(load_task("diabetes", Path("data"), seed=0), batch_size=128, seed=0)
    model = AdaRegressor(adalfl=AdaLFLConfig(task="regression"))
    trainer = L.Trainer(
        max_steps=args.steps,
        log_every_n_steps=1,
        enable_checkpointing=False,
        callbacks=[AdaLFLInit(steps=args.init_steps), LossShapeLogger(every_n_steps=20)],
    )
    trainer.fit(model, data.train, data.val)
    trainer.test(model, data.test)


if __name__ == "__main__":
    main()
