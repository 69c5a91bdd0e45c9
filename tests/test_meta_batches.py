"""Meta batches come forever, reshuffled, and touch no loader of the user."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from projects import loaders, points
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from lightning_adalfl import AdaLFLConfig
from lightning_adalfl.adapter.meta_batches import EndlessBatches, private_loader, private_meta_loader


def numbers(size: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(size))


def drawn(batches: EndlessBatches, count: int) -> list[list[int]]:
    return [next(batches)[0].tolist() for _ in range(count)]


def private(loader: Any, **options: Any) -> Any:
    return private_loader(loader, "the test", **options)


def test_each_pass_has_every_instance_once_in_an_order_of_its_own() -> None:
    batches = EndlessBatches(private(DataLoader(numbers(), 5)), seed=3)
    passes = [[number for batch in drawn(batches, 2) for number in batch] for _ in range(3)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({str(order) for order in passes}) == 3
    assert drawn(EndlessBatches(private(DataLoader(numbers(), 5)), seed=3), 2) == [passes[0][:5], passes[0][5:]]
    assert drawn(EndlessBatches(private(DataLoader(numbers(), 5)), seed=4), 1) != [passes[0][:5]]


@pytest.mark.parametrize("position", [0, 1, 2, 3, 7])
def test_it_goes_on_from_a_position(position: int) -> None:
    batches = EndlessBatches(private(DataLoader(numbers(), 3)), seed=3)
    drawn(batches, position)
    state = batches.state_dict()
    expected = drawn(batches, 5)
    resumed = EndlessBatches(private(DataLoader(numbers(), 3)), seed=99)
    resumed.load_state_dict(state)
    assert drawn(resumed, 5) == expected


def test_a_short_last_batch_is_left_out_unless_it_is_all_there_is() -> None:
    assert [len(batch) for batch in drawn(EndlessBatches(private(DataLoader(numbers(), 4)), 0), 4)] == [4] * 4
    assert [len(batch) for batch in drawn(EndlessBatches(private(DataLoader(numbers(3), 4)), 0), 2)] == [3] * 2


def test_the_users_loader_and_its_generator_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(numbers(), 5, shuffle=True, generator=generator)
    before = generator.get_state()
    drawn(EndlessBatches(private(loader), 0), 4)
    assert torch.equal(generator.get_state(), before)


def test_the_batch_size_may_be_another() -> None:
    assert len(next(EndlessBatches(private(DataLoader(numbers(), 2), batch_size=7), 0))[0]) == 7


LIMITS = [(None, 10), (0, 10), (1, 2), (3, 6), (99, 10), (0.5, 4), (1.0, 10), (0.01, 2)]


@pytest.mark.parametrize(("limit", "left"), LIMITS)
def test_limits_of_the_trainer_leave_the_first_batches(limit: Any, left: int) -> None:
    batches = EndlessBatches(private(DataLoader(numbers(), 2), limit=limit), 0)
    assert {number for batch in drawn(batches, 10) for number in batch} == set(range(left))


def test_processes_share_the_data() -> None:
    parts = [EndlessBatches(private(DataLoader(numbers(), 5), replicas=(2, rank)), seed=3) for rank in (0, 1)]
    for _ in range(3):
        (first,), (second,) = (drawn(part, 1) for part in parts)
        assert sorted(first + second) == list(range(10))


def test_containers_of_loaders_become_combined_batches() -> None:
    both = {"a": DataLoader(numbers(), 5), "b": DataLoader(numbers(4), 2)}
    for given in (both, CombinedLoader(both, "min_size")):
        batch = next(EndlessBatches(private(given), 0))
        assert {name: len(part[0]) for name, part in batch.items()} == {"a": 5, "b": 2}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def own_batches() -> DataLoader:
    class Batches:
        def __iter__(self) -> Iterator[list[int]]:
            return iter(BatchSampler(SequentialSampler(range(10)), 2, False))

    return DataLoader(numbers(), batch_sampler=Batches())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream()), "the test cannot be drawn at random from Stream, an IterableDataset"),
        (range(3), "the test needs a DataLoader whose data can be drawn at random; got range"),
        ([], "the test needs a DataLoader .*; got list"),
        (own_batches(), "the loader has no `batch_size` .*Set `meta_batch_size` in AdaLFLConfig"),
    ],
)
def test_what_cannot_be_shuffled_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        private(loader)


def test_an_empty_loader_is_reported() -> None:
    batches = EndlessBatches(DataLoader(numbers(3), 4, drop_last=True), 0)
    with pytest.raises(MisconfigurationException, match="gave no batch for the meta-objective; is its data set empty"):
        next(batches)


def source(loader: Any) -> Any:
    return SimpleNamespace(dataloader=lambda: loader, is_defined=lambda: loader is not None, instance=loader)


def a_trainer(train: Any, val: Any) -> Any:
    loop = SimpleNamespace(
        _data_source=source(train), epoch_loop=SimpleNamespace(val_loop=SimpleNamespace(_data_source=source(val)))
    )
    limits = {"limit_train_batches": 1.0, "limit_val_batches": 1.0}
    return SimpleNamespace(fit_loop=loop, world_size=1, global_rank=0, **limits)


@pytest.mark.parametrize(("meta_data", "size"), [("train", 96), ("val", 32)])
def test_meta_batches_come_from_the_data_that_the_configuration_names(meta_data: str, size: int) -> None:
    loader = private_meta_loader(a_trainer(*loaders()), AdaLFLConfig("multiclass", meta_data=meta_data))
    assert len(loader.dataset) == size
    assert loader.batch_size == 16


def test_what_to_do_without_validation_data_or_with_several() -> None:
    config = AdaLFLConfig("multiclass")
    with pytest.raises(MisconfigurationException, match=r"there is no validation loader. Give one to `fit`"):
        private_meta_loader(a_trainer(loaders()[0], None), config)
    with pytest.raises(MisconfigurationException, match="needs one validation DataLoader; got list"):
        private_meta_loader(a_trainer(loaders()[0], loaders()), config)
    one = private_meta_loader(a_trainer(loaders()[0], [DataLoader(points(), 4)]), config)
    assert one.batch_size == 4
