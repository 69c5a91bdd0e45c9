"""What Lightning does not promise, in one place; and which of its two packages a module comes from."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def package_of(cls: type) -> str | None:
    """Return the package whose LightningModule a class derives from; ``None`` for another class."""
    for base in cls.__mro__:
        package = base.__module__.rpartition(".core")[0]
        if base.__name__ == "LightningModule" and package in PACKAGES:
            return package
    return None


def lightning() -> ModuleType:
    """Return the package that has been imported, or else one that is installed."""
    for name in PACKAGES:
        if name in sys.modules and hasattr(sys.modules[name], "Callback"):
            return sys.modules[name]
    try:
        return importlib.import_module(PACKAGES[0])
    except ImportError:
        return importlib.import_module(PACKAGES[1])


Callback: Any = lightning().Callback


def is_a(value: object, *names: str) -> bool:
    """Return whether a value's class has one of these names, or derives from one that has, in either package."""
    return any(base.__name__ in names for base in type(value).__mro__)


def train_source(trainer: Any) -> Any:
    """Return the training loader, or several as a CombinedLoader; ``None`` if there are none."""
    combined = trainer.fit_loop._combined_loader
    if combined is not None:
        return combined if isinstance(combined.iterables, (list, tuple, dict)) else combined.iterables
    given = _given(trainer.fit_loop._data_source)
    if not isinstance(given, (list, tuple, dict)):
        return given
    package = importlib.import_module(f"{package_of(type(trainer.lightning_module))}.utilities")
    return package.CombinedLoader(given, "max_size_cycle")


def train_iterator(trainer: Any) -> Any:
    """Return the iterator of the training loader that batches come from; of several, Lightning's own over them."""
    combined = trainer.fit_loop._combined_loader._iterator
    return combined.iterators[0] if len(combined.iterators) == 1 else combined


def when_loaded(trainer: Any, change: Callable[[Any], None] | None) -> None:
    """Have a training loader changed when Lightning has made it, before anything is drawn from it.

    Args:
        trainer: Whose loaders.
        change: Changes a loader in place; it takes the place of an earlier one. ``None`` for no change any more.
    """
    connector = trainer._data_connector
    vars(connector).pop("_prepare_dataloader", None)
    if change is None:
        return
    prepare = connector._prepare_dataloader

    def prepared(loader: Any, shuffle: bool, mode: Any) -> Any:
        loader = prepare(loader, shuffle=shuffle, mode=mode)
        if mode == "train":
            change(loader)
        return loader

    connector._prepare_dataloader = prepared


def val_source(trainer: Any) -> Any:
    """Return the validation loaders as the user gave them; ``None`` if there are none."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    # Lightning keeps the loaders given to `fit` in the source alone until its loops begin.
    given = _given(loop._data_source) if loop._combined_loader is None else loop._combined_loader
    return given.iterables if is_a(given, "CombinedLoader") and given._mode == "sequential" else given


def _given(source: Any) -> Any:
    return source.dataloader() if source.instance is not None and source.is_defined() else None


def transferred(module: Any, batch: Any, is_training: bool, index: int = 0) -> Any:
    """Pass a batch through the precision's, the module's and the data module's own transfer hooks.

    Args:
        module: The user's module, with its trainer.
        batch: As its loader gives it.
        is_training: Whether the hooks see a training stage, in which a module may augment.
        index: Of the loader that the batch is from, among several.
    """
    trainer = module.trainer
    batch = trainer.precision_plugin.convert_input(batch)
    with _stage(trainer, is_training):
        # The private form knows the hooks of a data module too.
        batch = module._on_before_batch_transfer(batch, index)
        return trainer.strategy.batch_to_device(batch, module.device, index)


@contextmanager
def _stage(trainer: Any, is_training: bool) -> Iterator[None]:
    before = trainer.state.stage
    try:
        setattr(trainer, "training" if is_training else "validating", True)
        yield
    finally:
        trainer.state.stage = before


def is_own(function: Any) -> bool:
    """Return whether a method is Lightning's own, and not overridden by a user."""
    return getattr(function, "__module__", "").startswith(PACKAGES)


def wants_logs(trainer: Any) -> bool:
    """Return whether the loggers take what is logged at this step."""
    return bool(trainer._logger_connector.should_update_logs)


def returns_from_processes(trainer: Any) -> bool:
    """Return whether the training runs in processes of which the ``state_dict`` alone comes back."""
    return is_a(getattr(trainer.strategy, "launcher", None), "_MultiProcessingLauncher")


def step_arguments(step: Any, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """Return what a user's ``training_step`` takes."""
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError("a `training_step` that takes `dataloader_iter` has no batch to learn from; take `batch`.")
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_index = "batch_idx" in parameters or len(positional) > 1
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return (batch, batch_idx) if takes_index or takes_any else (batch,)


def loss_of(output: Any) -> Any:
    """Return the loss in what a ``training_step`` returned."""
    return output.get("loss") if isinstance(output, Mapping) else output
