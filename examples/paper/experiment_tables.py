"""The paper's tables from the records, each beside the paper's own numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from base_models import MODELS
from experiment_methods import ABLATIONS, TUNING_GRID

Record = dict[str, Any]
PAPER = json.loads((Path(__file__).parent / "paper_tables.json").read_text())
# Which table of the paper has a method, and in which column.
COLUMNS = {
    "baseline": ("table1_final_test", "baseline"),
    "ml3": ("table1_final_test", "ml3"),
    "metalr": ("table1_final_test", "metalr"),
    "adalfl": ("table1_final_test", "adalfl"),
    "ml3_relu": ("table5_activation", "ml3_relu_softplus_offline"),
    "taylor_quadratic_target_powers": ("table4_representations", "quadratic_taylor_online"),
    "taylor_cubic_target_powers": ("table4_representations", "cubic_taylor_online"),
    "adalfl meta_data=train": ("table7_meta_objective", "training"),
}
LABELS = {
    "baseline": "handcrafted",
    "ml3": "ML³",
    "metalr": "MetaLR",
    "adalfl": "AdaLFL",
    "baseline_tuned": "handcrafted, rate tuned",
    "baseline_matched": "handcrafted, rate of AdaLFL",
    "both": "loss and rate",
    "library": "the library's defaults",
    "library meta_every=1": "the same, every step",
    "ml3_relu": "ML³, ReLU and Softplus",
    "taylor_quadratic_target_powers": "quadratic, powers of the target",
    "taylor_cubic_target_powers": "cubic, powers of the target",
    "taylor_quadratic": "quadratic, powers of the prediction",
    "taylor_cubic": "cubic, powers of the prediction",
}
ROWS = {
    "crime/mlp": "Crime, MLP",
    "diabetes/mlp": "Diabetes, MLP",
    "california/mlp": "California, MLP",
    "mnist/logistic": "MNIST, logistic",
    "mnist/mlp": "MNIST, MLP",
    "mnist/lenet5": "MNIST, LeNet-5",
    "mnist/lenet5_unpadded": "MNIST, LeNet-5 unpadded",
    "mnist/lenet5_relu": "MNIST, LeNet-5 ReLU",
    "cifar10/allcnnc": "CIFAR-10, AllCNN-C",
}
# The paper's table of an ablation that it has on one row alone.
ABLATED = {"inner_steps": PAPER["table3_inner_steps"], "meta_lr": PAPER["table6_meta_learning_rate"]}
# Rows of an ablation that are a method as it is.
UNCHANGED = {"adalfl meta_lr=1e-5": "adalfl"}
STEPS = 10_000
MISSING = "not run"
NOT_RUN = "Not run; `reproduce.py` runs it."


Columns = Mapping[str, tuple[str, str]]
# What the paper gives another number for in the table of an ablation than in Table 1.
OF_ACTIVATION: Columns = {
    **COLUMNS,
    "ml3": ("table5_activation", "ml3_smooth_leaky_relu_offline"),
    "adalfl": ("table5_activation", "adalfl"),
}
OF_ABLATION: Mapping[str, Columns] = {"meta_data": {**COLUMNS, "adalfl": ("table7_meta_objective", "validation")}}


class Block(NamedTuple):
    """A table of the paper: its number, the methods that are its columns, and where their numbers are."""

    number: str
    methods: Sequence[str]
    columns: Columns = COLUMNS


TABLES = (
    Block("1", ("baseline", "ml3", "metalr", "adalfl")),
    Block("4", ("taylor_quadratic_target_powers", "taylor_cubic_target_powers", "taylor_quadratic", "taylor_cubic")),
    Block("5", ("ml3_relu", "ml3", "adalfl"), OF_ACTIVATION),
)
CONTROLS = ("baseline", "baseline_tuned", "baseline_matched", "adalfl", "both", "library", "library meta_every=1")


class Runs:
    """The records of runs of one length, by row, method and seed.

    Args:
        records: Any records; those of other lengths are left out.
        steps: The length.
    """

    def __init__(self, records: Iterable[Record], steps: int = STEPS) -> None:
        self._found: dict[tuple[str, str], list[Record]] = {}
        for record in sorted(records, key=lambda record: record["seed"]):
            if record["steps"] == steps:
                key = f"{record['task']}/{record['model']}", record["method"]
                self._found.setdefault(key, []).append(record)

    def of(self, row: str, method: str) -> list[Record]:
        """Return the records of a method, in the order of the seeds; those of ``"baseline_tuned"`` are chosen here."""
        if method == "baseline_tuned":
            return self._tuned(row)
        method = UNCHANGED.get(method, method)
        # A method with the model's own draw is the method itself.
        plain, _, draw = method.partition(" draw=")
        own = MODELS[row.split("/")[1]].draw
        return self._found.get((row, plain if draw == own else method), [])

    def _tuned(self, row: str) -> list[Record]:
        """Of each seed the run whose rate has the least validation error at the end; its seconds are those of all."""
        names = ["baseline", *(f"baseline rate x{k}" for k in TUNING_GRID[1:])]
        grid = [{record["seed"]: record for record in self.of(row, name)} for name in names]
        chosen = []
        for seed in sorted(set.intersection(*(set(runs) for runs in grid))):
            runs = [by_seed[seed] for by_seed in grid]
            best = min(runs, key=last_validation_error)
            chosen.append({**best, "seconds": sum(run["seconds"] for run in runs)})
        return chosen


def last_validation_error(record: Record) -> float:
    """Return it; infinity for a run that diverged."""
    value = record["curve"]["val"][-1]
    return math.inf if value is None or record["test"] is None else value


def stopped_early(record: Record) -> Record:
    """Return the record as if the run had ended where its validation error was least."""
    curve = record["curve"]
    known = [(val, test) for val, test in zip(curve["val"], curve["test"]) if val is not None and test is not None]
    return {**record, "test": min(known)[1] if known else None}


def paper_row(task: str, model: str) -> str:
    """Return the row of the paper's tables; all variants of LeNet-5 have one."""
    return f"{task}/{'lenet5' if model.startswith('lenet5') else model}"


def paper_number(task: str, model: str, method: str, columns: Columns = COLUMNS) -> list[float] | None:
    """Return the paper's mean and standard deviation, or ``None`` where it has none or the run diverged.

    Args:
        task: A key of `tasks.TASKS`.
        model: A key of `base_models.MODELS`.
        method: A key of `experiment_methods.METHODS`, or a row of an ablation.
        columns: Which table has a method, and in which column.
    """
    row = paper_row(task, model)
    name, _, variant = method.partition(" ")
    option, _, value = variant.partition("=")
    if (option, name) in (("inner_steps", "ml3"), ("meta_lr", "adalfl")):
        table = ABLATED[option]
        return table.get(value) if table["task"] == row else None
    if method not in columns:
        return None
    of_paper, column = columns[method]
    table = PAPER[of_paper]
    return table[row][table["columns"].index(column)] if row in table else None


def paper_hours(task: str, model: str, method: str) -> float | None:
    """Return the time in Table 2, on one NVIDIA RTX A5000."""
    table = PAPER["table2_runtime_hours"]
    row = table.get(paper_row(task, model))
    return row[table["columns"].index(method)] if row and method in table["columns"] else None


def outcome(records: Sequence[Record], decimals: int = 4) -> str:
    """Return mean ± standard deviation of the test error over seeds, and how many diverged."""
    finished = [record["test"] for record in records if record["test"] is not None]
    if not finished:
        return "diverged" if records else MISSING
    text = f"{mean(finished):.{decimals}f}"
    text += f" ± {stdev(finished):.{decimals}f}" if len(finished) > 1 else ""
    diverged = len(records) - len(finished)
    return f"{text} ({diverged} diverged)" if diverged else text


def beside_the_paper(runs: Runs, methods: Sequence[str], columns: Columns = COLUMNS) -> list[str]:
    """Return a table with two lines for each row of Table 1: ours and the paper's."""
    lines = head(["", "", "seeds", *(LABELS[method] for method in methods)])
    for row, label in ROWS.items():
        found = [runs.of(row, method) for method in methods]
        if not any(found):
            continue
        lines.append(line([label, "ours", seeds_of(found), *map(outcome, found)]))
        if known := _known(row, methods, columns):
            lines.append(line(["", "the paper", "10", *(known.get(method, "–") for method in methods)]))
    return lines if len(lines) > 2 else [NOT_RUN]


def ablation(runs: Runs, name: str, rows: Sequence[str]) -> list[str]:
    """Return a table with a line for each row of an ablation: ours on the tasks given, each beside the paper's if any.

    Where the paper has it on a task that is not among them, its numbers have a column of their own.
    """
    methods = [method for method in ABLATIONS[name] if any(runs.of(row, method) for row in rows)]
    was_run = [row for row in rows if any(runs.of(row, method) for method in methods)]
    if not set(methods) - set(LABELS) - set(UNCHANGED):
        return [NOT_RUN]
    columns: dict[str, dict[str, str]] = {}
    for row in was_run:
        columns[ROWS[row]] = {method: outcome(runs.of(row, method)) for method in methods}
        columns[f"{ROWS[row]}, the paper"] = _known(row, methods, OF_ABLATION.get(name, COLUMNS))
    if name in ABLATED:
        row = ABLATED[name]["task"]
        columns[f"{ROWS[row]}, the paper"] = _known(row, methods)
    columns = {title: cells for title, cells in columns.items() if cells}
    lines = head(["", *columns])
    return lines + [line([method, *(cells.get(method, "–") for cells in columns.values())]) for method in methods]


def _known(row: str, methods: Sequence[str], columns: Columns = COLUMNS) -> dict[str, str]:
    """Return the paper's numbers of a row, by method, where it has them."""
    found = {method: paper_number(*row.split("/"), method, columns) for method in methods}
    return {method: f"{number[0]:.4f} ± {number[1]:.4f}" for method, number in found.items() if number is not None}


def order(runs: Runs, methods: Sequence[str]) -> list[str]:
    """Return a table of the methods from the best to the worst, the paper's order beside ours."""
    lines = head(["", "ours, best first", "the paper's"])
    for row, label in ROWS.items():
        ours = {method: mean_error(runs.of(row, method)) for method in methods}
        papers = {method: paper_number(*row.split("/"), method) for method in methods}
        if None in ours.values() or None in papers.values():
            continue
        orders = (sorted(methods, key=ours.__getitem__), sorted(methods, key=papers.__getitem__))
        lines.append(line([label, *(" < ".join(LABELS[method] for method in found) for found in orders)]))
    return lines if len(lines) > 2 else [NOT_RUN]


def mean_error(records: Sequence[Record]) -> float | None:
    """Return the mean test error, infinite if a run diverged; ``None`` without any run."""
    return mean(math.inf if record["test"] is None else record["test"] for record in records) if records else None


def seeds_of(found: Sequence[Sequence[Record]]) -> str:
    """Return how many seeds the methods of a line have: one number, or the fewest and the most."""
    counts = {len(records) for records in found if records}
    return "–".join(str(n) for n in sorted({min(counts), max(counts)}))


def table(records: Sequence[Record]) -> str:
    """Return a Markdown table with a row for each method, in the order in which they first appear."""
    groups: dict[tuple[str, str, int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["model"], record["steps"], record["method"]), []).append(record)
    lines = head(["task / model", "steps", "method", "seeds", "test error", "seconds", "the paper's", "its hours"])
    for (task, model, steps, method), rows in groups.items():
        known, hours = _known(f"{task}/{model}", [method]).get(method, ""), paper_hours(task, model, method)
        seconds = f"{mean(row['seconds'] for row in rows):.0f}"
        time = "" if hours is None else f"{hours:g}"
        lines.append(
            line([f"{task} / {model}", f"{steps:,}", method, str(len(rows)), outcome(rows), seconds, known, time])
        )
    return "\n".join(lines)


def head(cells: Sequence[str]) -> list[str]:
    """Return the head of a Markdown table."""
    return [line(cells), "|" + "---|" * len(cells)]


def line(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
