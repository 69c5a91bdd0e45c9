"""Shortened, limited and bare runs of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from projects import INERT, Ada, Plain, assert_same, base_tensors, config, loaders, make, points, trainer
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLInit, LossShapeLogger


@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_takes_its_steps_and_shortens_the_offline_phase(tmp_path: Path, batches: int) -> None:
    plain = make(Plain)
    trainer(tmp_path, fast_dev_run=batches).fit(plain, *loaders())
    inert = make(Ada, adalfl=INERT)
    trainer(tmp_path, fast_dev_run=batches).fit(inert, *loaders())
    assert_same(base_tensors(inert), plain.state_dict())
    module = make(Ada, adalfl=config())
    taken = []
    init = AdaLFLInit(steps=100_000)
    t = trainer(tmp_path, fast_dev_run=batches, callbacks=[init, LossShapeLogger()])
    step = module.adalfl.step
    module.adalfl.step = lambda *arguments: (taken.append(module.adalfl.base_steps), step(*arguments))[1]
    t.fit(module, *loaders())
    assert taken == [0] * batches + list(range(batches))
    assert not list(tmp_path.iterdir())


def test_barebones_logs_nothing_and_trains(tmp_path: Path) -> None:
    def run(module: Any, *callbacks: Any) -> Any:
        t = trainer(tmp_path, barebones=True, max_epochs=1, logger=None, callbacks=list(callbacks))
        t.fit(module, *loaders())
        assert t.callback_metrics == {}
        return module

    plain = run(make(Quiet))
    assert_same(base_tensors(run(make(AdaQuiet, adalfl=INERT))), plain.state_dict())
    module = run(make(AdaQuiet, adalfl=config()), AdaLFLInit(steps=2))
    assert module.adalfl.meta_steps == 6


class Quiet(Plain):
    """Logs nothing, as Lightning advises for a bare run."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


class AdaQuiet(Ada, Quiet):
    pass


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("batches", [2, 0.5])
def test_overfit_batches_sees_those_batches_alone(tmp_path: Path, batches: Any) -> None:
    class Watching(Ada):
        def adalfl_predict(self, batch: Any) -> Any:
            seen.update(batch[0][:, 0].tolist())
            return super().adalfl_predict(batch)

    for meta_data in ("train", "val"):
        seen: set[float] = set()
        module = make(Watching, adalfl=config(meta_data=meta_data))
        callbacks = [AdaLFLInit(steps=8)]
        trainer(tmp_path, overfit_batches=batches, callbacks=callbacks).fit(module, *loaders(shuffle=False))
        count = 2 if batches == 2 else 3
        base = points().tensors[0][: 16 * count, 0].tolist()
        assert set(base) <= seen
        validation = points(32, 1).tensors[0][:, 0].tolist()
        assert seen <= set(base) | (set(validation) if meta_data == "val" else set())
        assert module.adalfl.base_steps == 2 * count


@pytest.mark.parametrize(("limit", "train", "val"), [(1, 1, 1), (2, 2, 2), (0.5, 3, 1), (1.0, 6, 2)])
def test_limited_batches_limit_meta_batches_and_the_offline_phase_too(
    tmp_path: Path, limit: Any, train: int, val: int
) -> None:
    class Watching(Ada):
        def adalfl_predict(self, batch: Any) -> Any:
            seen.update(batch[0][:, 0].tolist())
            return super().adalfl_predict(batch)

    seen: set[float] = set()
    module = make(Watching, adalfl=config())
    options = {"limit_train_batches": limit, "limit_val_batches": limit, "num_sanity_val_steps": 0}
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=12)], **options).fit(module, *loaders(shuffle=False))
    expected = points().tensors[0][: 16 * train, 0].tolist() + points(32, 1).tensors[0][: 16 * val, 0].tolist()
    assert seen == set(expected)


def test_without_a_validation_loop_its_data_still_serve_the_meta_objective(tmp_path: Path) -> None:
    module = make(Ada, adalfl=config())
    trainer(tmp_path, limit_val_batches=0).fit(module, *loaders())
    assert module.adalfl.meta_steps == 12


def test_a_second_fit_with_the_same_trainer_goes_on(tmp_path: Path) -> None:
    module = make(Ada, adalfl=config())
    t = trainer(tmp_path, gradient_clip_val=0.5, callbacks=[AdaLFLInit(steps=2)])
    t.fit(module, *loaders())
    t.fit_loop.max_epochs = 4
    t.fit(module, *loaders())
    assert module.adalfl.meta_steps == module.adalfl.base_steps == 24
    (val,) = t.validate(module, loaders()[1], verbose=False)
    assert val["val_loss"] > 0


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_other_stages_need_no_meta_data(tmp_path: Path, stage: str) -> None:
    module = make(Ada, adalfl=config())
    loader = loaders()[1]
    if stage == "validate":
        assert trainer(tmp_path).validate(module, loader, verbose=False)[0]["val_loss"] > 0
    else:
        module.predict_step = lambda batch, batch_idx: module(batch[0])
        assert trainer(tmp_path).predict(module, loader)[0].shape == (16, 3)


@pytest.mark.parametrize("option", [{"detect_anomaly": True}, {"deterministic": True}, {"inference_mode": False}])
def test_other_switches(tmp_path: Path, option: dict[str, Any]) -> None:
    module = make(Ada, adalfl=config())
    trainer(tmp_path, max_epochs=1, **option).fit(module, *loaders())
    torch.use_deterministic_algorithms(False)
    assert module.adalfl.meta_steps == 6


def test_a_step_that_stops_training_is_the_last(tmp_path: Path) -> None:
    class Stopping(Plain):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = self.trainer.global_step >= 4

    class AdaStopping(Ada, Stopping):
        pass

    module = make(AdaStopping, adalfl=config())
    t = trainer(tmp_path, max_epochs=5)
    t.fit(module, DataLoader(points(), 16), loaders()[1])
    assert t.global_step == module.adalfl.base_steps == 4
