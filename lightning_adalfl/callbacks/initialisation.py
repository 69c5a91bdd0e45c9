"""The callback that runs the offline phase before training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.nn.parameter import UninitializedParameter
from tqdm.auto import tqdm

from lightning_adalfl.adapter.imitation import imitate_task_loss
from lightning_adalfl.adapter.meta_batches import private_train_loader
from lightning_adalfl.adapter.offline_phase import OfflinePhase, untouched
from lightning_adalfl.arguments import positive_number, whole_number
from lightning_adalfl.callbacks.offline_progress import OfflineProgress
from lightning_adalfl.callbacks.termination import termination_noted
from lightning_adalfl.mixin import AdaLFLMixin


class AdaLFLInit(Callback):
    """Learns the loss offline in ``on_fit_start`` (Algorithm 1; Algorithm 3 for the learning rate).

    Base parameters, buffers, optimizer state and random states are afterwards as if it had not run. It runs once: not
    on a resumed run, nor in a second ``fit``, nor over a loss that was given by ``initial_loss`` or is replayed. Under
    ``fast_dev_run`` it takes as many steps as that has batches.

    A run that is killed meanwhile goes on where it was saved last when it is started again with the same seed, and ends
    as if it had not been stopped; SIGTERM saves and stops it at the next step. The file is ``adalfl_offline_*.pt`` in
    the Trainer's ``default_root_dir``. It goes when the first checkpoint is there, and where the Trainer keeps no
    checkpoints it is not written.

    Args:
        steps: S_init, the meta steps; 0 for none.
        lr: η, the learning rate of φ meanwhile. By default it is small: a shape that is best for single steps from
            fresh parameters is not that for a whole training. The gain of the bounds is not learned, for that reason.
        inner_steps: S_inner, the base steps before each meta step.
        reset: The base parameters before each meta step: ``"fresh"``, a new random draw by the submodules'
            ``reset_parameters``, or ``"initial"``, those that training will begin with.
        imitation_steps: Steps of fitting ∂M_φ/∂f to the gradient of the task loss first; they need no base model and a
            second or so.
        train_dataloader: Base batches, where they cannot be drawn from the training data, such as an IterableDataset.
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
        imitation_steps: int = 0,
        train_dataloader: Any = None,
        save_every: int = 100,
    ) -> None:
        if not isinstance(reset, str) or reset not in ("fresh", "initial"):
            raise ValueError(f"`reset` must be 'fresh' or 'initial'; got {reset!r}.")
        self.steps = whole_number("steps", steps, 0)
        self.lr = positive_number("lr", lr)
        self.inner_steps = whole_number("inner_steps", inner_steps, 1)
        self.reset = reset
        self.imitation_steps = whole_number("imitation_steps", imitation_steps, 0)
        self.train_dataloader = train_dataloader
        self.save_every = whole_number("save_every", save_every, 1)
        self._progress: OfflineProgress | None = None
        self._checkpointed = False

    @classmethod
    def paper(cls, **changes: Any) -> AdaLFLInit:
        """Return the paper's own recipe, S_init = 2500 and η = 1e-3 (section 4.4), to go with ``AdaLFLConfig.paper()``.

        Args:
            **changes: Arguments that are to differ.
        """
        return cls(**{"steps": 2500, "lr": 1e-3, **changes})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without a learned loss."""
        if not isinstance(pl_module, AdaLFLMixin):
            raise MisconfigurationException(
                f"AdaLFLInit needs a module with a learned loss; got {type(pl_module).__name__}. Put AdaLFLMixin left "
                f"of it: class Ada{type(pl_module).__name__}(AdaLFLMixin, {type(pl_module).__name__})."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the offline phase, unless it has run."""
        if not isinstance(pl_module, AdaLFLMixin):
            return
        batches = int(trainer.fast_dev_run)  # type: ignore[attr-defined]
        steps = min(self.steps, batches) if batches else self.steps
        learner = pl_module.adalfl
        seed = int(trainer.strategy.broadcast(torch.initial_seed() % 2**31))
        self._progress = OfflineProgress(trainer, self._settings(pl_module, seed), self.save_every)
        # A checkpoint from which this fit goes on holds what the phase has learned.
        self._checkpointed = learner.initialised
        if learner.initialised:
            return
        lazy = [name for name, p in pl_module.named_parameters() if isinstance(p, UninitializedParameter)]
        if lazy:
            raise MisconfigurationException(
                f"the offline phase draws parameters afresh, and those of lazy layers have no shape yet: {lazy}. Call "
                "the module on a batch before `fit`, or give the layers their sizes."
            )
        with untouched(pl_module):
            loader = self.train_dataloader if self.train_dataloader is not None else private_train_loader(trainer)
            phase = OfflinePhase(
                pl_module,
                loader,
                pl_module.adalfl_meta_dataloader(),
                self.lr,
                self.inner_steps,
                self.reset == "fresh",
                seed,
            )
            if self.imitation_steps and learner.loss is not None:
                imitate_task_loss(pl_module, phase.train_batches, self.imitation_steps)
            self._run(trainer, phase, steps, self._progress)
        learner.stop(forget=True)
        learner.initialised = True
        learner.meta_steps = 0  # counts those of training
        rank_zero_info(f"Offline phase: {steps} meta steps.")

    def _run(self, trainer: pl.Trainer, phase: OfflinePhase, steps: int, progress: OfflineProgress) -> None:
        first, done = 0.0, 0
        shown = tqdm(total=steps, desc="Offline phase", disable=not self._shows(trainer), leave=False)
        with shown as bar, termination_noted() as termination:
            while done < steps:
                task_loss, done = phase.step(), done + 1
                if done == 1:
                    first = task_loss
                    saved = progress.load(first)
                    if saved is not None:
                        phase.load_state_dict(saved["phase"])
                        done = saved["step"]
                stopped = termination.anywhere(trainer)
                if stopped or progress.due(done) or done == steps > self.save_every:
                    progress.save({"step": done, "first": first, "phase": phase.state_dict()})
                if stopped:
                    raise SIGTERMException
                if done % 10 == 1:
                    bar.set_postfix(task_loss=f"{task_loss:.4g}", refresh=False)
                bar.update(done - bar.n)

    def _settings(self, pl_module: AdaLFLMixin, seed: int) -> dict[str, Any]:
        return {
            "config": pl_module.adalfl.config.to_dict(),
            "module": type(pl_module).__qualname__,
            "steps": self.steps,
            "lr": self.lr,
            "inner_steps": self.inner_steps,
            "reset": self.reset,
            "imitation_steps": self.imitation_steps,
            "seed": seed,
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that what the phase has learned is about to be in a checkpoint."""
        self._checkpointed = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remove the phase's file once a checkpoint has been written."""
        if self._checkpointed and self._progress is not None:
            self._progress.remove()
            self._progress = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the phase's file, if no checkpoint was written before."""
        if self._progress is not None:
            self._progress.remove()
            self._progress = None

    @staticmethod
    def _shows(trainer: pl.Trainer) -> bool:
        bar = trainer.progress_bar_callback
        return trainer.is_global_zero and bar is not None and bool(getattr(bar, "is_enabled", True))
