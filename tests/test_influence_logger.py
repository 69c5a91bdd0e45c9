"""A user attaches InfluenceLogger, and has a list of the training targets to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from projects import Ada, AdaSmooth, Keep, Smooth, adaptive, assert_same, config, loaders, make, points, tensors
from projects import trainer as plain_trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from lightning_adalfl import InfluenceLogger
from lightning_adalfl.inspection import InfluenceTable

WATCHED = config(learn="nothing")

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


class Weighted(Smooth):
    """Gives instance ``turned`` of the third batch another weight."""

    turned: tuple[int, float] = (0, 0.0)
    optimizer = "SGD"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weight = torch.ones(len(y), dtype=x.dtype)
        if batch_idx == 2:
            weight[self.turned[0]] += self.turned[1]
        return (F.cross_entropy(self(x), y, reduction="none") * weight).mean()

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Normalised(Weighted):
    """The same with BatchNorm."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", [Weighted, Normalised])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_influence_is_the_slope_of_the_held_out_loss_by_the_weight_of_an_instance(
    name: str, kind: type[Weighted], tmp_path: Path
) -> None:
    """Of its loss in the batch: what BatchNorm makes of the instance stays."""
    train = DataLoader(points(30, dtype=torch.float64), 10)
    held_out = points(20, 1, torch.float64)

    def fitted(place: int, change: float, logger: list[Any]) -> float:
        module = make(
            adaptive(kind), adalfl=config(learn="nothing", meta_every=3, meta_batch_size=20, task_loss="handcrafted")
        )
        module.turned, module.optimizer = (place, change), name
        plain_trainer(tmp_path, max_epochs=1, precision="64-true", callbacks=logger).fit(
            module, train, DataLoader(held_out, 20)
        )
        x, y = held_out.tensors
        return F.cross_entropy(module.double().train()(x), y).item()

    logger = InfluenceLogger()
    fitted(0, 0.0, [logger])
    step = 1e-4
    slopes = torch.tensor([fitted(i, step, []) - fitted(i, -step, []) for i in range(10)], dtype=torch.float64) / (
        2 * step
    )
    assert logger.table.mean("seen").tolist() == [0.0] * 20 + [1.0] * 10
    found = torch.from_numpy(logger.table.mean("influence")[20:])
    torch.testing.assert_close(found, slopes / slopes.abs().mean(), rtol=1e-5, atol=1e-6)


class Numbered(Dataset[Any]):
    """Points that know their number: the third part of a batch, which the model does not see."""

    def __init__(self, size: int = 96) -> None:
        self.points, self.size = points(size), size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return *self.points[index], index


class ByNumber(Smooth):
    """Keeps which instances its steps have seen."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.seen = torch.zeros(96)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(batch[0]), batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, number = batch
        run, is_due = self._adalfl_run, self.adalfl.is_due
        assert torch.equal(run.instances, number)
        self.seen.index_add_(0, number, torch.full((len(number),), float(is_due)))
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return


class Pairs(BatchSampler):
    """Yields the instances in pairs, the last first."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        yield from ([i, i - 1] for i in range(self.size - 1, 0, -2))

    def __len__(self) -> int:
        return self.size // 2


def by_sampler(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbered(), **options)


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        ({"batch_size": 10, "shuffle": True}, {}),
        ({"batch_size": 10, "shuffle": True}, {"accumulate_grad_batches": 3}),
        ({"batch_size": 10, "shuffle": True, "num_workers": 2, "persistent_workers": True}, {}),
        ({"batch_size": 10, "drop_last": True, "sampler": RandomSampler(range(96), True)}, {"limit_train_batches": 4}),
        ({"batch_sampler": Pairs(96)}, {"reload_dataloaders_every_n_epochs": 1}),
        ({"batch_size": 10, "shuffle": True}, {"overfit_batches": 3}),
    ],
    ids=["shuffled", "accumulated", "workers", "with replacement", "batch sampler", "overfit"],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_instances_are_told_apart_in_whatever_order_they_come(loader: Any, options: Any, tmp_path: Path) -> None:
    logger, module = InfluenceLogger(), make(adaptive(ByNumber), adalfl=config(learn="nothing", meta_every=2))
    train = by_sampler(**loader)
    sampler = train.batch_sampler

    class Peeks(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            list(train)  # as a user does who looks at the training data between two epochs

    held_out = DataLoader(points(32, 1), 16)
    plain_trainer(tmp_path, max_epochs=3, callbacks=[logger, Peeks()], **options).fit(module, train, held_out)
    assert module.seen.sum() > 0
    assert logger.table.mean("seen").tolist() == module.seen.tolist()
    assert train.batch_sampler is sampler


@pytest.mark.parametrize("learn", ["nothing", "loss", "lr", "both"])
def test_training_is_the_same_with_and_without_it(learn: str, tmp_path: Path) -> None:
    def fitted(callbacks: list[Any]) -> Any:
        module = make(Ada, adalfl=config(learn=learn, meta_data="train"))  # with BatchNorm and dropout
        plain_trainer(tmp_path, callbacks=callbacks).fit(module, *loaders())
        return module

    watched, alone = fitted([InfluenceLogger()]), fitted([])
    assert_same(tensors(watched), tensors(alone))
    assert_same(watched.adalfl.learned, alone.adalfl.learned)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("steps", [(), (8,)], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_ends_with_the_same_table(steps: tuple[int, ...], tmp_path: Path) -> None:
    """Within an epoch Lightning begins the data anew, and in another order where they are shuffled."""

    def fitted(callbacks: list[Any], checkpoint: Path | None = None, epochs: int = 3) -> InfluenceTable:
        torch.manual_seed(1)
        train = DataLoader(points(96), 16, shuffle=not steps)
        logger, module = InfluenceLogger(), make(AdaSmooth, adalfl=config(learn="loss"))
        t = plain_trainer(tmp_path, max_epochs=epochs, callbacks=[logger, *callbacks])
        t.fit(module, train, DataLoader(points(32, 1), 16), ckpt_path=checkpoint)
        return logger.table

    whole = fitted([Keep(tmp_path, steps)])
    resumed = fitted([], next(tmp_path.glob("step=8.ckpt" if steps else "epoch=1.ckpt")))
    if steps:
        # Two batches of the second epoch were taken; its other four are the first ones again.
        assert resumed.mean("seen").tolist() == [4.0] * 32 + [3.0] * 32 + [2.0] * 32
    else:
        assert_same(vars(whole) | {"task": torch.zeros(1)}, vars(resumed) | {"task": torch.zeros(1)})


def found(train: Any, module: Any, tmp_path: Path, logger: Any = None, **options: Any) -> InfluenceTable:
    """Train and return the table."""
    logger = InfluenceLogger() if logger is None else logger
    plain_trainer(tmp_path, callbacks=[logger], **options).fit(module, train, DataLoader(points(32, 1), 16))
    return logger.table


def flipped(size: int = 480) -> tuple[TensorDataset, np.ndarray]:
    """Return points of which a quarter have the next class, and which."""
    x, y = points(size).tensors
    wrong = torch.arange(size) % 4 == 0
    return TensorDataset(x, torch.where(wrong, (y + 1) % 3, y)), wrong.numpy()


@pytest.mark.parametrize("learn", ["nothing", "loss"])
def test_wrong_labels_are_found(learn: str, tmp_path: Path) -> None:
    data, wrong = flipped()
    module = make(AdaSmooth, adalfl=config(learn=learn, meta_lr=1e-3))
    table = found(DataLoader(data, 32, shuffle=True), module, tmp_path, max_epochs=12)
    columns = table.columns()
    area = {name: roc_auc_score(wrong, values) for name, values in columns.items()}
    assert area["score"] > 0.93
    assert area["score"] > max(area["loss"], 1 - area["margin"], area["misclassified"]) + 0.02
    assert area["label_quality"] == pytest.approx(1 - area["score"], abs=1e-3)
    suspected = columns["label_quality"] < 0.5
    assert wrong[suspected].mean() > 0.8
    assert suspected[wrong].mean() > 0.5
    assert np.array_equal(np.sort(table.ranking()), np.arange(len(data)))


class Values(Smooth):
    """A regression."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__(lr)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return


class Flags(Values):
    """Binary classification of the same shape, or labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


@pytest.mark.parametrize(("task", "kind"), [("regression", Values), ("binary", Flags), ("multilabel", Flags)])
def test_wrong_targets_of_other_tasks_are_found(task: str, kind: type[Values], tmp_path: Path) -> None:
    x, _ = points(480).tensors
    y = x[:, :1].clone() if task == "regression" else (x[:, :1] > 0).float()
    wrong = torch.arange(480) % 5 == 0
    y[wrong] = y[wrong] + 2 if task == "regression" else 1 - y[wrong]
    held_out = points(64, 1).tensors[0]
    right = held_out[:, :1] if task == "regression" else (held_out[:, :1] > 0).float()
    logger, module = InfluenceLogger(), make(adaptive(kind), adalfl=config(task=task, learn="nothing"))
    plain_trainer(tmp_path, callbacks=[logger], max_epochs=10).fit(
        module, DataLoader(TensorDataset(x, y), 32, shuffle=True), DataLoader(TensorDataset(held_out, right), 32)
    )
    assert wrong.numpy()[logger.table.ranking()[:96]].mean() > 0.85
    assert ("margin" in logger.table.columns()) == (task != "regression")
