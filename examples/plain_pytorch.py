"""A learned loss in a plain PyTorch loop, without Lightning.

python examples/plain_pytorch.py --steps 300
"""

from __future__ import annotations

import argparse
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import trange

from lightning_adalfl import BaseStep, LossNetwork, hypergradient


def main() -> None:
    """Learn a loss for a small regression, one meta step after each base step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    torch.manual_seed(0)
    x = torch.rand(1200, 3) * 2 - 1
    y = (x[:, :1] * x[:, 1:2] + 0.3 * x[:, 2:]).tanh()
    train = cycle(DataLoader(TensorDataset(x[:800], y[:800]), batch_size=64, shuffle=True))
    val = cycle(DataLoader(TensorDataset(x[800:1000], y[800:1000]), batch_size=64, shuffle=True))

    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = LossNetwork("regression")
    meta_optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    step = BaseStep(model, optimizer)

    for _ in (bar := trange(args.steps)):
        optimizer.zero_grad()
        predictions, target = step.forward(next(train))
        loss(predictions, target).backward()
        step.step()

        gradient = hypergradient(step, loss, F.mse_loss, next(val))
        for parameter, g in zip(loss.parameters(), gradient.loss):
            parameter.grad = g
        meta_optimizer.step()
        bar.set_postfix(task_loss=f"{gradient.task_loss:.4f}")

    with torch.no_grad():
        print(f"test error: {F.mse_loss(model(x[1000:]), y[1000:]):.4f}, of a constant: {y[1000:].var():.4f}")


if __name__ == "__main__":
    main()
