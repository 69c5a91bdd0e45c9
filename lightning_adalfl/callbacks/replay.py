"""Train with the losses of another run."""

from __future__ import annotations

import os
from typing import Any

from lightning_adalfl.adapter.lightning_private import Callback
from lightning_adalfl.adapter.refusals import learner_of
from lightning_adalfl.checks import whole_number
from lightning_adalfl.files import PathLike
from lightning_adalfl.inspection.history import LossHistory


class LossReplay(Callback):
    """Trains with the losses of another run, without meta steps and without held-out data.

    Before each base step φ is set to what it was in that run, by linear interpolation between its snapshots. There is
    no meta step, so the configuration needs ``meta_every=None``; an offline phase is passed over. The base model and
    the data may be others, as long as the task, the structure of the loss and ``own_loss`` are the same. A resumed run
    goes on where it was.

    Args:
        path: The ``loss_history.safetensors`` that :class:`LossShapeLogger` wrote, or the log folder that it is in.
        steps: Base steps over which the history is stretched or squeezed; by default as many as it has. After them φ
            keeps its last value.

    Raises:
        TypeError: If ``steps`` is no whole number, or the module has no AdaLFLMixin.
        ValueError: If the file cannot be read, or does not fit the module's configuration.

    Example::

        model = AdaClassifier(adalfl=AdaLFLConfig(task="multiclass", meta_every=None))
        Trainer(callbacks=[LossReplay("lightning_logs/version_0/loss_history.safetensors")]).fit(model, data)
    """

    def __init__(self, path: PathLike, steps: int | None = None) -> None:
        super().__init__()
        self.steps = None if steps is None else whole_number("steps", steps)
        self.path = os.fspath(path)
        try:
            self.history = LossHistory.load(path)
        except OSError as error:
            raise ValueError(f"`path` {self.path!r} cannot be replayed: {error}") from error
        recorded = self.history.steps
        self._first = recorded[0]
        self._pace = 1.0 if steps is None else (recorded[-1] - recorded[0]) / steps

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a module that does not take this history, or whose meta steps would move φ as well."""
        if stage != "fit":
            return
        learner = learner_of(pl_module, "LossReplay")
        config = learner.config
        if learner.loss is None or config.learns_lr:
            raise ValueError(
                f"LossReplay sets a learned loss and no learning rate; got learn={config.learn!r}. Set "
                "`AdaLFLConfig(learn='loss')`."
            )
        if config.meta_every is not None:
            raise ValueError("LossReplay sets φ, and meta steps would move it; set `AdaLFLConfig(meta_every=None)`.")
        if config.own_loss != self.history.is_added:
            raise ValueError(
                f"{self.path} is of a run with `own_loss={self.history.is_added}`; set it in the AdaLFLConfig too."
            )
        if not self.history.accepts(learner.loss):
            raise ValueError(
                f"{self.path} has a loss that is {self.history.description}, and the module's is "
                f"{learner.loss.describe()}. Set `task` and `loss` in the AdaLFLConfig as in that run."
            )
        self._set(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set φ for the base step that is about to be taken."""
        self._set(pl_module)

    def _set(self, pl_module: Any) -> None:
        learner = pl_module.adalfl
        learner.set_phi(self.history.at(self._first + self._pace * learner.base_steps))
