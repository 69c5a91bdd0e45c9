"""What a checkpoint holds beside the plain module's; its hyper-parameters are the plain module's, in whatever form."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from lightning_adalfl.adapter.online import OnlineRun
from lightning_adalfl.adapter.plugins import gathered
from lightning_adalfl.config import AdaLFLConfig
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


# Lightning collects hyper-parameters from frames whose code has the cell that the bare name makes.
plain_super = super
# What `load_from_checkpoint` was given; among its other arguments it would get into the user's own container.
_given: ContextVar[Any] = ContextVar("adalfl", default=None)


class PlainHyperparameters:
    """Keeps ``adalfl`` out of what a module saves and loads as its own."""

    @classmethod
    def load_from_checkpoint(cls, *args: Any, adalfl: Any = None, **kwargs: Any) -> Any:
        """Load a checkpoint of this class or of the plain one; ``adalfl`` replaces the configuration in it."""
        token = _given.set(adalfl)
        try:
            return super().load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            _given.reset(token)

    def save_hyperparameters(
        self, *args: Any, ignore: str | Iterable[str] | None = None, frame: Any = None, **kwargs: Any
    ) -> None:
        """Save the plain module's hyper-parameters."""
        names = tuple(arg for arg in args if not (isinstance(arg, str) and arg == "adalfl"))
        if args and not names:
            return
        ignored = [ignore] if isinstance(ignore, str) else list(ignore or ())
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        super().save_hyperparameters(*names, ignore=[*ignored, "adalfl"], frame=frame, **kwargs)  # type: ignore[misc]

    def remove_ignored_hparams(self, ignore_list: list[str]) -> None:
        """Remove names from what has been saved; an entry of this name in a container is the user's own."""
        super().remove_ignored_hparams([name for name in ignore_list if name != "adalfl"])  # type: ignore[misc]


def config_from(given: AdaLFLConfig | Mapping[str, Any] | None) -> AdaLFLConfig | None:
    """Return the configuration that a constructor was given, or in its place ``load_from_checkpoint``."""
    config = _given.get() if given is None else given
    if isinstance(config, Mapping):
        config = AdaLFLConfig.from_dict(config)
    if config is not None and not isinstance(config, AdaLFLConfig):
        raise TypeError(f"`adalfl` must be an AdaLFLConfig, such as AdaLFLConfig(task='multiclass'); got {config!r}.")
    return config


def give_signature(cls: type, mixin: type) -> None:
    """Let a class without a constructor show the plain module's arguments, with ``adalfl`` beside them."""
    owners = [base for base in cls.__mro__ if "__init__" in base.__dict__]
    if owners[0] is not mixin:
        return

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_super(cls, self).__init__(*args, **kwargs)  # type: ignore[misc]

    signature = inspect.signature(owners[1].__init__)  # type: ignore[misc]
    own = [p for p in signature.parameters.values() if p.name != "adalfl"]
    given = inspect.Parameter("adalfl", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=AdaLFLConfig)
    own.insert(len(own) - any(p.kind is p.VAR_KEYWORD for p in own), given)
    __init__.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    cls.__init__ = __init__  # type: ignore[misc]
