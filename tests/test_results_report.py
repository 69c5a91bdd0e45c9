"""The tables and figures of the documentation are those of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import results_report
from experiment_figures import learned_losses, learning_curves
from experiment_tables import CONTROLS, NOT_RUN, Runs, ablation, beside_the_paper, order, outcome, stopped_early
from results_report import BLOCKS, PAGE, all_records, claim, difference, page, replaced


def record(method: str, seed: int, test: float | None, **changes: Any) -> dict[str, Any]:
    curve = {"step": [1, 5_000, 10_000], "seconds": [0.1, 1.0, 2.0], "implied_lr": [0.1, 0.1, 0.1]}
    curve |= {"train": [0.5, 0.1, test], "val": [0.5, 0.2, 0.3], "test": [0.5, 0.07, test]}
    made = {"task": "mnist", "model": "logistic", "method": method, "seed": seed, "steps": 10_000, "test": test}
    return {**made, "seconds": 2.0, "curve": curve, **changes}


def with_validation(method: str, seed: int, test: float, val: float) -> dict[str, Any]:
    made = record(method, seed, test)
    made["curve"]["val"][-1] = val
    return made


def with_losses(row: str, seed: int = 0) -> dict[str, Any]:
    task, model = row.split("/")
    targets = [0.0, 1.0] if task == "mnist" else [0.0, 0.5, 1.0]
    losses = {"target": targets, "prediction": [0.0, 0.5, 1.0], "step": [0, 10_000]}
    losses["value"] = [[[0.0, 0.1 * step, 1.0] for _ in targets] for step in (1, 2)]
    return record("adalfl", seed, 0.1, task=task, model=model, losses=losses)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(Runs(all_records())), "run `python examples/paper/results_report.py --write`"


def test_an_outcome_says_what_diverged_and_what_was_not_run() -> None:
    records = [{"test": value} for value in (0.1, None, 0.3)]
    assert outcome(records, 2) == "0.20 ± 0.14 (1 diverged)"
    assert (outcome(records[:1], 3), outcome(records[1:2], 3), outcome([], 3)) == ("0.100", "diverged", "not run")


def test_table_1_has_ours_and_the_papers_under_one_another() -> None:
    runs = Runs([record("baseline", 0, 0.08), record("baseline", 1, 0.07), record("adalfl", 0, 0.06)])
    lines = beside_the_paper(runs, ("baseline", "adalfl", "both"))
    (ours,) = [i for i, line in enumerate(lines) if "MNIST, logistic" in line]
    assert lines[ours] == "| MNIST, logistic | ours | 1–2 | 0.0750 ± 0.0071 | 0.0600 | not run |"
    assert lines[ours + 1] == "|  | the paper | 10 | 0.0766 ± 0.0009 | 0.0697 ± 0.0010 | – |"


def test_runs_of_another_length_are_left_out() -> None:
    assert Runs([record("baseline", 0, 0.08, steps=50)]).of("mnist/logistic", "baseline") == []


def test_a_method_with_the_models_own_draw_is_the_method_itself() -> None:
    runs = Runs([record("baseline", 0, 0.08), record("baseline draw=lecun", 0, 0.07)])
    for draw, expected in (("xavier", 0.08), ("lecun", 0.07)):
        (found,) = runs.of("mnist/logistic", f"baseline draw={draw}")
        assert found["test"] == expected


def test_a_tuned_rate_is_chosen_by_validation_error_for_each_seed_with_every_rate() -> None:
    names = ("baseline", "baseline rate x3", "baseline rate x10", "baseline rate x30")
    records = [with_validation(name, 0, 0.1 * i, val) for i, (name, val) in enumerate(zip(names, (0.4, 0.2, 0.3, 0.5)))]
    (chosen,) = Runs([*records, record("baseline", 1, 0.5)]).of("mnist/logistic", "baseline_tuned")
    assert (chosen["seed"], chosen["test"], chosen["seconds"]) == (0, pytest.approx(0.1), pytest.approx(8.0))
    records[1]["test"] = None
    (chosen,) = Runs(records).of("mnist/logistic", "baseline_tuned")
    assert chosen["test"] == pytest.approx(0.2), "a run that diverged is not chosen"


def test_stopping_early_takes_the_test_error_at_the_least_validation_error() -> None:
    assert stopped_early(record("baseline", 0, 0.09))["test"] == 0.07
    diverged = record("baseline", 0, None)
    diverged["curve"]["val"] = [None, None, None]
    assert stopped_early(diverged)["test"] is None


def test_a_difference_is_taken_over_the_seeds_that_both_have() -> None:
    ours = [{"seed": 0, "test": 0.1}, {"seed": 1, "test": 0.4}, {"seed": 5, "test": 0.0}]
    others = [{"seed": 1, "test": 0.2}, {"seed": 0, "test": 0.3}, {"seed": 2, "test": 9.0}]
    assert difference(ours, others) == "+0.0000 ± 0.2828 (1/2)"
    assert difference(ours[:1], [{"seed": 0, "test": None}]) == "(1/1)"
    assert difference(ours, []) == "not run"


def test_the_claim_is_held_against_every_explanation() -> None:
    lines = claim(Runs([record("adalfl", 0, 0.06), record("baseline", 0, 0.08)]))
    assert lines[0] == "| AdaLFL's error less that of | MNIST, logistic |", "rows without a run are left out"
    cells = dict(line.strip("| ").split(" | ") for line in lines[2:])
    assert cells["handcrafted"] == "-0.0200 (1/1)"
    assert cells["handcrafted, stopped early"] == "-0.0100 (1/1)"
    assert cells["MetaLR"] == "not run"


def test_an_ablation_has_the_papers_column() -> None:
    lines = ablation(Runs([record("adalfl meta_lr=1e-3", 0, 0.06)]), "meta_lr", ("mnist/logistic", "mnist/lenet5"))
    assert lines[0] == "|  | MNIST, logistic | MNIST, LeNet-5, the paper |"
    assert lines[-1] == "| adalfl meta_lr=1e-3 | 0.0600 | 0.0104 ± 0.0011 |"
    inner = [record("adalfl inner_steps=5", 0, 0.06), record("ml3 inner_steps=5", 0, 0.07)]
    lines = ablation(Runs(inner), "open_settings", ("mnist/logistic",))
    assert lines[-2:] == ["| ml3 inner_steps=5 | 0.0700 |", "| adalfl inner_steps=5 | 0.0600 |"], "that is on CIFAR-10"
    unchanged = ablation(Runs([record("adalfl", 0, 0.06)]), "meta_lr", ("mnist/logistic",))
    assert unchanged == [NOT_RUN], "what is not varied is no table"


def test_the_methods_of_a_row_in_order() -> None:
    records = [record("baseline", 0, 0.06), record("adalfl", 0, 0.07), record("adalfl", 1, 0.01)]
    (row,) = order(Runs(records), ("baseline", "adalfl"))[2:]
    assert row == "| MNIST, logistic | AdaLFL < handcrafted | AdaLFL < handcrafted |"
    diverged = [*records, record("adalfl", 2, None)]
    assert order(Runs(diverged), ("baseline", "adalfl"))[2].startswith("| MNIST, logistic | handcrafted < AdaLFL")
    assert order(Runs(records), ("baseline", "ml3")) == [NOT_RUN]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_table_can_be_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results_report.main(["--table", name])
    printed = capsys.readouterr().out.splitlines()
    widths = {line.count(" | ") for line in printed if line.startswith("| ")}
    assert len(widths) == (0 if NOT_RUN in printed else 1)


def test_a_stale_page_is_found_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "experiments.md"
    stale.write_text("".join(f"<!-- {name} --> old <!-- end of {name} -->\n" for name in BLOCKS))
    monkeypatch.setattr(results_report, "PAGE", stale)
    monkeypatch.setattr(results_report, "IMAGES", tmp_path)
    records = [with_losses("mnist/logistic"), with_losses("crime/mlp")]
    monkeypatch.setattr(results_report, "all_records", lambda: records)
    with pytest.raises(SystemExit, match="1"):
        results_report.main(["--check"])
    assert "old" in stale.read_text()
    with pytest.raises(SystemExit, match="0"):
        results_report.main(["--write"])
    assert "old" not in stale.read_text()
    assert len(list(tmp_path.glob("paper_*.png"))) == 5
    with pytest.raises(SystemExit, match="0"):
        results_report.main(["--check"])
    assert "was out of date" in capsys.readouterr().out


def test_a_block_is_replaced_and_the_rest_is_left() -> None:
    assert replaced("a <!-- x --> old <!-- end of x --> z", "x", "new") == "a <!-- x -->\n\nnew\n\n<!-- end of x --> z"
    with pytest.raises(ValueError, match="no block between '<!-- y -->'"):
        replaced("a", "y", "new")


def test_a_learning_curve_ends_where_a_run_diverged() -> None:
    runs = Runs([record("baseline", 0, 0.1), record("baseline", 1, None), record("adalfl", 0, 0.1)])
    figure = learning_curves(runs, ["mnist/logistic"], CONTROLS, "test")
    lines = figure.axes[0].lines
    assert len(lines) == 2
    assert [int(np.isfinite(line.get_ydata()).sum()) for line in lines] == [2, 3]
    assert all(axes.get_visible() == bool(axes.lines) for axes in figure.axes), "no empty panel"


def test_a_learned_loss_is_drawn_less_its_value_at_the_correct_prediction() -> None:
    figure = learned_losses(
        Runs([with_losses("mnist/logistic"), with_losses("crime/mlp")]), ["crime/mlp", "mnist/logistic"]
    )
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 3 + 2
    for axes in panels:
        target = float(axes.get_title().split()[-1])
        for line in axes.lines[:2]:
            assert dict(zip(*line.get_data()))[target] == 0
    with pytest.raises(ValueError, match="no record of 'adalfl' with seed 3"):
        learned_losses(Runs([with_losses("mnist/logistic")]), ["mnist/logistic"], seed=3)


def test_every_control_has_a_name() -> None:
    lines = results_report.controls(Runs([record("both", 0, 0.06)]))
    assert len(lines) == 3
    assert sorted(set(lines[2].strip("| ").split(" | ")[2:])) == ["0.0600", "not run"]
