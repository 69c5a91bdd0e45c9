"""Meta batches come forever, from what the user's own loader would draw, and touch nothing of the user's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from projects import (
    CLASSES,
    Ada,
    Plain,
    Smooth,
    adaptive,
    assert_same,
    config,
    loaders,
    make,
    phi,
    points,
    tensors,
    trainer,
)
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_adalfl import AdaLFLConfig, AdaLFLInit
from lightning_adalfl.adapter.meta_batches import META, OFFLINE_BASE, OFFLINE_META, EndlessBatches, derived_seed
from lightning_adalfl.adapter.private_loader import private_copy

NO_VALIDATION = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def numbers(size: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(size))


def endless(loader: Any, seed: int = 0, **options: Any) -> EndlessBatches:
    return EndlessBatches(lambda: private_copy(loader, "the test", **options), seed)


def drawn(batches: EndlessBatches, count: int) -> list[list[int]]:
    return [torch.as_tensor(next(batches)[0]).reshape(-1).tolist() for _ in range(count)]


# A plain loader.


def test_each_pass_has_every_instance_once_in_an_order_of_its_own() -> None:
    batches = endless(DataLoader(numbers(), 5), 3)
    passes = [[number for batch in drawn(batches, 2) for number in batch] for _ in range(3)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({str(order) for order in passes}) == 3
    assert drawn(endless(DataLoader(numbers(), 5), 3), 2) == [passes[0][:5], passes[0][5:]]
    assert drawn(endless(DataLoader(numbers(), 5), 4), 1) != [passes[0][:5]]


def test_a_pass_seeds_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    drawn(endless(DataLoader(numbers(), 5, shuffle=True)), 4)
    assert seeds == []
    torch.manual_seed(3)
    assert seeds == [3]


def test_streams_of_two_purposes_seeds_or_passes_have_nothing_in_common() -> None:
    seeds = {
        derived_seed(purpose, seed, k)
        for purpose in (META, OFFLINE_BASE, OFFLINE_META)
        for seed in range(9)
        for k in range(9)
    }
    assert len(seeds) == 3 * 9 * 9
    loader = DataLoader(numbers(50), 50, shuffle=True)
    orders = {
        str(drawn(EndlessBatches(lambda: private_copy(loader, ""), 7, p), 1))
        for p in (META, OFFLINE_BASE, OFFLINE_META)
    }
    torch.manual_seed(7)
    orders.add(str([next(iter(loader))[0].tolist()]))
    assert len(orders) == 4


def test_a_short_last_batch_is_left_out_unless_it_is_all_there_is() -> None:
    assert [len(batch) for batch in drawn(endless(DataLoader(numbers(), 4)), 4)] == [4] * 4
    assert [len(batch) for batch in drawn(endless(DataLoader(numbers(3), 4)), 2)] == [3] * 2
    assert len(drawn(endless(DataLoader(numbers(), 2), batch_size=7), 1)[0]) == 7


LIMITS = [(None, 10), (0, 10), (1, 2), (3, 6), (99, 10), (0.5, 4), (1.0, 10), (0.01, 2)]


@pytest.mark.parametrize(("limit", "left"), LIMITS)
def test_limits_of_the_trainer_leave_the_first_batches(limit: Any, left: int) -> None:
    found = drawn(endless(DataLoader(numbers(), 2), limit=limit), 10)
    assert {number for batch in found for number in batch} == set(range(left))


def test_processes_share_the_data() -> None:
    parts = [endless(DataLoader(numbers(), 5), 3, replicas=(2, rank)) for rank in (0, 1)]
    for _ in range(3):
        (first,), (second,) = (drawn(part, 1) for part in parts)
        assert sorted(first + second) == list(range(10))


def test_a_plain_loader_keeps_its_options() -> None:
    def collate(items: list[Any]) -> list[Any]:
        return [torch.stack([item[0] for item in items]) + 100]

    loader = DataLoader(
        numbers(), 5, num_workers=1, collate_fn=collate, prefetch_factor=3, timeout=60, worker_init_fn=seen_by_worker
    )
    own = private_copy(loader, "")
    for name in ("dataset", "num_workers", "collate_fn", "prefetch_factor", "timeout", "worker_init_fn"):
        assert getattr(own, name) is getattr(loader, name), name
    assert min(map(min, drawn(endless(loader), 2))) >= 100


def seen_by_worker(worker: int) -> None:
    return None


# Loaders of other kinds go on in their own way.


class Rows(Dataset):
    """Takes the numbers of a whole batch."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, rows: Any) -> tuple[Tensor]:
        return (torch.as_tensor(rows),)


class Episodes(Sampler):
    """Draws batches of three numbers of one parity, from the global generator."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(4):
            parity = int(torch.randint(2, ()))
            yield [int(k) * 2 + parity for k in torch.randperm(5)[:3]]


class PythonOrder(Sampler):
    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(10), 10))


class NumpyOrder(Sampler):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(10).tolist())


class Normalising(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        for (x,) in super().__iter__():
            yield (x + 100,)


class Prefetching:
    """Wraps a loader."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader


class Noisy(Dataset):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (torch.randint(1000, (), generator=self.generator),)


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from ((torch.tensor(k),) for k in range(10))


def wrapped() -> Any:
    return Prefetching(DataLoader(numbers(), 5, shuffle=True, generator=torch.Generator().manual_seed(1)))


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[list[int]], bool]]] = {
    "subset sampler": (lambda: DataLoader(numbers(), 4, sampler=SubsetRandomSampler(range(6))), lambda b: max(b) < 6),
    "weighted": (
        lambda: DataLoader(numbers(), 4, sampler=WeightedRandomSampler([0.0] * 5 + [1.0] * 5, 8)),
        lambda b: min(b) >= 5,
    ),
    "with replacement": (
        lambda: DataLoader(numbers(), 4, sampler=RandomSampler(range(2), replacement=True, num_samples=8)),
        lambda b: max(b) < 2,
    ),
    "batch sampler": (lambda: DataLoader(numbers(), batch_sampler=Episodes()), lambda b: len({k % 2 for k in b}) == 1),
    "whole batches": (
        lambda: DataLoader(Rows(), batch_size=None, sampler=BatchSampler(SequentialSampler(range(10)), 5, False)),
        lambda b: b in (list(range(5)), list(range(5, 10))),
    ),
    "python's order": (lambda: DataLoader(numbers(), 5, sampler=PythonOrder()), lambda b: len(set(b)) == 5),
    "numpy's order": (lambda: DataLoader(numbers(), 5, sampler=NumpyOrder()), lambda b: len(set(b)) == 5),
    "subclass": (lambda: Normalising(numbers(), 5, shuffle=True), lambda b: min(b) >= 100),
    "wrapper": (wrapped, lambda b: len(set(b)) == 5),
    "wrapped workers": (
        lambda: Prefetching(DataLoader(numbers(), 5, shuffle=True, num_workers=1, persistent_workers=True)),
        lambda b: len(set(b)) == 5,
    ),
    "noise of its own": (lambda: DataLoader(Noisy(), 5), lambda b: len(b) == 5),
    "stream": (lambda: DataLoader(Stream(), 5), lambda b: b in (list(range(5)), list(range(5, 10)))),
    "list": (lambda: [(torch.arange(5),), (torch.arange(5, 10),)], lambda b: len(b) == 5),
    "distributed": (
        lambda: DataLoader(numbers(), 5, sampler=DistributedSampler(numbers(), 1, 0)),
        lambda b: len(set(b)) == 5,
    ),
}
DRAWN_AT_RANDOM = set(OTHERS) - {"whole batches", "stream", "list"}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_loaders_go_on_in_their_own_way_and_the_users_does_not_notice(kind: str) -> None:
    make_loader, is_right = OTHERS[kind]

    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    def order(loader: Any, between: Callable[[], Any]) -> list[Any]:
        seeded()
        iterator, found = iter(loader), []
        for batch in iterator:
            found.append(batch[0].reshape(-1).tolist())
            state = random.getstate(), np.random.get_state(), torch.get_rng_state()
            between()
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])
        return found

    loader = make_loader()
    batches = endless(loader, 3)
    disturbed = order(loader, lambda: drawn(batches, 1))
    assert disturbed == order(make_loader(), lambda: None)
    again = order(loader, lambda: drawn(batches, 1)), order(loader, lambda: None)
    assert kind in DRAWN_AT_RANDOM or again[0] == again[1]
    found = drawn(endless(make_loader(), 3), 9)
    assert all(map(is_right, found))
    # The same seed draws the same, whatever the generators were before.
    torch.manual_seed(9)
    random.seed(9)
    assert drawn(endless(make_loader(), 3), 9) == found
    assert kind not in DRAWN_AT_RANDOM or drawn(endless(make_loader(), 4), 9) != found


@pytest.mark.parametrize("kind", ["plain", *OTHERS])
@pytest.mark.parametrize("position", [0, 1, 2, 7])
def test_it_goes_on_from_a_position(kind: str, position: int) -> None:
    make_loader = OTHERS[kind][0] if kind in OTHERS else lambda: DataLoader(numbers(), 3, shuffle=True)
    batches = endless(make_loader(), 3)
    drawn(batches, position)
    state, random_states = batches.state_dict(), (random.getstate(), torch.get_rng_state())
    expected = drawn(batches, 4)
    resumed = endless(make_loader(), 99)
    resumed.load_state_dict(state)
    random.setstate(random_states[0])
    torch.set_rng_state(random_states[1])
    assert drawn(resumed, 4) == expected


def test_containers_of_loaders_become_combined_batches() -> None:
    combined = CombinedLoader({"a": DataLoader(numbers(), 5), "b": DataLoader(numbers(4), 2)}, "min_size")
    batch = next(endless(combined))
    assert {name: len(part[0]) for name, part in batch.items()} == {"a": 5, "b": 2}


def once() -> Iterator[Any]:
    yield from loaders()[0]


class Itself(IterableDataset):
    """Goes on where it is, whoever asks."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("loader", "name"),
    [(once(), "generator"), (DataLoader(Itself()), "Itself")],
    ids=lambda v: str(type(v)),
)
def test_what_can_be_gone_through_only_once_is_refused(loader: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"the test is {name}, which can be gone through only once.*Give a loader"):
        private_copy(loader, "the test")


@pytest.mark.parametrize("given", [3, numbers(3)])
def test_a_data_set_is_no_loader(given: Any) -> None:
    with pytest.raises(ValueError, match=r"the test is \w+, which is no loader.*Give a loader"):
        private_copy(given, "the test")


def test_an_empty_loader_is_reported() -> None:
    for loader in (DataLoader(numbers(3), 4, drop_last=True), private_copy(DataLoader(numbers(0), 4), "the test")):
        batches = EndlessBatches(lambda loader=loader: loader, 0)
        with pytest.raises(ValueError, match="held-out batches gave none; is its data set empty"):
            next(batches)


# In a fit: which data, and how large.


class Seen(Smooth):
    """Keeps the sizes and first features of held-out batches, and the batches of its training steps."""

    def on_train_start(self) -> None:
        self.held_out: list[Tensor] = []
        self.trained: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained.append(batch[0].clone())
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        if hasattr(self, "held_out") and not any(torch.equal(batch[0], x) for x in self.trained[-1:]):
            self.held_out.append(batch[0].clone())
        return self(batch[0]), batch[1]


def see(
    tmp_path: Any, train: Any, val: Any, kind: Any = Seen, adalfl: AdaLFLConfig | None = None, **options: Any
) -> Any:
    module = make(adaptive(kind), adalfl=adalfl or config())
    trainer(tmp_path, num_sanity_val_steps=0, **{"max_epochs": 1, **options}).fit(module, train, val)
    return module


def test_they_are_as_large_as_training_batches_unless_told_otherwise(tmp_path: Any) -> None:
    for val_size, size in ((1, 16), (32, 16), (96, 16)):
        module = see(tmp_path, loaders()[0], DataLoader(points(96, 1), val_size))
        assert {len(x) for x in module.held_out} == {size}
    module = see(tmp_path, *loaders(), adalfl=config(meta_batch_size=5))
    assert {len(x) for x in module.held_out} == {5}


def test_a_size_that_a_loader_with_its_own_sampler_does_not_have_is_refused(tmp_path: Any) -> None:
    held_out = points(96, 1)
    drawn = DataLoader(held_out, 8, sampler=WeightedRandomSampler(torch.ones(96), 96))
    assert {len(x) for x in see(tmp_path, loaders()[0], drawn, adalfl=config(meta_batch_size=8)).held_out} == {8}
    with pytest.raises(ValueError, match="`meta_batch_size` is 5, and the loader of held-out batches makes its own"):
        see(tmp_path, loaders()[0], drawn, adalfl=config(meta_batch_size=5))


def test_batchnorm_meets_a_validation_loader_of_single_instances(tmp_path: Any) -> None:
    module = make(Ada, adalfl=config())
    trainer(tmp_path).fit(module, loaders()[0], DataLoader(points(32, 1)))
    assert module.adalfl.meta_steps == 12


def rows(*parts: TensorDataset) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for part in parts for row in part.tensors[0]}


def test_rows_that_a_sampler_leaves_out_are_never_seen(tmp_path: Any) -> None:
    """Training and test rows in one data set, told apart by samplers."""
    data = points(96)
    train, held, test = range(60), range(60, 80), range(80, 96)
    split = [DataLoader(data, 8, sampler=SubsetRandomSampler(part)) for part in (train, held)]
    for meta_data in ("val", "train"):
        module = see(tmp_path, *split, adalfl=config(meta_data=meta_data), max_epochs=4)
        seen = {tuple(row.tolist()) for x in module.held_out for row in x}
        allowed = rows(TensorDataset(data.tensors[0][list(held if meta_data == "val" else train)]))
        assert seen <= allowed
        assert not seen & rows(TensorDataset(data.tensors[0][list(test)]))


def test_one_of_several_validation_loaders_is_named_by_its_index(tmp_path: Any) -> None:
    train, first = loaders()
    second = DataLoader(points(32, 5), 16)
    for several in ([first, second], {"a": first, "b": second}, CombinedLoader([first, second], "sequential")):
        with pytest.raises(ValueError, match=r"there are 2 validation loaders; say which one .*meta_data=0"):
            see(tmp_path, train, several)
        for index, data in enumerate((points(32, 1), points(32, 5))):
            module = see(tmp_path, train, several, adalfl=config(meta_data=index))
            assert {tuple(row.tolist()) for x in module.held_out for row in x} <= rows(data)
    with pytest.raises(ValueError, match="`meta_data` is 2 and there are 2 validation loaders; give one below"):
        see(tmp_path, train, [first, second], adalfl=config(meta_data=2))
    assert see(tmp_path, train, [first]).adalfl.meta_steps == 6


@NO_VALIDATION
def test_without_validation_data_it_says_what_to_do(tmp_path: Any) -> None:
    train = loaders()[0]
    remedy = r"no validation loader. Give one to `fit`, set `AdaLFLConfig\(meta_data=loader\)` or `meta_data='train'`"
    with pytest.raises(ValueError, match=remedy):
        trainer(tmp_path).fit(make(Ada, adalfl=config()), train)
    for options in ({"meta_data": "train"}, {"meta_data": loaders()[1]}):
        module = make(Ada, adalfl=config(**options))
        trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, train)
        assert module.adalfl.meta_steps == 12
    module = make(Ada, adalfl=config(meta_every=None))
    trainer(tmp_path).fit(module, train)
    assert module.adalfl.base_steps == 12


class OwnMetaData(Plain):
    """A loader of the user's own, which is in use elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.others = DataLoader(points(32, 3), 8, shuffle=True, generator=torch.Generator().manual_seed(4))

    def adalfl_meta_dataloader(self) -> Any:
        return self.others

    def on_train_epoch_end(self) -> None:
        self.first = next(iter(self.others))[0]


def test_a_loader_of_the_users_own_is_drawn_from_and_left_alone(tmp_path: Any) -> None:
    plain, module = make(OwnMetaData), make(adaptive(OwnMetaData), adalfl=config())
    for fitted in (plain, module):
        trainer(tmp_path).fit(fitted, *loaders())
    assert module.adalfl.meta_steps == 12
    assert torch.equal(plain.first, module.first)

    class Generating(Ada):
        def adalfl_meta_dataloader(self) -> Any:
            return (batch for batch in loaders()[1])

    module = make(Generating, adalfl=config())
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=4)]).fit(module, *loaders())
    assert module.adalfl.meta_steps == 12


class Datamodule(L.LightningDataModule):
    """With workers that live on, loaders that are made anew for every epoch, and transfer hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def setup(self, stage: str) -> None:
        self.train, self.val = points(), points(32, 1)

    def train_dataloader(self) -> Any:
        self.made += 1
        return DataLoader(self.train, 16, shuffle=True, num_workers=1, persistent_workers=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, 16, num_workers=1, persistent_workers=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0], "y": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["x"] * 2, batch["y"]


def test_a_datamodule_with_persistent_workers_reloaded_each_epoch(tmp_path: Any) -> None:
    results = []
    for kind, arguments in ((Plain, {}), (Ada, {"adalfl": config(learn="nothing")}), (Ada, {"adalfl": config()})):
        module, data = make(kind, **arguments), Datamodule()
        callbacks = [AdaLFLInit(steps=13)] if len(results) == 2 else []
        trainer(tmp_path, reload_dataloaders_every_n_epochs=1, callbacks=callbacks).fit(module, datamodule=data)
        assert data.made <= 2 + 2 * len(callbacks)  # for all passes of the phase, base and meta batches
        results.append(module)
    assert_same(tensors(results[1]), tensors(results[0]))
    assert results[2].adalfl.meta_steps == 12


class Curriculum(Seen):
    """Other data in each epoch."""

    def train_dataloader(self) -> Any:
        x = torch.full((64, 4), float(self.trainer.current_epoch))
        return DataLoader(TensorDataset(x, torch.arange(64) % CLASSES), 16)

    def val_dataloader(self) -> Any:
        return loaders()[1]

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        self.seen = [*getattr(self, "seen", []), (self.trainer.current_epoch, int(batch[0][0, 0]))]
        return self(batch[0]), batch[1]


def test_data_that_are_reloaded_are_seen(tmp_path: Any) -> None:
    module = see(
        tmp_path, None, None, Curriculum, config(meta_data="train"), max_epochs=3, reload_dataloaders_every_n_epochs=1
    )
    assert {data for epoch, data in module.seen if epoch == data} == {0, 1, 2}
    assert all(epoch == data for epoch, data in module.seen)


class Augments(Seen):
    """Augments on the device where it trains, and tells which loader a batch is from."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        x = x.clone()
        x[:, 3] = dataloader_idx
        if self.trainer.training:
            x[:, 2] = 77.0
        return x, y


@pytest.mark.parametrize("meta_data", ["train", 0, 1])
def test_rows_pass_the_transfer_hooks_as_what_they_are(tmp_path: Any, meta_data: Any) -> None:
    train, val = loaders()
    module = see(tmp_path, train, [val, val], Augments, config(meta_data=meta_data))
    seen = torch.cat(module.held_out)
    assert bool((seen[:, 2] == 77.0).all()) is (meta_data == "train")
    assert set(seen[:, 3].tolist()) == {0.0 if meta_data == "train" else float(meta_data)}
    assert module.trainer.state.fn == "fit"


class OfRecords(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["features"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def test_batches_of_dictionaries(tmp_path: Any) -> None:
    records = [[{"features": x, "label": y} for x, y in points(size, seed)] for size, seed in ((96, 0), (32, 1))]
    train, val = DataLoader(records[0], 16, shuffle=True), DataLoader(records[1], 16)
    with pytest.raises(
        ValueError, match=r"a batch is dict and not a pair.*override `adalfl_predict\(batch\)` in AdaOf"
    ):
        trainer(tmp_path).fit(make(adaptive(OfRecords), adalfl=config()), train, val)

    class Decided(adaptive(OfRecords)):
        def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self(batch["features"]), batch["label"]

    module = make(Decided, adalfl=config())
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, train, val)
    assert module.adalfl.meta_steps == 12


class OfTwoSources(Plain):
    """Trains on two loaders at once, validates on the first kind alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        predictions, target = self.adalfl_predict(batch)
        return F.cross_entropy(predictions, target)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, dict):
            (x, y), (other_x, other_y) = batch["labelled"], batch["other"]
            batch = torch.cat([x, other_x]), torch.cat([y, other_y])
        return self(batch[0]), batch[1]


@pytest.mark.parametrize("wrap", [dict, lambda both: CombinedLoader(both, "min_size")])
@pytest.mark.parametrize("meta_data", ["val", "train"])
def test_several_training_loaders_at_once(tmp_path: Any, wrap: Any, meta_data: str) -> None:
    both = {"labelled": DataLoader(points(), 8, shuffle=True), "other": DataLoader(points(48, 2), 4, shuffle=True)}
    module = make(adaptive(OfTwoSources), adalfl=config(meta_data=meta_data))
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, wrap(both), loaders()[1])
    assert module.adalfl.meta_steps == module.adalfl.base_steps == 24


# Loaders and batches that go wrong.


class Disk(RuntimeError):
    """What a data set may raise."""


class Failing(Dataset):
    """Cannot read one of its instances."""

    def __init__(self, bad: int) -> None:
        self.points, self.bad = points(), bad

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            raise Disk(f"instance {index} cannot be read")
        return self.points[index]


@pytest.mark.parametrize("which", ["training", "held-out"])
def test_an_instance_that_cannot_be_read_raises_the_data_sets_own_error(tmp_path: Any, which: str) -> None:
    bad = DataLoader(Failing(3), 96 if which == "held-out" else 16)
    data = (loaders()[0], bad) if which == "held-out" else (bad, loaders()[1])
    with pytest.raises(Disk, match="instance 3 cannot be read"):
        trainer(tmp_path, num_sanity_val_steps=0).fit(make(Ada, adalfl=config(meta_batch_size=96)), *data)


class Batches:
    """A loader of given batches that is none of torch's."""

    def __init__(self, *batches: tuple[Tensor, Tensor], promised: int | None = None) -> None:
        self.batches, self.promised = batches, promised

    def __len__(self) -> int:
        return self.promised or len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def batch(size: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    return points(size, seed).tensors


def test_a_loader_that_ends_before_its_length_or_at_once(tmp_path: Any) -> None:
    short = Batches(batch(16), batch(16, 6), promised=5)
    module = make(Ada, adalfl=config())
    trainer(tmp_path).fit(module, short, loaders()[1])
    assert module.adalfl.meta_steps == 4
    module = make(Ada, adalfl=config())
    before = phi(module)
    trainer(tmp_path).fit(module, Batches(promised=3), loaders()[1])
    assert module.adalfl.base_steps == 0
    assert_same(phi(module), before)


@pytest.mark.parametrize("way", ["forward", "finite_difference", "reverse"])
def test_batches_of_every_length_from_one_instance_on(tmp_path: Any, way: str) -> None:
    ragged = Batches(batch(16), batch(1, 6), batch(7, 8), batch(2, 9))
    plain, watched = make(Smooth), make(adaptive(Smooth), adalfl=config(learn="nothing", hypergradient=way))
    for module in (plain, watched):
        trainer(tmp_path).fit(module, ragged, loaders()[1])
    assert_same(tensors(watched), tensors(plain))
    module = make(adaptive(Smooth), adalfl=config(hypergradient=way, meta_batch_size=1))
    trainer(tmp_path).fit(module, ragged, loaders()[1])
    assert module.adalfl.meta_steps == 8
    assert all(value.isfinite().all() for value in (*tensors(module).values(), *phi(module).values()))


NONE = torch.zeros(4, dtype=torch.long)
BAD_BATCHES = {
    "empty": ((torch.zeros(0, 4), NONE[:0]), r"`predictions` must hold at least one instance; got shape \(0, 3\)"),
    "more targets": ((torch.zeros(4, 4), torch.zeros(5, dtype=torch.long)), r"`target` must have shape \(4,\).*\(5,\)"),
    "class out of range": ((torch.zeros(4, 4), NONE + CLASSES), r"`target` must hold class.*got values from 3 to 3"),
    "negative class": ((torch.zeros(4, 4), NONE - 1), r"`target` must hold class.*\[0, 2\].*got values from -1"),
    "targets of floats": ((torch.zeros(4, 4), torch.zeros(4)), r"`target` must hold class indices.*got torch.float32"),
    "a single instance": (
        (torch.zeros(4), torch.zeros((), dtype=torch.long)),
        r"`predictions` must be logits of shape",
    ),
}


class Trusting(Smooth):
    """Whose own steps do not look at a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


class GivenMetaBatches(Trusting):
    def __init__(self, given: Batches) -> None:
        super().__init__()
        self.given = given

    def adalfl_meta_dataloader(self) -> Any:
        return self.given


@pytest.mark.parametrize(
    "options", [{}, {"own_loss": False}, {"loss": "taylor_cubic"}, {"learn": "nothing"}, {"learn": "lr"}], ids=str
)
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_batch_that_cannot_be_right_is_refused_by_name(tmp_path: Any, name: str, options: dict[str, Any]) -> None:
    bad, message = BAD_BATCHES[name]
    module = make(adaptive(Trusting), adalfl=config(**options))
    before = tensors(module)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module, Batches(bad), loaders()[1])
    assert_same(tensors(module), before)


@pytest.mark.parametrize("name", [name for name in BAD_BATCHES if name != "a single instance"])
def test_a_meta_batch_that_cannot_be_right_is_refused(tmp_path: Any, name: str) -> None:
    module = make(adaptive(GivenMetaBatches), given=Batches(BAD_BATCHES[name][0]), adalfl=config())
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"[Tt]arget|index|at least one instance"):
        trainer(tmp_path).fit(module, *loaders())


def test_same_seed_same_run_with_several_workers(tmp_path: Any) -> None:
    def trained() -> Any:
        train = DataLoader(points(), 16, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(3))
        val = DataLoader(TensorDataset(*batch(32, 1)), 16, num_workers=2)
        module = make(Ada, adalfl=config())
        t = trainer(tmp_path, deterministic=True, max_epochs=1, callbacks=[AdaLFLInit(steps=3)])
        t.fit(module, train, val)
        return {**tensors(module), **phi(module)}

    try:
        assert_same(trained(), trained())
    finally:
        torch.use_deterministic_algorithms(False)


class Weighted(Smooth):
    """Weights of instances, in the batch: only class 0 counts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, weight = batch
        return (F.cross_entropy(self(x), y, reduction="none") * weight).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return (self(batch[0]), *batch[1:])


def test_weights_of_instances_reach_the_meta_objective(tmp_path: Any) -> None:
    x, y = points(160).tensors
    data = TensorDataset(x, y, (y == 0).float())
    module = make(adaptive(Weighted), adalfl=config())
    trainer(tmp_path, max_epochs=20).fit(module, DataLoader(data, 32), DataLoader(data, 32))
    plain = make(Weighted)
    trainer(tmp_path, max_epochs=20).fit(plain, DataLoader(data, 32), DataLoader(data, 32))
    shares = [float(m(x).softmax(1)[:, 0].mean().detach()) for m in (module, plain)]
    assert shares[0] > 0.9 * shares[1] > 0.8


class Several(Smooth):
    """Is validated on any number of loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        return None


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("held_out", [None, [loaders()[1], loaders()[1]]])
def test_trusted_data_that_are_missing_or_unclear_are_refused_at_the_first_step(held_out: Any, tmp_path: Any) -> None:
    module = adaptive(Several)(adalfl=AdaLFLConfig("multiclass", meta_every=50))
    fitting = trainer(tmp_path, max_epochs=99)
    with pytest.raises(ValueError, match="validation"):
        fitting.fit(module, loaders()[0], held_out)
    assert fitting.global_step == 0
    assert module.adalfl.base_steps == 0


class TwoLoaders(Smooth):
    """Is validated on dictionaries of two batches."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch["a"] if isinstance(batch, dict) else batch
        return self(x), y


@pytest.mark.parametrize("callbacks", [[], [AdaLFLInit(steps=2)]])
def test_a_combined_loader_of_dictionaries_is_one_loader(callbacks: list[Any], tmp_path: Any) -> None:
    held_out = CombinedLoader({"a": loaders()[1], "b": loaders()[1]}, "max_size")
    module = make(adaptive(TwoLoaders), adalfl=AdaLFLConfig("multiclass", meta_every=2))
    trainer(tmp_path, max_epochs=1, callbacks=callbacks).fit(module, loaders()[0], held_out)
    assert module.adalfl.meta_steps == 3
