"""What finding wrong targets is worth: training again without them, beside robust losses and the learned one.

python training_again.py                      # twenty minutes on a CPU; needs dataset-fashion-mnist
python influence_report.py --write            # the table of docs/influence.md, from training_again.jsonl

The tasks are those of `wrong_targets.py`, and the trusted rows too. Every method takes as many steps, and its
error is that of the end, on 5,000 test images or 2,000 test rows: the share of wrong classes, or the mean squared
error.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from other_detectors import BATCH, predicted
from sklearn.datasets import make_friedman1
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.utils.data import TensorDataset
from wrong_targets import (
    FASHION,
    TRAINING,
    VALUES,
    AdaNetwork,
    fit,
    kind_of,
    read_images,
    sweep,
    task_data,
    watched,
)

from lightning_adalfl import AdaLFLConfig

RECORDS = Path(__file__).parent / "training_again.jsonl"
ROWS = [
    *[("fashion", kind) for kind in ("next class", "uniform")],
    *[("friedman1", kind) for kind in ("shifted up", "shifted")],
]
Losses = Callable[[Tensor, Tensor], Tensor]  # of each row


def own(task: str) -> Losses:
    """Return the handcrafted loss of each row."""
    if task in VALUES:
        return lambda f, y: (f - y).square().flatten(1).mean(1)
    return lambda f, y: F.cross_entropy(f, y, reduction="none")


def robust(task: str) -> Losses:
    """Return the absolute error, or a generalised cross-entropy (Zhang & Sabuncu, 2018) with their q."""
    if task in VALUES:
        return lambda f, y: (f - y).abs().flatten(1).mean(1)
    return lambda f, y: -torch.expm1(0.7 * f.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)) / 0.7


def test_rows(task: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return what nothing was trained with or judged by."""
    if task == "fashion":
        x, y = read_images(FASHION, "t10k")
        return x[:5000], y[:5000]
    # The rows that follow on those of the task.
    used = TRAINING[task][2] + 300
    random_state = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed)))
    x, y = (torch.from_numpy(a).float() for a in make_friedman1(used + 2000, noise=0.0, random_state=random_state))
    return x[used:], ((y[used:] - y[:used].mean()) / y[:used].std()).unsqueeze(1)


def online_weights(model: nn.Module, losses: Losses, x: Tensor, y: Tensor, trusted: TensorDataset) -> Tensor:
    """Return learning to reweight's (Ren et al., 2018): max(0, −τ_i · h_i) for a step of gradient descent.

    h = J u, with u the step that would lower the loss on trusted rows, by forward mode: there is no second backward.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = torch.randint(len(trusted), (BATCH,))
    x_trusted, y_trusted = (t[rows] for t in trusted.tensors)
    u = grad(lambda p: losses(functional_call(model, p, (x_trusted,)), y_trusted).mean())(parameters)
    _, slope = jvp(lambda p: losses(functional_call(model, p, (x,)), y), (parameters,), (u,))
    weights = slope.clamp(min=0)
    return weights / weights.sum().clamp(min=1e-12) * len(y)


def fitted(model: nn.Module, losses: Losses, train: TensorDataset, steps: int, lr: float, **options: Any) -> nn.Module:
    """Train a copy: with a weight for each row, or with `trusted` rows that weigh them anew at each step."""
    model, (x, y) = copy.deepcopy(model), train.tensors
    weights, trusted = options.get("weights", torch.ones(len(y))), options.get("trusted")
    optimizer, taken = torch.optim.Adam(model.parameters(), lr=lr), 0
    while taken < steps:
        for rows in torch.randperm(len(y)).split(BATCH)[: steps - taken]:
            w = weights[rows]
            if trusted is not None:
                w = online_weights(model, losses, x[rows], y[rows], trusted)
            optimizer.zero_grad()
            (losses(model(x[rows]), y[rows]) * w).mean().backward()
            optimizer.step()
            taken += 1
    return model


def measure(task: str, kind: str, seed: int, output: Path) -> dict[str, Any]:
    """Return the error of each method."""
    found = task_data(task, kind, seed, output)
    model, criterion, train, trusted, wrong = found
    lr, epochs, _ = TRAINING[task]
    steps = epochs * -(-len(train) // BATCH)
    begun = copy.deepcopy(model)
    table, _ = watched(task, found, output)
    quality = torch.from_numpy(table.label_quality()).float()
    kept = TensorDataset(*(t[quality >= 0.5] for t in train.tensors))
    with_trusted = TensorDataset(*(torch.cat(pair) for pair in zip(kept.tensors, trusted.tensors)))
    right = TensorDataset(*(t[~wrong] for t in train.tensors))
    learned = AdaNetwork(copy.deepcopy(begun), criterion, lr, adalfl=AdaLFLConfig(kind_of(task)))
    fit(learned, train, trusted, epochs, output)
    models = {
        "own loss": fitted(begun, own(task), train, steps, lr),
        "robust loss": fitted(begun, robust(task), train, steps, lr),
        "learned loss": learned.model,
        "drop": fitted(begun, own(task), kept, steps, lr),
        "drop, trusted rows added": fitted(begun, own(task), with_trusted, steps, lr),
        "reweight": fitted(begun, own(task), train, steps, lr, weights=quality / quality.mean()),
        "reweight online": fitted(begun, own(task), train, steps, lr, trusted=trusted),
        "trusted rows alone": fitted(begun, own(task), trusted, steps, lr),
        "right rows alone": fitted(begun, own(task), right, steps, lr),
    }
    x, y = test_rows(task, seed)
    record = {"task": task, "kind": kind, "seed": seed, "error": {}}
    for name, trained in models.items():
        f = predicted(trained, x)
        error = (f - y).square().mean() if task in VALUES else (f.argmax(1) != y).float().mean()
        record["error"][name] = round(error.item(), 5)
    return record


def main() -> None:
    """Make the records that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["fashion", "friedman1"], choices=["fashion", "friedman1"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--output", type=Path, default=Path("training_again"))
    options = parser.parse_args()
    jobs = [(task, kind, seed) for seed in options.seeds for task, kind in ROWS if task in options.tasks]
    sweep(options.records, jobs, partial(measure, output=options.output))


if __name__ == "__main__":
    main()
