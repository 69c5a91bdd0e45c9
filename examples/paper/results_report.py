"""The paper's tables and figures from the records in ``examples/paper/results``.

python examples/paper/results_report.py            # prints every table; --table 1 prints that one
python examples/paper/results_report.py --write    # writes them into the documentation, with the figures
python examples/paper/results_report.py --check    # writes nothing, and fails where a table is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from experiment_figures import learned_losses, learning_curves
from experiment_tables import (
    CONTROLS,
    LABELS,
    MISSING,
    ROWS,
    TABLES,
    Record,
    Runs,
    ablation,
    beside_the_paper,
    head,
    line,
    order,
    outcome,
    seeds_of,
    stopped_early,
)
from reproduce import RECORDS, read

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "experiments.md"
IMAGES = ROOT / "docs" / "images"
COMPARED = TABLES[0].methods
SWEPT = ("mnist/logistic", "diabetes/mlp")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, write or check what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(BLOCKS), help="print this one alone")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    runs = Runs(all_records())
    if not (options.write or options.check):
        for name in [options.table] if options.table else BLOCKS:
            print(f"\n{TITLES.get(name, f'Table {name}')}\n\n" + "\n".join(BLOCKS[name](runs)))
        return
    text, new = PAGE.read_text(), page(runs)
    if options.write:
        PAGE.write_text(new)
        draw(runs)
    print(f"docs/experiments.md {'is up to date' if text == new else 'was out of date'}.")
    sys.exit(1 if options.check and text != new else 0)


def all_records(folder: Path = RECORDS) -> list[Record]:
    """Return the records of every task and model."""
    return [record for path in sorted(folder.glob("*.jsonl")) for record in read(path)]


def controls(runs: Runs) -> list[str]:
    """Return the methods that the paper lacks."""
    lines = head(["", "seeds", *(LABELS[method] for method in CONTROLS)])
    for row, label in ROWS.items():
        found = [runs.of(row, method) for method in CONTROLS]
        if not any(found):
            continue
        lines.append(line([label, seeds_of(found), *map(outcome, found)]))
    return lines


def claim(runs: Runs) -> list[str]:
    """Return what is left of AdaLFL's gain beside each explanation of it."""
    against: dict[str, Callable[[str], Sequence[Record]]] = {
        "handcrafted": lambda row: runs.of(row, "baseline"),
        "handcrafted, stopped early": lambda row: [*map(stopped_early, runs.of(row, "baseline"))],
        "handcrafted, rate of AdaLFL": lambda row: runs.of(row, "baseline_matched"),
        "handcrafted, rate tuned": lambda row: runs.of(row, "baseline_tuned"),
        "handcrafted, rate tuned, stopped early": lambda row: [*map(stopped_early, runs.of(row, "baseline_tuned"))],
        "MetaLR": lambda row: runs.of(row, "metalr"),
        "ML³ (no online phase)": lambda row: runs.of(row, "ml3"),
    }
    rows = [row for row in ROWS if runs.of(row, "adalfl")]
    lines = head(["AdaLFL's error less that of", *(ROWS[row] for row in rows)])
    for label, records_of in against.items():
        lines.append(line([label, *(difference(runs.of(row, "adalfl"), records_of(row)) for row in rows)]))
    return lines


def difference(ours: Sequence[Record], others: Sequence[Record]) -> str:
    """Return the mean difference over the seeds that both have, and for how many of them ours is ahead."""
    by_seed = {record["seed"]: record["test"] for record in others}
    pairs = [(record["test"], by_seed[record["seed"]]) for record in ours if record["seed"] in by_seed]
    if not pairs:
        return MISSING
    finite = [(a, b) for a, b in pairs if a is not None and b is not None]
    ahead = sum(a is not None and (b is None or a < b) for a, b in pairs)
    text = "" if not finite else f"{mean(a - b for a, b in finite):+.4f}"
    text += f" ± {stdev([a - b for a, b in finite]):.4f}" if len(finite) > 1 else ""
    return f"{text} ({ahead}/{len(pairs)})".strip()


def open_settings(runs: Runs) -> list[str]:
    """Return the sweep of what the paper leaves open."""
    return ablation(runs, "open_settings", SWEPT)


BLOCKS: Mapping[str, Callable[[Runs], list[str]]] = {
    **{
        block.number: (lambda runs, block=block: beside_the_paper(runs, block.methods, block.columns))
        for block in TABLES
    },
    "order": lambda runs: order(runs, COMPARED),
    "3": lambda runs: ablation(runs, "inner_steps", ("mnist/logistic", "mnist/lenet5")),
    "6": lambda runs: ablation(runs, "meta_lr", ("mnist/logistic", "mnist/lenet5")),
    "7": lambda runs: ablation(runs, "meta_data", ("crime/mlp", "diabetes/mlp")),
    "controls": controls,
    "first draw": lambda runs: ablation(runs, "first_draw", list(ROWS)),
    "claim": claim,
    "open settings": open_settings,
}
TITLES = {
    "order": "The order of the methods of Table 1",
    "controls": "What the paper lacks: controls, and ours",
    "claim": "What explains AdaLFL's gain",
    "first draw": "The base model's first draw",
    "open settings": "What the paper leaves open",
}


def page(runs: Runs) -> str:
    """Return docs/experiments.md with every block as the records have it."""
    text = PAGE.read_text()
    for name, block in BLOCKS.items():
        text = replaced(text, name, "\n".join(block(runs)))
    return text


def replaced(text: str, name: str, block: str) -> str:
    """Return the text with another block between its marks."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"the text has no block between {start!r} and {end!r}.")
    return f"{before}{start}\n\n{block}\n\n{end}{after}"


def draw(runs: Runs) -> None:
    """Write the figures."""
    rows = [row for row in ROWS if runs.of(row, "adalfl")]
    regression = [row for row in rows if not row.startswith("mnist")]
    digits = [row for row in rows if row.startswith("mnist")]
    figures = {"learning_curves": learning_curves(runs, rows, COMPARED, "train")}
    figures["implied_rates"] = learning_curves(runs, rows, ("metalr", "adalfl"), "implied_lr")
    if digits:
        figures["test_curves"] = learning_curves(runs, digits, COMPARED, "test")
        figures["losses_digits"] = learned_losses(runs, digits)
    if regression:
        figures["losses_regression"] = learned_losses(runs, regression)
    for name, figure in figures.items():
        figure.savefig(IMAGES / f"paper_{name}.png")


if __name__ == "__main__":
    main()
