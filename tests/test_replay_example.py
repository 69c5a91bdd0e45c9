"""The replay example runs as its docstring says, with small settings."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "replay.py"


@pytest.mark.parametrize("recipe", ["library", "paper"])
def test_it_records_replays_and_keeps_the_numbers(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--data",
        "mnist5k",
        "--max-steps",
        "4",
        "--init-steps",
        "2",
        "--seeds",
        "1",
        "2",
        "--output",
        "kept/replay.json",
    ]
    monkeypatch.setattr("sys.argv", ["replay.py", *options, "--recipe", recipe])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    kept = json.loads((tmp_path / "kept" / "replay.json").read_text())
    names = ["handcrafted", "matched rate", "AdaLFL", "replay", "frozen peak", "frozen last"]
    assert [(run["loss"], run["seed"]) for run in kept["runs"]] == [(name, seed) for seed in (1, 2) for name in names]
    assert all(0 < run["test_error"] < 1 for run in kept["runs"])
    assert list(kept["gain"]) == ["0", "4"]
    table = capsys.readouterr().out.split("CPU seconds\n")[1]
    assert [line[:14].strip() for line in table.splitlines()] == names
