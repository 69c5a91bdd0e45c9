"""Both of Lightning's packages: the main stories with each, and with the other one blocked from import."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from projects import assert_same, config, loaders, make, phi, points, tensors
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLInit, AdaLFLMixin
from lightning_adalfl.adapter.lightning_private import PACKAGES, package_of


def project(package: ModuleType) -> tuple[Any, Any]:
    """Return a project of one of the packages, and its subclass with a learned loss."""

    class Classifier(package.LightningModule):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", F.cross_entropy(self(x), y))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])

    class AdaClassifier(AdaLFLMixin, Classifier):
        pass

    return Classifier, AdaClassifier


def fit(package: ModuleType, folder: Path, module: Any, *callbacks: Any, **options: Any) -> Any:
    ckpt_path, data = options.pop("ckpt_path", None), options.pop("data", None)
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 2}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    t = package.Trainer(**{**quiet, **options, "callbacks": list(callbacks)})
    t.fit(module, *(loaders() if data is None else ()), datamodule=data, ckpt_path=ckpt_path)
    return t


def trains_as_plain(package: ModuleType, folder: Path) -> None:
    plain_kind, kind = project(package)
    plain, module = make(plain_kind), make(kind, adalfl=config(learn="nothing"))
    for fitted in (plain, module):
        torch.manual_seed(1)
        fit(package, folder, fitted, gradient_clip_val=0.5, accumulate_grad_batches=2)
    assert_same(tensors(module), tensors(plain))
    assert module.adalfl.meta_steps == 6
    assert package_of(kind) == package.__name__


def learns_offline_and_online_and_resumes(package: ModuleType, folder: Path) -> None:
    plain_kind, kind = project(package)
    ends = []
    for path in (None, folder / "half.ckpt"):
        module = make(kind, adalfl=config(learn="both"))

        class Half(package.Callback):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                if trainer.current_epoch == 0:
                    trainer.save_checkpoint(folder / "half.ckpt")

        fit(package, folder, module, AdaLFLInit(steps=2), *([Half()] if path is None else []), ckpt_path=path)
        assert module.adalfl.meta_steps == 12
        ends.append({**tensors(module), **phi(module)})
    assert_same(*ends)
    assert plain_kind.load_from_checkpoint(folder / "half.ckpt", weights_only=True).hparams["lr"] == 0.1
    assert kind.load_from_checkpoint(folder / "half.ckpt", weights_only=True).adalfl.base_steps == 6


def takes_steps_by_hand(package: ModuleType, folder: Path) -> None:
    _, kind = project(package)
    automatic, manual = (
        make(kind, adalfl=config()),
        make(type("M", (kind,), {"automatic_optimization": False}), adalfl=config()),
    )
    for module in (automatic, manual):
        torch.manual_seed(1)
        fit(package, folder, module)
    assert_same(tensors(manual), tensors(automatic))
    assert_same(phi(manual), phi(automatic))


def data_modules_with_hooks(package: ModuleType, folder: Path) -> None:
    _, kind = project(package)

    class Data(package.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(points(), batch_size=16, shuffle=True)

        def val_dataloader(self) -> Any:
            return [DataLoader(points(32, 1), batch_size=16)]

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

    module = make(kind, adalfl=config())
    fit(package, folder, module, max_epochs=1, data=Data())
    assert module.adalfl.meta_steps == 6


STORIES = [trains_as_plain, learns_offline_and_online_and_resumes, takes_steps_by_hand, data_modules_with_hooks]


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("name", PACKAGES)
def test_the_main_stories_with_each_package(tmp_path: Path, name: str, story: Any) -> None:
    story(importlib.import_module(name), tmp_path)


BLOCKED = """
    import importlib.abc, importlib.util, sys, warnings

    class Blocks(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {blocked!r}:
                raise ImportError(name + " is blocked")

    sys.meta_path.insert(0, Blocks())
    warnings.simplefilter("ignore")
    import {package} as package
    import torch
    from pathlib import Path

    torch.set_num_threads(1)
    from lightning_adalfl import AdaLFLConfig, AdaLFLMixin
    from lightning_adalfl.callbacks.adalfl_init import AdaLFLInit

    assert issubclass(AdaLFLInit, package.Callback)

    class Plain(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def forward(self, x):
            return self.model(x)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Ada(AdaLFLMixin, Plain):
        pass

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 4), torch.arange(64) % 3), 16)
    module = Ada(adalfl=AdaLFLConfig("multiclass", meta_every=1, meta_data="train"))
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = package.Trainer(accelerator="cpu", max_epochs=2, callbacks=[AdaLFLInit(steps=2)], **quiet)
    trainer.fit(module, data)
    trainer.save_checkpoint({path!r})
    assert module.adalfl.meta_steps == 8
    assert Ada.load_from_checkpoint({path!r}, weights_only=True).adalfl.base_steps == 8
    assert not any(name.split(".")[0] in {blocked!r} for name in sys.modules)
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [("lightning.pytorch", ["pytorch_lightning", "lightning_fabric"]), ("pytorch_lightning", ["lightning"])],
)
def test_one_package_works_where_the_other_is_not_installed(tmp_path: Path, package: str, blocked: list[str]) -> None:
    script = textwrap.dedent(BLOCKED.format(package=package, blocked=blocked, path=str(tmp_path / "run.ckpt")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_a_module_of_neither_package_is_refused() -> None:
    class LightningModule(nn.Module):
        """Of this name, and of neither package."""

    with pytest.raises(TypeError, match="Ada is no LightningModule"):
        type("Ada", (AdaLFLMixin, LightningModule), {})
