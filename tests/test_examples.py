"""Every example runs as its docstring says, with small settings."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "plain_pytorch": ["--steps", "5"],
    "regression": ["--steps", "4", "--init-steps", "2"],
    "multilabel": ["--steps", "4", "--init-steps", "2"],
    "segmentation": ["--steps", "4", "--init-steps", "2"],
    "dict_batches": ["--steps", "4", "--init-steps", "2"],
}


def run(name: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, SMALL[name], tmp_path, monkeypatch)
    assert "test" in capsys.readouterr().out
    if name != "plain_pytorch":
        assert list(tmp_path.rglob("loss_shape.npz"))


@pytest.mark.slow
def test_the_quickstart_prints_its_table_and_draws_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("quickstart", ["--max-steps", "12", "--init-steps", "3", "--log-dir", "logs"], tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    for row in ("handcrafted loss  ", "handcrafted loss, tuned rate", "AdaLFL"):
        assert row in printed
    assert list((tmp_path / "logs" / "AdaLFL").rglob("loss_shape.png"))
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
