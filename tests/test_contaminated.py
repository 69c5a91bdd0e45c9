"""The comparison on contaminated targets: every method trains, sweeps resume, tables come from the records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import regret
import regret_report
import torch
import two_errors
from contaminated_tasks import TASKS, friedman, shifted, trusted_rows
from rate_rivals import installed, schedule_free_sgd
from regret import Job, jobs, run
from rivals import METHODS, generalised_cross_entropy
from training import Run

FEW = {"seed": 0, "steps": 25}
RATE_METHODS = [name for name, method in METHODS.items() if method.groups == ("clean",)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["friedman1_up", "mnist5k_next"])
def test_every_method_trains_from_the_same_model(task: str, method: str) -> None:
    if not METHODS[method].fits(TASKS[task]):
        assert not [job for job in jobs([task], [method], [0.05], [0], None)]
        return
    record = run(Job(task, method, 0.05, **FEW))
    assert record["curve"]["step"] == list(range(1, 26))
    assert all(math.isfinite(error) for error in record["curve"]["test"])
    assert record["test"] != run(Job(task, method, 0.05, seed=1, steps=1))["test"]


def test_a_run_repeats_and_the_library_begins_as_the_own_loss() -> None:
    """Its first meta step follows the tenth base step, so that the first ten are the own loss's to the bit."""
    ours, again, own = (run(Job("friedman1_up", name, 0.05, **FEW)) for name in ("ours", "ours", "own"))
    assert ours["curve"] == again["curve"]
    assert ours["curve"]["test"][:10] == own["curve"]["test"][:10]
    assert ours["curve"]["test"][10:] != own["curve"]["test"][10:]


@pytest.mark.parametrize(
    "method", [name for name in METHODS if METHODS[name].fits(TASKS["mnist5k_next"]) and name != "own"]
)
def test_no_rival_is_the_own_loss_under_another_name(method: str) -> None:
    curves = [run(Job("mnist5k_next", name, 0.05, **FEW))["curve"]["test"] for name in (method, "own")]
    assert curves[0] != curves[1]


@pytest.mark.parametrize("method", RATE_METHODS)
def test_who_does_not_see_the_rate_is_run_at_the_papers_alone(method: str) -> None:
    pair = ["clean_mnist5k_logistic_paper", "clean_mnist5k_logistic_tuned"]
    curves = [run(Job(task, method, 0.05, **FEW))["curve"] for task in pair]
    assert curves[0]["step"] == list(range(1, 26))
    assert all(math.isfinite(error) for error in curves[0]["test"])
    found = [job.task for job in jobs([*pair, "friedman1_up"], [method], [0.05], [0], None)]
    if METHODS[method].sees_rate:
        assert curves[0] != curves[1]
        assert found == pair
    else:
        assert curves[0] == curves[1]
        assert found == pair[:1]


@pytest.mark.parametrize(("method", "without"), [("both", "ours"), ("lr", "own")])
def test_a_learned_rate_is_what_the_optimizer_steps_with(method: str, without: str) -> None:
    """From the first step after the first meta step on, the eleventh."""
    learned, plain = (run(Job("clean_diabetes_tuned", name, 0.05, **FEW)) for name in (method, without))
    assert learned["curve"]["test"][:10] == plain["curve"]["test"][:10]
    assert learned["curve"]["test"][10:] != plain["curve"]["test"][10:]
    assert learned["rate"] == pytest.approx(0.1, rel=0.03)
    assert "rate" not in plain


def test_schedule_free_shows_its_average_and_looking_changes_nothing() -> None:
    task = TASKS["clean_mnist5k_logistic_paper"]
    data, models = task.draw(0), []
    rows = trusted_rows(task, data, 0.05)
    for looks in (False, True):
        torch.manual_seed(0)
        training = Run(task, data.train, rows, {"0.05": rows}, data.test, 0, 40)
        monitor = training.look
        training.look = monitor if looks else lambda: None  # type: ignore[method-assign]
        schedule_free_sgd(training)
        assert training.optimizer.param_groups[0]["train_mode"]
        models.append(training.model(data.test[0]).detach())
        monitor()
    torch.testing.assert_close(models[0], models[1], rtol=1e-3, atol=1e-4)
    training.optimizer.eval()  # type: ignore[attr-defined]
    assert training.curve["test"][-1] == round(task.error(training.model(data.test[0]), data.test[1]), 5)


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"needs the package no-such; `pip install no-such`"):
        installed("no_such_module", "no-such")


def test_the_table_of_rates_says_what_was_not_run() -> None:
    def record(task: str, method: str, seed: int, test: float | None, **more: Any) -> dict[str, Any]:
        curve = {"step": [1], "test": [test], "val": {"0.05": [0.1]}, "val_loss": {"0.05": [0.1]}}
        steps = TASKS[task].steps
        return {"task": task, "method": method, "seed": seed, "test": test, "steps": steps, "curve": curve, **more}

    paper, tuned = "clean_diabetes_paper", "clean_diabetes_tuned"
    records = [record(paper, "own", seed, 0.4) for seed in (0, 1)]
    records += [record(tuned, "own", seed, 0.2) for seed in (0, 1)]
    records += [record(paper, "mechanic", 0, 0.3, trusted=0.2, rate=0.5), record(tuned, "lr", 0, None)]
    runs = regret_report.Runs(records)
    rows = {line[: line.index("| 1 |")]: line for line in regret_report.rates(runs) if line.startswith("| diabetes")}
    not_run = "not run"
    expected = [("0.001", ["0.4", not_run, not_run, not_run, not_run, "0.3", not_run, not_run])]
    expected += [("0.1", ["0.2", not_run, not_run, "diverged", not_run, "0.3", not_run, not_run])]
    for rate, cells in expected:
        assert rows[f"| diabetes | {rate} "] == f"| diabetes | {rate} | 1 | {' | '.join(cells)} |"
    found = [line for line in regret_report.found_rates(runs) if line.startswith("| diabetes")]
    assert found == [
        f"| diabetes_{n} | {rate} | {not_run} | {not_run} | 0.5 | {not_run} |"
        for n, rate in (("paper", "0.001"), ("tuned", "0.1"))
    ]


def test_what_is_wrong_and_what_is_trusted() -> None:
    data = friedman(1, 0, shifted)
    _, y = data.train
    assert (len(y), len(data.trusted[1]), len(data.test[1])) == (3000, 600, 2000)
    assert 0 <= data.trusted[1].min() <= data.trusted[1].max() < 1.2
    assert 0.2 < (y > 1.2).float().mean() < 0.35
    few = trusted_rows(TASKS["friedman1_up"], data, 0.01)
    assert torch.equal(few[1], data.trusted[1][:30])
    with pytest.raises(ValueError, match=r"`fraction` must lie in .*; got 0.5"):
        trusted_rows(TASKS["friedman1_up"], data, 0.5)
    labels, right = TASKS["mnist5k_next"].draw(0).train[1], TASKS["mnist5k_tail"].draw(0).trusted[1][:10]
    assert len(labels) == 3000
    assert sorted(right.tolist()) == list(range(10))


def test_the_robust_loss_is_between_absolute_error_and_cross_entropy() -> None:
    logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([1])
    p = logits.softmax(1)[0, 1]
    assert float(generalised_cross_entropy(logits, target)) == pytest.approx(float((1 - p**0.7) / 0.7), rel=1e-5)


def test_a_sweep_resumes_and_its_tables_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("friedman1_up", "friedman2_absolute"):  # one task of each kind of table, cut short
        monkeypatch.setitem(TASKS, name, _shortened(TASKS[name]))
    arguments = ["--tasks", "friedman1_up", "--records", str(tmp_path), "--seeds", "0"]
    regret.main([*arguments, "--methods", "own"])
    first = (tmp_path / "friedman1_up.jsonl").read_text()
    regret.main([*arguments, "--methods", "own", "ours", "pinball_told", "added"])
    text = (tmp_path / "friedman1_up.jsonl").read_text()
    assert text.startswith(first), "what is there is not run again"
    assert len(text.splitlines()) == 4
    assert json.loads(first)["method"] == "own"
    capsys.readouterr()

    monkeypatch.setattr(regret_report, "RECORDS", tmp_path)
    runs = regret_report.Runs(regret_report.all_records(tmp_path))
    table = "\n".join(regret_report.regret(runs, 0.05))
    assert "| the library's defaults |" in table
    assert "| own loss, stopped early |" in table
    ratios = regret_report.ratios({"own": 4.0, "ours": 2.0, "pinball_told": 1.0})
    assert ratios == {"own": 2.0, "ours": 1.0, "pinball_told": 0.5}, "who is told has no part in the best"
    page = "before\n<!-- regret 0.05 -->\nof old\n<!-- end of regret 0.05 -->\nafter"
    written = regret_report.page(page, runs)
    assert "of old" not in written
    assert table in written
    with pytest.raises(ValueError, match=r"the page has no .* after"):
        regret_report.page("<!-- clean -->", runs)


def test_the_page_is_what_the_records_say() -> None:
    runs = regret_report.Runs(regret_report.all_records())
    text = regret_report.PAGE.read_text()
    assert regret_report.page(text, runs) == text


def _shortened(task: Any) -> Any:
    return type(task)(**{**vars(task), "steps": 12})


def test_the_picture_of_the_readme_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "two_errors.png"
    two_errors.main(["--steps", "40", "20", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
