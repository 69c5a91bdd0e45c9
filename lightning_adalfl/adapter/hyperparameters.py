"""The plain module's hyper-parameters, in whatever form it saves them, and ``adalfl`` beside them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from lightning_adalfl.config import AdaLFLConfig

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
    """Return the configuration that a constructor was given, or in its place ``load_from_checkpoint``.

    Raises:
        TypeError: If it is of another type.
        ValueError: If a mapping has unknown fields.
    """
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
