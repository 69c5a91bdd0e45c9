"""The results as a table, beside the numbers of the paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Record = dict[str, Any]
PAPER = json.loads((Path(__file__).parent / "paper_tables.json").read_text())
# Which table of the paper has a method, and in which column.
COLUMNS = {
    "baseline": ("table1_final_test", "baseline"),
    "ml3": ("table1_final_test", "ml3"),
    "metalr": ("table1_final_test", "metalr"),
    "adalfl": ("table1_final_test", "adalfl"),
    "adalfl_paper": ("table1_final_test", "adalfl"),
    "ml3_relu": ("table5_activation", "ml3_relu_softplus_offline"),
    "taylor_quadratic_target_powers": ("table4_representations", "quadratic_taylor_online"),
    "taylor_cubic_target_powers": ("table4_representations", "cubic_taylor_online"),
}
# Ablations: the part of the name behind the method, and the table that it is a key or a column of.
ABLATED = {"inner_steps": "table3_inner_steps", "meta_lr": "table6_meta_learning_rate"}


def paper_number(task: str, model: str, method: str) -> list[float] | None:
    """Return the paper's mean and standard deviation, or ``None`` where it has none or the run diverged."""
    row = f"{'mnist' if task == 'mnist5k' else task}/{model}"
    name, _, variant = method.partition(" ")
    option, _, value = variant.partition("=")
    if option in ABLATED:
        table = PAPER[ABLATED[option]]
        return table.get(value) if table["task"] == row else None
    if option == "meta_data":
        table, column = PAPER["table7_meta_objective"], ("training", "validation")[value == "val"]
    elif name in COLUMNS and not variant:
        table, column = PAPER[COLUMNS[name][0]], COLUMNS[name][1]
    else:
        return None
    return table[row][table["columns"].index(column)] if row in table else None


def paper_hours(task: str, model: str, method: str) -> float | None:
    """Return the time in Table 2, on one NVIDIA RTX A5000."""
    table = PAPER["table2_runtime_hours"]
    row = table.get(f"{'mnist' if task == 'mnist5k' else task}/{model}")
    return row[table["columns"].index(method)] if row and method in table["columns"] else None


def outcome(records: Sequence[Record], decimals: int = 4) -> str:
    """Return mean ± standard deviation of the test error over seeds, and how many diverged; nothing without a run."""
    finished = [record["test"] for record in records if record["test"] is not None]
    if not finished:
        return "diverged" if records else ""
    text = f"{mean(finished):.{decimals}f}"
    text += f" ± {stdev(finished):.{decimals}f}" if len(finished) > 1 else ""
    diverged = len(records) - len(finished)
    return f"{text} ({diverged} diverged)" if diverged else text


def table(records: Sequence[Record]) -> str:
    """Return a Markdown table with a row for each method, in the order in which they first appear."""
    groups: dict[tuple[str, str, int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["model"], record["steps"], record["method"]), []).append(record)
    lines = [
        "| task / model | steps | method | seeds | test error | seconds | the paper's | its hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, model, steps, method), rows in groups.items():
        paper, hours = paper_number(task, model, method), paper_hours(task, model, method)
        known = "" if paper is None else f"{paper[0]:.4f} ± {paper[1]:.4f}"
        if known and task == "mnist5k":
            known += " (all of MNIST)"
        seconds = f"{mean(row['seconds'] for row in rows):.0f}"
        time = "" if hours is None else f"{hours:g}"
        cells = [f"{task} / {model}", f"{steps:,}", method, str(len(rows)), outcome(rows), seconds, known, time]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
