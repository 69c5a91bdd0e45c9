"""The tables of the README and of docs/experiments.md, and their picture, from the records in ``examples/results``.

python examples/results_report.py            # writes them
python examples/results_report.py --check    # writes nothing, and fails where one is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiment_figures import error_against_time
from experiment_methods import ABLATIONS
from experiment_tables import outcome, paper_number, table

Record = dict[str, Any]
EXAMPLES = Path(__file__).parent
LABELS = {
    "baseline": "handcrafted loss",
    "baseline_tuned": "handcrafted, tuned rate",
    "baseline_matched": "handcrafted, rate of AdaLFL",
    "ml3": "ML³",
    "ml3_relu": "ML³, ReLU",
    "metalr": "MetaLR",
    "taylor_quadratic": "quadratic Taylor loss",
    "taylor_cubic": "cubic Taylor loss",
    "adalfl_paper": "AdaLFL, the paper's recipe",
    "both": "loss and rate, the paper's recipe",
    "adalfl": "**AdaLFL, defaults**",
    "adalfl meta_every=10": "**AdaLFL, `meta_every=10`**",
}
OURS = ("baseline", "adalfl", "adalfl meta_every=10")
# Where the records are, the heading, and the steps and decimals that are shown.
TASKS = {
    "diabetes_mlp": ("Diabetes, MLP", 3_000, 4),
    "mnist5k_logistic": ("MNIST-5k, logistic", 10_000, 3),
    "mnist5k_lenet5": ("MNIST-5k, LeNet-5", 1_000, 3),
    "fashion_mnist_lenet5": ("Fashion-MNIST, LeNet-5", 1_000, 3),
}
LONG = 10_000


def main() -> None:
    """Write or check what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    root = EXAMPLES.parent
    stale = []
    for path, text in reports(root).items():
        if path.read_text() != text:
            stale.append(path.name)
            if not check:
                path.write_text(text)
    if not check:
        picture = root / "docs" / "images" / "cost_benefit.png"
        title = "Fashion-MNIST, LeNet-5: what a method costs and brings"
        error_against_time(cost_records(), title).savefig(picture)
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    sys.exit(1 if check and stale else 0)


def reports(root: Path) -> dict[Path, str]:
    """Return the texts that hold tables, as they should be, by their paths."""
    readme, experiments = root / "README.md", root / "docs" / "experiments.md"
    cost = f"{cost_table(cost_records())}\n\n![Test error against seconds for each method](images/cost_benefit.png)"
    return {
        readme: replaced(readme.read_text(), "brings", "\n".join(overview())),
        experiments: replaced(replaced(experiments.read_text(), "results", table(list(shown()))), "cost", cost),
    }


def replaced(text: str, name: str, block: str) -> str:
    """Return the text with another block between its marks."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"the text has no block between {start!r} and {end!r}.")
    return f"{before}{start}\n\n{block}\n\n{end}{after}"


def records_of(task: str) -> list[Record]:
    """Return all records of a task and model."""
    return json.loads((EXAMPLES / "results" / f"{task}.json").read_text())


def chosen(task: str, method: str, steps: int, seeds: int) -> list[Record]:
    """Return the records of the first seeds, in their order."""
    found = [r for r in records_of(task) if r["method"] == method and r["steps"] == steps and r["seed"] < seeds]
    return sorted(found, key=lambda record: record["seed"])


def shown() -> Iterator[Record]:
    """Return what the table of docs/experiments.md has rows of."""
    for task, (_, steps, _) in TASKS.items():
        for length in dict.fromkeys((steps, LONG)):
            for method in LABELS:
                yield from chosen(task, method, length, 3)


def overview() -> Iterator[str]:
    """Yield the lines of the README's tables."""
    headings = []
    for name, steps, _ in TASKS.values():
        headings += [f"{name}, {steps:,} steps", "the paper's, all of MNIST" if "MNIST-5k" in name else "the paper's"]
    # The paper has no Fashion-MNIST.
    yield from row_lines(["", *headings[:-1]])
    for method, label in LABELS.items():
        cells = []
        for task, (_, steps, decimals) in TASKS.items():
            paper = paper_number(*task.rsplit("_", 1), method)
            cells += [outcome(chosen(task, method, steps, 3), decimals), "" if paper is None else f"{paper[0]:.4f}"]
        yield from row_lines([label, *cells[:-1]], head=False)
    yield from ("", "Over five seeds:", "")
    yield from small_table(list(TASKS), OURS, 5)
    longer = [task for task, (_, steps, _) in TASKS.items() if steps < LONG and chosen(task, OURS[-1], LONG, 3)]
    if longer:
        yield from ("", f"At the paper's {LONG:,} steps, three seeds:", "")
        yield from small_table(longer, (OURS[0], OURS[-1]), 3, LONG)
    yield from (
        "",
        "CPU seconds of a run on a shared machine, offline phase included; the tuned rate pays for four runs:",
        "",
    )
    yield from row_lines(["", *(name for name, _, _ in TASKS.values())])
    for method, label in LABELS.items():
        runs = [chosen(task, method, steps, 3) for task, (_, steps, _) in TASKS.items()]
        cells = [f"{mean(r['seconds'] for r in found):.0f}" if found else "" for found in runs]
        yield from row_lines([label, *cells], head=False)


def small_table(tasks: Sequence[str], methods: Sequence[str], seeds: int, length: int | None = None) -> Iterator[str]:
    """Yield the lines of a table of test errors over tasks, at their usual lengths or at one for all."""
    yield from row_lines(["", *(TASKS[task][0] for task in tasks)])
    for method in methods:
        cells = [outcome(chosen(task, method, length or TASKS[task][1], seeds), TASKS[task][2]) for task in tasks]
        yield from row_lines([LABELS[method], *cells], head=False)


def cost_records() -> list[Record]:
    """Return the records of what a method costs and brings."""
    task = "fashion_mnist_lenet5"
    return [record for method in ABLATIONS["cost"] for record in chosen(task, method, TASKS[task][1], 3)]


def cost_table(records: Sequence[Record]) -> str:
    """Return error and time of each method."""
    lines = list(row_lines(["method", "seeds", "test error", "seconds"]))
    for method in dict.fromkeys(record["method"] for record in records):
        found = [record for record in records if record["method"] == method]
        seconds = f"{mean(record['seconds'] for record in found):.0f}"
        lines += row_lines([method, str(len(found)), outcome(found, 4), seconds], head=False)
    return "\n".join(lines)


def row_lines(cells: Sequence[str], head: bool = True) -> list[str]:
    """Return a row, and the rule below it if it is the head."""
    return [f"| {' | '.join(cells)} |", *(["|" + "---|" * len(cells)] * head)]


if __name__ == "__main__":
    main()
