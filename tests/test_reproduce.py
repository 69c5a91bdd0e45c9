"""The paper's experiments: every row of its Table 1 runs, and what the script prints, keeps and draws."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from typing import Any

import datasets_images
import datasets_tabular
import experiment_run
import experiment_tables
import pytest
import reproduce
import torch
from dataset_files import crime_table, generator, write_cifar, write_idx, write_svhn
from experiment_figures import draw_figures
from experiment_methods import ABLATIONS, METHODS, find_method
from experiment_run import Job, error, matched_rate, run

ROWS = [row.split("/") for row in experiment_tables.PAPER["table1_final_test"] if "/" in row]
RESULTS = sorted((Path(reproduce.__file__).parent / "results").glob("*.json"))
SLOW = {"marks": pytest.mark.slow}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny files in the formats of the real data sets, of which one batch is looked at."""
    write_idx(tmp_path / "MNIST" / "raw", compress=False)
    write_cifar(tmp_path, monkeypatch, classes=10, count=20)
    write_svhn(tmp_path, monkeypatch)
    houses = generator().random((100, 8)), generator().random(100)
    monkeypatch.setattr(datasets_tabular, "fetch_openml", lambda **kwargs: crime_table())
    monkeypatch.setattr(datasets_tabular, "fetch_california_housing", lambda **kwargs: houses)
    digits = generator().random((200, 784)) * 255, generator().permutation(200) % 10
    monkeypatch.setattr(datasets_images, "mnist_data", lambda: digits)
    monkeypatch.setattr(experiment_run, "error", lambda module, data, kind: error(module, islice(data, 1), kind))
    return tmp_path


@pytest.mark.parametrize(
    ("task", "model"),
    [pytest.param(*row, id="-".join(row), **(SLOW if row[1] == "wrn28_10" else {})) for row in ROWS],
)
def test_every_row_of_table_1_runs(task: str, model: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if task == "cifar100":
        rmtree(data / "made")  # of CIFAR-10
        write_cifar(data, monkeypatch, classes=100, count=1000)
    record = run(Job(task, model, "adalfl_paper", 0, 1, str(data), init_steps=1, batch_size=2))
    assert record["method"] == "adalfl_paper"
    assert math.isfinite(record["test"])
    assert record["init_steps"] == 1


@pytest.mark.parametrize("method", [m for m in METHODS if m != "baseline_matched"])
def test_every_method_trains_from_the_same_parameters(method: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    initial: list[list[torch.Tensor]] = []

    class Spy(experiment_run.Recorder):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            initial.append([p.detach().clone() for p in pl_module.model.parameters()])

    monkeypatch.setattr(experiment_run, "Recorder", Spy)
    for name in ("baseline", method):
        record = run(Job("diabetes", "mlp", name, 3, 2, str(data), init_steps=2, batch_size=16))
    assert all(torch.equal(a, b) for a, b in zip(initial[0], initial[-1], strict=True))
    assert [point["step"] for point in record["curve"]] == [1, 2]
    assert record["seconds"] > 0


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_row_of_an_ablation_runs(ablation: str, data: Path) -> None:
    for method in ABLATIONS[ablation]:
        record = run(Job("crime", "mlp", method, 0, 1, str(data), init_steps=1, batch_size=16))
        assert math.isfinite(record["test"])


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="`name` must be one of 'baseline'"):
        find_method("adam")


def test_the_control_follows_the_implied_learning_rate(data: Path) -> None:
    reference = {
        "curve": [
            {"step": 2, "implied_lr": 0.02},
            {"step": 3, "implied_lr": None},
            {"step": 4, "implied_lr": 0.04},
        ]
    }
    rate = matched_rate(reference)
    assert [rate(step) for step in (0, 1, 2, 3, 9)] == pytest.approx([0.02, 0.02, 0.03, 0.04, 0.04])
    record = run(Job("diabetes", "mlp", "baseline_matched", 0, 4, str(data), batch_size=16), rate)
    rates = [point["implied_lr"] for point in record["curve"]]
    assert rates == pytest.approx([0.02, 0.03, 0.04, 0.04], rel=1e-6)  # each that of the next step


def test_a_run_that_diverges_has_no_test_error(data: Path) -> None:
    record = run(Job("diabetes", "mlp", "baseline", 0, 60, str(data)), lambda step: 1e6)
    assert record["test"] is None
    assert "diverged" in experiment_tables.table([record])


@pytest.mark.slow
def test_the_table_is_printed_beside_the_papers_and_a_sweep_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.json"
    arguments = ["--task", "diabetes", "--model", "mlp", "--steps", "2", "--init-steps", "2", "--json", str(path)]
    reproduce.main([*arguments, "--methods", "baseline", "--seeds", "1", "--figures", str(tmp_path / "figures")])
    first = json.loads(path.read_text())
    assert {"task", "model", "method", "seed", "steps", "test", "seconds", "command"} <= set(first[0])
    assert first[0]["command"].startswith("python examples/reproduce.py --task diabetes")
    assert (tmp_path / "figures" / "diabetes_mlp_learning_curves.png").exists()
    reproduce.main([*arguments, "--methods", "baseline", "baseline_matched", "--seeds", "1", "--workers", "1"])
    records = json.loads(path.read_text())
    assert records[0] == first[0]  # not run again
    assert [record["method"] for record in records] == ["baseline", "adalfl", "baseline_matched"]
    assert records[2]["curve"][-1]["implied_lr"] == pytest.approx(records[1]["curve"][-1]["implied_lr"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "1 of 3 runs are there already." in printed
    assert "| diabetes / mlp | 2 | baseline | 1 |" in printed
    assert "| 0.0432 ± 0.0013 | 0.01 |" in printed
    assert "| 0.0420 ± 0.0014 | 0.05 |" in printed


@pytest.mark.parametrize(
    ("task", "model", "method", "expected"),
    [
        ("diabetes", "mlp", "adalfl", [0.0420, 0.0014]),
        ("mnist5k", "logistic", "baseline", [0.0766, 0.0009]),
        ("mnist5k", "lenet5", "ml3_relu", [0.0095, 0.0006]),
        ("diabetes", "mlp", "taylor_quadratic_target_powers", None),
        ("fashion_mnist", "lenet5", "adalfl", None),
        ("diabetes", "mlp", "both", None),
        ("cifar10", "allcnnc", "ml3 inner_steps=5", [0.0978, 0.0052]),
        ("mnist", "lenet5", "adalfl_paper meta_lr=1e-6", [0.0088, 0.0004]),
        ("mnist", "mlp", "adalfl_paper meta_lr=1e-6", None),
        ("diabetes", "mlp", "adalfl_paper meta_data=train", [0.0468, 0.0016]),
    ],
)
def test_the_papers_numbers_are_found(task: str, model: str, method: str, expected: list[float] | None) -> None:
    assert experiment_tables.paper_number(task, model, method) == expected


def test_seeds_methods_and_bad_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.seeds([3]) == [0, 1, 2]
    assert reproduce.seeds([4, 7]) == [4, 7]
    assert reproduce.ordered(["baseline_matched", "ml3"]) == ["ml3", "adalfl", "baseline_matched"]
    with pytest.raises(SystemExit):
        reproduce.parse(["--task", "diabetes", "--model", "mlp", "--steps", "0"])
    assert "--steps must be 1 or more; got 0." in capsys.readouterr().err


def test_figures_end_where_a_run_diverged(tmp_path: Path) -> None:
    def record(method: str, seed: int, last: float | None) -> dict[str, Any]:
        points = [{"step": 1, "val": 0.5, "test": 0.5, "implied_lr": 0.1, "seconds": 1.0}]
        points.append({"step": 2, "val": last, "test": last, "implied_lr": 0.1, "seconds": 2.0})
        names = SimpleNamespace(task="diabetes", model="mlp", method=method, seed=seed, steps=2)
        return {**vars(names), "test": last, "seconds": 1.0, "curve": points}

    records = [record("baseline", 0, 0.4), record("baseline", 1, None), record("adalfl", 0, 0.3)]
    files = draw_figures(records, tmp_path)
    assert sorted(file.name for file in files) == [
        f"diabetes_mlp_{name}.png" for name in ("cost", "dynamics", "learning_curves")
    ]
    assert all(file.stat().st_size > 1000 for file in files)
    assert draw_figures([], tmp_path) == []


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_the_kept_results_are_records_of_runs(path: Path) -> None:
    records = json.loads(path.read_text())
    keys = [reproduce.record_key(record) for record in records]
    assert len(keys) == len(set(keys))
    for record in records:
        assert find_method(record["method"])
        assert record["test"] is None or record["test"] >= 0
        assert record["seconds"] > 0
        assert record["command"].startswith("python examples/reproduce.py --task")
        assert record["curve"][-1]["step"] == record["steps"]
