"""The library with Lightning Fabric: a loop of your own, on any device, in any precision.

python fabric.py                          # twenty seconds on a CPU
python fabric.py --accelerator gpu --precision bf16-mixed

Forty in a hundred training labels are flipped, each class to the next one. A small network is trained on 1,000 images
of digits with the cross-entropy, and with the same loss while its shape is learned from 100 images that can be trusted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, MetaLearner

TRAIN, TRUSTED = 1000, 100  # the other 697 test
Rows = tuple[Tensor, Tensor]


def load_rows(seed: int) -> tuple[Rows, Rows, Rows]:
    """Return digits to train with, of which 40% have the next class, digits to trust, and digits to test with."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.from_numpy(images)[order].float() / 16, torch.from_numpy(labels)[order].long()
    is_wrong = torch.rand(TRAIN, generator=generator) < 0.4
    flipped = torch.where(is_wrong, (y[:TRAIN] + 1) % 10, y[:TRAIN])
    trusted = slice(TRAIN, TRAIN + TRUSTED)
    return (x[:TRAIN], flipped), (x[trusted], y[trusted]), (x[TRAIN + TRUSTED :], y[TRAIN + TRUSTED :])


def endless(loader: Any) -> Iterator[Any]:
    """Draw batches without end, in another order each time."""
    while True:
        yield from loader


def train(fabric: Fabric, rows: Rows, trusted: Rows | None, max_steps: int, seed: int) -> nn.Module:
    """Train a network; with rows to trust, the shape of its loss is learned on the way."""
    fabric.seed_everything(seed, verbose=False)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    batches = endless(fabric.setup_dataloaders(DataLoader(TensorDataset(*rows), batch_size=64, shuffle=True)))

    if trusted is None:
        for _, (x, y) in zip(range(max_steps), batches):
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
        return model

    loader = DataLoader(TensorDataset(*trusted), batch_size=64, shuffle=True, drop_last=True)
    held_out = endless(fabric.setup_dataloaders(loader))
    learner = MetaLearner(AdaLFLConfig(task="multiclass"))
    # The optimizer itself, since Fabric's is a wrapper; Fabric's steps it, between two calls that take note.
    step = learner.new_base_step(model, optimizer.optimizer)
    for _, batch in zip(range(max_steps), batches):
        predictions, y = step.forward(batch)
        optimizer.zero_grad()
        fabric.backward(step.descend(learner.objective, F.cross_entropy(predictions, y)))
        step.before_step()
        optimizer.step()
        step.after_step()
        learner.end_base_step(step, held_out)
    return model


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both ways, and print and return the test errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed; 16-mixed needs a scaler's factor")
    args = parser.parse_args(arguments)

    fabric = Fabric(accelerator=args.accelerator, devices=1, precision=args.precision)
    fabric.launch()
    rows, trusted, test = load_rows(args.seed)
    models = {
        "own loss": train(fabric, rows, None, args.max_steps, args.seed),
        "own loss, its shape learned": train(fabric, rows, trusted, args.max_steps, args.seed),
    }
    x, y = fabric.to_device(test)
    print(f"Test error on {len(y)} digits after {args.max_steps:,} steps\n")
    with torch.no_grad():
        errors = {name: (model(x).argmax(1) != y).float().mean().item() for name, model in models.items()}
    for name, error in errors.items():
        print(f"{name:30}{error:8.4f}")
    return errors


if __name__ == "__main__":
    main()
