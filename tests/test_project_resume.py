"""A run that is stopped and resumed equals one that was not, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from projects import (
    Ada,
    Keep,
    Plain,
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
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, RandomSampler

from lightning_adalfl import AdaLFLInit, AdaLFLMixin, LossShapeLogger


class StatefulLoader(DataLoader):
    """Knows its order and its place in it, as loaders do that can go on in the middle of an epoch."""

    def __init__(self, size: int = 16) -> None:
        self.order = torch.Generator().manual_seed(7)
        super().__init__(points(), size, sampler=RandomSampler(points(), generator=self.order))
        self.start, self.done, self.resumed = self.order.get_state(), 0, False

    def __iter__(self) -> Iterator[Any]:
        skipped = self.done if self.resumed else 0
        if not self.resumed:
            self.start, self.done = self.order.get_state(), 0
        self.order.set_state(self.start)
        self.resumed = False
        state = torch.get_rng_state()
        batches = list(super().__iter__())
        torch.set_rng_state(state)
        for batch in batches[skipped:]:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.done, self.resumed = state["start"], state["done"], True


class Cycled(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=self.lr)
        schedule = OneCycleLR(optimizer, 0.05, total_steps=24)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class AdaCycled(AdaLFLMixin, Cycled):
    pass


class Trajectory(Callback):
    """Keeps the learned loss of each step."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.rows[trainer.global_step] = pl_module.adalfl.run.logged["adalfl/learned_loss"]


def run(folder: Path, module: Any, train: Any, ckpt: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train four epochs, and return everything that a resumed run must agree on."""
    trajectory, shapes = Trajectory(), LossShapeLogger(every_n_steps=5, resolution=5)
    callbacks = [trajectory, shapes, AdaLFLInit(steps=3), *options.pop("callbacks", [])]
    folder.mkdir(exist_ok=True)
    t = trainer(folder, max_epochs=4, callbacks=callbacks, log_every_n_steps=1, **options)
    t.fit(module, train, loaders()[1], ckpt_path=ckpt)
    t.save_checkpoint(folder / "end.ckpt", weights_only=False)
    end = torch.load(folder / "end.ckpt", weights_only=True)
    assert t.global_step == module.adalfl.base_steps == 24
    return {
        "theta": base_tensors(module),
        "phi": learned_tensors(module),
        "optimizer": end["optimizer_states"],
        "schedulers": end["lr_schedulers"],
        "adalfl": end["adalfl"],
        "shapes": shapes.history.state_dict(),
        "rows": trajectory.rows,
        "drawn": torch.rand(3),
    }


def assert_equal(first: Any, second: Any, path: str = "") -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for i, (a, b) in enumerate(zip(first, second)):
            assert_equal(a, b, f"{path}.{i}")
    else:
        assert first == second or first != first, path


def assert_resumed(whole: dict[str, Any], resumed: dict[str, Any], step: int) -> None:
    rows, after = whole.pop("rows"), resumed.pop("rows")
    assert sorted(after) == list(range(step + 1, 25))
    assert_equal({key: rows[key] for key in after}, after)
    assert_equal(whole, resumed)


CONFIGS = [
    {},
    {"learn": "both", "meta_every": 3},
    {"hypergradient": "finite_difference", "meta_data": "train"},
    {"max_gain": None, "residual": False, "safeguard": False},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_at_the_end_of_an_epoch(tmp_path: Path, options: dict[str, Any]) -> None:
    keep = Keep(tmp_path)
    whole = run(tmp_path / "whole", make(AdaCycled, adalfl=config(**options)), loaders()[0], callbacks=[keep])
    # Another seed: everything must come from the checkpoint.
    module = make(AdaCycled, seed=5, adalfl=config(**options))
    resumed = run(tmp_path / "resumed", module, loaders()[0], tmp_path / "epoch=1.ckpt")
    assert_resumed(whole, resumed, 12)


@pytest.mark.parametrize("options", CONFIGS[:2])
def test_in_the_middle_of_an_epoch_with_a_stateful_loader(tmp_path: Path, options: dict[str, Any]) -> None:
    keep = Keep(tmp_path, steps=[9])
    whole = run(tmp_path / "whole", make(AdaCycled, adalfl=config(**options)), StatefulLoader(), callbacks=[keep])
    module = make(AdaCycled, seed=5, adalfl=config(**options))
    resumed = run(tmp_path / "resumed", module, StatefulLoader(), tmp_path / "step=9.ckpt")
    assert_resumed(whole, resumed, 9)


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_with_other_features_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    epochs = {"max_epochs": 4}
    results = []
    for seed, ckpt in ((0, None), (5, tmp_path / "epoch=1.ckpt")):
        module = make(Ada, seed=seed, adalfl=config())
        callbacks = [Keep(tmp_path)] if ckpt is None else []
        trainer(tmp_path, callbacks=callbacks, **epochs, **options).fit(module, *loaders(), ckpt_path=ckpt)
        results.append((module, torch.rand(3)))
    assert_same(base_tensors(results[0][0]), base_tensors(results[1][0]))
    assert_same(learned_tensors(results[0][0]), learned_tensors(results[1][0]))
    assert torch.equal(results[0][1], results[1][1])


def test_the_offline_phase_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(Ada, adalfl=config())
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2), Keep(tmp_path)]).fit(module, *loaders())
    resumed = make(Ada, adalfl=config())
    monkeypatch.setattr("lightning_adalfl.callbacks.initialisation.OfflinePhase", None)
    t = trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)], max_epochs=3)
    t.fit(resumed, *loaders(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.adalfl.base_steps == 18
    t.fit_loop.max_epochs = 4  # nor in a second fit
    t.fit(resumed, *loaders())
    assert resumed.adalfl.base_steps == 24
