"""Every example runs, on its own in an empty folder, and says what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# What each is called with, and the files that it leaves.
SHORT: dict[str, tuple[list[str], list[str]]] = {
    "quickstart": (["--max-steps", "12"], ["quickstart.png", "loss_history.safetensors", "events.out.tfevents.*"]),
    "noisy_labels": (["--max-steps", "70"], ["noisy_labels.png", "loss_history.safetensors", "*.ckpt"]),
    "regression": (["--max-steps", "12"], ["regression.png", "loss_history.safetensors"]),
    "multilabel": (["--max-steps", "50"], ["*.ckpt"]),
    "segmentation": (["--max-steps", "17"], ["*.ckpt"]),
    "language_model": (["--max-steps", "63"], ["*.ckpt"]),
    "replay": (["--max-steps", "12"], ["loss_history.safetensors"]),
}
CONTAMINATED = {"plain_pytorch": 600, "fabric": 600}


def main_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's function, as in a project of its own: nothing else of the examples can be imported."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if "examples" not in entry])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.parametrize("name", SHORT)
def test_an_example_prints_what_it_returns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, files = SHORT[name]
    values = main_of(name, tmp_path, monkeypatch)(arguments)
    printed = capsys.readouterr().out
    for row, value in values.items():
        numbers = re.findall(r"\d+\.\d+", printed[printed.index(row) :].splitlines()[0])
        assert any(abs(float(number) - value) < 1e-3 for number in numbers), (row, value)
    for pattern in files:
        assert list(tmp_path.rglob(pattern)), pattern


@pytest.mark.parametrize("name", CONTAMINATED)
def test_a_loop_of_ones_own_ends_better_than_with_its_own_loss(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = main_of(name, tmp_path, monkeypatch)(["--max-steps", str(CONTAMINATED[name])])
    assert errors["own loss, its shape learned"] < 0.9 * errors["own loss"]


# Of Lightning itself: how it calls jsonargparse, and a checkpoint in the folder of another run.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_command_line_trains_by_the_yaml_and_tests_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["cli.py"])
    main = main_of("cli", tmp_path, monkeypatch)
    config = str(EXAMPLES / "configs" / "digits.yaml")
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    options = ["--model.adalfl.meta_every", "5", "--trainer.max_steps", "10"]
    module = main(["fit", "--config", config, *quiet, *options]).model
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (10, 2)
    (path,) = tmp_path.rglob("*.ckpt")
    tested = main(["test", "--config", config, *quiet, "--ckpt_path", str(path)])
    assert 0 < tested.trainer.callback_metrics["test_error"] < 1
    assert tested.model.adalfl.meta_steps == 2
