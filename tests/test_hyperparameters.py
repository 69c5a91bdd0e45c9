"""The module's hyper-parameters are the plain module's, in every form; a checkpoint gives them back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from omegaconf import DictConfig, OmegaConf
from projects import adaptive, assert_same, config, loaders, make, phi, points, tensors, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin, LearnedLoss, LossNetwork


class Small(L.LightningModule):
    """What the modules of this file share: they differ in their constructors."""

    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__()
        self.lr = lr
        self.model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any) -> None:
        return None

    def predict_step(self, batch: Any) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class AllArguments(Small):
    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.save_hyperparameters()


class NamedArguments(Small):
    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.save_hyperparameters("lr")


class InConstructorOfBase(AllArguments):
    """A subclass that adds an argument, and leaves saving to its base."""

    def __init__(self, depth: int, lr: float = 0.1) -> None:
        super().__init__(lr, 2 * depth)


class Container(Small):
    def __init__(self, hparams: Any) -> None:
        values = vars(hparams) if isinstance(hparams, argparse.Namespace) else hparams
        super().__init__(values["lr"], values["width"])
        self.save_hyperparameters(hparams)


class ForeignKeys(Small):
    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        super().__init__(lr, width)
        self.save_hyperparameters({"lr": lr, "width": width, "comment": "no argument"})


class AnyKeywords(Small):
    def __init__(self, lr: float = 0.1, **others: Any) -> None:
        super().__init__(lr, others.get("width", 8))
        self.save_hyperparameters()


class Changed(Small):
    def __init__(self, lr: float = 0.1, width: int = 8) -> None:
        lr = 2 * lr
        super().__init__(lr, width)
        self.save_hyperparameters()


class Ignoring(Small):
    def __init__(self, head: nn.Module, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.save_hyperparameters(ignore=["head"])
        self.head = head


def dict_config(flag: Callable[[DictConfig], None] = lambda _: None) -> DictConfig:
    container = OmegaConf.create({"lr": 0.02, "width": 6})
    flag(container)
    return container


def set_struct(container: DictConfig) -> None:
    OmegaConf.set_struct(container, True)


def set_read_only(container: DictConfig) -> None:
    OmegaConf.set_readonly(container, True)


VALUES = {"lr": 0.02, "width": 6}
FORMS: dict[str, tuple[type[Small], Callable[[], dict[str, Any]]]] = {
    "none saved": (Small, lambda: {}),
    "all arguments": (AllArguments, lambda: VALUES),
    "named arguments": (NamedArguments, lambda: {"lr": 0.02}),
    "of a subclass": (InConstructorOfBase, lambda: {"depth": 3, "lr": 0.02}),
    "a dict": (Container, lambda: {"hparams": dict(VALUES)}),
    "a Namespace": (Container, lambda: {"hparams": argparse.Namespace(**VALUES)}),
    "foreign keys": (ForeignKeys, lambda: VALUES),
    "any keywords": (AnyKeywords, lambda: VALUES),
    "changed before saving": (Changed, lambda: {"lr": 0.01, "width": 6}),
    "a DictConfig": (Container, lambda: {"hparams": dict_config()}),
    "a DictConfig in struct mode": (Container, lambda: {"hparams": dict_config(set_struct)}),
    "a read-only DictConfig": (Container, lambda: {"hparams": dict_config(set_read_only)}),
}


def fitted(tmp_path: Path, module: Any, name: str = "run.ckpt") -> Path:
    t = trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    t.fit(module, *loaders())
    t.save_checkpoint(tmp_path / name)
    return tmp_path / name


def saved(module: Any) -> tuple[Any, ...]:
    return module.hparams, module.hparams_initial, getattr(module, "_hparams_name", None)


@pytest.mark.parametrize("form", FORMS)
def test_hyper_parameters_are_the_plain_modules_and_come_back(tmp_path: Path, form: str) -> None:
    kind, arguments = FORMS[form]
    plain, module = make(kind, **arguments()), make(adaptive(kind), **arguments(), adalfl=config(meta_every=2))
    assert saved(module) == saved(plain)
    assert type(module.hparams) is type(plain.hparams)
    assert_same(tensors(module), tensors(plain))
    path, plain_path = fitted(tmp_path, module), fitted(tmp_path, plain, "plain.ckpt")
    # A DictConfig is an object, which the plain module's checkpoint cannot give back without trust either.
    trust = {"weights_only": "DictConfig" not in form}
    written = torch.load(path, weights_only=trust["weights_only"])
    expected = torch.load(plain_path, weights_only=trust["weights_only"])
    assert written.keys() - expected.keys() == {"adalfl"}
    assert written.get("hyper_parameters") == expected.get("hyper_parameters")
    ada = type(module)
    for loaded, options in (
        (ada.load_from_checkpoint(path, **trust), config(meta_every=2)),
        (ada.load_from_checkpoint(path, adalfl=config(meta_every=3), **trust), config(meta_every=3)),
    ):
        assert loaded.adalfl.config == options
        same = kind.load_from_checkpoint(plain_path, **trust)
        assert loaded.lr == same.lr
        assert saved(loaded) == saved(same)
        assert_same(tensors(loaded), tensors(module))
        assert_same(phi(loaded), phi(module))
        assert loaded.adalfl.base_steps == 2
    assert_same(tensors(kind.load_from_checkpoint(path, **trust)), tensors(module))
    from_plain = ada.load_from_checkpoint(plain_path, adalfl=config(), **trust)
    assert_same(tensors(from_plain), tensors(plain))
    assert from_plain.adalfl.base_steps == 0


def test_arguments_that_are_no_hyper_parameters_are_given_again(tmp_path: Path) -> None:
    module = make(adaptive(Ignoring), head=nn.Linear(3, 3), adalfl=config())
    path = fitted(tmp_path, module)
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"lr": 0.1}
    loaded = type(module).load_from_checkpoint(path, head=nn.Linear(3, 3), weights_only=True)
    assert_same(tensors(loaded), tensors(module))
    assert dict(loaded.hparams) == {"lr": 0.1}


def test_without_a_configuration_a_module_predicts_and_refuses_to_fit(tmp_path: Path) -> None:
    path = fitted(tmp_path, make(AllArguments))
    module = adaptive(AllArguments).load_from_checkpoint(path, weights_only=True)
    assert module.adalfl is None
    batches = trainer(tmp_path).predict(module, loaders()[1])
    assert batches[0].shape == (16, 3)
    with pytest.raises(ValueError, match=r"AdaAllArguments has no configuration.*adalfl=AdaLFLConfig\(task="):
        trainer(tmp_path).fit(module, *loaders())
    again = adaptive(AllArguments).load_from_checkpoint(path, adalfl={"task": "multiclass"}, weights_only=True)
    trainer(tmp_path, max_epochs=1).fit(again, *loaders())
    assert again.adalfl.base_steps == 6


def test_the_configuration_is_checked_where_it_is_given() -> None:
    kind = adaptive(AllArguments)
    with pytest.raises(TypeError, match=r"`adalfl` must be an AdaLFLConfig, such as .*; got 'multiclass'"):
        kind(adalfl="multiclass")
    assert kind(adalfl={"task": "multiclass", "meta_every": 2}).adalfl.config == AdaLFLConfig(
        "multiclass", meta_every=2
    )
    with pytest.raises(ValueError, match=r"`adalfl` has unknown fields \['meta_rate'\]"):
        kind(adalfl={"task": "multiclass", "meta_rate": 1})


class OwnConstructor(AdaLFLMixin, AllArguments):
    """A subclass with a constructor and hyper-parameters of its own."""

    def __init__(self, size: str, adalfl: AdaLFLConfig | None = None) -> None:
        super().__init__(0.02, {"small": 4, "large": 9}[size], adalfl=adalfl)
        self.save_hyperparameters("size", "adalfl")


class Inherited(OwnConstructor):
    """Inherits that constructor."""


class OnlyOurs(AdaLFLMixin, Small):
    def __init__(self, adalfl: AdaLFLConfig | None = None) -> None:
        super().__init__(adalfl=adalfl)
        self.save_hyperparameters("adalfl")


@pytest.mark.parametrize("kind", [OwnConstructor, Inherited])
def test_a_subclass_may_have_a_constructor_of_its_own(tmp_path: Path, kind: Any) -> None:
    module = make(kind, size="large", adalfl=config())
    assert dict(module.hparams) == {"size": "large", "lr": 0.02, "width": 9}
    path = fitted(tmp_path, module)
    for given in ({}, {"adalfl": config(meta_every=4)}):
        loaded = kind.load_from_checkpoint(path, weights_only=True, **given)
        assert loaded.adalfl.config == given.get("adalfl", config())
        assert_same(tensors(loaded), tensors(module))
    assert dict(make(OnlyOurs, adalfl=config()).hparams) == {}


def task_loss(predictions: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(predictions, target, label_smoothing=0.1)


def test_a_function_of_a_module_is_found_again(tmp_path: Path) -> None:
    path = fitted(tmp_path, make(adaptive(Small), adalfl=config(task_loss=task_loss)))
    loaded = adaptive(Small).load_from_checkpoint(path, weights_only=True)
    assert loaded.adalfl.config.task_loss is task_loss


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("task_loss", lambda: lambda f, y: F.cross_entropy(f, y), "lambda"),
        ("task_loss", lambda: nn.CrossEntropyLoss(torch.ones(3)), "CrossEntropyLoss"),
        ("meta_data", lambda: loaders()[1], "DataLoader"),
    ],
)
def test_what_no_file_can_hold_is_named_and_given_again(tmp_path: Path, name: str, value: Any, words: str) -> None:
    module = make(adaptive(Small), adalfl=config(**{name: value()}))
    path = fitted(tmp_path, module)
    with pytest.raises(ValueError, match=rf"`{name}` was .*{words}.*adalfl=AdaLFLConfig\(\.\.\., {name}=\.\.\.\)"):
        adaptive(Small).load_from_checkpoint(path, weights_only=True)
    loaded = adaptive(Small).load_from_checkpoint(path, adalfl=config(**{name: value()}), weights_only=True)
    assert_same(phi(loaded), phi(module))
    assert_same(tensors(Small.load_from_checkpoint(path, weights_only=True)), tensors(module))


class Squared(LearnedLoss):
    """A representation of a user's own."""

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.weight = nn.Parameter(torch.ones(()))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.weight * (prediction - target).square()


@pytest.mark.parametrize("given", ["network", "own class", "file"])
def test_a_loss_that_was_given_comes_back_without_what_gave_it(tmp_path: Path, given: str) -> None:
    loss = LossNetwork("multiclass") if given == "network" else Squared("multiclass")
    path = tmp_path / "loss.safetensors"
    loss.save(path)
    module = make(adaptive(Small), adalfl=config(loss=str(path) if given == "file" else loss))
    checkpoint = fitted(tmp_path, module)
    path.unlink()
    loaded = adaptive(Small).load_from_checkpoint(checkpoint, weights_only=True)
    assert type(loaded.adalfl.loss) is type(loss)
    assert_same(phi(loaded), phi(module))
    assert given != "file" or loaded.adalfl.config == module.adalfl.config
    again = adaptive(Small).load_from_checkpoint(fitted(tmp_path, loaded), weights_only=True)
    assert again.adalfl.base_steps == 4
    assert_same(phi(again), phi(loaded))


# The command line of both packages, in both of its ways to name classes.

CLI_WARNINGS = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def project(package: Any) -> tuple[Any, Any, Any]:
    """Return a plain module, its subclass and a data module of one of the packages."""

    class Classifier(package.LightningModule):
        def __init__(self, lr: float = 0.1, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

        forward = Small.forward
        training_step = Small.training_step
        validation_step = Small.validation_step
        predict_step = Small.predict_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])

    class AdaClassifier(AdaLFLMixin, Classifier):
        pass

    class Data(package.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loaders()[0]

        def val_dataloader(self) -> Any:
            return loaders()[1]

        def predict_dataloader(self) -> Any:
            return DataLoader(points(32, 1), batch_size=16)

    return Classifier, AdaClassifier, Data


@CLI_WARNINGS
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("by_class", [False, True])
def test_the_command_line_fits_and_both_classes_load_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, by_class: bool
) -> None:
    pl = pytest.importorskip(package)
    cli = pytest.importorskip(f"{package}.cli")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    plain, ada, data = project(pl)
    for kind in (plain, ada, data):
        monkeypatch.setitem(globals(), kind.__name__, kind)
        kind.__module__, kind.__qualname__ = __name__, kind.__name__
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}

    def run(kind: Any, *arguments: str) -> Any:
        common = {
            "trainer_defaults": {**quiet, "max_steps": 4, "enable_checkpointing": False},
            "seed_everything_default": 0,
        }
        if by_class:
            options = {"model_class": pl.LightningModule, "subclass_mode_model": True}
            arguments = (arguments[0], f"--model={__name__}.{kind.__name__}", *arguments[1:])
        else:
            options = {"model_class": kind}
        return cli.LightningCLI(
            datamodule_class=data, args=list(arguments), save_config_callback=None, **options, **common
        )

    prefix = "--model.init_args." if by_class else "--model."
    path = tmp_path / "ada.yaml"
    path.write_text(yaml.safe_dump({"task": "multiclass", "meta_every": 2, "meta_lr": 0.01}))
    done = run(ada, "fit", f"{prefix}lr=0.02", f"{prefix}adalfl={path}")
    module = done.model
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (4, 2)
    assert module.adalfl.config == AdaLFLConfig("multiclass", meta_every=2, meta_lr=0.01)
    assert "adalfl" not in module.hparams
    assert module.hparams["lr"] == 0.02
    expected = run(plain, "fit", f"{prefix}lr=0.02").model
    assert module.hparams.keys() == expected.hparams.keys()
    checkpoint = tmp_path / "cli.ckpt"
    done.trainer.save_checkpoint(checkpoint)
    for kind in (ada, plain):
        loaded = kind.load_from_checkpoint(checkpoint, weights_only=True)
        assert_same(tensors(loaded), tensors(module))
        run(kind, "predict", "--ckpt_path", str(checkpoint))
    with pytest.raises(ValueError, match="`meta_every` must be a whole number, 1 or more; got 0"):
        run(ada, "fit", f"{prefix}adalfl.task=multiclass", f"{prefix}adalfl.meta_every=0")
