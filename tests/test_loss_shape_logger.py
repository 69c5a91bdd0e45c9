"""A user attaches LossShapeLogger and watches the learned loss change."""

from __future__ import annotations

import itertools
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin
from lightning_adalfl.callbacks import loss_shape as module_under_test
from lightning_adalfl.callbacks.loss_shape import LossShapeLogger
from lightning_adalfl.snapshots import LossShapeHistory


class GrowingLoss(nn.Module):
    """ℓ(y, f) = scale · (f - y)²."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * (prediction - target) ** 2


class Learner(nn.Module):
    def __init__(self, task: str) -> None:
        super().__init__()
        self.loss = GrowingLoss(task)
        self.base_steps = 0

    @property
    def trained(self) -> GrowingLoss:
        return self.loss


class Net(pl.LightningModule):
    """A module whose learned loss grows by one at every base step; counters are in its checkpoint."""

    def __init__(self, task: str = "regression") -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.adalfl = Learner(task)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return self.layer(x).pow(2).mean()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.adalfl.base_steps += 1
        self.adalfl.loss.scale += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.01)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["base_steps"] = self.adalfl.base_steps

    def on_load_checkpoint(self, checkpoint):
        self.adalfl.base_steps = checkpoint["base_steps"]


def loader(batches: int = 10) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(batches, 2)), batch_size=1)


def make_trainer(tmp_path: Path, *callbacks, **options) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(trainer: pl.Trainer, module: pl.LightningModule, batches: int = 10, **options) -> None:
    trainer.fit(module, loader(batches), **options)


def pngs(tmp_path: Path, tag: str = "loss_shape") -> list[int]:
    return sorted(int(file.stem.removeprefix("step_")) for file in tmp_path.rglob(f"adalfl/{tag}/*.png"))


def test_snapshots_are_taken_at_the_start_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    callback = LossShapeLogger(every_n_steps=4)
    fit(make_trainer(tmp_path, callback), Net())

    assert callback.history.steps == [0, 4, 8, 10]
    for shape in callback.history:
        error = shape.grid
        torch.testing.assert_close(shape.loss, ((1 + shape.step) * error**2).expand(3, -1))


def test_a_step_on_schedule_at_the_end_is_not_taken_twice(tmp_path: Path) -> None:
    callback = LossShapeLogger(every_n_steps=5)
    fit(make_trainer(tmp_path, callback), Net())
    assert callback.history.steps == [0, 5, 10]


def test_base_steps_count_and_not_batches(tmp_path: Path) -> None:
    callback = LossShapeLogger(every_n_steps=2)
    fit(make_trainer(tmp_path, callback, accumulate_grad_batches=3), Net(), batches=15)
    assert callback.history.steps == [0, 2, 4, 5]


def test_data_is_in_the_log_folder_after_every_snapshot(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)

    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 6:
                raise RuntimeError("power cut")

    trainer = make_trainer(tmp_path, LossShapeLogger(every_n_steps=2), Crash(), logger=logger)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(trainer, Net())
    assert LossShapeHistory.load(Path(logger.log_dir) / "loss_shape.npz").steps == [0, 2, 4, 6]


def test_without_a_logger_the_data_is_in_the_root_folder(tmp_path: Path) -> None:
    fit(make_trainer(tmp_path, LossShapeLogger()), Net())
    assert LossShapeHistory.load(tmp_path / "loss_shape.npz").steps == [0, 10]
    assert pngs(tmp_path) == []


def test_every_logger_gets_the_figures_and_regression_a_heat_map(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    fit(make_trainer(tmp_path, LossShapeLogger(figure_every=4, every_n_steps=1), logger=[board, table]), Net())

    events = EventAccumulator(board.log_dir).Reload()
    for tag in ("adalfl/loss_shape", "adalfl/loss_heatmap"):
        assert [image.step for image in events.Images(tag)] == [0, 4, 8, 10]
    assert pngs(tmp_path / "table") == pngs(tmp_path / "table", "loss_heatmap") == [0, 4, 8, 10]
    assert LossShapeHistory.load(Path(board.log_dir) / "loss_shape.npz").steps == list(range(11))


def test_classification_has_no_heat_map(tmp_path: Path) -> None:
    fit(make_trainer(tmp_path, LossShapeLogger(), logger=CSVLogger(tmp_path)), Net("multiclass"))
    assert pngs(tmp_path) == [0, 10]
    assert pngs(tmp_path, "loss_heatmap") == []


def test_figures_become_rarer_with_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(module_under_test.time, "monotonic", lambda: 1000.0 * next(ticks) ** 2)  # drawing costs little
    monkeypatch.setattr(module_under_test, "_TIME_SHARE", 1.0)
    trainer = make_trainer(tmp_path, LossShapeLogger(every_n_steps=1), logger=CSVLogger(tmp_path))
    fit(trainer, Net("binary"), batches=30)
    assert pngs(tmp_path) == [0, 1, 2, 3, 5, 8, 12, 18, 27, 30]


def test_drawing_takes_no_more_than_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    draw = module_under_test.plot_loss_shapes

    def slow_drawing(history):
        now[0] += 2.0
        return draw(history)

    class Step(pl.Callback):
        def on_train_batch_start(self, *args):
            now[0] += 10.0

    monkeypatch.setattr(module_under_test.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module_under_test, "plot_loss_shapes", slow_drawing)
    trainer = make_trainer(tmp_path, LossShapeLogger(every_n_steps=1), Step(), logger=CSVLogger(tmp_path))
    fit(trainer, Net("binary"), batches=30)
    # 2 s at the start are 2% of the 102 s that 10 steps take, 4 s of the 204 s that 20 take
    assert pngs(tmp_path) == [0, 10, 20, 30]


def test_snapshots_stay_bounded(tmp_path: Path) -> None:
    callback = LossShapeLogger(every_n_steps=1, max_snapshots=5)
    fit(make_trainer(tmp_path, callback), Net("binary"), batches=43)
    assert callback.history.steps == [0, 16, 32, 43]


@pytest.mark.parametrize("stop", [6, 7])
def test_a_resumed_run_has_the_snapshots_of_one_that_was_not_stopped(stop: int, tmp_path: Path) -> None:
    whole = LossShapeLogger(every_n_steps=3, max_snapshots=4)
    torch.manual_seed(1)
    fit(make_trainer(tmp_path / "whole", whole, max_epochs=3), Net())

    torch.manual_seed(1)
    trainer = make_trainer(tmp_path / "first", LossShapeLogger(every_n_steps=3, max_snapshots=4), max_steps=stop)
    fit(trainer, Net())
    # after the end, so that the last snapshot, which is off schedule, has been taken
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = LossShapeLogger(every_n_steps=3, max_snapshots=4)
    second = make_trainer(tmp_path / "second", resumed, max_epochs=3)
    fit(second, Net(), ckpt_path=tmp_path / "stopped.ckpt")

    assert resumed.history.steps[0] == 0
    assert resumed.history.steps[:-1] == whole.history.steps[:-1]
    common = zip(resumed.history, whole.history, strict=True)
    for one, other in itertools.islice(common, len(whole.history) - 1):
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.slope, other.slope)


def test_checkpoints_hold_the_snapshots_and_load_without_pickle(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)
    fit(make_trainer(tmp_path, LossShapeLogger(every_n_steps=5), checkpoint), Net())
    (file,) = (tmp_path / "kept").glob("*step=5.ckpt")
    state = torch.load(file, weights_only=True)["callbacks"]["LossShapeLogger"]
    assert state["history"]["steps"] == [0, 5]


def test_a_second_fit_goes_on_and_another_module_begins_anew(tmp_path: Path) -> None:
    callback = LossShapeLogger(every_n_steps=4)
    trainer, net = make_trainer(tmp_path, callback), Net()
    fit(trainer, net)
    trainer.fit_loop.max_epochs = 2
    fit(trainer, net)
    assert callback.history.steps == [0, 4, 8, 12, 16, 20]

    other = make_trainer(tmp_path, callback)
    fit(other, Net("binary"))
    assert callback.history.steps == [0, 4, 8, 10]
    assert callback.history[0].task == "binary"


def test_another_grid_after_a_resume_begins_anew_with_a_warning(tmp_path: Path) -> None:
    before, after = LossShapeLogger(every_n_steps=5), LossShapeLogger(every_n_steps=5, resolution=11)
    net = Net()
    fit(make_trainer(tmp_path, before), net)
    after.load_state_dict(before.state_dict())
    with pytest.warns(UserWarning, match="taken on another grid, so LossShapeLogger begins anew; keep `resolution`"):
        fit(make_trainer(tmp_path, after), net)
    assert after.history.steps == [10, 15, 20]


@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
@pytest.mark.filterwarnings("ignore:You are running with `Trainer\\(barebones=True")
def test_fast_dev_run_and_barebones_write_nothing(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = LossShapeLogger(every_n_steps=1)
    options = {"fast_dev_run": 3} if mode == "fast_dev_run" else {"barebones": True, "max_epochs": 1}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **options)
    fit(trainer, Net())
    assert len(callback.history) == 0
    assert list(tmp_path.rglob("*.*")) == []


def test_only_rank_zero_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = LossShapeLogger(every_n_steps=1)
    trainer = make_trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
    monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda self: False))
    fit(trainer, Net())
    assert len(callback.history) == 0
    assert not list(tmp_path.rglob("loss_shape*"))


def test_looking_does_not_change_the_training(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [LossShapeLogger(every_n_steps=1)]):
        torch.manual_seed(3)
        net = Net()
        fit(make_trainer(tmp_path, *callbacks), net)
        results.append((net.layer.weight.detach().clone(), torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_module_without_a_learned_loss_is_refused_with_the_remedy(tmp_path: Path) -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.adalfl

    plain, only_rate = Plain(), Net()
    only_rate.adalfl.loss = None
    with pytest.raises(MisconfigurationException, match="no `adalfl` submodule in Plain; put AdaLFLMixin to the left"):
        fit(make_trainer(tmp_path, LossShapeLogger()), plain)
    with pytest.raises(MisconfigurationException, match="Net learns no loss; use learn='loss'"):
        fit(make_trainer(tmp_path, LossShapeLogger()), only_rate)


def test_a_plain_module_can_still_be_tested_with_the_same_callbacks(tmp_path: Path) -> None:
    LossShapeLogger().setup(make_trainer(tmp_path), pl.LightningModule(), "test")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be a whole number, 1 or more; got 0"),
        ({"every_n_steps": 1.5}, TypeError, "`every_n_steps` must be a whole number, 1 or more; got 1.5"),
        ({"every_n_steps": True}, TypeError, "`every_n_steps` must be a whole number, 1 or more; got True"),
        ({"max_snapshots": 1}, ValueError, "`max_snapshots` must be a whole number, 2 or more; got 1"),
        ({"figure_every": 0}, ValueError, "`figure_every` must be a whole number, 1 or more; got 0"),
        ({"figure_every": "epoch"}, TypeError, "`figure_every` must be a whole number, 1 or more; got 'epoch'"),
        ({"resolution": 1}, ValueError, "`resolution` must be a whole number, 2 or more; got 1"),
        ({"targets": ()}, ValueError, r"`targets` must be a sequence of numbers.*got \(\)"),
        ({"targets": 0.5}, TypeError, r"`targets` must be a sequence of numbers.*got 0\.5"),
        ({"targets": "12"}, TypeError, r"`targets` must be a sequence of numbers.*got '12'"),
        ({"targets": (0.0, "1")}, TypeError, "`targets` must be a number; got '1'"),
        ({"targets": (0.0, float("nan"))}, ValueError, "`targets` must be finite; got nan"),
        ({"error_range": 0.0}, ValueError, r"`error_range` must be positive; got 0\.0"),
        ({"error_range": float("inf")}, ValueError, "`error_range` must be finite; got inf"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LossShapeLogger(**arguments)


@pytest.mark.parametrize(
    "state", [{}, {"last_figure": 0, "history": {"version": 99}}, {"last_figure": 0, "history": {}}]
)
def test_a_state_that_cannot_be_read_is_refused(state: dict) -> None:
    with pytest.raises(ValueError, match="state of LossShapeLogger cannot be read"):
        LossShapeLogger().load_state_dict(state)


class Classifier(pl.LightningModule):
    """A user's module, which knows nothing of learned losses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AdaClassifier(AdaLFLMixin, Classifier):
    pass


def test_the_evolving_loss_of_a_users_classifier_is_on_tensorboard_and_in_a_file(tmp_path: Path) -> None:
    x = torch.randn(64, 4)
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    config = AdaLFLConfig(task="multiclass", meta_data="train", meta_lr=1e-2)
    callback, logger = LossShapeLogger(every_n_steps=4), TensorBoardLogger(tmp_path)
    make_trainer(tmp_path, callback, logger=logger).fit(AdaClassifier(adalfl=config), data)

    images = EventAccumulator(logger.log_dir).Reload().Images("adalfl/loss_shape")
    assert [image.step for image in images] == [0, 8]
    history = LossShapeHistory.load(Path(logger.log_dir) / "loss_shape.npz")
    assert history.steps == [0, 4, 8]
    assert not np.allclose(history[0].slope, history[-1].slope)
