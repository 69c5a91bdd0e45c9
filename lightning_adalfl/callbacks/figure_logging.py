"""Sends a matplotlib figure to a logger, in the way of that logger."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure

from lightning_adalfl.atomic_file import atomic_write


def log_figure(logger: Logger, tag: str, figure: Figure, step: int, *, default_dir: Path | None = None) -> None:
    """Sends a figure to one logger; call it on rank zero only.

    TensorBoard and W&B show it under `tag` with a slider over steps, Comet among its graphics, MLflow as the artifact
    `tag/step_00000100.png`. Any other logger (CSV, a user's own) gets a PNG of that name in its folder.

    Args:
        logger: The logger; Lightning's stand-in for a disabled one is passed over.
        tag: Such as "adalfl/loss_shape".
        figure: The figure; it stays usable.
        step: Base steps taken.
        default_dir: Where the PNG goes if the logger has no folder; without it such a logger is passed over.
    """
    file = f"{tag}/step_{step:08d}.png"
    if isinstance(logger, DummyLogger):
        return
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(tag, figure, step, close=False)
    elif isinstance(logger, WandbLogger):
        logger.log_image(tag, [figure], step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, file)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_figure(figure_name=tag, figure=figure, step=step)
    else:
        folder = logger_dir(logger) or default_dir
        if folder is not None:
            with atomic_write(folder / file) as png:
                figure.savefig(png, format="png")


def logger_dir(logger: Logger) -> Path | None:
    """The folder of a logger's current run, or None if it keeps none on this machine.

    That is its `log_dir`; for a logger with only a `save_dir`, which all of its runs share, the folder
    `save_dir/name/version` where `ModelCheckpoint` writes too.
    """
    log_dir = getattr(logger, "log_dir", None)
    if isinstance(log_dir, (str, Path)):
        return Path(log_dir)
    if not isinstance(logger.save_dir, (str, Path)):
        return None
    version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
    return Path(logger.save_dir, *(str(part) for part in (logger.name, version) if part is not None))
