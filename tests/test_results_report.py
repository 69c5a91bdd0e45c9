"""The tables that the README and the documentation show are those of the records."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import pytest
import results_report
from experiment_tables import outcome
from results_report import replaced, reports

ROOT = Path(results_report.__file__).parents[1]


@pytest.mark.parametrize("path", sorted(reports(ROOT)), ids=lambda path: path.name)
def test_the_tables_are_up_to_date(path: Path) -> None:
    assert path.read_text() == reports(ROOT)[path], "run `python examples/results_report.py`"


def test_the_defaults_are_nowhere_worse_than_the_handcrafted_loss_by_a_standard_deviation() -> None:
    for task, (_, steps, _) in results_report.TASKS.items():
        for length, seeds in ((steps, 5), (results_report.LONG, 3)):
            plain = [record["test"] for record in results_report.chosen(task, "baseline", length, seeds)]
            for method in results_report.OURS[1:]:
                learned = [record["test"] for record in results_report.chosen(task, method, length, seeds)]
                if learned:
                    worse = mean(learned) - mean(plain)
                    assert worse <= stdev(plain), (task, method, length)


def test_an_outcome_says_what_diverged_and_what_was_not_run() -> None:
    records = [{"test": value} for value in (0.1, None, 0.3)]
    assert outcome(records, 2) == "0.20 ± 0.14 (1 diverged)"
    assert (outcome(records[:1], 3), outcome(records[1:2], 3), outcome([], 3)) == ("0.100", "diverged", "")


def test_a_block_is_replaced_and_the_rest_is_left() -> None:
    assert replaced("a <!-- x --> old <!-- end of x --> z", "x", "new") == "a <!-- x -->\n\nnew\n\n<!-- end of x --> z"
    with pytest.raises(ValueError, match="no block between '<!-- y -->'"):
        replaced("a", "y", "new")
