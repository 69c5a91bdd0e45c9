"""``python -m lightning_adalfl inspect`` as a user types it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import matplotlib.image
import pytest
from projects import Ada, config, loaders, make, trainer

from lightning_adalfl import LossNetwork, LossShapeLogger, TaylorLoss
from lightning_adalfl.__main__ import main


@pytest.mark.parametrize("name", ["", "loss_history.safetensors", "last.ckpt", "loss.safetensors"])
def test_it_draws_and_describes_whatever_a_run_leaves(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "a.png"
    assert main(["inspect", str(run / name), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    step = 0 if name == "loss.safetensors" else 12
    for part in (
        f"a LossNetwork of 2,921 numbers for task 'multiclass', added to your own loss, at base step {step}.",
        "Strength (section 5.5).",
        "the rest on one other class",
        "Flat regions",
        "Turning regions",
        "Classes. Between two of them",
        f"Figures: {output}.",
    ):
        assert part in text
    pixels = matplotlib.image.imread(output)
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 0.05


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what a short run leaves."""
    folder = tmp_path_factory.mktemp("version_0")
    module = make(Ada, adalfl=config())
    fit = trainer(folder, callbacks=[LossShapeLogger(every_n_steps=4)])
    fit.fit(module, *loaders())
    fit.save_checkpoint(folder / "last.ckpt", weights_only=False)
    module.adalfl.loss.save(folder / "loss.safetensors")
    return folder


def test_regression_has_a_heat_map_and_a_range_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LossNetwork("regression").save(tmp_path / "loss.safetensors")
    look = ["--targets", "0", "2", "--error-range", "3", "--output", str(tmp_path / "a.png")]
    assert main(["inspect", str(tmp_path / "loss.safetensors"), *look]) == 0
    text = capsys.readouterr().out
    assert "-3     -1.5" in text
    assert "target 2" in text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.png", "a_heatmap.png"]


def test_the_number_of_classes_is_asked_for_where_it_matters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = str(tmp_path / "loss.safetensors"), str(tmp_path / "a.png")
    LossNetwork("multiclass").save(path)
    assert main(["inspect", path, "--alone", "--output", output]) == 1
    assert "error: `classes` is needed" in capsys.readouterr().err
    for more in (["--alone", "--classes", "5"], []):
        assert main(["inspect", path, *more, "--output", output]) == 0
    assert "alone, at base step 0" in capsys.readouterr().out


def test_it_runs_as_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    TaylorLoss("binary").save(tmp_path / "loss.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning_adalfl", "inspect", "loss.safetensors"])
    monkeypatch.delitem(sys.modules, "lightning_adalfl.__main__")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("lightning_adalfl", run_name="__main__")
    assert "a TaylorLoss of 8 numbers" in capsys.readouterr().out
    assert (tmp_path / "learned_loss.png").stat().st_size > 10_000


def test_what_cannot_be_read_is_an_error_and_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"x" * 99)
    for name, message in (("a.ckpt", "it is truncated, corrupt"), ("b.ckpt", "there is no such file or folder")):
        assert main(["inspect", str(tmp_path / name), "--output", str(tmp_path / "a.png")]) == 1
        output = capsys.readouterr()
        assert output.err.startswith(f"error: cannot read {tmp_path / name}: ")
        assert message in output.err
        assert output.out == ""
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["draw", "x"], ["inspect", "x", "--classes", "many"]])
def test_a_wrong_command_line_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m lightning_adalfl" in capsys.readouterr().err
