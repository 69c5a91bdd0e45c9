"""Lightning's own callbacks, beside a learned loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from projects import (
    INERT,
    Ada,
    Plain,
    assert_same,
    base_tensors,
    config,
    learned_tensors,
    loaders,
    make,
    trainer,
)
from torch import nn

from lightning_adalfl import AdaLFLInit, AdaLFLMixin


def run(tmp_path: Path, module: Any, *callbacks: Any, **options: Any) -> Any:
    trainer(tmp_path, callbacks=list(callbacks), **options).fit(module, *loaders())
    return module


def finder() -> LearningRateFinder:
    return LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=40, early_stop_threshold=None)


def test_the_learning_rate_finder_finds_what_it_finds_for_the_plain_module(tmp_path: Path) -> None:
    plain_finder, inert_finder = finder(), finder()
    plain = run(tmp_path, make(Plain), plain_finder, max_epochs=8)
    inert = run(tmp_path, make(Ada, adalfl=INERT), inert_finder, max_epochs=8)
    assert inert_finder.optimal_lr.results == plain_finder.optimal_lr.results
    assert inert.lr == plain.lr != 0.1
    assert_same(base_tensors(inert), plain.state_dict())


@pytest.mark.parametrize("order", [1, -1])
def test_the_learning_rate_finder_leaves_the_learned_loss_as_it_was(tmp_path: Path, order: int) -> None:
    """Whichever of the two comes first: the offline phase, or the finder."""
    module = make(Ada, adalfl=config())
    seen = {}

    class Start(LearningRateMonitor):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update(steps=pl_module.adalfl.base_steps, **learned_tensors(pl_module))

    class Finder(LearningRateFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update(before=learned_tensors(pl_module))
            super().on_fit_start(trainer, pl_module)
            assert_same(learned_tensors(pl_module), seen["before"])

    callbacks = [AdaLFLInit(steps=2), Finder(1e-4, 1.0, 20)][::order]
    run(tmp_path, module, *callbacks, Start(), logger=CSVLogger(tmp_path))
    assert seen["steps"] == 0
    assert module.adalfl.meta_steps == module.adalfl.base_steps == 12
    assert module.adalfl.initialised


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
def test_weight_averaging_averages_the_steps_of_the_plain_module(tmp_path: Path, averaging: Any) -> None:
    plain = run(tmp_path, make(Plain), averaging())
    inert = run(tmp_path, make(Ada, adalfl=INERT), averaging())
    assert_same(base_tensors(inert), plain.state_dict())
    module = run(tmp_path, make(Ada, adalfl=config()), averaging(), AdaLFLInit(steps=2))
    assert module.adalfl.meta_steps == 12


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging(tmp_path: Path) -> None:
    options = {"max_epochs": 4}
    plain = run(tmp_path, make(Plain), StochasticWeightAveraging(0.05, swa_epoch_start=2), **options)
    inert = run(tmp_path, make(Ada, adalfl=INERT), StochasticWeightAveraging(0.05, swa_epoch_start=2), **options)
    assert_same(base_tensors(inert), plain.state_dict())


def test_early_stopping_stops_where_it_stops_the_plain_module(tmp_path: Path) -> None:
    def stopping() -> EarlyStopping:
        return EarlyStopping("val_loss", patience=0, min_delta=0.05)

    plain = run(tmp_path, make(Plain), stopping(), max_epochs=30)
    with pytest.warns(UserWarning, match=r"Callbacks monitor \['val_loss'\].*are optimistic"):
        module = run(tmp_path, make(Ada, adalfl=config()), stopping(), max_epochs=30)
    assert 0 < module.trainer.current_epoch < 30
    # With the task loss there is nothing to warn of, and the epoch is the same.
    inert = run(tmp_path, make(Ada, adalfl=INERT), stopping(), max_epochs=30)
    assert inert.trainer.current_epoch == plain.trainer.current_epoch
    assert_same(base_tensors(inert), plain.state_dict())


class Finetuned(Plain):
    """Trains its head, and from the second epoch on its backbone."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.backbone = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        self.model = nn.Linear(16, 3)

    def forward(self, x: Any) -> Any:
        return self.model(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=self.lr)


class AdaFinetuned(AdaLFLMixin, Finetuned):
    pass


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=1)


def test_layers_that_a_callback_unfreezes_are_part_of_the_hypergradient(tmp_path: Path) -> None:
    plain = run(tmp_path, make(Finetuned), Unfreeze())
    inert = run(tmp_path, make(AdaFinetuned, adalfl=INERT), Unfreeze())
    assert_same(base_tensors(inert), plain.state_dict())
    options = {"meta_optimizer": "SGD", "meta_lr": 0.1}
    learned = []
    for method in ("forward", "reverse"):
        module = make(AdaFinetuned, adalfl=config(hypergradient=method, **options))
        t = trainer(tmp_path, callbacks=[Unfreeze()], precision="64-true")
        t.fit(module, *loaders(dtype=torch.float64))
        learned.append(learned_tensors(module))
        assert module.adalfl.meta_steps == 12
        assert len(t.optimizers[0].param_groups) == 2
    for name, value in learned[0].items():
        torch.testing.assert_close(value, learned[1][name], rtol=1e-6, atol=1e-9)


def test_backbone_finetuning(tmp_path: Path) -> None:
    callback = BackboneFinetuning(1, backbone_initial_ratio_lr=0.5)
    plain = run(tmp_path, make(Finetuned), copy.deepcopy(callback), max_epochs=3)
    inert = run(tmp_path, make(AdaFinetuned, adalfl=INERT), copy.deepcopy(callback), max_epochs=3)
    assert_same(base_tensors(inert), plain.state_dict())
    module = run(tmp_path, make(AdaFinetuned, adalfl=config()), callback, max_epochs=3)
    assert module.adalfl.meta_steps == 18
