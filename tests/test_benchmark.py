"""The benchmark on tiny settings: what it measures is there, and the methods that it times agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark
import benchmark_trainer
import pytest
import torch
from benchmark_cases import build_case
from benchmark_engines import ALL_ENGINES, ENGINES
from benchmark_memory import peak_extra_mb

FIELDS = ["model", "batch", "engine", "meta_every", "step_ms", "ratio_to_baseline", "peak_extra_mb", "rel_error"]
EXACT = {"forward", "reverse", "higher", "torchopt"}


def run(tmp_path: Path, *arguments: str) -> dict[tuple[str, int], dict[str, Any]]:
    path = tmp_path / "records.json"
    benchmark.main(
        ["--models", "lenet5", "--batch", "3", "--repeats", "1", "--threads", "1", "--json", str(path), *arguments]
    )
    records = json.loads(path.read_text())
    assert all(list(record) == FIELDS for record in records)
    assert {(record["model"], record["batch"]) for record in records} == {("lenet5", 3)}
    return {(record["engine"], record["meta_every"]): record for record in records}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TURN_SECONDS", 1e-9)
    monkeypatch.setattr(benchmark, "FIT_SECONDS", 1e-9)


def test_times_and_errors_of_every_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = run(tmp_path, "--parts", "time", "error")
    assert {engine for engine, meta_every in records if meta_every == 1} >= set(ENGINES)
    plain = records["handcrafted", 1]
    assert plain["ratio_to_baseline"] == 1.0
    for record in records.values():
        assert record["step_ms"] > 0
        assert record["ratio_to_baseline"] == pytest.approx(record["step_ms"] / plain["step_ms"])
        assert record["peak_extra_mb"] is None
    for engine in EXACT:
        assert records[engine, 1]["rel_error"] < 1e-5, engine
    assert 0 < records["finite_difference", 1]["rel_error"] < 1e-2
    # A meta step in a hundred costs less than one in ten, and that less than one each time.
    in_a_while = [records["forward", k]["step_ms"] for k in (1, 10, 100)]
    assert in_a_while == sorted(in_a_while, reverse=True)
    printed = capsys.readouterr().out
    assert "| lenet5 | 3 | torchopt | 1 |" in printed
    assert "1 threads" in printed


def test_whole_fits_and_the_offline_phase(tmp_path: Path) -> None:
    records = run(tmp_path, "--parts", "trainer")
    assert list(records) == [
        ("trainer_plain", 1),
        ("trainer_adalfl", 1),
        ("trainer_adalfl", 1000),
        ("trainer_offline", 1),
    ]
    assert all(record["step_ms"] > 0 for record in records.values())


def test_memory_of_a_process_of_its_own() -> None:
    megabytes = peak_extra_mb("lenet5", "forward", 64)
    assert megabytes is not None
    assert 1 < megabytes < 1000


def test_memory_rows_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(model: str, engine: str, batch_size: int) -> float:
        asked.append((model, engine, batch_size))
        return 12.5

    monkeypatch.setattr(benchmark, "peak_extra_mb", measured)
    monkeypatch.setattr(benchmark, "INNER_LOOP_MODEL", "lenet5")
    records = run(tmp_path, "--parts", "memory", "inner")
    assert ("lenet5", "reverse_inner_20", 3) in asked
    assert set(ENGINES) < {engine for _, engine, _ in asked}
    assert {record["peak_extra_mb"] for record in records.values()} == {12.5}


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_every_engine_trains_what_it_says(engine: str) -> None:
    case = build_case("lenet5", 2)
    model, loss = case.copies()
    step = ALL_ENGINES[engine](model, loss)
    before = [[p.clone() for p in module.parameters()] for module in (model, loss)]
    step(case.batches[0], case.batches[1])
    moved = [
        any(not torch.equal(p, old) for p, old in zip(module.parameters(), olds))
        for module, olds in zip((model, loss), before)
    ]
    assert moved == [True, engine not in ("handcrafted", "between")]


def test_forward_mode_in_an_inner_loop_equals_the_unrolled_one() -> None:
    results = []
    for engine in ("forward_inner_5", "reverse_inner_5"):
        case = build_case("lenet5", 2)
        model, loss = case.copies()
        ALL_ENGINES[engine](model, loss)(case.batches[0], case.batches[1])
        results.append(torch.cat([p.grad.flatten() for p in loss.parameters()]))
    assert (results[0] - results[1]).norm() < 1e-4 * results[1].norm()


def test_refuses_no_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--repeats", "0"])
    assert "--repeats must be at least 1; got 0" in capsys.readouterr().err


def test_the_stopwatch_leaves_the_first_steps_out() -> None:
    case = build_case("lenet5", 2)
    module = benchmark_trainer.Classifier(case.copies()[0])
    watch = benchmark_trainer._fit(case, module, steps=4)
    assert module.trainer.global_step == 6
    assert 0 < watch.fit_started < watch.started
    assert watch.step_seconds > 0
