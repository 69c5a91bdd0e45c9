"""The losses of one run are recorded, kept in a file, and replayed in another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from projects import Ada, Keep, Plain, assert_same, base_tensors, config, learned_tensors, loaders, make, trainer
from torch import Tensor

from lightning_adalfl import (
    AdaLFLInit,
    LearnedLoss,
    LossNetwork,
    LossTrajectory,
    TaylorLoss,
    TrajectoryRecorder,
    TrajectoryReplay,
)
from lightning_adalfl.losses.safe_file import read_safe_file, write_safe_file

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]
NAME = "loss_trajectory.safetensors"


def at_value(value: float) -> TaylorLoss:
    loss = TaylorLoss("binary")
    with torch.no_grad():
        loss.coefficients.fill_(value)
    return loss


def line(steps: int, **options: int) -> LossTrajectory:
    """A trajectory whose φ is its step."""
    trajectory = LossTrajectory(**{"every_n_steps": 1, **options})
    for step in range(steps):
        if trajectory.due(step):
            trajectory.append(step, at_value(step))
    return trajectory


def value_at(trajectory: LossTrajectory, step: float) -> float:
    (values,) = trajectory.at(step).values()
    assert len(set(values.tolist())) == 1
    return float(values[0])


def test_interpolation_is_linear_between_snapshots_and_constant_beyond() -> None:
    trajectory = line(41, every_n_steps=10)
    assert trajectory.steps == [0, 10, 20, 30, 40]
    for step in (0, 3.5, 10, 25, 39.75, 40):
        assert value_at(trajectory, step) == pytest.approx(step, abs=1e-6)
    assert value_at(trajectory, -3) == 0
    assert value_at(trajectory, 1000) == 40


def test_a_snapshot_is_read_bit_for_bit() -> None:
    trajectory, losses = LossTrajectory(1), [LossNetwork("multiclass") for _ in range(3)]
    for step, loss in enumerate(losses):
        trajectory.append(step, loss)
    other = LossNetwork("multiclass")
    for step, loss in enumerate(losses):
        trajectory.write_into(other, step)
        assert_same(dict(other.state_dict()), dict(loss.state_dict()))
        assert_same(dict(trajectory.loss_at(step).state_dict()), dict(loss.state_dict()))
    assert all(p.requires_grad for p in trajectory.loss_at(0).parameters())


@pytest.mark.parametrize("steps", [1, 2, 17, 100, 1000])
def test_thinning_keeps_it_bounded_even_and_complete(steps: int) -> None:
    trajectory = line(steps, max_snapshots=16)
    assert len(trajectory) <= 16
    assert trajectory.steps[0] == 0
    gaps = {b - a for a, b in zip(trajectory.steps, trajectory.steps[1:])}
    assert gaps <= {trajectory.interval}
    assert steps - 1 - trajectory.steps[-1] < trajectory.interval
    assert len(trajectory) >= min(steps, 8)


def test_a_newest_snapshot_off_schedule_makes_room_for_the_next() -> None:
    """So that a run which ended and goes on keeps what an uninterrupted one does."""
    trajectory = line(25, every_n_steps=10)
    trajectory.append(25, at_value(25))
    assert trajectory.steps == [0, 10, 20, 25]
    assert trajectory.due(30)
    trajectory.append(30, at_value(30))
    assert trajectory.steps == [0, 10, 20, 30]


def test_what_does_not_belong_is_not_appended() -> None:
    trajectory = line(3)
    with pytest.raises(ValueError, match="step 2 is not after 2; append in order"):
        trajectory.append(2, at_value(2))
    with pytest.raises(ValueError, match=r"is not what the trajectory is of, .* begin a new one"):
        trajectory.append(3, TaylorLoss("binary", "quadratic"))


def test_an_empty_trajectory_has_nothing_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the trajectory is empty; append a snapshot first"):
        LossTrajectory().at(0)
    with pytest.raises(ValueError, match="the trajectory is empty; append a snapshot before saving it"):
        LossTrajectory().save(tmp_path / NAME)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number, 1 or more; got 0"),
        ({"max_snapshots": 1}, "`max_snapshots` must be a whole number, 2 or more; got 1"),
        ({"max_snapshots": 2.5}, "`max_snapshots` must be a whole number, 2 or more; got 2.5"),
    ],
)
@pytest.mark.parametrize("kind", [LossTrajectory, TrajectoryRecorder])
def test_options(kind: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**options)


def test_the_file_round_trips_bitwise(tmp_path: Path) -> None:
    trajectory, loss = LossTrajectory(3, 8), LossNetwork("regression", reduction="sum")
    for step in (0, 3, 6, 7):
        loss.reset_parameters()
        trajectory.append(step, loss)
    trajectory.save(tmp_path / "a" / NAME)
    loaded = LossTrajectory.load(tmp_path / "a" / NAME)
    assert (loaded.steps, loaded.interval, loaded.max_snapshots) == ([0, 3, 6, 7], 3, 8)
    assert loaded.accepts(loss)
    for step in (0, 2, 7):
        assert_same(loaded.at(step), trajectory.at(step))
    loaded.save(tmp_path / "b" / NAME)
    assert (tmp_path / "b" / NAME).read_bytes() == (tmp_path / "a" / NAME).read_bytes()


def edited(
    path: Path,
    edit: Callable[[dict[str, Any], dict[str, Tensor]], None],
    kind: str = "loss trajectory",
    version: int = 1,
) -> None:
    content, tensors = read_safe_file(path, "loss trajectory", 1)
    edit(content, tensors)
    content = {name: value for name, value in content.items() if name not in ("kind", "version")}
    write_safe_file(path, kind, version, content, tensors)


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    line(3).save(path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cannot read .*: it is truncated, corrupt, or was not written by"):
            LossTrajectory.load(path)
    at_value(1).save(path)
    with pytest.raises(ValueError, match="it holds 'learned loss' and not a 'loss trajectory'"):
        LossTrajectory.load(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c, t: t.pop("steps"), "it holds no trajectory of a loss"),
        (lambda c, t: t.update(steps=torch.tensor([0, 2])), "its steps do not fit its snapshots"),
        (lambda c, t: t.update(steps=torch.tensor([0, 2, 2])), "or are not in order"),
        (lambda c, t: t.update(steps=torch.tensor([-1, 0, 1])), "or are not in order"),
        (lambda c, t: t.update(steps=torch.tensor([0.0, 1.0, 2.0])), "or are not in order"),
        (lambda c, t: t.update(steps=torch.tensor(3)), "it holds no trajectory of a loss"),
        (lambda c, t: c.update(interval=0), "its interval 0 or its last step of φ"),
        (lambda c, t: c.update(interval="1"), "its steps do not fit"),
        (lambda c, t: c.update(task_loss_from=-1), "its last step of φ, -1, is none"),
        (lambda c, t: c.update(max_snapshots=None), "`max_snapshots` must be a whole number"),
        (lambda c, t: c.update(bounds={"max_gain": 2.0, "min_cosine": 0.5}), "its gain and its bounds do not belong"),
        (lambda c, t: t.update({"phi.log_gain": torch.ones(3)}), "its gain and its bounds do not belong"),
        (
            lambda c, t: (t.update({"phi.log_gain": torch.ones(3)}), c.update(bounds={"max_gain": "2"})),
            "its bounds .* are none",
        ),
        (lambda c, t: t.update({"phi.coefficients": torch.ones(3, 8)}), "'coefficients' is no part of a learned loss"),
        (lambda c, t: c.update({"class": "Other"}), "a loss of class 'Other', and known here are"),
        (
            lambda c, t: t.update({"phi.loss.coefficients": torch.ones(3, 7)}),
            r"has shape \(8,\), and its φ has \(7,\) there",
        ),
        (lambda c, t: t["phi.loss.coefficients"].fill_(torch.nan), "its φ is not finite"),
        (
            lambda c, t: t.update(steps=torch.tensor([]).long(), **{"phi.loss.coefficients": torch.ones(0, 8)}),
            "no snapshot",
        ),
    ],
)
def test_contents_that_do_not_fit_are_refused(edit: Callable[..., None], message: str, tmp_path: Path) -> None:
    line(3).save(tmp_path / NAME)
    edited(tmp_path / NAME, edit)
    with pytest.raises(ValueError, match=f"cannot read .*{NAME}: .*{message}"):
        LossTrajectory.load(tmp_path / NAME)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    line(3).save(tmp_path / NAME)
    edited(tmp_path / NAME, lambda *_: None, version=2)
    with pytest.raises(ValueError, match=r"its format version 2 is newer than 1, .* upgrade lightning_adalfl"):
        LossTrajectory.load(tmp_path / NAME)


class PhiTrace(Callback):
    """Keeps what φ was at every base step."""

    def __init__(self) -> None:
        self.phi: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.phi.append(learned_tensors(pl_module))


def named(phi: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that a module has for φ."""
    return {f"adalfl.{name}": value for name, value in phi.items()}


def record(tmp_path: Path, **options: Any) -> tuple[Any, Path]:
    module = make(Ada, adalfl=config())
    recorder = TrajectoryRecorder(**{"every_n_steps": 1, **options})
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2), recorder]).fit(module, *loaders())
    return module, tmp_path / NAME


def test_a_replay_is_the_recorded_run_without_its_meta_steps(tmp_path: Path) -> None:
    """With every step recorded and the same seed, base model, buffers and last φ are equal to the bit."""
    recorded, path = record(tmp_path)
    assert LossTrajectory.load(path).steps == list(range(13))
    module = make(Ada, adalfl=config(online=False))
    torch.manual_seed(1)
    trainer(tmp_path, callbacks=[TrajectoryReplay(path), AdaLFLInit(steps=2)]).fit(module, *loaders())
    assert module.adalfl.meta_steps == 0
    assert recorded.adalfl.meta_steps == 12
    assert_same(base_tensors(module), base_tensors(recorded))
    assert_same(learned_tensors(module), named(LossTrajectory.load(path).at(11)))


def test_where_the_task_loss_took_over_it_does_so_again(tmp_path: Path) -> None:
    class GiveUp(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if pl_module.adalfl.base_steps == 5:
                pl_module.adalfl.safeguard.level = 2

    recorded = make(Ada, adalfl=config())
    trainer(tmp_path, callbacks=[GiveUp(), TrajectoryRecorder(1)]).fit(recorded, *loaders())
    # A safeguard gives up after a base step, so what is seen at the end of a batch holds from the next one.
    trajectory = LossTrajectory.load(tmp_path / NAME)
    assert trajectory.task_loss_from == 6
    module, levels = make(Ada, adalfl=config(online=False)), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            levels.append(pl_module.adalfl.fell_back)

    trainer(tmp_path, callbacks=[TrajectoryReplay(tmp_path / NAME), Watch()]).fit(module, *loaders())
    assert levels == [False] * 6 + [True] * 6


def test_a_replay_in_a_plain_loop_without_lightning(tmp_path: Path) -> None:
    _, path = record(tmp_path, every_n_steps=4)
    trajectory = LossTrajectory.load(path)
    loss = trajectory.build()
    assert trajectory.gain_at(12) > trajectory.gain_at(0) >= 1
    model, values = torch.nn.Linear(4, 3), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, (x, y) in enumerate(loaders()[0]):
        trajectory.write_into(loss, step)
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        values.append(value.item())
        assert_same(dict(loss.state_dict()), trajectory.at(step))
        assert all(p.grad is None for p in loss.parameters())
    assert len(set(values)) == 6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stretched_over_another_number_of_steps(accumulate: int, tmp_path: Path) -> None:
    _, path = record(tmp_path)
    trajectory, trace = LossTrajectory.load(path), PhiTrace()
    module = make(Ada, adalfl=config(online=False))
    callbacks = [TrajectoryReplay(path, steps=24), trace]
    fit = trainer(tmp_path, max_epochs=5, callbacks=callbacks, accumulate_grad_batches=accumulate)
    fit.fit(module, *loaders())
    assert len(trace.phi) == 30
    for batch, phi in enumerate(trace.phi):
        wanted = trajectory.at((batch // accumulate) * 12 / 24)
        assert_same(phi, named(wanted))


def test_a_recording_that_began_late_is_replayed_from_its_beginning(tmp_path: Path) -> None:
    trajectory = LossTrajectory(1)
    losses = {step: LossNetwork("multiclass") for step in (100, 101, 102)}
    for step, loss in losses.items():
        trajectory.append(step, loss)
    trajectory.save(tmp_path / NAME)
    module, trace = make(Ada, adalfl=config(online=False, residual=False, max_gain=None)), PhiTrace()
    trainer(tmp_path, max_steps=2, callbacks=[TrajectoryReplay(tmp_path / NAME), trace]).fit(module, *loaders())
    for phi, loss in zip(trace.phi, losses.values()):
        assert_same(phi, named({f"loss.{name}": value for name, value in loss.state_dict().items()}))


def test_a_resumed_recording_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    def fit(folder: str, epochs: int, checkpoint: Path | None = None) -> Path:
        keep = [Keep(tmp_path / folder)] if checkpoint is None else []
        module = make(Ada, adalfl=config())
        callbacks = [TrajectoryRecorder(every_n_steps=4, max_snapshots=3), *keep]
        runner = trainer(tmp_path / folder, max_epochs=epochs, callbacks=callbacks)
        runner.fit(module, *loaders(shuffle=False), ckpt_path=checkpoint)
        return tmp_path / folder / NAME

    whole = fit("whole", 3)
    fit("first", 1)
    resumed = fit("second", 3, tmp_path / "first" / "epoch=0.ckpt")
    assert LossTrajectory.load(whole).steps == [0, 16, 18]
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_resumed_replay_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    _, path = record(tmp_path)

    def fit(epochs: int, checkpoint: Path | None = None) -> Any:
        module = make(Ada, adalfl=config(online=False))
        callbacks: list[Callback] = [TrajectoryReplay(path, steps=20)]
        callbacks += [] if checkpoint else [Keep(tmp_path / "kept")]
        runner = trainer(tmp_path, max_epochs=epochs, callbacks=callbacks)
        runner.fit(module, *loaders(shuffle=False), ckpt_path=checkpoint)
        return module

    whole = fit(2)
    resumed = fit(2, tmp_path / "kept" / "epoch=0.ckpt")
    assert_same(base_tensors(resumed), base_tensors(whole))
    assert_same(learned_tensors(resumed), learned_tensors(whole))


def test_the_recording_is_in_the_log_folder(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0)
    trainer(tmp_path, max_epochs=1, logger=logger, callbacks=[TrajectoryRecorder(4)]).fit(
        make(Ada, adalfl=config()), *loaders()
    )
    assert LossTrajectory.load(tmp_path / "run" / "version_0" / NAME).steps == [0, 4, 6]


def test_recording_changes_nothing(tmp_path: Path) -> None:
    recorded, _ = record(tmp_path)
    module = make(Ada, adalfl=config())
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, *loaders())
    assert_same(dict(module.state_dict()), dict(recorded.state_dict()))


def test_a_recorder_that_meets_another_run_begins_anew(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(4)
    trainer(tmp_path, max_epochs=1, callbacks=[recorder]).fit(make(Ada, adalfl=config()), *loaders())
    with pytest.warns(UserWarning, match="a trajectory up to step 6 of another run than this one, which is at step 0"):
        trainer(tmp_path, max_steps=2, callbacks=[recorder]).fit(make(Ada, adalfl=config()), *loaders())
    assert recorder.trajectory.steps == [0, 2]


@pytest.mark.filterwarnings("ignore:.*`Trainer.barebones=True.` is configured")
@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True, "logger": None, "max_steps": 1}])
def test_nothing_is_recorded_in_a_trial(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"max_epochs": 1, **options}
    trainer(tmp_path, callbacks=[TrajectoryRecorder(1)], **options).fit(make(Ada, adalfl=config()), *loaders())
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("callback", ["recorder", "replay"])
def test_modules_that_do_not_fit(callback: str, tmp_path: Path) -> None:
    _, path = record(tmp_path)

    def fit(module: Any) -> None:
        made = TrajectoryRecorder() if callback == "recorder" else TrajectoryReplay(path)
        trainer(tmp_path, callbacks=[made]).fit(module, *loaders())

    with pytest.raises(
        MisconfigurationException, match=r"needs a module with a learned loss; got Plain. Put AdaLFLMixin"
    ):
        fit(Plain())
    for learn in ("lr", "both"):
        with pytest.raises(MisconfigurationException, match=f"got learn='{learn}', set `AdaLFLConfig.learn='loss'"):
            fit(make(Ada, adalfl=config(learn=learn)))


def test_replays_that_do_not_fit(tmp_path: Path) -> None:
    _, path = record(tmp_path)
    replay = TrajectoryReplay(path)
    with pytest.raises(MisconfigurationException, match=r"meta steps would move it as well; set .*online=False"):
        trainer(tmp_path, callbacks=[replay]).fit(make(Ada, adalfl=config()), *loaders())
    for options in ({"representation": "taylor_cubic"}, {"residual": False}, {"max_gain": None}, {"min_cosine": 0.5}):
        module = make(Ada, adalfl=config(online=False, **options))
        with pytest.raises(MisconfigurationException, match=r"holds the trajectory of another loss, .*'LossNetwork'"):
            trainer(tmp_path, callbacks=[replay]).fit(module, *loaders())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "no.safetensors"}, "`path` 'no.safetensors' cannot be replayed: .* no such file"),
        ({"path": "no.safetensors", "steps": 0}, "`steps` must be a whole number, 1 or more; got 0"),
    ],
)
def test_replay_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectoryReplay(**arguments)


def test_a_polynomial_is_recorded_too(tmp_path: Path) -> None:
    module = make(Ada, adalfl=config(representation="taylor_quadratic"))
    trainer(tmp_path, max_epochs=1, callbacks=[TrajectoryRecorder(2)]).fit(module, *loaders())
    last: LearnedLoss = LossTrajectory.load(tmp_path / NAME).loss_at(6)
    assert isinstance(last, TaylorLoss)
    assert_same(dict(last.state_dict()), dict(module.adalfl.loss.state_dict()))
