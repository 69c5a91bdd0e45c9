"""A saved loss is kept, carried over to another model or data set, and learned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from projects import (
    Ada,
    AdaSmooth,
    Smooth,
    assert_same,
    config,
    loaders,
    loss_state,
    make,
    phi,
    points,
    tensors,
    trainer,
)
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLInit, LearnedLoss, LossNetwork


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the file of a loss that is as good as one of three classes' cross-entropy, and no more than that."""
    loss = LossNetwork("multiclass", bias=True, reduction="sum")
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    f = torch.linspace(0.02, 1, 200).unsqueeze(1).expand(-1, 2).contiguous()
    y = torch.tensor([1.0, 0.0]).expand(200, -1)
    for _ in range(150):
        optimizer.zero_grad()
        (loss.pairwise(f, y) + y * f.log()).square().mean().backward()
        optimizer.step()
    loss.save(tmp_path / "loss.safetensors")
    return tmp_path / "loss.safetensors"


def fixed(path: Path, **options: Any) -> Any:
    return config(**{"loss": str(path), "own_loss": False, "meta_every": None, **options})


def test_it_is_the_fixed_loss_of_another_model(saved: Path, tmp_path: Path) -> None:
    """Training with it in Lightning is training in a loop of one's own with the loaded loss."""
    module = make(AdaSmooth, adalfl=fixed(saved))
    trainer(tmp_path).fit(module, *loaders(shuffle=False))
    assert (module.adalfl.meta_steps, module.adalfl.base_steps) == (0, 12)
    loss = LearnedLoss.load(saved).requires_grad_(False)
    assert_same(loss_state(module), dict(loss.state_dict()))

    plain = make(Smooth).model
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    data = DataLoader(points(), 16)
    first = torch.cat([loss(plain(x), y)[None] for x, y in data]).mean().item()
    for x, y in [batch for _ in range(2) for batch in data]:
        optimizer.zero_grad()
        loss(plain(x), y).backward()
        optimizer.step()
    for found, wanted in zip(module.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.cat([loss(plain(x), y)[None] for x, y in data]).mean().item() < 0.9 * first


def test_learning_goes_on_from_it(saved: Path, tmp_path: Path) -> None:
    module = make(Ada, adalfl=config(loss=str(saved)))
    trainer(tmp_path, max_epochs=1).fit(module, *loaders())
    assert module.adalfl.meta_steps == 6
    before = LearnedLoss.load(saved).state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in phi(module).items() if "0.weight" in name)


def test_the_offline_phase_does_not_run_over_it(saved: Path, tmp_path: Path) -> None:
    module = make(Ada, adalfl=fixed(saved))
    trainer(tmp_path, max_epochs=1, callbacks=[AdaLFLInit(steps=3)]).fit(module, *loaders())
    assert_same(loss_state(module), dict(LearnedLoss.load(saved).state_dict()))


@pytest.mark.parametrize("meta_every", [1, None])
def test_the_checkpoint_needs_the_file_no_more(meta_every: int | None, saved: Path, tmp_path: Path) -> None:
    module = make(Ada, adalfl=fixed(saved, meta_every=meta_every))
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module, *loaders())
    fit.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    saved.unlink()
    again = Ada.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert_same(phi(again), phi(module))
    assert_same(tensors(again), tensors(module))
    assert again.adalfl.loss.reduction == "sum"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls jsonargparse
def test_it_is_carried_over_from_the_command_line(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("task=multiclass", f"loss={saved}", "own_loss=false", "meta_every=null")
    monkeypatch.setattr(
        "sys.argv", ["train.py", "--seed_everything=1", *(f"--model.adalfl.{option}" for option in options)]
    )
    cli = LightningCLI(Ada, run=False, save_config_callback=None)
    assert_same(loss_state(cli.model), dict(LearnedLoss.load(saved).state_dict()))
