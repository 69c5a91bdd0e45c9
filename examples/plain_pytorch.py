"""The library in a loop of your own, without Lightning: a `MetaLearner`, and ten lines.

python plain_pytorch.py                   # twenty seconds on a CPU

Three in ten training targets are too high. A small network is trained with the mean squared error, and with the same
loss while its shape is learned from 150 rows that can be trusted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from sklearn.datasets import make_friedman1
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, MetaLearner

TRAIN, TRUSTED, TEST = 3000, 150, 1000
Rows = tuple[Tensor, Tensor]


def load_rows(seed: int) -> tuple[Rows, Rows, Rows]:
    """Return rows to train with, of which 30% have too high a target, rows to trust, and rows to test with."""
    inputs, values = make_friedman1(TRAIN + TRUSTED + TEST, random_state=seed)
    x, y = torch.from_numpy(inputs).float(), torch.from_numpy(values).float().unsqueeze(1)
    y = (y - y.mean()) / y.std()
    generator = torch.Generator().manual_seed(seed)
    is_wrong = torch.rand(TRAIN, 1, generator=generator) < 0.3
    too_high = y[:TRAIN] + is_wrong * 2 * torch.rand(TRAIN, 1, generator=generator)
    trusted = slice(TRAIN, TRAIN + TRUSTED)
    return (x[:TRAIN], too_high), (x[trusted], y[trusted]), (x[TRAIN + TRUSTED :], y[TRAIN + TRUSTED :])


def endless(rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches without end, in another order each time."""
    loader = DataLoader(TensorDataset(*rows), batch_size=64, shuffle=True)
    while True:
        yield from loader


def new_model(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network and its optimizer, the same for a seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    return model, torch.optim.Adam(model.parameters(), lr=3e-3)


def train_as_ever(train: Rows, max_steps: int, seed: int) -> nn.Module:
    """Train with the mean squared error."""
    model, optimizer = new_model(seed)
    for _, (x, y) in zip(range(max_steps), endless(train)):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


def train_with_a_learner(train: Rows, trusted: Rows, max_steps: int, seed: int) -> nn.Module:
    """Train with the same loss, its shape learned on the way: the ten lines."""
    model, optimizer = new_model(seed)
    learner = MetaLearner(AdaLFLConfig(task="regression"))
    step, held_out = learner.new_base_step(model, optimizer), cycle([trusted])
    for _, batch in zip(range(max_steps), endless(train)):
        predictions, y = step.forward(batch)
        optimizer.zero_grad()
        own_loss = F.mse_loss(predictions, y)
        step.descend(learner.objective, own_loss).backward()
        step.step()
        learner.end_base_step(step, held_out)
    return model


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both ways, and print and return the test errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    train, trusted, (x, y) = load_rows(args.seed)
    models = {
        "own loss": train_as_ever(train, args.max_steps, args.seed),
        "own loss, its shape learned": train_with_a_learner(train, trusted, args.max_steps, args.seed),
    }
    print(f"Mean squared error on {TEST:,} test rows after {args.max_steps:,} steps; a constant has 1\n")
    with torch.no_grad():
        errors = {name: F.mse_loss(model(x), y).item() for name, model in models.items()}
    for name, error in errors.items():
        print(f"{name:30}{error:8.4f}")
    return errors


if __name__ == "__main__":
    main()
