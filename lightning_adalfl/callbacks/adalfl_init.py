"""The offline phase, in ``on_fit_start``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.nn.parameter import UninitializedParameter
from tqdm.auto import tqdm

from lightning_adalfl.adapter.lightning_private import lightning
from lightning_adalfl.adapter.meta_batches import train_loader
from lightning_adalfl.adapter.offline import OfflineFile, OfflinePhase, untouched
from lightning_adalfl.adapter.refusals import base_optimizer, checked_predict, learner_of
from lightning_adalfl.checks import one_of, positive_number, whole_number

Callback: Any = lightning().Callback


class AdaLFLInit(Callback):
    """Learns the loss offline in ``on_fit_start`` (Algorithm 1; Algorithm 3 for the learning rate).

    Base parameters, buffers, optimizer state and random states are afterwards as if it had not run. It runs once: not
    on a resumed run, nor in a second ``fit``, nor over a loss that was given as a file or is replayed. Under
    ``fast_dev_run`` it takes as many steps as that has batches. The module's ``on_fit_start`` has run before.

    A run that is killed meanwhile goes on where it was saved last when it is started again with the same seed, and ends
    as if it had not been stopped. The file is ``adalfl_offline_*.pt`` in the Trainer's ``default_root_dir``. It goes
    when the first checkpoint is there, and where the Trainer keeps no checkpoints it is not written.

    Args:
        steps: S_init, the meta steps; 0 for none.
        lr: η, the learning rate of φ meanwhile. By default it is small: a shape that is best for single steps from
            fresh parameters is not that for a whole training.
        inner_steps: S_inner, the base steps before each meta step.
        reset: The base parameters before each meta step: ``"fresh"``, a new random draw by the submodules'
            ``reset_parameters``, or ``"initial"``, those that training will begin with.
        train_dataloader: Base batches, where they cannot be drawn from the training data.
        save_every: Meta steps after which progress is saved.

    Raises:
        TypeError: For a value of the wrong type.
        ValueError: For a value out of range.

    Example::

        Trainer(callbacks=[AdaLFLInit()]).fit(model, datamodule=data)
    """

    def __init__(
        self,
        steps: int = 300,
        lr: float = 1e-5,
        inner_steps: int = 1,
        reset: str = "fresh",
        train_dataloader: Any = None,
        save_every: int = 100,
    ) -> None:
        super().__init__()
        self.steps = whole_number("steps", steps, 0)
        self.lr = positive_number("lr", lr)
        self.inner_steps = whole_number("inner_steps", inner_steps, 1)
        self.reset = one_of("reset", reset, ("fresh", "initial"))
        self.train_dataloader = train_dataloader
        self.save_every = whole_number("save_every", save_every, 1)
        self._file: OfflineFile | None = None
        self._is_checkpointed = False

    @classmethod
    def paper(cls, **changes: Any) -> AdaLFLInit:
        """Return the paper's own recipe, S_init = 2500 and η = 1e-3 (section 4.4), to go with ``AdaLFLConfig.paper()``.

        Args:
            **changes: Arguments that are to differ.
        """
        return cls(**{"steps": 2500, "lr": 1e-3, **changes})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a module without a learned loss."""
        learner_of(pl_module, "AdaLFLInit")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Have the module run the offline phase, once its own ``on_fit_start`` is through."""
        learner = learner_of(pl_module, "AdaLFLInit")
        # A checkpoint from which this fit goes on holds what the phase has learned.
        self._is_checkpointed = learner.is_initialised
        seed = int(trainer.strategy.broadcast(torch.initial_seed() % 2**31))
        self._file = OfflineFile(trainer, self._settings(pl_module, seed))
        if not learner.is_initialised and learner.learned:
            pl_module._adalfl_offline = partial(self._run, trainer, pl_module, seed)

    def _run(self, trainer: Any, pl_module: Any, seed: int) -> None:
        lazy = [name for name, p in pl_module.named_parameters() if isinstance(p, UninitializedParameter)]
        if lazy:
            raise ValueError(
                f"the offline phase draws parameters afresh, and those of lazy layers have no shape yet: {lazy}. Call "
                "the module on a batch before `fit`, or give the layers their sizes."
            )
        steps = min(self.steps, int(trainer.fast_dev_run)) if trainer.fast_dev_run else self.steps
        learner, given = pl_module.adalfl, self.train_dataloader
        with untouched(pl_module):
            phase = OfflinePhase(
                pl_module,
                learner,
                base_optimizer(trainer, learner),
                checked_predict(pl_module),
                (lambda: train_loader(trainer)) if given is None else (lambda: given),
                pl_module.adalfl_meta_dataloader,
                self.lr,
                self.inner_steps,
                self.reset == "fresh",
                seed,
            )
            self._steps(trainer, phase, steps)
        learner.finish_offline()
        rank_zero_info(f"Offline phase: {steps} meta steps.")

    def _steps(self, trainer: Any, phase: OfflinePhase, steps: int) -> None:
        file, first, done = self._file, 0.0, 0
        bar = tqdm(total=steps, desc="Offline phase", disable=not _shows_progress(trainer), leave=False)
        with bar:
            while done < steps and file is not None:
                task_loss, done = phase.step(), done + 1
                if done == 1:
                    first = float(task_loss)
                    saved = file.load(first)
                    if saved is not None:
                        phase.load_state_dict(saved["phase"])
                        done = saved["step"]
                is_last = done == steps > self.save_every
                if file.is_enabled and (done % self.save_every == 0 or is_last):
                    file.save({"step": done, "first": first, "phase": phase.state_dict()})
                if done % 10 == 1 and not bar.disable:
                    bar.set_postfix(task_loss=f"{float(task_loss):.4g}", refresh=False)
                bar.update(done - bar.n)

    def _settings(self, pl_module: Any, seed: int) -> dict[str, Any]:
        return {
            "config": pl_module.adalfl.config.to_dict(),
            "module": type(pl_module).__qualname__,
            "steps": self.steps,
            "lr": self.lr,
            "inner_steps": self.inner_steps,
            "reset": self.reset,
            "seed": seed,
        }

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Note that what the phase has learned is about to be in a checkpoint."""
        self._is_checkpointed = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remove the phase's file once a checkpoint has been written."""
        if self._is_checkpointed:
            self._remove_file()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the phase's file, if no checkpoint was written before."""
        self._remove_file()

    def _remove_file(self) -> None:
        if self._file is not None:
            self._file.remove()
            self._file = None


def _shows_progress(trainer: Any) -> bool:
    bar = trainer.progress_bar_callback
    return trainer.is_global_zero and bar is not None and bool(getattr(bar, "is_enabled", True))
