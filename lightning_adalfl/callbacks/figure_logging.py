"""A figure to any logger, in that logger's way; and where a run keeps files, and whether this process writes them."""

from __future__ import annotations

import os
from typing import Any

from matplotlib.figure import Figure

from lightning_adalfl.adapter.lightning_private import is_a
from lightning_adalfl.files import atomic_write


def log_figure(logger: Any, tag: str, figure: Figure, step: int, default_dir: str | None = None) -> None:
    """Send a figure to one logger; to be called in one process only.

    TensorBoard and W&B show it under ``tag`` with a slider over steps, Comet among its graphics, MLflow as the artifact
    ``tag/step_00000100.png``. Any other logger gets a PNG of that name in the folder of its run.

    Args:
        logger: The logger, of either package; Lightning's stand-in for a disabled one is passed over.
        tag: Such as ``"adalfl/loss_shape"``.
        figure: The figure; it stays usable.
        step: Base steps taken.
        default_dir: Where the PNG goes if the logger has no folder; without it such a logger is passed over.
    """
    file = f"{tag}/step_{step:08d}.png"
    if is_a(logger, "DummyLogger"):
        return
    if is_a(logger, "TensorBoardLogger"):
        logger.experiment.add_figure(tag, figure, step, close=False)
    elif is_a(logger, "WandbLogger"):
        logger.log_image(tag, [figure], step)
    elif is_a(logger, "MLFlowLogger"):
        logger.experiment.log_figure(logger.run_id, figure, file)
    elif is_a(logger, "CometLogger"):
        logger.experiment.log_figure(figure_name=tag, figure=figure, step=step)
    else:
        folder = logger_dir(logger) or default_dir
        if folder is not None:
            with atomic_write(os.path.join(folder, file)) as png:
                figure.savefig(png, format="png")


def logger_dir(logger: Any) -> str | None:
    """Return the folder of a logger's current run, a local one or a URL; ``None`` if it keeps no files.

    That is its ``log_dir``; for a logger with only a ``save_dir``, which all of its runs share, the folder
    ``save_dir/name/version`` where ``ModelCheckpoint`` writes too.
    """
    log_dir = getattr(logger, "log_dir", None)
    if isinstance(log_dir, (str, os.PathLike)):
        return os.fspath(log_dir)
    if not isinstance(logger.save_dir, (str, os.PathLike)):
        return None
    version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
    return os.path.join(logger.save_dir, *(str(part) for part in (logger.name, version) if part is not None))


def run_dir(trainer: Any) -> str:
    """Return the folder of the first logger's run, or else the Trainer's ``default_root_dir``."""
    # Not `trainer.log_dir`, which is a collective call: one process alone asks for this.
    return (logger_dir(trainer.loggers[0]) if trainer.loggers else None) or trainer.default_root_dir


def writes(trainer: Any) -> bool:
    """Return whether this process is to write what a run shows: the first one, and in a real run alone."""
    return trainer.is_global_zero and not trainer.fast_dev_run and not trainer.barebones
