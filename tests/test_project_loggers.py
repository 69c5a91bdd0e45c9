"""Every logger has the scalars, the hyper-parameters and the figure, each in its own way."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from projects import Ada, config, loaders, make, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_adalfl import AdaLFLInit, LossShapeLogger

SCALARS = {"adalfl/learned_loss", "adalfl/task_loss", "adalfl/meta_grad_norm", "adalfl/implied_lr"}


def fit(tmp_path: Path, logger: Any) -> Any:
    module = make(Ada, adalfl=config())
    callbacks = [AdaLFLInit(steps=2), LossShapeLogger(every_n_steps=5)]
    trainer(tmp_path, logger=logger, callbacks=callbacks, log_every_n_steps=3).fit(module, *loaders())
    return module


def test_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tmp_path, logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert SCALARS | {"train_loss", "val_loss"} <= set(events.Tags()["scalars"])
    assert "adalfl/loss_shape" in events.Tags()["images"]
    assert [event.step for event in events.Scalars("adalfl/learned_loss")] == [2, 5, 8, 11]
    assert "meta_every: 1" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_csv(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run")
    fit(tmp_path, logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["adalfl/learned_loss"]]
    assert set(rows[0]) >= SCALARS
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11]
    assert list(Path(logger.log_dir).rglob("*.png"))


# Of wandb and what it brings, where they are imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="project", save_dir=tmp_path, offline=True)
    fit(tmp_path, logger)
    run = logger.experiment
    summary = {key for key in run.summary.keys() if key.startswith("adalfl/")}  # noqa: SIM118
    config_kept = dict(run.config)
    run.finish()
    assert summary >= SCALARS
    assert config_kept["adalfl"]["task"] == "multiclass"
    assert list(tmp_path.rglob("*.wandb"))


# Of mlflow and what it brings, where they are imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_mlflow_in_a_local_store(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'runs.db'}"
    logger = MLFlowLogger("experiment", tracking_uri=store, artifact_location=str(tmp_path))
    fit(tmp_path, logger)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics.keys() >= SCALARS
    assert any(key.startswith("adalfl") for key in run.data.params)
    assert list(tmp_path.rglob("*.png"))


def test_several_at_once_and_none_at_all(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    module = fit(tmp_path / "both", loggers)
    assert module.adalfl.meta_steps == 12
    assert (Path(loggers[0].log_dir) / "metrics.csv").exists()
    module = fit(tmp_path / "none", False)
    assert module.trainer.callback_metrics.keys() >= SCALARS
