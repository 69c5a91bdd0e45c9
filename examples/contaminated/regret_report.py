"""The tables of regret from the records in ``examples/results``.

python examples/contaminated/regret_report.py            # prints every table; --table "regret 0.05" prints that one
python examples/contaminated/regret_report.py --write    # writes them into docs/contaminated.md
python examples/contaminated/regret_report.py --check    # writes nothing, and fails where a table is out of date
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean, mean, stdev

from contaminated_tasks import TASKS
from regret import FRACTIONS, RECORDS, Record, best_step, read
from rivals import METHODS, PAPER, TUNED, run_as

PAGE = Path(__file__).parents[2] / "docs" / "contaminated.md"
MISSING = "–"
NOT_RUN = "not run"
GROUPS = ("regression", "classification")
# Derived from a run of another method: the best step by the error on the trusted rows.
STOPPED = {"own": "own loss, stopped early"}
RATES = ("own", "ours", "both", "lr", "prodigy", "mechanic", "schedule_free_sgd", "schedule_free_adamw")
Errors = Mapping[int, float]  # by seed; a run that diverged is infinite


class Runs:
    """All records, by what is asked of them."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._found: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            self._found.setdefault((record["task"], record["method"]), []).append(record)

    def errors(self, task: str, method: str, fraction: float, stopped: bool = False) -> Errors:
        """Return test errors by seed, at the end or at the best step by the error on the trusted rows."""
        found: dict[int, float] = {}
        for record in self._found.get((task, method), []):
            by_fraction = record["curve"]["val"]
            if f"{fraction:g}" not in by_fraction or record["steps"] != TASKS[task].steps:
                continue
            value = best_step(record, fraction)["test"] if stopped else record["test"]
            found[record["seed"]] = math.inf if value is None else value
        return found

    def rates(self, task: str, method: str) -> Errors:
        """Return the learning rates at the end, by seed, where the method finds one."""
        of_task = [r for r in self._found.get((task, method), []) if r["steps"] == TASKS[task].steps]
        return {record["seed"]: record["rate"] for record in of_task if record.get("rate") is not None}


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
            print(f"\n{name}\n\n" + "\n".join(BLOCKS[name](runs)))
        return
    text = PAGE.read_text()
    new = page(text, runs)
    if options.write:
        PAGE.write_text(new)
    print(f"docs/contaminated.md {'is up to date' if text == new else 'was out of date'}.")
    sys.exit(1 if options.check and text != new else 0)


def all_records(folder: Path = RECORDS) -> list[Record]:
    """Return the records of every task."""
    return [record for task in TASKS for record in read(folder / f"{task}.jsonl")]


# Regret.


def row_errors(runs: Runs, task: str, fraction: float, stopped: bool) -> dict[str, float]:
    """Return the mean error of each method that was run on a task, over the seeds that all of them have.

    A task without a run of the library has none.

    Args:
        runs: The records.
        task: Its name.
        fraction: Of the trusted rows.
        stopped: Whether every method is stopped at the best step by the error on the trusted rows; if not, the own loss
            alone has a line for that.
    """
    found = {name: runs.errors(task, name, fraction, stopped) for name in METHODS}
    if not stopped:
        found |= {f"{name} stopped": runs.errors(task, name, fraction, True) for name in STOPPED}
    found = {name: errors for name, errors in found.items() if errors}
    seeds = set.intersection(*map(set, found.values())) if "ours" in found else set()
    return {name: mean(errors[seed] for seed in seeds) for name, errors in found.items()} if seeds else {}


def ratios(errors: Mapping[str, float]) -> dict[str, float]:
    """Return each method's error over the best method's, those that know more left out of the best."""
    best = min((error for name, error in errors.items() if not knows_more(name)), default=math.nan)
    return {name: error / best for name, error in errors.items()}


def knows_more(name: str) -> bool:
    """Return whether a method is no rival, since it knows what the others have to find."""
    return name in METHODS and METHODS[name].knows_more


def label(name: str) -> str:
    """Return a method's name in the tables."""
    return METHODS[name].label if name in METHODS else STOPPED[name.removesuffix(" stopped")]


def regret(runs: Runs, fraction: float, stopped: bool = False) -> list[str]:
    """Return the worst ratio and the geometric mean of each method, by group and over all."""
    rows = {task: ratios(row_errors(runs, task, fraction, stopped)) for task in tasks_of(*GROUPS)}
    rows = {task: row for task, row in rows.items() if row}
    counts = {group: sum(TASKS[task].group == group for task in rows) for group in GROUPS}
    titles = [f"{group} ({counts[group]} tasks)" for group in GROUPS]
    lines = head(["error over the best method's: worst / geometric mean", *titles, f"all ({len(rows)} tasks)"])

    def cell(name: str, tasks: Sequence[str]) -> str:
        values = [rows[task].get(name) for task in tasks]
        if not values or None in values:
            return MISSING
        finite = [value for value in values if value is not None]
        return f"{short(max(finite))} / {short(geometric_mean(finite))}"

    names = [
        name for name in [*METHODS, *(f"{name} stopped" for name in STOPPED)] if any(name in r for r in rows.values())
    ]

    def order(name: str) -> tuple[bool, float]:
        values = [row[name] for row in rows.values() if name in row]
        return len(values) < len(rows), geometric_mean(values)

    for name in sorted(names, key=order):
        cells = [cell(name, [task for task in rows if TASKS[task].group == group]) for group in GROUPS]
        lines.append(line([label(name), *cells, cell(name, list(rows))]))
    return lines


def errors(runs: Runs, fraction: float, groups: Sequence[str], stopped: bool = False) -> list[str]:
    """Return the errors of every method on the tasks of some groups that the library was run on."""
    tasks = [task for task in tasks_of(*groups) if runs.errors(task, "ours", fraction)]
    lines = head(["", *tasks])
    names = [*METHODS, *(f"{name} stopped" for name in STOPPED if not stopped)]
    for name in names:
        of_method = name.removesuffix(" stopped")
        found = [runs.errors(task, of_method, fraction, stopped or name != of_method) for task in tasks]
        if any(found):
            fits = [METHODS[of_method].fits(TASKS[task]) for task in tasks]
            cells = [spread(e) if e else NOT_RUN if ok else MISSING for e, ok in zip(found, fits)]
            lines.append(line([label(name), *cells]))
    return lines


def clean(runs: Runs) -> list[str]:
    """Return how far the library is behind the own loss on clean data, in standard deviations of the own loss."""
    lines = head(["", "trusted", "seeds", "own loss", METHODS["ours"].label, "mean difference", "worst seed"])
    for task in tasks_of("clean"):
        own = runs.errors(task, "own", FRACTIONS[-1])
        for fraction in FRACTIONS:
            ours = runs.errors(task, "ours", fraction)
            seeds = sorted(own.keys() & ours.keys())
            if not seeds:
                continue
            unit = stdev(own[s] for s in seeds) if len(seeds) > 1 else math.nan
            differences = [(ours[s] - own[s]) / unit for s in seeds]
            cells = [spread({s: e[s] for s in seeds}) for e in (own, ours)]
            in_units = [f"{value:+.2f} sd" for value in (mean(differences), max(differences))]
            lines.append(line([task, f"{fraction:.0%}", str(len(seeds)), *cells, *in_units]))
    return lines


# Learned rates.


def rates(runs: Runs, stopped: bool = False) -> list[str]:
    """Return errors on the clean pairs, at the paper's rate and at the tuned one, of those that find a rate.

    A method that does not see the task's rate has been run once, and stands in both rows of a pair. A row is of the
    seeds that all methods with a run have. The last rows are geometric means, over the pairs, of the error over that
    of the own loss at the tuned rate.

    Args:
        runs: The records.
        stopped: Whether every method is stopped at the best step by the error on 5% of the rows, trusted ones.
    """
    lines = head(["", "rate", "seeds", *map(label, RATES)])
    ratios: dict[str, list[list[float]]] = {PAPER: [], TUNED: []}  # by rate, pair and method
    for pair in [name.removesuffix(PAPER) for name in tasks_of("clean") if name.endswith(PAPER)]:
        found = {
            end: {name: runs.errors(run_as(pair + end, name), name, 0.05, stopped) for name in RATES} for end in ratios
        }
        run = [errors for of_rate in found.values() for errors in of_rate.values() if errors]
        seeds = sorted(set.intersection(*map(set, run))) if run else []
        for end, of_rate in found.items():
            cells = [spread({s: errors[s] for s in seeds}) if errors else NOT_RUN for errors in of_rate.values()]
            rate = TASKS[pair + end].optimizer.keywords["lr"]  # type: ignore[attr-defined]
            lines.append(line([pair.removeprefix("clean_"), f"{rate:g}", str(len(seeds)), *cells]))
            means = [mean(e[s] for s in seeds) if e and seeds else math.nan for e in of_rate.values()]
            own = found[TUNED]["own"]
            unit = mean(own[s] for s in seeds) if own and seeds else math.nan
            ratios[end].append([value / unit for value in means])
    for end, title in ((PAPER, "paper's"), (TUNED, "tuned")):
        cells = [MISSING if any(map(math.isnan, v)) else short(geometric_mean(v)) for v in zip(*ratios[end])]
        lines.append(line(["error over the own loss's at the tuned rate", title, "", *cells]))
    return lines


def found_rates(runs: Runs) -> list[str]:
    """Return the learning rates that were found, the geometric means over seeds, on the clean pairs."""
    names = ("both", "lr", "mechanic", "prodigy")
    lines = head(["", "begins at", *map(label, names)])
    for task in tasks_of("clean"):
        found = [runs.rates(run_as(task, name), name).values() for name in names]
        cells = [short(geometric_mean(values)) if values else NOT_RUN for values in found]
        rate = TASKS[task].optimizer.keywords["lr"]  # type: ignore[attr-defined]
        lines.append(line([task.removeprefix("clean_"), f"{rate:g}", *cells]))
    return lines


def tasks_of(*groups: str) -> list[str]:
    """Return the names of the tasks of some groups."""
    return [name for name, task in TASKS.items() if task.group in groups]


def spread(errors: Errors) -> str:
    """Return the mean and the standard deviation over seeds."""
    values = list(errors.values())
    text = short(mean(values))
    return f"{text} ± {short(stdev(values))}" if len(values) > 1 and all(map(math.isfinite, values)) else text


def short(value: float) -> str:
    """Return a number of three digits."""
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.5f}"


def head(cells: Sequence[str]) -> list[str]:
    """Return the first two lines of a table."""
    return [line(cells), "|" + "---|" * len(cells)]


def line(cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return "| " + " | ".join(cells) + " |"


BLOCKS: Mapping[str, Callable[[Runs], list[str]]] = {
    **{f"regret {f:g}": partial(regret, fraction=f) for f in FRACTIONS},
    **{f"regret {f:g} stopped": partial(regret, fraction=f, stopped=True) for f in FRACTIONS},
    **{f"errors {f:g} {group}": partial(errors, fraction=f, groups=(group,)) for f in FRACTIONS for group in GROUPS},
    **{f"errors {f:g} held-out": partial(errors, fraction=f, groups=("held-out",)) for f in FRACTIONS},
    "clean": clean,
    "rates": rates,
    "rates stopped": partial(rates, stopped=True),
    "rates found": found_rates,
}


def page(text: str, runs: Runs) -> str:
    """Return docs/contaminated.md with every block that it has as the records have it.

    Raises:
        ValueError: For a block that has no end.
    """
    for name, block in BLOCKS.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start not in text:
            continue
        before, _, rest = text.partition(start)
        _, mark, after = rest.partition(end)
        if not mark:
            raise ValueError(f"the page has no {end!r} after {start!r}; add it.")
        text = f"{before}{start}\n\n" + "\n".join(block(runs)) + f"\n\n{end}{after}"
    return text


if __name__ == "__main__":
    main()
