"""The paper's experiments: every row of its Table 1 runs, and what the script prints, keeps and repeats."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import Any

import datasets_images
import datasets_tabular
import experiment_run
import experiment_tables
import pytest
import reproduce
import step_times
import torch
from dataset_files import crime_table, generator, write_cifar, write_idx, write_svhn
from experiment_methods import ABLATIONS, ALL_METHODS, METHODS, find_method
from experiment_run import AdaptiveLearner, BaseLearner, Job, error, matched_rate, run
from tasks import load_task

ROWS = [row.split("/") for row in experiment_tables.PAPER["table1_final_test"] if "/" in row]
RESULTS = sorted(reproduce.RECORDS.glob("*.jsonl"))
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
    record = run(Job(task, model, "adalfl", 0, 1, str(data), init_steps=1, batch_size=2))
    assert record["method"] == "adalfl"
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
    assert record["curve"]["step"] == [1, 2]
    assert record["seconds"] > 0


@pytest.mark.parametrize(("worst", "is_ended"), [(5e3, False), (1e7, True), (math.nan, True), (math.inf, True)])
def test_a_run_ends_only_where_it_does_not_come_back(
    worst: float, is_ended: bool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows that are far off make an error of thousands, for a while."""
    errors = iter([0.1] * 3 + [worst] * 3 + [0.2] * 9)
    monkeypatch.setattr(experiment_run, "error", lambda *_: next(errors))
    record = run(Job("diabetes", "mlp", "baseline", 0, 4, str(data), batch_size=16))
    assert record["curve"]["step"] == ([1, 2] if is_ended else [1, 2, 3, 4])
    assert record["test"] == (None if is_ended else 0.2)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_row_of_an_ablation_runs(ablation: str, data: Path) -> None:
    for method in set(ABLATIONS[ablation]) - set(METHODS):
        record = run(Job("crime", "mlp", method, 0, 1, str(data), init_steps=1, batch_size=16))
        assert math.isfinite(record["test"])


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="`name` must be one of 'baseline'"):
        find_method("adam")


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_the_reading_is_the_papers_recipe(kind: str) -> None:
    config, init = METHODS["adalfl"].build(kind)
    assert (config.meta_lr, init.steps, init.lr) == (1e-5, 2500, 1e-3)  # section 4.4
    assert METHODS["adalfl"].build(kind, init_steps=3)[1].steps == 3
    ml3, _ = METHODS["ml3"].build(kind)
    assert ml3.meta_every is None


@pytest.mark.parametrize("draw", [None, "torch"])
def test_the_offline_phase_draws_as_training_does(draw: str | None, tmp_path: Path) -> None:
    task = load_task("diabetes", tmp_path, seed=0)
    config, _ = METHODS["adalfl"].build("regression")
    plain = BaseLearner(task, "mlp", lambda step: 1.0, draw)
    module = AdaptiveLearner(task, "mlp", lambda step: 1.0, draw, adalfl=config)
    before = module.model[1].weight.detach().clone()
    module.adalfl_reset_parameters()
    assert not torch.equal(module.model[1].weight, before)
    deviation = {None: (1 / 10) ** 0.5, "torch": (1 / 30) ** 0.5}[draw]
    for layer in (plain.model[1], module.model[1]):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)


def test_the_control_follows_the_implied_learning_rate(data: Path) -> None:
    reference = {"rates": {"step": [2, 3, 4], "implied_lr": [0.002, None, 0.004]}}
    rate = matched_rate(reference)
    assert [rate(step) for step in (0, 1, 2, 3, 9)] == pytest.approx([0.002, 0.002, 0.003, 0.004, 0.004])
    record = run(Job("diabetes", "mlp", "baseline_matched", 0, 4, str(data), batch_size=16), rate)
    assert record["curve"]["implied_lr"] == pytest.approx([0.002, 0.003, 0.004, 0.004], rel=1e-6)  # of the next


def test_a_run_that_diverges_ends_without_a_test_error(data: Path) -> None:
    record = run(Job("diabetes", "mlp", "baseline", 0, 400, str(data)), lambda step: 1e6)
    assert record["test"] is None
    assert record["curve"]["step"][-1] < 400
    assert "diverged" in experiment_tables.table([record])


def test_the_learned_loss_and_its_rate_are_kept(data: Path) -> None:
    job = {"seed": 0, "steps": 16, "data": str(data), "init_steps": 1, "batch_size": 16}
    losses = run(Job("crime", "mlp", "adalfl", **job))
    assert losses["rates"]["step"] == list(range(1, 17))
    assert losses["losses"]["step"] == list(range(0, 17, 2))
    assert {len(rows) for rows in losses["losses"]["value"]} == {len(losses["losses"]["target"])}
    assert {len(row) for rows in losses["losses"]["value"] for row in rows} == {len(losses["losses"]["prediction"])}
    rate = run(Job("crime", "mlp", "metalr", **job))
    assert "losses" not in rate
    assert rate["curve"]["implied_lr"][-1] == pytest.approx(1e-3, rel=0.1)
    assert "losses" not in run(Job("crime", "mlp", "adalfl", **{**job, "seed": 7}))


def test_the_table_is_printed_beside_the_papers_and_a_sweep_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", SameProcess)
    arguments = ["--task", "diabetes", "--model", "mlp", "--steps", "2", "--init-steps", "2"]
    arguments += ["--records", str(tmp_path), "--seeds", "1", "--first-seed", "4"]
    reproduce.main([*arguments, "--methods", "baseline"])
    first = (tmp_path / "diabetes_mlp.jsonl").read_text()
    record = json.loads(first)
    assert {"task", "model", "method", "seed", "steps", "test", "seconds"} <= set(record)
    assert record["command"] == (
        "python examples/paper/reproduce.py --task diabetes --model mlp --methods baseline --seeds 1 --first-seed 4 "
        "--steps 2 --init-steps 2"
    )
    reproduce.main([*arguments, "--methods", "baseline", "baseline_matched"])
    assert (tmp_path / "diabetes_mlp.jsonl").read_text().startswith(first), "what is there is not run again"
    records = reproduce.read(tmp_path / "diabetes_mlp.jsonl")
    assert [record["method"] for record in records] == ["baseline", "adalfl", "baseline_matched"]
    assert {record["seed"] for record in records} == {4}
    printed = capsys.readouterr().out
    assert "1 of 3 runs are there already." in printed
    assert "| diabetes / mlp | 2 | baseline | 1 |" in printed
    assert "| 0.0432 ± 0.0013 | 0.01 |" in printed
    assert "| 0.0420 ± 0.0014 | 0.05 |" in printed


class SameProcess:
    """A pool that runs at once, in this process."""

    def __init__(self, *args: Any) -> None:
        pass

    def __enter__(self) -> SameProcess:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def submit(self, function: Any, *args: Any) -> reproduce.Future[Any]:
        future: reproduce.Future[Any] = reproduce.Future()
        future.set_result(function(*args))
        return future


@pytest.mark.parametrize(
    ("task", "model", "method", "expected"),
    [
        ("diabetes", "mlp", "adalfl", [0.0420, 0.0014]),
        ("mnist", "lenet5_unpadded", "ml3_relu", [0.0095, 0.0006]),
        ("diabetes", "mlp", "taylor_quadratic_target_powers", None),
        ("fashion_mnist", "lenet5", "adalfl", None),
        ("diabetes", "mlp", "both", None),
        ("cifar10", "allcnnc", "ml3 inner_steps=5", [0.0978, 0.0052]),
        ("mnist", "lenet5", "adalfl meta_lr=1e-6", [0.0088, 0.0004]),
        ("mnist", "mlp", "adalfl meta_lr=1e-6", None),
        ("diabetes", "mlp", "adalfl meta_data=train", [0.0468, 0.0016]),
    ],
)
def test_the_papers_numbers_are_found(task: str, model: str, method: str, expected: list[float] | None) -> None:
    assert experiment_tables.paper_number(task, model, method) == expected


def test_the_control_comes_last_and_after_what_it_is_matched_to() -> None:
    assert reproduce.ordered(["baseline_matched", "ml3"]) == ["ml3", "adalfl", "baseline_matched"]
    assert reproduce.ordered(["ml3", "baseline"]) == ["ml3", "baseline"]


@pytest.mark.parametrize("option", ["--steps", "--seeds", "--batch-size"])
def test_bad_counts_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.parse(["--task", "diabetes", "--model", "mlp", option, "0"])
    assert f"{option} must be 1 or more; got 0." in capsys.readouterr().err


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_the_kept_results_are_records_of_runs(path: Path) -> None:
    records = reproduce.read(path)
    keys = [reproduce.record_key(record) for record in records]
    assert len(keys) == len(set(keys))
    for record in records:
        assert f"{record['task']}_{record['model']}" == path.stem
        assert record["method"] in ALL_METHODS
        assert record["test"] is None or record["test"] >= 0
        assert record["seconds"] > 0
        job = Job(*(record[name] for name in ("task", "model", "method", "seed", "steps")))
        assert record["command"].startswith(reproduce.command(job))
        ended = record["curve"]["step"][-1] == record["steps"]
        assert ended or record["test"] is None


def test_the_steps_of_the_large_rows_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    step_times.main(["--models", "squeezenet", "--steps", "1", "--batch-size", "2"])
    model, plain, adaptive, *hours = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert model == "squeezenet"
    assert 0 < float(plain) < float(adaptive)
    assert len(hours) == 2
    with pytest.raises(SystemExit):
        step_times.main(["--steps", "0"])
