"""Watch the learned loss, and keep its history."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_adalfl.adapter.lightning_private import Callback, wants_logs
from lightning_adalfl.adapter.refusals import learner_of
from lightning_adalfl.callbacks.figure_logging import log_figure, run_dir, writes
from lightning_adalfl.checks import positive_number, whole_number
from lightning_adalfl.inspection.figures import plot_heatmap, plot_history
from lightning_adalfl.inspection.history import FILE_NAME, LossHistory
from lightning_adalfl.inspection.loss_shape import checked_targets

_GROWTH = 1.5  # from one figure to the next, in base steps
_TIME_SHARE = 0.02  # of the training time, for drawing
_POINTS = 26  # of each curve, for the scalars; a figure has more


class LossShapeLogger(Callback):
    """Keeps the history of the learned loss, and shows it in every attached logger.

    φ is kept when training starts, every ``every_n_steps`` base steps, and when training ends; it is in
    ``loss_history.safetensors`` in the log folder of the first logger (``default_root_dir`` without a logger), which
    :class:`LossReplay` replays and ``python -m lightning_adalfl inspect`` describes. It is part of the checkpoint, and
    a resumed run goes on with it.

    The figure of all snapshots so far goes to every logger under ``adalfl/loss_shape``; see
    :func:`~lightning_adalfl.inspection.plot_history` for what it shows. For regression there is a heat map of the
    newest under ``adalfl/loss_heatmap``. The scalars ``adalfl/flatness`` and, for classification, ``adalfl/turn_up``
    say how much of the newest is flat (section 5.6) and how far it rises again at confident predictions (section 5.7).

    Drawing takes about half a second, so it is bounded: there is a figure when training starts and when it ends, and
    between these whenever the base steps have grown by half since the last one and drawing has taken less than 2% of
    the time so far. ``figure_every`` sets fixed intervals instead.

    Note:
        TensorBoard's server shows ten images of a tag by default; ``--samples_per_plugin images=100`` shows all.
        Under ``fast_dev_run`` and ``barebones`` the callback does nothing.

    Args:
        every_n_steps: Base steps from one snapshot to the next; it doubles whenever there are too many.
        max_snapshots: Upper bound on the snapshots, of about 11 kB each.
        figure_every: Base steps from one figure to the next; ``None`` for the policy above.
        resolution: Points of each curve.
        targets: For regression, the targets to look at, in the units of the data; by default around their mean.
        error_range: For regression, errors up to this are looked at; by default the targets' standard deviation.

    Attributes:
        history: What has been kept so far, in the process of rank zero.

    Raises:
        TypeError: For an argument of the wrong type, or a module without AdaLFLMixin.
        ValueError: For one out of range, or a module that learns no loss.

    Example::

        trainer = Trainer(max_epochs=20, callbacks=[LossShapeLogger(every_n_steps=50)])
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        max_snapshots: int = 64,
        figure_every: int | None = None,
        resolution: int = 101,
        targets: Sequence[float] | None = None,
        error_range: float | None = None,
    ) -> None:
        super().__init__()
        self.every_n_steps, self.max_snapshots = every_n_steps, max_snapshots
        self.history = LossHistory(every_n_steps, max_snapshots)
        self.figure_every = None if figure_every is None else whole_number("figure_every", figure_every)
        self._look: dict[str, Any] = {
            "resolution": whole_number("resolution", resolution, 3),
            "targets": None if targets is None else checked_targets(targets),
            "error_range": None if error_range is None else positive_number("error_range", error_range),
        }
        self._scalars: dict[str, float] = {}
        self._last_figure = 0
        self._started = self._drawing = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a module without a learned loss."""
        if stage == "fit" and learner_of(pl_module, "LossShapeLogger").loss is None:
            raise ValueError(
                f"LossShapeLogger has nothing to show: {type(pl_module).__name__} learns no loss with "
                f"`learn={pl_module.adalfl.config.learn!r}`. Set `AdaLFLConfig(learn='loss')` or 'both', or leave the "
                "callback out."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the first φ, unless the run goes on from a checkpoint that has it."""
        if not writes(trainer):
            return
        self._started, self._drawing = time.monotonic(), 0.0
        learner, steps = pl_module.adalfl, self.history.steps
        step, is_added = learner.base_steps, learner.config.own_loss
        is_of_this_run = self.history.accepts(learner.loss) and self.history.is_added == is_added
        if steps and (steps[-1] > step or not is_of_this_run):
            rank_zero_warn(
                f"LossShapeLogger has the history of another run, up to step {steps[-1]}, than this one, which is at "
                f"step {step}, and begins anew. Give each run a LossShapeLogger of its own."
            )
            steps = []
        if not steps:
            self.history, self._last_figure = LossHistory(self.every_n_steps, self.max_snapshots, is_added), 0
        if self.history.is_due(step):
            self._keep(trainer, pl_module)
            self._draw(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep φ where a snapshot is due, and log the scalars where the loggers take them."""
        step = pl_module.adalfl.base_steps
        is_figure_due = self._is_figure_due(step)
        if writes(trainer) and (self.history.is_due(step) or (is_figure_due and self.figure_every is not None)):
            self._keep(trainer, pl_module)
            if is_figure_due:
                self._draw(trainer)
        # In every process, where a callback may monitor them.
        if (wants_logs(trainer) or trainer.is_last_batch) and not trainer.barebones:
            pl_module.log_dict(trainer.strategy.broadcast(self._scalars), batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the last φ, and draw the figure of the whole run."""
        if not writes(trainer):
            return
        if pl_module.adalfl.base_steps > self.history.steps[-1]:
            self._keep(trainer, pl_module)
        if self.history.steps[-1] > self._last_figure:
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the history, as tensors and plain values."""
        return {"history": self.history.state_dict(), "last_figure": self._last_figure}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the history of a checkpoint.

        Raises:
            ValueError: If the state is not that of this callback.
        """
        try:
            self.history.load_state_dict(state_dict["history"])
            self._last_figure = int(state_dict["last_figure"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's state of LossShapeLogger cannot be read: {error}.") from error

    def _keep(self, trainer: Any, pl_module: Any) -> None:
        self.history.append(pl_module.adalfl.base_steps, pl_module.adalfl.loss)
        (shape,) = self.history.shapes(1, **{**self._look, "resolution": _POINTS})
        self._scalars = {"adalfl/flatness": shape.flatness}
        if shape.task != "regression":
            self._scalars["adalfl/turn_up"] = shape.turn_up
        self.history.save(os.path.join(run_dir(trainer), FILE_NAME))

    def _is_figure_due(self, step: int) -> bool:
        if self.figure_every is not None:
            return step // self.figure_every > self._last_figure // self.figure_every
        is_affordable = self._drawing <= _TIME_SHARE * (time.monotonic() - self._started)
        return step >= _GROWTH * self._last_figure and is_affordable

    def _draw(self, trainer: Any) -> None:
        began = time.monotonic()
        self._last_figure = self.history.steps[-1]
        if trainer.loggers:
            shapes = self.history.shapes(**self._look)
            figures = {"adalfl/loss_shape": plot_history(shapes)}
            if shapes[-1].heat is not None:
                figures["adalfl/loss_heatmap"] = plot_heatmap(shapes[-1])
            for logger in trainer.loggers:
                for tag, figure in figures.items():
                    log_figure(logger, tag, figure, self._last_figure, trainer.default_root_dir)
        self._drawing += time.monotonic() - began
