"""The callbacks that record the losses of one run and replay them in another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_adalfl.adapter.meta_learner import MetaLearner
from lightning_adalfl.arguments import whole_number
from lightning_adalfl.callbacks.figure_logging import logger_dir
from lightning_adalfl.mixin import AdaLFLMixin
from lightning_adalfl.trajectory import LossTrajectory

FILE_NAME = "loss_trajectory.safetensors"


class TrajectoryRecorder(Callback):
    """Keeps the values that φ takes over training, for a replay.

    They are in ``loss_trajectory.safetensors`` in the log folder of the first logger (``default_root_dir`` without
    one), about 7 kB a snapshot, written anew after each one. They are part of the checkpoint too, so that a resumed run
    goes on with them. Under ``fast_dev_run`` and ``barebones`` nothing is recorded.

    Args:
        every_n_steps: Base steps from one snapshot to the next; it doubles whenever there are too many.
        max_snapshots: Upper bound on the snapshots.

    Attributes:
        trajectory: What has been recorded so far, on rank zero.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If the module learns no loss, or a learning rate beside it.

    Example::

        trainer = L.Trainer(callbacks=[AdaLFLInit(), TrajectoryRecorder()])
    """

    def __init__(self, every_n_steps: int = 100, max_snapshots: int = 128) -> None:
        self.every_n_steps = every_n_steps
        self.max_snapshots = max_snapshots
        self.trajectory = LossTrajectory(every_n_steps, max_snapshots)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is a learned loss, and nothing else that is learned."""
        if stage == "fit":
            _learner(self, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the first φ, unless the run goes on from a checkpoint that has it."""
        if not _records(trainer):
            return
        learner, steps = _learner(self, pl_module), self.trajectory.steps
        step = learner.base_steps
        if steps and (steps[-1] > step or not self.trajectory.accepts(learner.trained)):
            rank_zero_warn(
                f"TrajectoryRecorder has a trajectory up to step {steps[-1]} of another run than this one, which is "
                f"at step {step}, and begins anew."
            )
            self.trajectory = LossTrajectory(self.every_n_steps, self.max_snapshots)
        self._record(trainer, learner, self.trajectory.due(step))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep φ where a snapshot is due."""
        if _records(trainer):
            learner = _learner(self, pl_module)
            ends = learner.fell_back and self.trajectory.task_loss_from is None
            if ends:
                self.trajectory.task_loss_from = learner.base_steps
            self._record(trainer, learner, ends or self.trajectory.due(learner.base_steps))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the last φ."""
        if _records(trainer):
            learner = _learner(self, pl_module)
            self._record(trainer, learner, learner.base_steps > self.trajectory.steps[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return the trajectory, as tensors and plain values."""
        return self.trajectory.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the trajectory of a checkpoint."""
        self.trajectory.load_state_dict(state_dict)

    def _record(self, trainer: pl.Trainer, learner: MetaLearner, due: bool) -> None:
        if due:
            self.trajectory.append(learner.base_steps, learner.trained)
            # Not `trainer.log_dir`, which is a collective call, and this is rank zero.
            folder = logger_dir(trainer.loggers[0]) if trainer.loggers else None
            self.trajectory.save((folder or Path(trainer.default_root_dir)) / FILE_NAME)


class TrajectoryReplay(Callback):
    """Trains with the losses that another run recorded, at the cost of ordinary training.

    Before each base step φ is set to what it was in the recorded run, by linear interpolation between its snapshots;
    where the safeguard had the task loss take over there, it takes over here. There is no meta step, so the
    configuration needs ``online=False``; an offline phase is passed over. The base model and the data may be others, as
    long as the task, the structure of the loss and its bounds are the same. A resumed run goes on where it was.

    Args:
        path: What :class:`TrajectoryRecorder` wrote.
        steps: Base steps over which the trajectory is stretched or squeezed; by default as many as were recorded. After
            them φ keeps its last value.

    Raises:
        ValueError: If the file cannot be read, or ``steps`` is no positive whole number.
        MisconfigurationException: If the module's configuration does not fit.

    Example::

        model = AdaClassifier(lr=0.01, adalfl=AdaLFLConfig(task="multiclass", online=False))
        L.Trainer(callbacks=[TrajectoryReplay("lightning_logs/version_0/loss_trajectory.safetensors")]).fit(model, data)
    """

    def __init__(self, path: str | os.PathLike[str], steps: int | None = None) -> None:
        if steps is not None:
            whole_number("steps", steps)
        self.path = os.fspath(path)
        try:
            self.trajectory = LossTrajectory.load(path)
        except OSError as error:
            raise ValueError(f"`path` {self.path!r} cannot be replayed: {error}") from error
        recorded = self.trajectory.steps
        self._first = recorded[0]
        self._pace = 1.0 if steps is None else (recorded[-1] - recorded[0]) / steps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the module takes what was recorded, and nothing else moves φ."""
        if stage != "fit":
            return
        learner = _learner(self, pl_module)
        if learner.config.online:
            raise MisconfigurationException(
                "TrajectoryReplay sets φ, and meta steps would move it as well; set `AdaLFLConfig(online=False)`."
            )
        if not self.trajectory.accepts(learner.trained):
            raise MisconfigurationException(
                f"{self.path} holds the trajectory of another loss, {self.trajectory.description}, than the module's; "
                "configure `task`, `representation` and its options, `max_gain` and `min_cosine` as in that run."
            )
        learner.initialised = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set φ for the base step that is about to be taken."""
        learner = _learner(self, pl_module)
        step = self._first + self._pace * learner.base_steps
        self.trajectory.write_into(learner.trained, step)
        end = self.trajectory.task_loss_from
        learner.task_loss_alone = end is not None and step >= end


def _learner(callback: Callback, pl_module: pl.LightningModule) -> MetaLearner:
    name = type(callback).__name__
    if not isinstance(pl_module, AdaLFLMixin):
        raise MisconfigurationException(
            f"{name} needs a module with a learned loss; got {type(pl_module).__name__}. Put AdaLFLMixin left of it: "
            f"class Ada{type(pl_module).__name__}(AdaLFLMixin, {type(pl_module).__name__})."
        )
    learner = pl_module.adalfl
    if learner.loss is None or learner.config.learns_lr:
        raise MisconfigurationException(
            f"{name} is for a learned loss alone, and a learned rate is no part of it; got "
            f"learn={learner.config.learn!r}, set `AdaLFLConfig(learn='loss')`."
        )
    return learner


def _records(trainer: pl.Trainer) -> bool:
    return trainer.is_global_zero and not trainer.fast_dev_run and not trainer.barebones  # type: ignore[attr-defined]
