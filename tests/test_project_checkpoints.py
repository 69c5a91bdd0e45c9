"""Checkpoints: named as for the plain module, loaded by it and from it, safe to load, with every hyper-parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from projects import INERT, Ada, Plain, assert_same, base_tensors, config, learned_tensors, loaders, make, trainer
from torch import Tensor, nn

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin


def task_loss(predictions: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(predictions, target, label_smoothing=0.1)


class WithBackbone(L.LightningModule):
    """Takes a module as an argument, which is not among its hyper-parameters."""

    def __init__(self, backbone: nn.Module, lr: float, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = backbone
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class AdaWithBackbone(AdaLFLMixin, WithBackbone):
    pass


def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU())


def fit(folder: Path, module: Any, **options: Any) -> Path:
    t = trainer(folder, max_epochs=1, **options)
    t.fit(module, *loaders())
    t.save_checkpoint(folder / "run.ckpt", weights_only=False)
    return folder / "run.ckpt"


def test_a_hundred_steps_with_a_checkpoint_every_ten_give_ten_rightly_named(tmp_path: Path) -> None:
    names = []
    for kind, arguments in ((Plain, {}), (Ada, {"adalfl": config(meta_every=3)})):
        keep = ModelCheckpoint(tmp_path / kind.__name__, every_n_train_steps=10, save_top_k=-1)
        module = make(kind, **arguments)
        t = trainer(tmp_path, max_steps=100, max_epochs=-1, callbacks=[keep])
        t.fit(module, *loaders())
        assert t.global_step == 100
        names.append(sorted(path.name for path in (tmp_path / kind.__name__).iterdir()))
    assert len(names[0]) == 10
    assert names[1] == names[0]
    assert {int(name.split("step=")[1].removesuffix(".ckpt")) for name in names[1]} == set(range(10, 101, 10))
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (100, 33)


def test_the_best_checkpoint_is_found_by_a_metric_of_the_users_step(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="train_accuracy", mode="max", filename="{epoch}", save_last=True)
    module = make(Ada, adalfl=config(meta_data="train"))
    t = trainer(tmp_path, max_epochs=3, callbacks=[keep])
    t.fit(module, *loaders())
    assert keep.best_model_score > 0
    best = torch.load(keep.best_model_path, weights_only=True)
    assert best["adalfl"]["progress"]["base_steps"] == best["global_step"]
    assert torch.load(keep.last_model_path, weights_only=True)["adalfl"]["progress"]["base_steps"] == 18


def test_a_checkpoint_of_the_subclass_is_one_of_the_plain_module(tmp_path: Path) -> None:
    module = make(Ada, adalfl=config())
    path = fit(tmp_path, module)
    checkpoint = torch.load(path, weights_only=True)
    plain = make(Plain, seed=3)
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert_same(plain.state_dict(), base_tensors(module))
    loaded = Plain.load_from_checkpoint(path, weights_only=True)
    assert_same(loaded.state_dict(), base_tensors(module))
    resumed = make(Plain, seed=4)
    trainer(tmp_path, max_epochs=2).fit(resumed, *loaders(), ckpt_path=path)
    assert resumed.trainer.global_step == 12


def test_a_checkpoint_of_the_plain_module_starts_the_subclass(tmp_path: Path) -> None:
    plain = make(Plain)
    path = fit(tmp_path, plain)
    loaded = Ada.load_from_checkpoint(path, adalfl=config(), weights_only=True)
    assert_same(base_tensors(loaded), plain.state_dict())
    module = make(Ada, seed=3, adalfl=config())
    start = learned_tensors(module)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    assert_same(base_tensors(module), plain.state_dict())
    assert_same(learned_tensors(module), start)


def test_a_run_of_the_plain_module_is_resumed_by_the_subclass_which_learns_its_loss_first(tmp_path: Path) -> None:
    plain = make(Plain)
    path = fit(tmp_path, plain)
    module = make(Ada, seed=3, adalfl=config())
    trainer(tmp_path, max_epochs=2, callbacks=[AdaLFLInit(steps=2)]).fit(module, *loaders(), ckpt_path=path)
    assert module.adalfl.initialised
    assert module.adalfl.base_steps == 6
    assert module.trainer.global_step == 12
    assert module.trainer.optimizers[0].state_dict()["state"]


def test_load_from_checkpoint_gives_the_module_with_its_configuration(tmp_path: Path) -> None:
    options = config(meta_every=2, hypergradient="finite_difference", task_loss=task_loss)
    module = make(Ada, lr=0.05, adalfl=options)
    path = fit(tmp_path, module)
    loaded = Ada.load_from_checkpoint(path, weights_only=True)
    assert_same(loaded.state_dict(), module.state_dict())
    assert loaded.adalfl.config == options
    assert loaded.adalfl.config.task_loss is task_loss
    assert loaded.lr == 0.05
    assert (loaded.adalfl.base_steps, loaded.adalfl.meta_steps) == (6, 3)
    assert AdaLFLConfig.from_dict(loaded.hparams["adalfl"]) == options
    # It trains on from there, with the meta optimizer's state; the gain has its first step at the tenth base step.
    trainer(tmp_path, max_epochs=1).fit(loaded, *loaders())
    assert (loaded.adalfl.base_steps, loaded.adalfl.meta_steps) == (12, 6)
    states = loaded.adalfl.progress()["meta_optimizer"]["state"]
    assert [int(state["step"]) for _, state in sorted(states.items())] == [1, 6, 6, 6]


def test_arguments_that_are_no_hyper_parameters_are_given_again(tmp_path: Path) -> None:
    module = make(AdaWithBackbone, backbone=backbone(), lr=0.1, adalfl=config())
    path = fit(tmp_path, module)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"].keys() == {"lr", "width", "adalfl"}
    loaded = AdaWithBackbone.load_from_checkpoint(path, backbone=backbone(), weights_only=True)
    assert_same(loaded.state_dict(), module.state_dict())
    assert loaded.adalfl.config == config()
    plain = WithBackbone.load_from_checkpoint(path, backbone=backbone(), weights_only=True)
    assert_same(plain.state_dict(), base_tensors(module))


def test_a_new_configuration_may_be_given_where_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    path = fit(tmp_path, make(Ada, adalfl=config()))
    loaded = Ada.load_from_checkpoint(path, adalfl=config(online=False), weights_only=True)
    trainer(tmp_path, max_epochs=1).fit(loaded, *loaders())
    assert loaded.adalfl.meta_steps == 6
    assert loaded.adalfl.base_steps == 12


def test_a_weights_only_checkpoint_has_the_loss_too(tmp_path: Path) -> None:
    module = make(Ada, adalfl=config())
    t = trainer(tmp_path)
    t.fit(module, *loaders())
    t.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = Ada.load_from_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert_same(loaded.state_dict(), module.state_dict())


def test_the_state_dict_of_the_subclass_loads_strictly_into_another(tmp_path: Path) -> None:
    module, other = make(Ada, adalfl=config()), make(Ada, seed=3, adalfl=config())
    other.load_state_dict(module.state_dict(), strict=True)
    assert_same(other.state_dict(), module.state_dict())
    assert any(name.startswith("adalfl.loss.") for name in module.state_dict())
    inert = make(Ada, adalfl=INERT)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict.*adalfl.loss"):
        inert.load_state_dict(module.state_dict(), strict=True)
