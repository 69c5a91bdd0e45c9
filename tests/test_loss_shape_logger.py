"""A user attaches LossShapeLogger, watches the learned loss change, and has its history in a file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from projects import (
    Ada,
    Keep,
    Plain,
    adaptive,
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, LossHistory, LossShapeLogger
from lightning_adalfl.callbacks import loss_shape_logger as module_under_test
from lightning_adalfl.inspection import read

NAME = "loss_history.safetensors"


def fit(
    tmp_path: Path, callbacks: list[Any], module: Any = None, checkpoint: Path | None = None, **options: Any
) -> Any:
    """Train six base steps an epoch; return the module."""
    module = make(Ada, adalfl=config()) if module is None else module
    trainer(tmp_path, callbacks=callbacks, **options).fit(module, *loaders(shuffle=False), ckpt_path=checkpoint)
    return module


def pngs(folder: Path, tag: str = "loss_shape") -> list[int]:
    return sorted(int(file.stem.removeprefix("step_")) for file in folder.rglob(f"adalfl/{tag}/*.png"))


class Trace(Callback):
    """Keeps φ at the end of every batch."""

    def __init__(self) -> None:
        self.phi: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.phi[pl_module.adalfl.base_steps] = loss_state(pl_module)


@pytest.mark.parametrize(("every", "steps"), [(4, [0, 4, 8, 12]), (5, [0, 5, 10, 12]), (100, [0, 12])])
def test_phi_is_kept_at_the_start_every_n_steps_and_at_the_end(every: int, steps: list[int], tmp_path: Path) -> None:
    logger, trace = LossShapeLogger(every), Trace()
    fit(tmp_path, [trace, logger])
    assert logger.history.steps == steps
    for step in steps[1:]:
        assert_same(logger.history.at(step), trace.phi[step])


def test_base_steps_count_and_not_batches(tmp_path: Path) -> None:
    logger = LossShapeLogger(2)
    fit(tmp_path, [logger], accumulate_grad_batches=3, max_epochs=3)
    assert logger.history.steps == [0, 2, 4, 6]


def test_the_file_is_in_the_log_folder_after_every_snapshot(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                raise RuntimeError("power cut")

    logger = CSVLogger(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, [LossShapeLogger(2), Crash()], logger=logger)
    assert LossHistory.load(Path(logger.log_dir) / NAME).steps == [0, 2, 4, 6]


def test_without_a_logger_it_is_in_the_root_folder_and_nothing_is_drawn(tmp_path: Path) -> None:
    fit(tmp_path, [LossShapeLogger()])
    assert read(tmp_path).steps == [0, 12]
    assert pngs(tmp_path) == []


def test_a_remote_root_folder_is_no_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit("memory://bucket/root", [LossShapeLogger()])  # type: ignore[arg-type]
    assert read("memory://bucket/root").steps == [0, 12]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:`isinstance")
def test_every_logger_of_the_other_package_gets_figures_and_regression_a_heat_map(tmp_path: Path) -> None:
    pl, loggers = importlib.import_module("pytorch_lightning"), importlib.import_module("pytorch_lightning.loggers")

    class Regressor(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Any) -> Any:
            return self.layer(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return nn.functional.mse_loss(self(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    board, table = loggers.TensorBoardLogger(tmp_path / "board"), loggers.CSVLogger(tmp_path / "table")
    x = points().tensors[0]
    runner = pl.Trainer(
        accelerator="cpu",
        max_steps=6,
        logger=[board, table],
        callbacks=[LossShapeLogger(every_n_steps=1, figure_every=4, targets=(0.0, 2.0), error_range=3.0)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    module = make(adaptive(Regressor), adalfl=AdaLFLConfig("regression", meta_data="train", meta_every=1))
    runner.fit(module, DataLoader(TensorDataset(x, x[:, :1]), 16))
    events = EventAccumulator(board.log_dir).Reload()
    for tag in ("adalfl/loss_shape", "adalfl/loss_heatmap"):
        assert [image.step for image in events.Images(tag)] == [0, 4, 6]
    assert [event.step for event in events.Scalars("adalfl/flatness")] == [1, 3, 5]
    assert "adalfl/turn_up" not in events.Tags()["scalars"]
    assert pngs(tmp_path / "table") == pngs(tmp_path / "table", "loss_heatmap") == [0, 4, 6]
    assert LossHistory.load(Path(board.log_dir) / NAME).steps == list(range(7))


def test_classification_has_a_turn_up_and_no_heat_map_and_its_loss_evolves(tmp_path: Path) -> None:
    module = fit(tmp_path, [LossShapeLogger(4)], logger=CSVLogger(tmp_path))
    assert pngs(tmp_path) == [0, 12]
    assert pngs(tmp_path, "loss_heatmap") == []
    assert {"adalfl/flatness", "adalfl/turn_up"} <= module.trainer.callback_metrics.keys()
    first, *_, last = read(module.trainer.logger.log_dir).shapes()
    assert (first.paths[0].slope == first.paths[0].own_slope).all()
    assert abs(last.paths[0].slope - first.paths[0].slope).max() > 0.01


def test_the_learned_loss_alone_is_known_as_such(tmp_path: Path) -> None:
    logger = LossShapeLogger()
    fit(tmp_path, [logger], make(Ada, adalfl=config(own_loss=False)))
    assert not logger.history.is_added
    assert not any(shape.is_added for shape in logger.history.shapes())


def drawing_at(folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, batch: float) -> list[int]:
    """Return when figures are drawn in 24 base steps, by a clock on which drawing and a batch take these times."""
    now = [0.0]

    def draw(shapes: Any) -> Figure:
        now[0] += seconds
        return Figure(figsize=(1, 1))

    class Step(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += batch

    monkeypatch.setattr(module_under_test.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module_under_test, "plot_history", draw)
    fit(folder, [LossShapeLogger(1), Step()], logger=CSVLogger(folder), max_epochs=4)
    return pngs(folder)


def test_figures_become_rarer_with_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawing_at(tmp_path, monkeypatch, 0.0, 1.0) == [0, 1, 2, 3, 5, 8, 12, 18, 24]


def test_drawing_takes_no_more_than_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 s at the start are 2% of the 102 s that 10 steps take, 4 s of the 204 s that 20 take."""
    assert drawing_at(tmp_path, monkeypatch, 2.0, 10.0) == [0, 10, 20, 24]


def test_figures_at_fixed_intervals_do_not_wait_for_a_snapshot(tmp_path: Path) -> None:
    logger = LossShapeLogger(figure_every=5)
    fit(tmp_path, [logger], logger=CSVLogger(tmp_path))
    assert pngs(tmp_path) == [0, 5, 10, 12]
    assert logger.history.steps == [0, 12]


class AtEnd(Checkpoint):
    """Saves a checkpoint when training ends."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "end.ckpt", weights_only=False)


@pytest.mark.parametrize("every", [3, 4])
def test_a_resumed_run_keeps_what_one_that_was_not_stopped_does(every: int, tmp_path: Path) -> None:
    """Whether the run stopped at a snapshot that is on schedule, or at one of its own."""

    def logger() -> LossShapeLogger:
        return LossShapeLogger(every, max_snapshots=4)

    fit(tmp_path / "whole", [logger()], max_epochs=3)
    first = logger()
    fit(tmp_path / "first", [first, AtEnd()], max_epochs=1)
    assert first.history.steps[-1] == 6
    fit(tmp_path / "second", [logger()], checkpoint=tmp_path / "first" / "end.ckpt", max_epochs=3)
    assert (tmp_path / "second" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


def test_checkpoints_hold_the_history_and_load_without_pickle(tmp_path: Path) -> None:
    fit(tmp_path, [LossShapeLogger(5), Keep(tmp_path, [5])])
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["callbacks"]["LossShapeLogger"]
    assert state["history"]["steps"].tolist() == [0, 5]
    again = LossShapeLogger()
    again.load_state_dict(state)
    assert again.history.steps == [0, 5]


def test_a_second_fit_goes_on_and_another_run_begins_anew(tmp_path: Path) -> None:
    logger, module = LossShapeLogger(4), make(Ada, adalfl=config())
    runner = trainer(tmp_path, callbacks=[logger], max_epochs=1)
    runner.fit(module, *loaders())
    runner.fit_loop.max_epochs = 2
    runner.fit(module, *loaders())
    assert logger.history.steps == [0, 4, 8, 12]
    with pytest.warns(UserWarning, match="history of another run, up to step 12, than this one, which is at step 0"):
        fit(tmp_path, [logger], max_epochs=1)
    assert logger.history.steps == [0, 4, 6]
    with pytest.warns(UserWarning, match="history of another run"):
        fit(tmp_path, [logger], make(Ada, adalfl=config(loss="taylor_cubic")), max_epochs=1)
    assert logger.history.description["class"] == "TaylorLoss"


@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
@pytest.mark.filterwarnings(
    "ignore:You are running with `Trainer\\(barebones=True", "ignore:.*`Trainer\\(barebones=True"
)
def test_fast_dev_run_and_barebones_write_nothing(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger = LossShapeLogger(1)
    options = {"fast_dev_run": 3} if mode == "fast_dev_run" else {"barebones": True, "logger": None}
    fit(tmp_path, [logger], max_epochs=1, **options)
    assert len(logger.history) == 0
    assert list(tmp_path.rglob("*.*")) == []


def test_only_rank_zero_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = LossShapeLogger(1)
    runner = trainer(tmp_path, callbacks=[logger], logger=CSVLogger(tmp_path))
    monkeypatch.setattr(type(runner), "is_global_zero", property(lambda self: False))
    runner.fit(make(Ada, adalfl=config()), *loaders())
    assert len(logger.history) == 0
    assert not list(tmp_path.rglob("loss*"))


def test_looking_does_not_change_the_training(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [LossShapeLogger(1)]):
        module = fit(tmp_path, callbacks, logger=CSVLogger(tmp_path))
        results.append((tensors(module), phi(module), torch.get_rng_state()))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


def test_a_module_without_a_learned_loss_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"LossShapeLogger needs .* got Plain. Put AdaLFLMixin left of it"):
        fit(tmp_path, [LossShapeLogger()], Plain())
    with pytest.raises(ValueError, match=r"Ada learns no loss with `learn='lr'`. Set `AdaLFLConfig\(learn='loss'\)`"):
        fit(tmp_path, [LossShapeLogger()], make(Ada, adalfl=config(learn="lr")))
    LossShapeLogger().setup(trainer(tmp_path), Plain(), "test")  # the same callbacks may go with a plain module


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be a whole number, 1 or more; got 0"),
        ({"max_snapshots": 1}, ValueError, "`max_snapshots` must be a whole number, 2 or more; got 1"),
        ({"figure_every": "epoch"}, TypeError, "`figure_every` must be a whole number, 1 or more; got 'epoch'"),
        ({"resolution": 1}, ValueError, "`resolution` must be a whole number, 3 or more; got 1"),
        ({"targets": 0.5}, TypeError, r"`targets` must be a sequence of numbers.*got 0\.5"),
        ({"targets": (0.0, "1")}, TypeError, "`targets` must be a number; got '1'"),
        ({"error_range": float("inf")}, ValueError, "`error_range` must be finite; got inf"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LossShapeLogger(**arguments)


@pytest.mark.parametrize("state", [{}, {"last_figure": 0, "history": {}}, {"last_figure": "no", "history": {}}])
def test_a_state_that_cannot_be_read_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="state of LossShapeLogger cannot be read"):
        LossShapeLogger().load_state_dict(state)
