"""The benchmark on tiny settings: what it measures is there, and the ways that it times agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark
import benchmark_steps
import pytest
import torch
from benchmark_cases import CASES, FITS, build_module
from benchmark_steps import STEPS

LEARNING = [name for name in STEPS if name != "plain loop"]


def test_it_prints_a_table_and_writes_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "TURN_SECONDS", 1e-9)
    path = tmp_path / "records.json"
    options = ["--cases", "LeNet-5", "--turns", "1", "--threads", "1", "--no-memory", "--json", str(path)]
    records = benchmark.main(options)
    assert json.loads(path.read_text()) == records
    assert [r["way"] for r in records] == [*FITS, *STEPS]
    times = {r["way"]: r["step_ms"] for r in records}
    for record in records:
        baseline = times["plain" if record["way"] in FITS else "plain loop"]
        assert record["ratio"] == pytest.approx(record["step_ms"] / baseline)
    # A meta step after each base step, for as many forwards and backwards more.
    assert times["plain"] < times["forward"]
    assert f"| LeNet-5, 128 | defaults | {times['defaults']:.2f} |" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["forward", "MetaLearner, forward"])
def test_memory_is_measured_in_a_process_of_its_own(way: str) -> None:
    args = _arguments(device="cpu", precision="32-true", threads=1)
    megabytes = benchmark.peak_mb("LeNet-5", way, args)
    assert megabytes is not None
    assert 1 < megabytes < 1000


def test_every_way_of_the_paper_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps: the second descends the loss that the first meta step has left."""
    monkeypatch.setattr(benchmark_steps, "META_LR", 0.1)
    ends: dict[str, Any] = {}
    for way in LEARNING:
        torch.manual_seed(0)
        model = CASES["LeNet-5"].model()
        batches = [(x[:4], y[:4]) for x, y in CASES["LeNet-5"].batches()]
        benchmark.run(STEPS[way](model), batches, 2)
        ends[way] = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    monkeypatch.setattr(benchmark_steps, "META_LR", 1e-9)
    torch.manual_seed(0)
    model = CASES["LeNet-5"].model()
    benchmark.run(STEPS["MetaLearner, reverse"](model), batches, 2)
    without = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    moved = (ends["MetaLearner, reverse"] - without).norm()  # by the meta step
    assert moved > 0
    for way, end in ends.items():
        assert (end - ends["MetaLearner, reverse"]).norm() < 0.02 * moved, way


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_as_large_as_it_says(name: str) -> None:
    case = CASES[name]
    model = case.model()
    x, y = case.batches()[0]
    assert model(x[:2]).shape == (2, case.classes, *y.shape[1:])
    if case.is_text:
        assert 9e6 < sum(p.numel() for p in model.parameters()) < 11e6


def test_the_shape_is_there_where_no_meta_step_makes_it() -> None:
    assert not build_module(CASES["LeNet-5"], "no meta step").adalfl.objective.is_zero


def test_no_turns_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--turns", "0"])
    assert "--turns must be at least 1; got 0" in capsys.readouterr().err


def _arguments(**values: Any) -> Any:
    return type("Arguments", (), values)()
