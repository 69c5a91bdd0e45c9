"""What the offline phase has done so far, in a file, so that a run that was killed goes on from there."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_adalfl.atomic_file import atomic_write

_FORMAT_VERSION = 1
_SAME = 1e-3  # relative; the first meta step of the same run differs by less, on a device that sums in any order


class OfflineProgress:
    """Saves an offline phase under a name that only the same run has, and gives it back to that run.

    The name is made from the seed and the settings. Whether data, model and code are the same shows in the first meta
    step, which every start takes: its task loss must be the one that was saved.

    Args:
        trainer: Writes on its first process, in its ``default_root_dir``, and only where it keeps checkpoints as well.
        settings: Plain values that the phase depends on.
        every: Meta steps from one file to the next.
    """

    def __init__(self, trainer: pl.Trainer, settings: dict[str, Any], every: int) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.path = Path(trainer.default_root_dir) / f"adalfl_offline_{digest}.pt"
        self._trainer = trainer
        self._every = every
        self._enabled = bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def due(self, step: int) -> bool:
        """Return whether the phase is to be saved after ``step`` meta steps."""
        return self._enabled and step % self._every == 0

    def save(self, state: dict[str, Any]) -> None:
        """Write the state of every process' phase; whoever reads the file sees the old one or the new one."""
        if not self._enabled:
            return
        states: list[Any] = [state]
        if self._trainer.world_size > 1:
            states = [None] * self._trainer.world_size
            torch.distributed.all_gather_object(states, state)
        if self._trainer.is_global_zero:
            with atomic_write(self.path) as file:
                torch.save({"version": _FORMAT_VERSION, "processes": states}, file)

    def load(self, first: float) -> dict[str, Any] | None:
        """Return what this process saved, if there is a file and it is of this very run.

        Args:
            first: The task loss of this start's first meta step.
        """
        states = None
        if self._enabled and self._trainer.is_global_zero and self.path.exists():
            states = self._read(first)
        states = self._trainer.strategy.broadcast(states)
        return None if states is None else states[self._trainer.global_rank]

    def _read(self, first: float) -> list[dict[str, Any]] | None:
        try:
            with zipfile.ZipFile(self.path) as archive:  # torch itself passes over checksums
                if archive.testzip() is not None:
                    raise ValueError("its checksum does not fit what it holds")
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            states, version = saved["processes"], saved["version"]
            known, step = float(states[0]["first"]), int(states[0]["step"])
        except Exception as error:  # whatever torch makes of bytes that are not its own
            rank_zero_warn(f"The offline phase starts over: {self.path} cannot be read ({_brief(error)}).")
            return None
        if version != _FORMAT_VERSION or len(states) != self._trainer.world_size:
            rank_zero_warn(
                f"The offline phase starts over: {self.path} was written by another version of lightning_adalfl, or "
                f"for {len(states)} processes where there are {self._trainer.world_size}."
            )
            return None
        if not math.isclose(known, first, rel_tol=_SAME):
            rank_zero_warn(
                f"The offline phase starts over: the one in {self.path} began with a task loss of {known:.6g} and this "
                f"one with {first:.6g}, so model, data or code have changed since."
            )
            return None
        rank_zero_info(f"Offline phase: going on after {step} meta steps, from {self.path}.")
        return states

    def remove(self) -> None:
        """Delete the file: what it held is in a checkpoint, or in a model that has been trained to the end."""
        if self._trainer.is_global_zero:
            self.path.unlink(missing_ok=True)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
