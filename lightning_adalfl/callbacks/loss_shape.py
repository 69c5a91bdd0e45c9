"""The callback that lets people watch the learned loss change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_adalfl.arguments import positive_number, whole_number
from lightning_adalfl.callbacks.figure_logging import log_figure, logger_dir
from lightning_adalfl.loss_shape import CLASSIFICATION_TASKS, checked_targets
from lightning_adalfl.plotting import plot_loss_heatmap, plot_loss_shapes
from lightning_adalfl.snapshots import LossShape, LossShapeHistory, evaluate_loss_shape

_FILE_NAME = "loss_shape.npz"
_GROWTH = 1.5  # from one figure to the next, in base steps
_TIME_SHARE = 0.02  # of the training time, for drawing


class LossShapeLogger(Callback):
    """Keeps snapshots of the learned loss ℓ_φ and shows them in every attached logger.

    Within the bounds of `AdaLFLConfig.max_gain`, ℓ_φ is shown times its gain. A snapshot is taken when training starts,
    every `every_n_steps` base steps, and when training ends. After each one, the data of all is in `loss_shape.npz` in
    the log folder of the first logger (`default_root_dir` without a logger). The figure of all snapshots so far goes to
    every logger under `adalfl/loss_shape`, for regression also a heat map of the newest under `adalfl/loss_heatmap`.
    The snapshots are part of the checkpoint; a resumed run goes on with them.

    The scalars `adalfl/flatness` and, for classification, `adalfl/turn_up` say how much of the newest snapshot is flat
    (section 5.6) and how far it rises again at confident predictions (section 5.7).

    Drawing takes about half a second, so it is bounded: there is a figure when training starts and when it ends, and
    between these whenever the base steps have grown by half since the last figure and drawing has taken less than 2% of
    the time so far. That is 25 figures or fewer in a million steps. `figure_every` sets fixed intervals instead.

    Note:
        TensorBoard's server shows ten images of a tag by default; `--samples_per_plugin images=100` shows all.
        Under `fast_dev_run` and `barebones` the callback does nothing.

    Args:
        every_n_steps: Base steps from one snapshot to the next.
        max_snapshots: Upper bound on the snapshots that are kept; a longer history is thinned evenly.
        figure_every: Base steps from one figure to the next; None for the policy above.
        resolution: Grid points of each curve.
        targets: For regression, the targets to look at, in the units of the data.
        error_range: For regression, errors from -error_range to error_range are looked at.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.
        MisconfigurationException: If the module to be trained has no learned loss.

    Example::

        trainer = L.Trainer(max_epochs=20, callbacks=[AdaLFLInit(), LossShapeLogger(every_n_steps=50)])
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        max_snapshots: int = 64,
        figure_every: int | None = None,
        resolution: int = 101,
        targets: Sequence[float] = (0.0, 0.5, 1.0),
        error_range: float = 1.0,
    ) -> None:
        super().__init__()
        self.every_n_steps = whole_number("every_n_steps", every_n_steps, 1)
        self.max_snapshots = whole_number("max_snapshots", max_snapshots, 2)
        self.figure_every = None if figure_every is None else whole_number("figure_every", figure_every, 1)
        self.resolution = whole_number("resolution", resolution, 2)
        self.targets = checked_targets(targets)
        self.error_range = positive_number("error_range", error_range)
        self._scheduled = LossShapeHistory(max_snapshots)
        self._final: LossShape | None = None  # taken off schedule at the end; a resumed run must not see it
        self._last_figure = 0
        self._started = 0.0
        self._drawing = 0.0

    @property
    def history(self) -> LossShapeHistory:
        """All snapshots so far, on rank zero: those taken on schedule, and the one at the end of training."""
        if self._final is None:
            return self._scheduled
        history = self._scheduled.copy()
        history.append(self._final)
        return history

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that there is a learned loss to look at."""
        if stage != "fit":
            return
        adalfl = getattr(pl_module, "adalfl", None)
        if not isinstance(adalfl, nn.Module):
            raise MisconfigurationException(
                f"LossShapeLogger found no `adalfl` submodule in {type(pl_module).__name__}; put AdaLFLMixin to the "
                "left of your module, as in `class Ada(AdaLFLMixin, YourModule)`, or remove the callback."
            )
        if getattr(adalfl, "loss", None) is None:
            raise MisconfigurationException(
                f"LossShapeLogger has nothing to show: {type(pl_module).__name__} learns no loss; use learn='loss' or "
                "learn='both', or remove the callback."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the first snapshot, unless the run goes on from a checkpoint that has it."""
        if not _enabled(trainer):
            return
        self._started, self._drawing, self._final = time.monotonic(), 0.0, None
        shape = self._evaluate(pl_module)
        if len(self._scheduled) and self._scheduled[-1].step <= shape.step:
            if self._scheduled.accepts(shape):
                return
            rank_zero_warn(
                "The loss-shape snapshots of the checkpoint were taken on another grid, so LossShapeLogger begins "
                "anew; keep `resolution`, `targets` and `error_range` as they were to go on with them."
            )
        self._scheduled = LossShapeHistory(self.max_snapshots)
        self._scheduled.append(shape)
        self._save(trainer)
        self._draw(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes a snapshot whenever a multiple of `every_n_steps` base steps has been reached."""
        if not _enabled(trainer):
            return
        adalfl: Any = pl_module.adalfl
        step, last = adalfl.base_steps, self._scheduled[-1].step
        # with accumulated gradients several batches end at one base step
        if step // self.every_n_steps != last // self.every_n_steps:
            self._scheduled.append(self._evaluate(pl_module))
            self._save(trainer)
            if self._figure_due(step):
                self._draw(trainer)
        newest = self._scheduled[-1]
        pl_module.log("adalfl/flatness", newest.flatness, batch_size=1)
        if newest.task in CLASSIFICATION_TASKS:
            pl_module.log("adalfl/turn_up", newest.turn_up, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the last snapshot and draws the figure of the whole run."""
        if not _enabled(trainer):
            return
        if pl_module.adalfl.base_steps > self._scheduled[-1].step:  # type: ignore[union-attr,operator]
            self._final = self._evaluate(pl_module)
            self._save(trainer)
        if self.history[-1].step > self._last_figure:
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The snapshots taken on schedule, as tensors and plain values."""
        return {"history": self._scheduled.state_dict(), "last_figure": self._last_figure}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the snapshots of a checkpoint.

        Raises:
            ValueError: If the state is not that of this callback, or comes from a newer version of it.
        """
        try:
            history, last_figure = LossShapeHistory(self.max_snapshots), int(state_dict["last_figure"])
            history.load_state_dict(state_dict["history"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's state of LossShapeLogger cannot be read: {error}.") from error
        self._scheduled, self._last_figure, self._final = history, last_figure, None

    def _evaluate(self, pl_module: pl.LightningModule) -> LossShape:
        adalfl: Any = pl_module.adalfl
        return evaluate_loss_shape(
            adalfl.trained,
            adalfl.base_steps,
            resolution=self.resolution,
            targets=self.targets,
            error_range=self.error_range,
        )

    def _figure_due(self, step: int) -> bool:
        if self.figure_every is not None:
            return step // self.figure_every > self._last_figure // self.figure_every
        affordable = self._drawing <= _TIME_SHARE * (time.monotonic() - self._started)
        return step >= _GROWTH * self._last_figure and affordable

    def _draw(self, trainer: pl.Trainer) -> None:
        began = time.monotonic()
        history = self.history
        newest = history[-1]
        self._last_figure = newest.step
        if trainer.loggers:
            figures = {"adalfl/loss_shape": plot_loss_shapes(history)}
            if newest.heat_loss is not None:
                figures["adalfl/loss_heatmap"] = plot_loss_heatmap(newest)
            for logger in trainer.loggers:
                for tag, figure in figures.items():
                    log_figure(logger, tag, figure, newest.step, default_dir=Path(trainer.default_root_dir))
        self._drawing += time.monotonic() - began

    def _save(self, trainer: pl.Trainer) -> None:
        # not `trainer.log_dir`, which is a collective call and this is rank zero
        folder = logger_dir(trainer.loggers[0]) if trainer.loggers else None
        self.history.save((folder or Path(trainer.default_root_dir)) / _FILE_NAME)


def _enabled(trainer: pl.Trainer) -> bool:
    return trainer.is_global_zero and not trainer.fast_dev_run and not trainer.barebones  # type: ignore[attr-defined]
