"""Tiny data sets in the formats in which the real ones are distributed, and a way to look at loaded ones."""

from __future__ import annotations

import gzip
import pickle
import struct
import tarfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from scipy.io import savemat
from sklearn.utils import Bunch
from tasks import in_order


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def write_idx(folder: Path, compress: bool, per_class: int = 20) -> None:
    """The four idx files of MNIST: a big-endian header of magic number and sizes, then bytes."""
    folder.mkdir(parents=True)
    suffix, opener = (".gz", gzip.open) if compress else ("", open)
    for part, count in (("train", 10 * per_class), ("t10k", 50)):
        images = generator().integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        with opener(folder / f"{part}-images-idx3-ubyte{suffix}", "wb") as file:
            file.write(struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes())
        with opener(folder / f"{part}-labels-idx1-ubyte{suffix}", "wb") as file:
            file.write(struct.pack(">II", 0x801, count) + labels.tobytes())


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, classes: int, count: int) -> None:
    """The pickled batches of CIFAR in their archive; torchvision checks sums, so it is told those of the tiny files."""
    dataset_class = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    folder = root / "made" / dataset_class.base_folder
    folder.mkdir(parents=True)
    labels_key = "labels" if classes == 10 else "fine_labels"

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(dataset_class, attribute):
            rows = generator().integers(0, 256, (count, 3072), dtype=np.uint8)
            rows[:, :1024] //= 4  # a dark red channel, to tell the channels apart
            entries.append([name, write(name, {"data": rows, labels_key: [row % classes for row in range(count)]})])
        monkeypatch.setattr(dataset_class, attribute, entries)
    meta = dict(dataset_class.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [str(label) for label in range(classes)]})
    monkeypatch.setattr(dataset_class, "meta", meta)
    with tarfile.open(root / dataset_class.filename, "w:gz") as archive:
        archive.add(folder, dataset_class.base_folder)
    monkeypatch.setattr(dataset_class, "tgz_md5", md5((root / dataset_class.filename).read_bytes()).hexdigest())


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MATLAB files of SVHN: X of shape (32, 32, 3, N), y of shape (N, 1) with 10 for the digit 0."""
    split_list = {}
    for split, count in (("train", 200), ("test", 30)):
        name = f"{split}_32x32.mat"
        images = generator().integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(root / name, {"X": images, "y": (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]})
        split_list[split] = [
            torchvision.datasets.SVHN.split_list[split][0],
            name,
            md5((root / name).read_bytes()).hexdigest(),
        ]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)


def crime_table(rows: int = 200) -> Bunch:
    """What OpenML's Communities and Crime looks like: keys, gaps, and numbers declared as nominal."""
    random = generator()
    numbers = pd.DataFrame(random.random((rows, 4)), columns=["population", "racePctWhite", "medIncome", "PctKids"])
    gaps = np.where(np.arange(rows) % 5 == 0, random.random(rows), np.nan)
    nominal = pd.Categorical(["?"] + [f"{value:.2f}" for value in random.random(rows - 1)])
    data = numbers.assign(
        state=1.0, communityname="Somewhere", fold=1.0, county=np.nan, LemasSwornFT=gaps, OtherPerCap=nominal
    )
    return Bunch(frame=data.assign(ViolentCrimesPerPop=random.random(rows) * 3))


def stacked(dataset: torch.utils.data.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """All of a data set as one batch."""
    return next(iter(in_order(dataset, 10_000)))
