"""What a checkpoint holds beside the plain module's, so that a resumed run equals one that was not stopped."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_adalfl.adapter.meta_learner import MetaLearner
from lightning_adalfl.hypergradient.random_state import RandomState


def save(module: pl.LightningModule, learner: MetaLearner, checkpoint: dict[str, Any]) -> None:
    """Move φ from the ``state_dict`` to the key ``"adalfl"``, beside counters, meta optimizer and random states.

    What is left is a checkpoint of the plain module, which that module loads strictly.
    """
    prefix = "adalfl."
    state_dict = checkpoint["state_dict"]
    phi = {name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    saved: dict[str, Any] = {"state_dict": phi, "progress": learner.progress()}
    hyperparameters = checkpoint.get("hyper_parameters", {})
    if "adalfl" in hyperparameters:
        # φ is in the checkpoint, which must load where the file that it began with is not.
        hyperparameters["adalfl"] = {**hyperparameters["adalfl"], "initial_loss": None}
    trainer = module._trainer
    if trainer is not None and learner.run is not None:
        here = {"global": RandomState.capture(module.device).to_plain(), "run": learner.run.state_dict()}
        saved["processes"] = _gathered(here, trainer.world_size)
    checkpoint["adalfl"] = saved


def restore(module: pl.LightningModule, learner: MetaLearner) -> None:
    """Go on where the checkpoint's run was, if this fit resumes one."""
    resumed, learner.resumed = learner.resumed, None
    processes = None if resumed is None else resumed.get("processes")
    if processes is None or module.trainer.ckpt_path is None or len(processes) != module.trainer.world_size:
        return
    here = processes[module.global_rank]
    if learner.run is not None:
        learner.run.load_state_dict(here["run"])
    RandomState.from_plain(here["global"], module.device).restore()


def _gathered(value: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    if world_size == 1:
        return [value]
    # Only one process writes the file, and each has random states of its own.
    values: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values
