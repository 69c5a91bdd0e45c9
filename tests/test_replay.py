"""The losses of one run are replayed in another, in a loop of one's own, and on another model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from projects import Ada, Keep, Plain, adaptive, assert_same, config, loaders, loss_state, make, tensors, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import (
    AdaLFLConfig,
    AdaLFLInit,
    LossHistory,
    LossNetwork,
    LossReplay,
    LossShapeLogger,
    MetaLearner,
)

NAME = "loss_history.safetensors"


class PhiTrace(Callback):
    """Keeps what φ was at every batch."""

    def __init__(self) -> None:
        self.phi: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.phi.append(loss_state(pl_module))


def record(tmp_path: Path, every: int = 1, **options: Any) -> tuple[Any, Path]:
    """Train twelve base steps from φ as an offline phase leaves it."""
    module = make(Ada, adalfl=config(**options))
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2), LossShapeLogger(every)]).fit(module, *loaders())
    return module, tmp_path / NAME


@pytest.mark.parametrize("own_loss", [True, False])
def test_a_replay_is_the_recorded_run_without_its_meta_steps(own_loss: bool, tmp_path: Path) -> None:
    """With every step recorded and the same seed, base model, buffers and last φ are equal to the bit."""
    recorded, path = record(tmp_path, own_loss=own_loss)
    assert LossHistory.load(path).steps == list(range(13))
    module = make(Ada, adalfl=config(meta_every=None, own_loss=own_loss))
    trainer(tmp_path, callbacks=[LossReplay(path), AdaLFLInit(steps=2)]).fit(module, *loaders())
    assert (module.adalfl.meta_steps, recorded.adalfl.meta_steps) == (0, 12)
    assert_same(tensors(module), tensors(recorded))
    assert_same(loss_state(module), LossHistory.load(path).at(11))


def test_a_replay_in_a_loop_of_ones_own_without_lightning(tmp_path: Path) -> None:
    recorded = make(Ada, dropout=0.0, adalfl=config())
    trainer(tmp_path, callbacks=[LossShapeLogger(1)]).fit(recorded, *loaders(shuffle=False))
    history, learner = LossHistory.load(tmp_path / NAME), MetaLearner(AdaLFLConfig("multiclass", meta_every=None))
    model = make(Plain, dropout=0.0).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = learner.new_base_step(model, optimizer)
    for batch in [batch for _ in range(2) for batch in loaders(shuffle=False)[0]]:
        learner.set_phi(history.at(learner.base_steps))
        predictions, target = step.forward(batch)
        optimizer.zero_grad()
        step.descend(learner.objective, F.cross_entropy(predictions, target)).backward()
        step.step()
        learner.end_base_step(step)
    assert_same(tensors(model), tensors(recorded.model))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stretched_over_another_number_of_steps(accumulate: int, tmp_path: Path) -> None:
    _, path = record(tmp_path)
    history, trace = LossHistory.load(path), PhiTrace()
    module = make(Ada, adalfl=config(meta_every=None))
    callbacks = [LossReplay(path, steps=24), trace]
    fit = trainer(tmp_path, max_epochs=5, callbacks=callbacks, accumulate_grad_batches=accumulate)
    fit.fit(module, *loaders())
    assert len(trace.phi) == 30
    for batch, found in enumerate(trace.phi):
        assert_same(found, history.at((batch // accumulate) * 12 / 24))


def test_a_history_that_began_late_is_replayed_from_its_beginning(tmp_path: Path) -> None:
    history = LossHistory(1)
    losses = {step: LossNetwork("multiclass", bias=True, sees_classes=True) for step in (100, 101, 102)}
    for step, loss in losses.items():
        history.append(step, loss)
    history.save(tmp_path / NAME)
    module, trace = make(Ada, adalfl=config(meta_every=None)), PhiTrace()
    trainer(tmp_path, max_steps=2, callbacks=[LossReplay(tmp_path / NAME), trace]).fit(module, *loaders())
    for found, loss in zip(trace.phi, losses.values()):
        assert_same(found, dict(loss.state_dict()))


def test_a_resumed_replay_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    _, path = record(tmp_path)

    def fit(checkpoint: Path | None = None) -> Any:
        module = make(Ada, adalfl=config(meta_every=None))
        callbacks: list[Any] = [LossReplay(path, steps=20), *([] if checkpoint else [Keep(tmp_path / "kept")])]
        trainer(tmp_path, callbacks=callbacks).fit(module, *loaders(shuffle=False), ckpt_path=checkpoint)
        return module

    whole, resumed = fit(), fit(tmp_path / "kept" / "epoch=0.ckpt")
    assert_same(tensors(resumed), tensors(whole))
    assert_same(loss_state(resumed), loss_state(whole))


class Regressor(pl.LightningModule):
    """A regressor of the other package."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore:`isinstance", "ignore:You passed in a `val_dataloader`")
def test_a_replay_on_another_model_and_seed_keeps_the_gain(tmp_path: Path) -> None:
    """A third of the targets is too high; what was learned of that on one model serves a wider one."""
    x = torch.randn(768, 2)
    y = x.sum(1, keepdim=True).sin()
    wrong = y + 2 * (torch.rand(len(y), 1) < 0.33)
    train = DataLoader(TensorDataset(x[:384], wrong[:384]), 32, shuffle=True)
    trusted = DataLoader(TensorDataset(x[384:480], y[384:480]), 32)

    def error(module: Any, *callbacks: Any) -> float:
        runner = pl.Trainer(
            accelerator="cpu",
            max_epochs=25,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        runner.fit(module, train, trusted)
        with torch.no_grad():
            return F.mse_loss(module(x[480:]), y[480:]).item()

    kind, settings = adaptive(Regressor), AdaLFLConfig("regression", meta_lr=3e-3)
    learned = error(make(kind, width=8, adalfl=settings), LossShapeLogger(10))
    own = error(make(Regressor, seed=1, width=24))
    replay = LossReplay(tmp_path / NAME)
    replayed = error(make(kind, seed=1, width=24, adalfl=replace(settings, meta_every=None)), replay)
    assert learned < 0.5 * own
    assert replayed < 0.5 * own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": "lr"}, "sets a learned loss and no learning rate; got learn='lr'"),
        ({"learn": "both"}, r"got learn='both'. Set `AdaLFLConfig\(learn='loss'\)`"),
        ({"meta_every": 1}, r"meta steps would move it; set `AdaLFLConfig\(meta_every=None\)`"),
        ({"own_loss": False}, r"is of a run with `own_loss=True`; set it in the AdaLFLConfig too"),
        ({"loss": "taylor_cubic"}, r"has a loss that is .*'LossNetwork'.*TaylorLoss.*Set `task` and `loss`"),
    ],
)
def test_replays_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    history = LossHistory()
    history.append(0, LossNetwork("multiclass", bias=True, sees_classes=True))
    history.save(tmp_path / NAME)
    module = make(Ada, adalfl=config(**{"meta_every": None, **options}))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callbacks=[LossReplay(tmp_path / NAME)]).fit(module, *loaders())
    with pytest.raises(TypeError, match=r"LossReplay needs .* got Plain. Put AdaLFLMixin left of it"):
        trainer(tmp_path, callbacks=[LossReplay(tmp_path / NAME)]).fit(Plain(), *loaders())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "no.safetensors"}, "`path` 'no.safetensors' cannot be replayed: .* no such file"),
        ({"path": "no.safetensors", "steps": 0}, "`steps` must be a whole number, 1 or more; got 0"),
    ],
)
def test_replay_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossReplay(**arguments)
