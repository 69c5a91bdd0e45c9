"""What an offline phase has done so far, in a file, so that a run that was killed goes on from there."""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
import zipfile
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_adalfl.adapter.plugins import gathered
from lightning_adalfl.files import atomic_write, exists, joined, read_bytes, remove

_FORMAT_VERSION = 2
_SAME = 1e-3  # relative; the first meta step of the same run differs by less, on a device that sums in any order


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
        self.path = joined(trainer.default_root_dir, f"adalfl_offline_{digest}.pt")
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
