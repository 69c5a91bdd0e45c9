"""A user attaches InfluenceLogger, and has a list of the training targets to look at."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import ddp_influence
import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from processes import in_two_processes
from projects import Ada, AdaSmooth, Keep, Smooth, adaptive, assert_same, config, loaders, make, points, tensors
from projects import trainer as plain_trainer
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from lightning_adalfl import AdaLFLConfig, InfluenceLogger
from lightning_adalfl.__main__ import main
from lightning_adalfl.adapter.recorded_indices import indices_of, record
from lightning_adalfl.callbacks import influence_logger
from lightning_adalfl.inspection import InfluenceTable
from lightning_adalfl.inspection.target_scores import other_targets, target_scores
from lightning_adalfl.losses.tasks import task_named

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
        names = ("sums", "probes", "probe_weights")
        assert_same(*({name: getattr(table, name) for name in names} for table in (whole, resumed)))


def found(train: Any, module: Any, tmp_path: Path, logger: Any = None, **options: Any) -> InfluenceTable:
    """Train and return the table."""
    logger = InfluenceLogger() if logger is None else logger
    plain_trainer(tmp_path, callbacks=[logger], **options).fit(module, train, DataLoader(points(128, 1), 32))
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
    assert area["score"] > max(area["loss"], 1 - area["margin"], area["misclassified"])
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


class Pictures(Dataset[Any]):
    """Squares in one of three rows, of which every fourth has the label of the next row."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        image = torch.rand(1, 6, 6) * 0.5  # drawn each time, as an augmentation draws
        row = index % 3
        image[0, 2 * row : 2 * row + 2, 2:4] += 1
        return image, (row + (index % 4 == 0)) % 3


class Looks(Smooth):
    """Classifies them."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    logger, boards = InfluenceLogger(), TensorBoardLogger(tmp_path)
    module, held_out = make(adaptive(Looks), adalfl=WATCHED), DataLoader(points(4), 2)
    held_out = DataLoader(torch.utils.data.Subset(Pictures(300), [i for i in range(300) if i % 4]), 32)
    plain_trainer(tmp_path, callbacks=[logger], logger=boards, max_epochs=4).fit(
        module, DataLoader(Pictures(240), 32, shuffle=True), held_out
    )
    folder = Path(boards.log_dir)
    assert {"influence.safetensors", "influence.png", "influence_images.png"} <= {f.name for f in folder.iterdir()}
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    for tag in ("adalfl/influence", "adalfl/influence_images"):
        assert [image.step for image in events.Images(tag)] == [module.adalfl.base_steps]
    worst, best = logger.table.ranking()[:20], logger.table.ranking()[-20:]
    assert (worst % 4 == 0).mean() > 0.9
    assert not (best % 4 == 0).any()
    for table in (InfluenceTable.load(folder), InfluenceTable.load(folder / "influence.safetensors")):
        assert np.array_equal(table.score(), logger.table.score(), equal_nan=True)


def by_hand(task: str = "multiclass") -> InfluenceTable:
    """Return four instances, of which the last was never seen, and no held-out ones."""
    sums = torch.tensor(
        [[2, 2.0, 1.0, 4.0, -2.0, 2], [1, -1.0, -0.5, 0.5, 3.0, 0], [4, 2.0, 0.4, 4, -4.0, 3], [0, 0, 0, 0, 0, 0]]
    )
    return InfluenceTable(task, sums, torch.zeros(0, 1, 5), torch.zeros(0, 0))


def test_a_table_holds_means_and_ranks_by_agreement_where_nothing_was_held_out(tmp_path: Path) -> None:
    table, nan = by_hand(), np.nan
    np.testing.assert_allclose(table.mean("influence"), [1.0, -1.0, 0.5, nan])
    np.testing.assert_allclose(table.mean("misclassified"), [1.0, 0.0, 0.75, nan])
    np.testing.assert_allclose(table.score(), [0.5, -0.5, 0.1, nan], rtol=1e-6)
    np.testing.assert_allclose(table.label_quality(), [0.25, 0.75, 0.45, 1.0], rtol=1e-6)
    assert table.ranking().tolist() == [0, 2, 1]
    found = table.by(["ann", "ben", "ann", "ben"])
    assert {name: row["instances"] for name, row in found.items()} == {"ann": 2, "ben": 2}
    assert found["ann"]["influence"] == pytest.approx(1.5)
    assert found["ben"] == pytest.approx({"instances": 2, "influence": -1.0, "label_quality": 0.875})
    with pytest.raises(ValueError, match="`keys` must hold one for each of 4 instances; got 3"):
        table.by("abc")
    frame = table.to_pandas()
    assert frame.index.name == "index"
    table.to_csv(tmp_path / "influence.csv")
    written = pandas.read_csv(tmp_path / "influence.csv", index_col="index")
    pandas.testing.assert_frame_equal(frame, written, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("task", ["multiclass", "binary", "regression"])
def test_scores_are_what_they_say_however_sure_a_prediction_is(task: str) -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(50, 3 if task == "multiclass" else 1, generator=generator, dtype=torch.float64)
    f[:20] *= torch.logspace(0, 2, 20).unsqueeze(1)
    h = torch.randn(f.shape, generator=generator, dtype=torch.float64) * 1e-9
    y = torch.randint(0, f.shape[1], (50,), generator=generator)
    y = y if task == "multiclass" else torch.randint(0, 2, f.shape, generator=generator).double()
    known = task_named(task)
    leaf = f.clone().requires_grad_()
    losses = torch.stack([known.loss(leaf[i : i + 1], y[i : i + 1]) for i in range(50)])
    (tau,) = torch.autograd.grad(losses.sum(), leaf)
    agreement, loss, margin, misclassified = target_scores(known, f, y, h, None, 50).double().unbind(1)
    assert agreement.abs().max() <= 1 + 1e-6
    is_kept = tau.abs().amax(1) > 1e-7  # what float32 can tell
    expected = F.cosine_similarity(tau, h, eps=1e-300)
    torch.testing.assert_close(agreement[is_kept], expected[is_kept], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(loss, losses.detach(), rtol=1e-4, atol=1e-6)
    if task == "regression":
        assert margin.isnan().all()
        return
    is_wrong = f.argmax(1) != y if task == "multiclass" else ((f > 0) != (y > 0)).squeeze(1)
    assert torch.equal(misclassified > 0, is_wrong)
    assert torch.equal(margin < 0, is_wrong)


def test_tokens_of_a_sequence_count_together_and_those_without_weight_not_at_all() -> None:
    generator = torch.Generator().manual_seed(0)
    f, h = (torch.randn(4 * 5, 3, generator=generator) for _ in range(2))
    y = torch.randint(0, 3, (4 * 5,), generator=generator)
    y[::5] = -1
    flat = target_scores(task_named("multiclass", ignore_index=-1), f, y, h, None, 4)
    weight = (y >= 0).float()
    upright = [t.view(4, 5, 3).movedim(2, 1) for t in (f, h)]
    y[::5] = 2
    for found in (
        target_scores(task_named("multiclass"), f, y, h, weight, 4),
        target_scores(task_named("multiclass"), upright[0], y.view(4, 5), upright[1], weight.view(4, 5), 4),
    ):
        torch.testing.assert_close(found, flat)
    kept = (f.view(4, 5, 3)[:, 1:], y.view(4, 5)[:, 1:])
    losses = F.cross_entropy(kept[0].reshape(-1, 3), kept[1].reshape(-1), reduction="none").view(4, 4).mean(1)
    torch.testing.assert_close(flat[:, 1], losses)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_losses_count_unless_those_held_out_differ_twice_as_much(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(200, 6, generator=generator)
    rows[:, 0] = 1
    rows[:60, 2] += 0.5
    probes = torch.rand(50, 2, 5, generator=generator)
    probes[..., 0] = 1
    probes[:, 1, 1] += 0.5  # a wrong target agrees less with the others, and has a larger loss
    probes[:, 1, 2] += 0.5
    probes[..., 2] *= scale
    table = InfluenceTable("multiclass", rows, probes, torch.ones(50, 1))
    by_agreement = np.argsort(-table.mean("agreement"), kind="stable")
    assert np.array_equal(table.ranking(), by_agreement) == (scale > 2)


def test_a_million_instances_take_24_megabytes(tmp_path: Path) -> None:
    table = InfluenceTable("binary", torch.rand(1_000_000, 6), torch.zeros(0, 1, 5), torch.zeros(0, 0))
    table.save(tmp_path / "influence.safetensors")
    assert (tmp_path / "influence.safetensors").stat().st_size < 24_001_000


def test_numbers_beyond_a_million_are_written_whole(tmp_path: Path) -> None:
    sums = torch.ones(1_000_002, 6)
    InfluenceTable("binary", sums, torch.zeros(0, 1, 5), torch.zeros(0, 0)).to_csv(tmp_path / "i.csv")
    assert (tmp_path / "i.csv").read_text().splitlines()[-1].startswith("1000001,")


def test_instances_are_added_up_by_keys_of_any_kind() -> None:
    table = InfluenceTable("binary", torch.ones(4, 6), torch.zeros(0, 1, 5), torch.zeros(0, 0))
    for keys in (
        [1, "1", 1, None],
        [(0, "a"), (0, "b"), (0, "a"), ()],
        np.array([3, 1, 3, 2]),
        torch.tensor([3, 1, 3, 2]),
    ):
        found = table.by(keys)
        assert list(found) == list(dict.fromkeys(keys.tolist() if hasattr(keys, "tolist") else keys))
        assert [one["instances"] for one in found.values()] == [2, 1, 1]
        assert [one["influence"] for one in found.values()] == [2.0, 1.0, 1.0]


def test_a_table_of_which_nothing_was_seen_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = InfluenceTable("binary", torch.zeros(4, 6), torch.zeros(0, 1, 5), torch.zeros(0, 0))
    table.save(tmp_path / "influence.safetensors")
    assert main(["influence", str(tmp_path), "--output", str(tmp_path / "a.png")]) == 1
    assert "no instance was seen by a meta step" in capsys.readouterr().err


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = flipped(96)
    found(DataLoader(data, 16), make(AdaSmooth, adalfl=WATCHED), tmp_path)
    output = tmp_path / "out" / "influence.png"
    assert (
        main(["influence", str(tmp_path), "--output", str(output), "--csv", str(tmp_path / "i.csv"), "--rows", "5"])
        == 0
    )
    text = capsys.readouterr().out
    worst = InfluenceTable.load(tmp_path).ranking()[:5]
    assert [int(line.split()[0]) for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()] == [
        *worst
    ]
    assert output.exists()
    assert (tmp_path / "i.csv").exists()
    assert main(["influence", str(tmp_path / "nowhere")]) == 1
    assert "there is no such file" in capsys.readouterr().err


class Stream(IterableDataset[Any]):
    """Numbered points from a stream."""

    def __iter__(self) -> Any:
        data = Numbered()
        yield from (data[i] for i in range(len(data)))


class Indexed(ByNumber):
    """Says which instances a batch holds."""

    def adalfl_index(self, batch: Any) -> Any:
        return batch[2]


def test_a_module_says_which_instances_a_stream_holds(tmp_path: Path) -> None:
    module = make(adaptive(Indexed), adalfl=WATCHED)
    table = found(DataLoader(Stream(), 16), module, tmp_path, InfluenceLogger(size=96))
    assert table.mean("seen").tolist() == [2.0] * 96


class InColumn(ByNumber):
    """Says it in a column."""

    def adalfl_index(self, batch: Any) -> Any:
        return batch[2].unsqueeze(1)


def test_numbers_may_stand_in_a_column(tmp_path: Path) -> None:
    table = found(by_sampler(batch_size=16), make(adaptive(InColumn), adalfl=WATCHED), tmp_path)
    assert table.mean("seen").tolist() == [2.0] * 96


class Nameless(Smooth):
    """Gives none."""

    def adalfl_index(self, batch: Any) -> None:
        return


class Named(Numbered):
    """The same by name."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(int(index))[:2]


class Fewer(Smooth):
    """Leaves one out."""

    def adalfl_index(self, batch: Any) -> Any:
        return range(len(batch[1]) - 1)


class Batches:
    """An iterable that is no DataLoader."""

    def __iter__(self) -> Any:
        return iter(loaders()[0])


class Real(Indexed):
    """Gives no whole numbers."""

    def adalfl_index(self, batch: Any) -> Any:
        return batch[2] + 0.5


@pytest.mark.parametrize(
    ("kind", "train", "size", "message"),
    [
        (Smooth, lambda: DataLoader(Stream(), 16), None, "a DataLoader over Stream does not tell which instances"),
        (Smooth, lambda: DataLoader(points(), None), None, "a DataLoader over TensorDataset does not tell which"),
        (Smooth, lambda: Batches(), None, "a Batches does not tell which instances it draws"),
        (Smooth, lambda: [DataLoader(points(), 8)] * 2, None, "come from a _MaxSizeCycle and no single DataLoader"),
        (Indexed, lambda: DataLoader(Stream(), 16), None, "`size` is needed where the data have no length"),
        (Indexed, lambda: by_sampler(batch_size=16), 90, r"from 0 to 89; got tensor\(\[80"),
        (Real, lambda: by_sampler(batch_size=16), None, "indices must be whole numbers from 0 to 95"),
        (Nameless, lambda: loaders()[0], None, "indices must be whole numbers from 0 to 95; got None"),
        (Smooth, lambda: DataLoader(Named(), 16, sampler=[*map(str, range(96))]), None, r"to 95; got \['0', '1'"),
        (Fewer, lambda: loaders()[0], None, "there are 15 indices for a batch of 16 instances"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    kind: Any, train: Any, size: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        found(train(), make(adaptive(kind), adalfl=WATCHED), tmp_path, InfluenceLogger(size))


def test_a_checkpoint_of_other_data_is_refused_and_one_that_is_tested_begins_no_run(tmp_path: Path) -> None:
    logger, module = InfluenceLogger(), make(AdaSmooth, adalfl=WATCHED)
    fit = plain_trainer(tmp_path, callbacks=[logger, Keep(tmp_path)])
    fit.fit(module, *loaders())
    checkpoint = tmp_path / "epoch=0.ckpt"
    other, more = plain_trainer(tmp_path, callbacks=[InfluenceLogger()]), DataLoader(points(112), 16)
    with pytest.raises(ValueError, match="the checkpoint has 96 instances, and there are 112; resume with as many"):
        other.fit(make(AdaSmooth, adalfl=WATCHED), more, loaders()[1], ckpt_path=checkpoint)
    fit.validate(module, loaders()[1], ckpt_path=checkpoint, verbose=False)
    table = found(loaders()[0], make(AdaSmooth, adalfl=WATCHED), tmp_path, logger)
    assert table.mean("seen").tolist() == [2.0] * 96


class OneInAList(Smooth):
    """Has one loader in a list."""

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch[0] if isinstance(batch[0], list) else batch
        return self(x), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[0], batch_idx)


def test_one_loader_in_a_list_is_left_as_it_was(tmp_path: Path) -> None:
    train = loaders()[0]
    sampler = train.batch_sampler
    table = found([train], make(adaptive(OneInAList), adalfl=WATCHED), tmp_path, InfluenceLogger(96))
    assert table.mean("seen").tolist() == [2.0] * 96
    assert train.batch_sampler is sampler


class Frozen(Looks):
    """Has a layer that stays as it is used, and takes images of any size."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.model.insert(0, nn.AdaptiveAvgPool2d(6))
        self.model[4].eval()


class OfTwoSizes(Pictures):
    """Squares in images of two sizes."""

    def __getitem__(self, index: int) -> Any:
        image, target = super().__getitem__(index)
        return image[..., index % 2 :], target


@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.parametrize(("data", "size"), [(Pictures, 16), (OfTwoSizes, 1)])
def test_drawing_images_leaves_modes_alone_and_sizes_may_differ(data: Any, size: int, tmp_path: Path) -> None:
    module = make(adaptive(Frozen), adalfl=config(learn="nothing", meta_batch_size=size))
    train, held_out = (DataLoader(data(count), size) for count in (32, 16))
    plain_trainer(tmp_path, callbacks=[InfluenceLogger()]).fit(module, train, held_out)
    assert not module.model[4].training
    assert (tmp_path / "influence_images.png").exists() == (size > 1)


def test_a_process_that_writes_nothing_predicts_for_the_images_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that `fully_shard` has sharded predicts in all processes at once, or waits for ever."""
    asked: list[Any] = []
    monkeypatch.setattr(influence_logger, "writes", lambda trainer: False)
    monkeypatch.setattr(influence_logger, "shown", lambda module, chosen: asked.append(chosen))
    found(loaders()[0], make(AdaSmooth, adalfl=WATCHED), tmp_path)
    assert len(asked) == 1
    assert not list(tmp_path.iterdir())


def test_probes_grow_with_the_processes() -> None:
    """A run of two processes goes on from one of a single one."""
    one = influence_logger._Sums(4, {})
    one.update_probes(0, torch.ones(2, 3, 5), torch.ones(2, 2), 2, False)
    two = influence_logger._Sums(4, one.copies())
    two.update_probes(2, torch.ones(2, 3, 5), torch.ones(2, 2), 4, False)
    assert torch.equal(two.probes, torch.ones(4, 3, 5))
    assert torch.equal(two.probe_weights, torch.ones(4, 2))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3)])
def test_other_targets_of_values_may_have_any_shape(shape: tuple[int, ...]) -> None:
    f, y = torch.randn(shape), torch.randn(shape)
    others, weights = other_targets(task_named("regression"), f, y, (f, y), 0)
    assert others.shape == (len(f), *others.shape[1:2], *f.shape[1:])
    assert weights.shape == others.shape[:2]


def test_a_target_under_a_mask_may_be_nan(tmp_path: Path) -> None:
    """It spoils no other held-out instance that is scored with wrong targets."""

    class Masked(Smooth):
        """Predicts one value; every fourth target is missing."""

        def __init__(self, lr: float = 0.1) -> None:
            super().__init__(lr)
            self.model = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            f, y, weight = self.adalfl_predict(batch)
            return (F.mse_loss(f, y.nan_to_num(), reduction="none") * weight).sum() / weight.sum()

        def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
            x, y = batch
            return self.model(x), y, y.isfinite().float()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    def data(rows: int) -> TensorDataset:
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
        y = x.sum(1, keepdim=True)
        y[::4] = torch.nan
        return TensorDataset(x, y)

    logger = InfluenceLogger()
    module = make(adaptive(Masked), adalfl=config(task="regression", learn="nothing", meta_every=1))
    t = plain_trainer(tmp_path, callbacks=[logger], max_epochs=3)
    t.fit(module, DataLoader(data(64), 16, shuffle=True), DataLoader(data(40), 20))
    table = logger.table
    assert table.probes.isfinite()[..., :3].all()
    assert table.probe_weights.isfinite().all()
    scored = table.probes[:, :, 0] > 0
    scored, weights = scored[scored.any(1)], table.probe_weights[scored.any(1)]
    assert scored[:, 1:].all()
    assert 30 < scored[:, 0].sum() < len(scored)  # with their own targets, those that have one
    assert torch.equal(scored[:, 0], weights.sum(1) > 0)


def test_what_is_not_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="InfluenceLogger looks on at meta steps"):
        found(loaders()[0], make(AdaSmooth, adalfl=AdaLFLConfig("multiclass", meta_every=None)), tmp_path)
    with pytest.raises(TypeError, match="InfluenceLogger needs a module with a learned loss; got Smooth"):
        found(loaders()[0], make(Smooth), tmp_path)
    with pytest.raises(TypeError, match="`size`"):
        InfluenceLogger("many")  # type: ignore[arg-type]


def test_an_iterator_that_draws_from_no_recorded_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="batches come from a list_iterator and no single DataLoader"):
        indices_of(iter([1]), 0)
    loader = DataLoader(points(), 16)
    record(loader)
    with pytest.raises(ValueError, match="batch 3 is none that its sampler has drawn"):
        indices_of(iter(loader), 3)


def test_the_name_of_a_table_says_what_a_file_must_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        InfluenceTable.load(tmp_path)


EXPERIMENT = Path(__file__).parents[1] / "examples" / "influence"


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_the_experiment_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENT)
    wrong_targets = importlib.import_module("wrong_targets")
    monkeypatch.setitem(wrong_targets.TRAINING, "friedman1", (3e-3, 4, 2000))
    options = Namespace(others=True, data=None, output=tmp_path)
    result = wrong_targets.measure("friedman1", "shifted up", 0, options)
    area = result["auc"]
    assert area["score"] > 0.85 > area["loss"]
    assert {"influence", "agreement", "TracIn, itself", "cleanlab, residual", "trusted rows alone"} <= set(area)
    assert result["suspected"]["precision"] > 0.8
    error = importlib.import_module("training_again").measure("friedman1", "shifted up", 0, tmp_path)["error"]
    assert error["right rows alone"] < error["drop"] < error["reweight"] < error["own loss"]
    assert callable(importlib.import_module("mislabelled").main)


def test_the_tables_of_the_page_are_those_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENT)
    influence_report = importlib.import_module("influence_report")
    text = influence_report.PAGE.read_text()
    assert influence_report.page(text) == text
    assert influence_report.page(text.replace("| 0.9", "| 0.1")) == text


class Wide(Smooth):
    """Learns its targets by heart."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__(lr)
        self.model = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("meta_every", [1, 2])
def test_losses_stay_once_targets_are_learned_by_heart_and_influence_goes_on(meta_every: int, tmp_path: Path) -> None:
    data, _ = flipped(96)

    def fitted(checkpoint: Path | None = None, callbacks: Any = ()) -> tuple[list[InfluenceTable], list[bool], Tensor]:
        torch.manual_seed(1)
        logger, tables, over = InfluenceLogger(), [], []

        class Peeks(Callback):
            def on_train_epoch_end(self, *_: Any) -> None:
                tables.append(logger.table)
                over.append(bool(logger.state_dict()["course"][5]))

        module = make(adaptive(Wide), adalfl=config(learn="nothing", meta_every=meta_every))
        plain_trainer(tmp_path, max_epochs=30, callbacks=[logger, Peeks(), *callbacks]).fit(
            module, DataLoader(data, 16, shuffle=True), DataLoader(points(64, 1), 32), ckpt_path=checkpoint
        )
        return tables, over, logger.state_dict()["course"]

    tables, over, course = fitted(callbacks=[Keep(tmp_path)])
    first, last = tables[over.index(True)], tables[-1]
    assert 0 < over.index(True) < 25
    assert all(over[over.index(True) :])
    seen = first.mean("seen") > 0
    assert (last.mean("seen") > first.mean("seen"))[seen].all()
    for name in ("loss", "margin", "misclassified"):
        np.testing.assert_allclose(last.mean(name)[seen], first.mean(name)[seen], rtol=1e-4, atol=1e-5)
        assert not np.isnan(last.mean(name)).any()  # an instance that comes late is scored once and for all
    for name in ("influence", "agreement"):
        assert (last.mean(name) != first.mean(name))[seen].all()
    asked = first.probes[:, 0, 0] > 0
    new, old = (table.probes[asked] for table in (last, first))
    torch.testing.assert_close(new[..., 2:] / new[..., :1], old[..., 2:] / old[..., :1], rtol=1e-4, atol=1e-5)
    for after in (28, 2):  # resumed when it was over, and before
        resumed, _, resumed_course = fitted(next(tmp_path.glob(f"epoch={after}.ckpt")))
        assert torch.equal(resumed[-1].sums, last.sums)
        assert torch.equal(resumed[-1].probes, last.probes)
        assert torch.equal(resumed_course, course)


@pytest.mark.parametrize(
    ("epochs", "is_over"),
    [
        ([(2.0, 1.0), (1.5, 0.5), (1.0, 0.9)], False),  # the held-out loss rises, below the training loss
        ([(2.0, 1.0), (0.4, 0.5), (0.2, 0.51)], False),  # it rises within its error
        ([(2.0, 1.0), (0.4, 0.5), (0.2, 0.9)], True),
        ([(2.0, 1.0), (0.4, 0.5), (0.2, 0.9), (0.1, 0.4)], True),  # for good
    ],
)
def test_what_learning_by_heart_is(epochs: list[tuple[float, float]], is_over: bool) -> None:
    logger, each = InfluenceLogger(), torch.tensor([0.9, 1.1] * 20, dtype=torch.float64)
    train, held_out = torch.zeros(10, 2, dtype=torch.float64), torch.zeros(40, 2, dtype=torch.float64)
    for of_train, of_held_out in epochs:
        train = train + torch.tensor([1.0, of_train])
        held_out = held_out + torch.stack([torch.ones(40, dtype=torch.float64), of_held_out * each], 1)
        logger._follow(train, held_out)
        logger._follow(train, held_out)  # as at the end of training, where no epoch has passed
    assert bool(logger.state_dict()["course"][5]) == is_over


def test_two_processes_have_one_table(tmp_path: Path) -> None:
    in_two_processes(Path(__file__).parent / "ddp_influence.py", tmp_path, timeout=120)
    saved = {
        (name, rank): torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        for name in ("joint", "whole", "resumed")
        for rank in range(2)
    }
    for name in ("joint", "whole", "resumed"):
        assert_same(saved[name, 0], saved[name, 1])
        assert saved[name, 0]["sums"][:, 0].tolist() == [2.0] * 96
    for name, tensor in saved["whole", 0].items():  # the sums of two processes go on as one sum, rounded otherwise
        torch.testing.assert_close(saved["resumed", 0][name], tensor)
    alone = ddp_influence.run(1, tmp_path / "alone", False)
    # But for influence, which is in units of its mean size in the batch of a process.
    kept = [0, 2, 3, 4, 5]
    torch.testing.assert_close(saved["joint", 0]["sums"][:, kept], alone.sums[:, kept], rtol=1e-5, atol=1e-6)
    seen = saved["joint", 0]["probes"][..., 0]
    assert (seen > 0).any(1).sum() == 2 * 4 * 16  # four batches in each process
