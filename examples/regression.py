"""Targets that are wrong in one direction: in three rows of ten a part of the value is missing.

python regression.py                      # a minute on a CPU

A network is trained on 3,000 rows with the mean squared error, with the absolute error, the usual remedy for
outliers, and with the mean squared error while its shape is learned from 150 rows that can be trusted. Nobody has to
say in which direction the targets are wrong.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import make_friedman2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, LossShapeLogger
from lightning_adalfl.inspection import plot_heatmap

TRAIN, TRUSTED, TEST = 3000, 150, 1000


def load_rows(wrong: float, seed: int) -> list[TensorDataset]:
    """Return rows to train with, a part of them with too low a target; rows to trust; and rows to test with."""
    inputs, values = make_friedman2(TRAIN + TRUSTED + TEST, random_state=seed)
    x, y = torch.from_numpy(inputs).float(), torch.from_numpy(values).float().unsqueeze(1)
    x, y = ((part - part.mean(0)) / part.std(0) for part in (x, y))
    generator = torch.Generator().manual_seed(seed)
    is_wrong = torch.rand(TRAIN, 1, generator=generator) < wrong
    noisy = y.clone()
    noisy[:TRAIN] -= is_wrong * 3 * torch.rand(TRAIN, 1, generator=generator)
    end = TRAIN + TRUSTED
    return [
        TensorDataset(x[:TRAIN], noisy[:TRAIN]),
        TensorDataset(x[TRAIN:end], y[TRAIN:end]),
        TensorDataset(x[end:], y[end:]),
    ]


class LitRegressor(L.LightningModule):
    """Predicts one value.

    Args:
        loss: Of predictions and targets.
        lr: Of Adam.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss, lr: float = 3e-3) -> None:
        super().__init__()
        self.loss, self.lr = loss, lr
        self.model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return values of shape (N, 1)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        return self.loss(self(x), y)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean squared error."""
        x, y = batch
        self.log("test_error", F.mse_loss(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class AdaRegressor(AdaLFLMixin, LitRegressor):
    """The same, trained with a loss that learns."""


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train three ways, print and return the errors, and draw the loss that was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=3000, help="training steps of each run")
    parser.add_argument("--wrong", type=float, default=0.3, help="share of the training targets that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec).*")
    train, trusted, test = load_rows(args.wrong, args.seed)

    def fit(kind: type[L.LightningModule], *callbacks: L.Callback, **options: Any) -> float:
        L.seed_everything(args.seed, verbose=False)
        module = kind(**options)
        trainer = L.Trainer(
            max_steps=args.max_steps,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            log_every_n_steps=10,
        )
        trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
        return trainer.test(module, DataLoader(test, batch_size=TEST), verbose=False)[0]["test_error"]

    # The module does not validate, so the rows to trust are given here.
    config = AdaLFLConfig(task="regression", meta_data=DataLoader(trusted, batch_size=64, shuffle=True))
    shapes = LossShapeLogger(error_range=3.0)
    errors = {
        "mean squared error": fit(LitRegressor),
        "absolute error": fit(LitRegressor, loss=F.l1_loss),
        "mean squared error, its shape learned": fit(AdaRegressor, shapes, adalfl=config),
    }
    print("\nMean squared error on the test rows; a constant has 1\n")
    for name, error in errors.items():
        print(f"{name:40}{error:8.4f}")
    (newest,) = shapes.history.shapes(1, targets=(-1.0, 0.0, 1.0), error_range=3.0)
    plot_heatmap(newest).savefig("regression.png")
    print("\nThe loss that was learned: regression.png")
    return errors


if __name__ == "__main__":
    main()
