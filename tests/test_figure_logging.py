"""A figure reaches each logger in its own way, in either package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import fsspec
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_adalfl.callbacks.figure_logging import log_figure, logger_dir

PNG = b"\x89PNG"
TAG = "adalfl/loss_shape"
FILE = f"{TAG}/step_00000150.png"


@pytest.fixture
def figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [1, 0])
    return figure


class OwnLogger(Logger):
    """A user's logger; it keeps what it logs in memory, or in a folder."""

    name = "own"

    def __init__(self, folder: str | None = None, version: int | str | None = None) -> None:
        super().__init__()
        self._folder, self._version = folder, version

    version = property(lambda self: self._version)
    save_dir = property(lambda self: self._folder)

    def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_tensorboard_shows_the_figure_at_each_step_and_csv_has_a_png(
    package: str, figure: Figure, tmp_path: Path
) -> None:
    loggers = importlib.import_module(f"{package}.loggers")
    board, table = loggers.TensorBoardLogger(tmp_path / "board"), loggers.CSVLogger(tmp_path / "table")
    for step in (0, 150):
        for logger in (board, table):
            log_figure(logger, TAG, figure, step)
    board.finalize("success")
    events = EventAccumulator(board.log_dir).Reload()
    assert events.Tags()["images"] == [TAG]
    images = events.Images(TAG)
    assert [image.step for image in images] == [0, 150]
    assert all(image.encoded_image_string.startswith(PNG) for image in images)
    assert images[0].width == 2 * images[0].height
    files = sorted((Path(table.log_dir) / TAG).iterdir())
    assert [file.name for file in files] == ["step_00000000.png", "step_00000150.png"]
    assert files[1].read_bytes().startswith(PNG)


def test_wandb_gets_an_image_in_its_offline_run(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    logger = WandbLogger(project="adalfl", save_dir=tmp_path, offline=True)
    log_figure(logger, TAG, figure, 150)
    logger.experiment.finish()
    (image,) = tmp_path.glob("wandb/offline-run-*/files/media/images/adalfl/loss_shape_*.png")
    assert image.read_bytes().startswith(PNG)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow's own use of SQLAlchemy
def test_mlflow_keeps_the_figure_as_an_artifact_of_the_run(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    logger = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    log_figure(logger, TAG, figure, 150)
    assert [artifact.path for artifact in logger.experiment.list_artifacts(logger.run_id, TAG)] == [FILE]
    assert (tmp_path / "artifacts" / logger.run_id / "artifacts" / FILE).read_bytes().startswith(PNG)


def test_comet_gets_the_figure_with_its_name_and_step(figure: Figure) -> None:
    calls = []

    class OfflineComet(CometLogger):
        """Comet's logger without its package, whose experiment notes what it is given."""

        def __init__(self) -> None:
            Logger.__init__(self)

        @property
        def experiment(self) -> Any:
            return self

        def log_figure(self, figure_name: str, figure: Figure, overwrite: bool = False, step: Any = None) -> None:
            calls.append((figure_name, figure, step))

    log_figure(OfflineComet(), TAG, figure, 150)
    assert calls == [(TAG, figure, 150)]


def test_a_users_own_logger_gets_a_png_in_the_folder_of_its_run(figure: Figure, tmp_path: Path) -> None:
    log_figure(OwnLogger(str(tmp_path), version=3), TAG, figure, 150)
    assert (tmp_path / "own" / "version_3" / FILE).read_bytes().startswith(PNG)


def test_a_folder_at_a_url_is_no_local_folder(figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log_figure(CSVLogger("memory://bucket", name="a", version=0), TAG, figure, 150)
    log_figure(OwnLogger(), TAG, figure, 150, "memory://bucket/root")
    for folder in ("a/version_0", "root"):
        assert fsspec.filesystem("memory").cat(f"/bucket/{folder}/{FILE}").startswith(PNG)
    assert list(tmp_path.iterdir()) == []


def test_a_logger_without_a_folder_falls_back_or_is_passed_over(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log_figure(OwnLogger(), TAG, figure, 150)
    log_figure(DummyLogger(), TAG, figure, 150, str(tmp_path))
    assert not list(tmp_path.rglob("*"))
    log_figure(OwnLogger(), TAG, figure, 150, str(tmp_path / "root"))
    assert (tmp_path / "root" / FILE).is_file()


def test_logger_dir_is_that_of_the_run_and_not_shared_by_runs(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert logger_dir(TensorBoardLogger(root)) == f"{root}/lightning_logs/version_0"
    assert logger_dir(CSVLogger(root, name="a", version="b")) == f"{root}/a/b"
    assert logger_dir(CSVLogger("memory://b", name="a", version=1)) == "memory://b/a/version_1"
    assert logger_dir(OwnLogger("s3://bucket", version=1)) == "s3://bucket/own/version_1"
    assert logger_dir(OwnLogger(root, version="run")) == f"{root}/own/run"
    assert logger_dir(OwnLogger(root)) == f"{root}/own"
    assert logger_dir(OwnLogger()) is None
    assert logger_dir(DummyLogger()) is None
