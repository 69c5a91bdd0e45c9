"""Every kind of data that a Trainer takes: it works, or it says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from projects import INERT, Ada, Plain, assert_same, base_tensors, config, loaders, make, points, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_adalfl import AdaLFLInit, AdaLFLMixin

NO_VALIDATION = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Records(Dataset):
    """Instances by name."""

    def __init__(self, size: int = 96, seed: int = 0) -> None:
        self.points = points(size, seed)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.points[index]
        return {"features": x, "label": y}


class OfRecords(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["features"], batch["label"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["features"], batch["label"]), batch_idx)


class AdaOfRecords(AdaLFLMixin, OfRecords):
    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(batch["features"]), batch["label"]


class Undecided(AdaLFLMixin, OfRecords):
    pass


def test_batches_of_dictionaries(tmp_path: Any) -> None:
    train, val = DataLoader(Records(), 16, shuffle=True), DataLoader(Records(32, 1), 16)
    plain = make(OfRecords)
    trainer(tmp_path).fit(plain, train, val)
    module = make(AdaOfRecords, adalfl=INERT)
    trainer(tmp_path).fit(module, train, val)
    assert_same(base_tensors(module), plain.state_dict())
    module = make(AdaOfRecords, adalfl=config())
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, train, val)
    assert module.adalfl.meta_steps == 12


def test_a_dictionary_without_a_prediction_of_ones_own_is_refused(tmp_path: Any) -> None:
    module = make(Undecided, adalfl=config())
    with pytest.raises(MisconfigurationException, match=r"a batch is dict and not a pair.*override `adalfl_predict"):
        trainer(tmp_path).fit(module, DataLoader(Records(), 16), DataLoader(Records(32, 1), 16))


class OfTwoSources(Plain):
    """Trains on two loaders at once, validates on the first kind alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (other_x, other_y) = batch["labelled"], batch["other"]
        return super().training_step((torch.cat([x, other_x]), torch.cat([y, other_y])), batch_idx)


class AdaOfTwoSources(AdaLFLMixin, OfTwoSources):
    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, dict):
            (x, y), (other_x, other_y) = batch["labelled"], batch["other"]
            batch = torch.cat([x, other_x]), torch.cat([y, other_y])
        x, y = batch
        return self(x), y


@pytest.mark.parametrize("wrap", [dict, lambda both: CombinedLoader(both, "min_size")])
@pytest.mark.parametrize("meta_data", ["val", "train"])
def test_several_training_loaders_at_once(tmp_path: Any, wrap: Any, meta_data: str) -> None:
    both = {"labelled": DataLoader(points(), 8, shuffle=True), "other": DataLoader(points(48, 2), 4, shuffle=True)}
    module = make(AdaOfTwoSources, adalfl=config(meta_data=meta_data))
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, wrap(both), loaders()[1])
    assert module.adalfl.meta_steps == module.adalfl.base_steps == 24


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from (points()[i] for i in range(96))


def test_an_iterable_training_set_trains_with_meta_batches_from_the_validation_data(tmp_path: Any) -> None:
    module = make(Ada, adalfl=config())
    init = AdaLFLInit(steps=2, train_dataloader=DataLoader(points(), 16, shuffle=True))
    trainer(tmp_path, callbacks=[init]).fit(module, DataLoader(Stream(), 16), loaders()[1])
    assert module.adalfl.meta_steps == 12


@pytest.mark.parametrize("init", [True, False])
def test_an_iterable_set_that_would_have_to_be_shuffled_is_refused(tmp_path: Any, init: bool) -> None:
    options = config() if init else config(meta_data="train")
    callbacks = [AdaLFLInit(steps=2)] if init else []
    pattern = r"cannot be drawn at random from Stream.*`adalfl_meta_dataloader\(\)`.*train_dataloader"
    with pytest.raises(MisconfigurationException, match=pattern):
        trainer(tmp_path, callbacks=callbacks).fit(make(Ada, adalfl=options), DataLoader(Stream(), 16), loaders()[1])


class OwnMetaData(Ada):
    def adalfl_meta_dataloader(self) -> Any:
        return DataLoader(points(32, 3), 8, shuffle=True)


@NO_VALIDATION
def test_meta_batches_of_the_users_own(tmp_path: Any) -> None:
    module = make(OwnMetaData, adalfl=config())
    trainer(tmp_path).fit(module, DataLoader(Stream(), 16))
    assert module.adalfl.meta_steps == 12
    assert module.adalfl.run is None


@NO_VALIDATION
def test_without_validation_data_it_says_what_to_do(tmp_path: Any) -> None:
    train = loaders()[0]
    remedy = r"no validation loader. Give one to `fit`, set `AdaLFLConfig\(meta_data='train'\)`, or override"
    with pytest.raises(MisconfigurationException, match=remedy):
        trainer(tmp_path).fit(make(Ada, adalfl=config()), train)
    module = make(Ada, adalfl=config(meta_data="train"))
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, train)
    assert module.adalfl.meta_steps == 12
    module = make(Ada, adalfl=config(online=False))
    trainer(tmp_path).fit(module, train)
    assert module.adalfl.base_steps == 12


class OnTwoSets(Ada):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def test_several_validation_loaders(tmp_path: Any) -> None:
    train, val = loaders()
    with pytest.raises(MisconfigurationException, match="needs one validation DataLoader; got list"):
        trainer(tmp_path).fit(make(OnTwoSets, adalfl=config()), train, [val, val])
    module = make(Ada, adalfl=config())
    trainer(tmp_path).fit(module, train, [val])
    assert module.adalfl.meta_steps == 12


class Module(L.LightningDataModule):
    """With workers that live on, and a loader made anew for every epoch."""

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


def test_a_datamodule_with_persistent_workers_reloaded_each_epoch(tmp_path: Any) -> None:
    results = []
    for kind, arguments in ((Plain, {}), (Ada, {"adalfl": INERT}), (Ada, {"adalfl": config()})):
        module = make(kind, **arguments)
        callbacks = [AdaLFLInit(steps=2)] if module.hparams.get("adalfl") and arguments["adalfl"].online else []
        data = Module()
        trainer(tmp_path, reload_dataloaders_every_n_epochs=1, callbacks=callbacks).fit(module, datamodule=data)
        assert data.made == 2 + len(callbacks)
        results.append(module)
    assert_same(base_tensors(results[1]), results[0].state_dict())
    assert results[2].adalfl.meta_steps == 12


class Moved(Ada):
    """Changes batches in the transfer hooks, where meta batches must pass too."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0], "y": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["x"] * 2, batch["y"]


@NO_VALIDATION
def test_meta_batches_pass_the_transfer_hooks(tmp_path: Any) -> None:
    seen = []

    class Watching(Moved):
        def adalfl_predict(self, batch: Any) -> Any:
            seen.append(float(batch[0].abs().max()))
            return super().adalfl_predict(batch)

    train = DataLoader(points(), 96)
    trainer(tmp_path, max_epochs=1).fit(make(Watching, adalfl=config(meta_data="train")), train)
    assert len(set(seen)) == 1
    assert len(seen) >= 2


def test_an_empty_set_is_reported(tmp_path: Any) -> None:
    class Nothing(Ada):
        def adalfl_meta_dataloader(self) -> Any:
            return DataLoader(points(4), 8, drop_last=True)

    with pytest.raises(MisconfigurationException, match="gave no batch for the meta-objective"):
        trainer(tmp_path).fit(make(Nothing, adalfl=config()), *loaders())


@pytest.mark.parametrize(
    ("result", "message"),
    [("logits", "must return two tensors.*got str"), (("a", "b"), r"got \['str', 'str'\]. Override it in Wrong")],
)
def test_a_prediction_that_is_no_pair_of_tensors_is_refused(tmp_path: Any, result: Any, message: str) -> None:
    class Wrong(Ada):
        def adalfl_predict(self, batch: Any) -> Any:
            return result

    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path).fit(make(Wrong, adalfl=config()), *loaders())


def test_a_loss_of_regression_meets_its_data(tmp_path: Any) -> None:
    class Regressor(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.mse_loss(self(x)[:, 0], y.float())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", F.mse_loss(self(x)[:, 0], y.float()))

    class AdaRegressor(AdaLFLMixin, Regressor):
        def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
            x, y = batch
            return self(x)[:, 0], y.float()

    plain = make(Regressor)
    trainer(tmp_path).fit(plain, *loaders())
    module = make(AdaRegressor, adalfl=config(task="regression", learn="lr", online=False))
    trainer(tmp_path).fit(module, *loaders())
    assert_same(base_tensors(module), plain.state_dict())
