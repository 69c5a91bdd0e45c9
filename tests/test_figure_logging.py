"""A figure reaches each logger in its own way."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_adalfl.callbacks.figure_logging import log_figure, logger_dir

PNG = b"\x89PNG"
TAG = "adalfl/loss_shape"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trackers report nothing about these tests to their makers."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [1, 0])
    return figure


class OwnLogger(Logger):
    """A user's logger; it keeps what it logs in memory, or in a folder."""

    def __init__(self, folder: str | None = None, version: int | str | None = None) -> None:
        super().__init__()
        self._folder, self._version = folder, version

    name = "own"
    version = property(lambda self: self._version)
    save_dir = property(lambda self: self._folder)

    def log_metrics(self, metrics, step=None) -> None: ...

    def log_hyperparams(self, params) -> None: ...


def test_tensorboard_shows_the_figure_at_each_step(figure: Figure, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in (0, 150):
        log_figure(logger, TAG, figure, step)
    logger.finalize("success")

    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == [TAG]
    images = events.Images(TAG)
    assert [image.step for image in images] == [0, 150]
    assert all(image.encoded_image_string.startswith(PNG) for image in images)
    assert images[0].width == 2 * images[0].height


def test_csv_gets_a_png_in_its_folder(figure: Figure, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_figure(logger, TAG, figure, 150)

    folder = Path(logger.log_dir) / TAG
    assert [file.name for file in folder.iterdir()] == ["step_00000150.png"]
    assert (folder / "step_00000150.png").read_bytes().startswith(PNG)


def test_wandb_gets_an_image_in_its_offline_run(figure: Figure, tmp_path: Path) -> None:
    logger = WandbLogger(project="adalfl", save_dir=tmp_path, offline=True)
    log_figure(logger, TAG, figure, 150)
    logger.experiment.finish()

    (image,) = tmp_path.glob("wandb/offline-run-*/files/media/images/adalfl/loss_shape_*.png")
    assert image.read_bytes().startswith(PNG)


# MLflow's own use of SQLAlchemy
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_mlflow_keeps_the_figure_as_an_artifact_of_the_run(figure: Figure, tmp_path: Path) -> None:
    logger = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    log_figure(logger, TAG, figure, 150)

    file = f"{TAG}/step_00000150.png"
    assert [artifact.path for artifact in logger.experiment.list_artifacts(logger.run_id, TAG)] == [file]
    assert (tmp_path / "artifacts" / logger.run_id / "artifacts" / file).read_bytes().startswith(PNG)


def test_comet_gets_the_figure_with_its_name_and_step(figure: Figure) -> None:
    calls = []

    class OfflineComet(CometLogger):
        """Comet's logger without its package, whose experiment notes what it is given."""

        def __init__(self) -> None:
            Logger.__init__(self)

        @property
        def experiment(self):
            return self

        def log_figure(self, figure_name, figure, overwrite=False, step=None) -> None:
            calls.append((figure_name, figure, step))

    log_figure(OfflineComet(), TAG, figure, 150)
    assert calls == [(TAG, figure, 150)]


def test_a_users_own_logger_gets_a_png_in_the_folder_of_its_run(figure: Figure, tmp_path: Path) -> None:
    log_figure(OwnLogger(str(tmp_path), version=3), TAG, figure, 7)
    assert (tmp_path / "own" / "version_3" / TAG / "step_00000007.png").read_bytes().startswith(PNG)


def test_a_logger_without_a_folder_falls_back_or_is_passed_over(figure: Figure, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    log_figure(OwnLogger(), TAG, figure, 7)
    assert not list(tmp_path.rglob("*"))
    log_figure(OwnLogger(), TAG, figure, 7, default_dir=tmp_path / "root")
    assert (tmp_path / "root" / TAG / "step_00000007.png").is_file()


def test_a_disabled_logger_is_passed_over(figure: Figure, tmp_path: Path) -> None:
    log_figure(DummyLogger(), TAG, figure, 7, default_dir=tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_logger_dir_is_that_of_the_run_and_not_shared_by_runs(tmp_path: Path) -> None:
    assert logger_dir(TensorBoardLogger(tmp_path)) == tmp_path / "lightning_logs" / "version_0"
    assert logger_dir(CSVLogger(tmp_path, name="a", version="b")) == tmp_path / "a" / "b"
    assert logger_dir(OwnLogger(str(tmp_path), version="run")) == tmp_path / "own" / "run"
    assert logger_dir(OwnLogger(str(tmp_path))) == tmp_path / "own"
    assert logger_dir(OwnLogger()) is None
    assert logger_dir(DummyLogger()) is None


def test_one_figure_can_go_to_several_loggers(figure: Figure, tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    for logger in (board, table, board):
        log_figure(logger, TAG, figure, 1)
    board.finalize("success")
    assert len(EventAccumulator(board.log_dir).Reload().Images(TAG)) == 2
    assert len(list(Path(table.log_dir).rglob("*.png"))) == 1
