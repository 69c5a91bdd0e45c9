"""Loaders and batches that go wrong: the run goes on right, or ends in an error that says whose fault it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from projects import (
    CLASSES,
    INERT,
    Ada,
    AdaSmooth,
    Plain,
    Smooth,
    assert_same,
    base_tensors,
    config,
    learned_tensors,
    loaders,
    make,
    points,
    trainer,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_adalfl import AdaLFLInit, AdaLFLMixin


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


def fit(tmp_path: Any, module: Any, train: Any, val: Any = None, **options: Any) -> Any:
    trainer(tmp_path, **options).fit(module, train, val or loaders()[1])
    return module


def test_an_instance_that_cannot_be_read_raises_the_data_sets_own_error(tmp_path: Any) -> None:
    with pytest.raises(Disk, match="instance 40 cannot be read"):
        fit(tmp_path, make(Ada, adalfl=config()), DataLoader(Failing(40), 16))


def test_a_meta_instance_that_cannot_be_read_raises_the_data_sets_own_error(tmp_path: Any) -> None:
    with pytest.raises(Disk, match="instance 3 cannot be read"):
        fit(tmp_path, make(Ada, adalfl=config()), loaders()[0], DataLoader(Failing(3), 96), num_sanity_val_steps=0)


def test_the_offline_phase_leaves_the_base_model_alone_when_a_loader_fails(tmp_path: Any) -> None:
    module = make(Ada, adalfl=config())
    before = base_tensors(module)
    with pytest.raises(Disk):
        fit(tmp_path, module, DataLoader(Failing(40), 16), callbacks=[AdaLFLInit(steps=20)])
    assert_same(base_tensors(module), before)


def test_a_loader_that_ends_before_its_length_trains_as_plain(tmp_path: Any) -> None:
    short = Batches(batch(16), batch(16, 6), promised=5)
    plain = make(Plain)
    fit(tmp_path, plain, short)
    module = fit(tmp_path, make(Ada, adalfl=INERT), short)
    assert_same(base_tensors(module), plain.state_dict())
    assert fit(tmp_path, make(Ada, adalfl=config()), short).adalfl.meta_steps == 4


def test_a_loader_that_yields_nothing_takes_no_step(tmp_path: Any) -> None:
    module = make(Ada, adalfl=config())
    before = learned_tensors(module)
    trainer(tmp_path, callbacks=[]).fit(module, Batches(promised=3), loaders()[1])
    assert module.adalfl.base_steps == 0
    assert_same(learned_tensors(module), before)


@pytest.mark.parametrize("method", ["forward", "finite_difference", "reverse"])
def test_batches_of_every_length_from_one_instance_on(tmp_path: Any, method: str) -> None:
    ragged = Batches(batch(16), batch(1, 6), batch(7, 8), batch(2, 9))
    plain = make(Smooth)
    fit(tmp_path, plain, ragged)
    module = fit(tmp_path, make(AdaSmooth, adalfl=INERT), ragged)
    assert_same(base_tensors(module), plain.state_dict())
    module = fit(tmp_path, make(AdaSmooth, adalfl=config(hypergradient=method, meta_batch_size=1)), ragged)
    assert module.adalfl.meta_steps == 8
    assert all(t.isfinite().all() for t in base_tensors(module).values())


def test_a_part_of_the_base_batch_is_one_instance_at_least(tmp_path: Any) -> None:
    ragged = Batches(batch(16), batch(1, 6), batch(2, 9))
    module = fit(tmp_path, make(AdaSmooth, adalfl=config(base_fraction=0.01)), ragged)
    assert module.adalfl.meta_steps == 6


FOUR = torch.zeros(4, dtype=torch.long)
BAD_BATCHES = {
    "empty": ((torch.zeros(0, 4), FOUR[:0]), r"`predictions` must hold at least one instance; got shape \(0, 3\)"),
    "more targets": ((torch.zeros(4, 4), torch.zeros(5, dtype=torch.long)), r"`target` must have shape \(4,\).*\(5,\)"),
    "class out of range": ((torch.zeros(4, 4), FOUR + CLASSES), r"`target` must hold class.*got values from 3 to 3"),
    "negative class": ((torch.zeros(4, 4), FOUR - 1), r"`target` must hold class.*\[0, 2\]; got values from -1"),
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


class AdaTrusting(AdaLFLMixin, Trusting):
    """The same with a learned loss."""


@pytest.mark.parametrize("bounds", [{}, {"max_gain": None}, {"representation": "taylor_cubic", "residual": False}])
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_batch_that_cannot_be_right_is_refused_by_name(tmp_path: Any, name: str, bounds: dict[str, Any]) -> None:
    bad, message = BAD_BATCHES[name]
    module = make(AdaTrusting, adalfl=config(**bounds))
    before = base_tensors(module)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, Batches(bad))
    assert_same(base_tensors(module), before)


class OwnMetaData(AdaTrusting):
    """With meta batches that are given."""

    def __init__(self, meta_batches: Batches) -> None:
        super().__init__(adalfl=config())
        self.meta_batches = meta_batches

    def adalfl_meta_dataloader(self) -> Any:
        return self.meta_batches


@pytest.mark.parametrize("name", ["more targets", "class out of range", "negative class", "targets of floats"])
def test_a_meta_batch_that_cannot_be_right_is_refused(tmp_path: Any, name: str) -> None:
    # By the task loss, which is the user's own; a step would have to be lost otherwise.
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"[Tt]arget|Float"):
        fit(tmp_path, OwnMetaData(Batches(BAD_BATCHES[name][0])), loaders()[0])


def test_an_empty_meta_batch_costs_its_meta_step_alone(tmp_path: Any) -> None:
    module = OwnMetaData(Batches(BAD_BATCHES["empty"][0], batch(16)))
    with pytest.warns(UserWarning, match="the hypergradient is not finite"):
        fit(tmp_path, module, loaders()[0])
    assert module.adalfl.skipped_meta_steps == 6
    assert module.adalfl.meta_steps == 6


def test_same_seed_same_run_with_several_workers(tmp_path: Any) -> None:
    def trained() -> Any:
        train = DataLoader(points(), 16, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(3))
        val = DataLoader(TensorDataset(*batch(32, 1)), 16, num_workers=2)
        module = make(Ada, adalfl=config())
        return fit(tmp_path, module, train, val, deterministic=True, callbacks=[AdaLFLInit(steps=3)])

    try:
        first, second = trained(), trained()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(base_tensors(first), base_tensors(second))
    assert_same(learned_tensors(first), learned_tensors(second))
