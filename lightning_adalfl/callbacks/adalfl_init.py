"""The offline phase, in ``on_fit_start``."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
import zipfile
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.nn.parameter import UninitializedParameter
from tqdm.auto import tqdm

from lightning_adalfl.adapter.lightning_private import Callback
from lightning_adalfl.adapter.meta_batches import train_loader
from lightning_adalfl.adapter.offline import OfflinePhase, untouched
from lightning_adalfl.adapter.plugins import gathered
from lightning_adalfl.adapter.refusals import base_optimizer, learner_of
from lightning_adalfl.checks import one_of, positive_number, whole_number
from lightning_adalfl.files import atomic_write, exists, read_bytes, remove

_FORMAT_VERSION = 2
_SAME = 1e-3  # relative; the first meta step of the same run differs by less, on a device that sums in any order


class AdaLFLInit(Callback):
    """Learns the loss offline in ``on_fit_start`` (Algorithm 1; Algorithm 3 for the learning rate).

    Base parameters, buffers, optimizer state and random states are afterwards as if it had not run. It runs once: not
    on a resumed run, nor in a second ``fit``, nor over a loss that was given as a file or is replayed, nor where
    nothing is learned. Under ``fast_dev_run`` it takes one step for each of its batches. The module's ``on_fit_start``
    has run before; its ``training_step`` is not run, and the handcrafted loss of the task stands for its loss.

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
        if stage == "fit":
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
                pl_module._adalfl_predict,
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
        file, first, done, own_bar = self._file, 0.0, 0, trainer.progress_bar_callback
        is_shown = trainer.is_global_zero and own_bar is not None and bool(getattr(own_bar, "is_enabled", True))
        with tqdm(total=steps, desc="Offline phase", disable=not is_shown, leave=False) as bar:
            while done < steps and file is not None:
                task_loss, done = phase.step(), done + 1
                if done == 1:
                    first = float(task_loss)
                    if (saved := file.load(first)) is not None:
                        phase.load_state_dict(saved["phase"])
                        done = saved["step"]
                if file.is_enabled and (done % self.save_every == 0 or done == steps > self.save_every):
                    file.save({"step": done, "first": first, "phase": phase.state_dict()})
                if done % 10 == 1 and not bar.disable:
                    bar.set_postfix(task_loss=f"{float(task_loss):.4g}", refresh=False)
                bar.update(done - bar.n)

    def _settings(self, pl_module: Any, seed: int) -> dict[str, Any]:
        return {
            "config": pl_module.adalfl.config.to_dict(),
            "module": type(pl_module).__qualname__,
            "seed": seed,
            "rates": [float(g["lr"]) for o in pl_module.trainer.optimizers for g in o.param_groups],
            **{name: getattr(self, name) for name in ("steps", "lr", "inner_steps", "reset")},
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


class OfflineFile:
    """Saves an offline phase under a name that only the same run has, and gives it back to that run.

    The name is made from the seed and the settings. Whether data, model and code are the same shows in the first meta
    step, which every start takes: its task loss must be the one that was saved.

    Args:
        trainer: Writes on its first process, in its ``default_root_dir``, and only where it keeps checkpoints as well.
        settings: Plain values that the phase depends on.
    """

    def __init__(self, trainer: Any, settings: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.path = os.path.join(trainer.default_root_dir, f"adalfl_offline_{digest}.pt")
        self._trainer = trainer
        self.is_enabled = bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run

    def save(self, state: dict[str, Any]) -> None:
        """Write the state of every process' phase; whoever reads the file sees the old one or the new one."""
        states = gathered(state, self._trainer)
        if self._trainer.is_global_zero:
            with atomic_write(self.path) as file:
                torch.save({"version": _FORMAT_VERSION, "processes": states}, file)

    def load(self, first: float) -> dict[str, Any] | None:
        """Return what this process saved, if there is a file and it is of this very run.

        Args:
            first: The task loss of this start's first meta step.
        """
        states = None
        if self.is_enabled and self._trainer.is_global_zero and exists(self.path):
            try:
                states = self._read(first)
            except ValueError as error:
                warnings.warn(f"The offline phase starts over: {error}.", stacklevel=3)
        states = self._trainer.strategy.broadcast(states)
        return None if states is None else states[self._trainer.global_rank]

    def _read(self, first: float) -> list[dict[str, Any]]:
        try:
            data = read_bytes(self.path)
            with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch itself passes over checksums
                if archive.testzip() is not None:
                    raise ValueError("its checksum does not fit what it holds")
            saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            states, version = saved["processes"], saved["version"]
            known, step = float(states[0]["first"]), int(states[0]["step"])
        except Exception as error:  # whatever torch makes of bytes that are not its own
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self.path} cannot be read ({type(error).__name__}: {reason})") from error
        if version != _FORMAT_VERSION or len(states) != self._trainer.world_size:
            raise ValueError(
                f"{self.path} was written by another version of lightning_adalfl, or for {len(states)} processes where "
                f"there are {self._trainer.world_size}"
            )
        if not math.isclose(known, first, rel_tol=_SAME):
            raise ValueError(
                f"the one in {self.path} began with a task loss of {known:.6g} and this one with {first:.6g}, so "
                "model, data or code have changed since"
            )
        rank_zero_info(f"Offline phase: going on after {step} meta steps, from {self.path}.")
        return states

    def remove(self) -> None:
        """Delete the file: what it held is in a checkpoint, or in a model that has been trained to the end."""
        if self._trainer.is_global_zero and exists(self.path):
            remove(self.path)
