"""What a checkpoint holds beside the plain module's, so that a resumed run equals one that was not stopped."""

from __future__ import annotations

from typing import Any

from lightning_adalfl.adapter.online import OnlineRun
from lightning_adalfl.adapter.plugins import gathered
from lightning_adalfl.learning.meta_learner import MetaLearner
from lightning_adalfl.learning.recorded_forward import RandomState

KEY = "adalfl"


def save(module: Any, learner: MetaLearner, run: OnlineRun | None, checkpoint: dict[str, Any]) -> None:
    """Write φ, counters and the meta optimizer under one key, with the random states of every process."""
    state: dict[str, Any] = {"learner": learner.state_dict()}
    if run is not None and module._trainer is not None:
        here = {"global": RandomState.capture(module.device).to_plain(), "run": run.state_dict()}
        state["processes"] = gathered(here, run.trainer)  # only one process writes the file
    checkpoint[KEY] = state


def load(learner: MetaLearner, checkpoint: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Take over φ and the meta-learning's state; a checkpoint of a plain module has none, and φ stays as it is.

    Returns:
        The random states of the processes, to be given to :func:`resume`.

    Raises:
        ValueError: If the entry is damaged, or of another kind of learner.
    """
    state = checkpoint.get(KEY)
    if state is None:
        return None
    learner.load_state_dict(_learner_state(state))
    processes = state.get("processes")
    is_whole = isinstance(processes, list) and all(
        isinstance(p, dict) and {"global", "run"} <= p.keys() for p in processes
    )
    return processes if is_whole else None


def without_global(processes: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return the random states of the processes but for those of the whole run."""
    return None if processes is None else [{**process, "global": None} for process in processes]


def learner_of(checkpoint: dict[str, Any]) -> MetaLearner | None:
    """Return the learner that a checkpoint was written with, if any."""
    state = checkpoint.get(KEY)
    return None if state is None else MetaLearner.from_state(_learner_state(state))


def _learner_state(state: Any) -> Any:
    return state.get("learner") if isinstance(state, dict) else state


def resume(module: Any, run: OnlineRun, processes: list[dict[str, Any]] | None) -> None:
    """Go on where the checkpoint's run was, if this fit resumes one, or a tuner puts it back."""
    trainer = module.trainer
    if processes is None or len(processes) != trainer.world_size:
        return
    here = processes[module.global_rank]
    if here["global"] is None:
        run.load_state_dict(here["run"])
    elif trainer.ckpt_path is not None:
        run.load_state_dict(here["run"])
        RandomState.from_plain(here["global"], module.device).restore()
