"""The tables of docs/influence.md, from records.jsonl and training_again.jsonl.

python influence_report.py            # prints them
python influence_report.py --write    # writes them into the page
python influence_report.py --check    # writes nothing, and fails where a table is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "influence.md"
NAMES = {
    "mnist": "MNIST, 4,000 digits",
    "fashion": "Fashion-MNIST, 2,000 images",
    "fashion10k": "Fashion-MNIST, 10,000 images",
    "friedman1": "friedman1, 2,000 rows",
    "california": "California Housing, 4,000 rows",
}
OWN = ("score", "influence", "agreement", "loss", "margin", "misclassified")
# By the head of their column: what there is for classes, or else for values.
OTHERS = {
    **{name: (name,) for name in ("trusted rows alone", "AUM", "forgetting", "TracIn, trusted rows", "TracIn, itself")},
    "cleanlab, self-confidence or residual": ("cleanlab, self-confidence", "cleanlab, residual"),
    "cleanlab, normalized margin or outre": ("cleanlab, normalized margin", "cleanlab, outre"),
}
Record = dict[str, Any]
Runs = dict[tuple[str, str], list[Record]]


def read(name: str) -> Runs:
    """Return the records of a file by task and kind, in the order of the tasks."""
    found: Runs = {}
    for record in map(json.loads, (HERE / name).read_text().splitlines()):
        found.setdefault((record["task"], record["kind"]), []).append(record)
    tasks = list(NAMES)
    return dict(sorted(found.items(), key=lambda item: tasks.index(item[0][0])))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def best(values: Sequence[float | None], smallest: bool = False, digits: int = 3) -> list[str]:
    """Return cells, the best of them in bold."""
    known = [value for value in values if value is not None]
    top = (min if smallest else max)(known)
    shown = ["–" if value is None else f"{value:.{digits}f}" for value in values]
    return [f"**{text}**" if text == f"{top:.{digits}f}" else text for text in shown]


def of_seeds(runs: Sequence[Record], key: str, name: str) -> float | None:
    """Return a mean over seeds; ``None`` where there is none."""
    values = [run[key][name] for run in runs if name in run.get(key, {})]
    return mean(values) if values else None


def own_scores() -> list[str]:
    """Return the table of the library's own scores."""
    rows = []
    for (task, kind), runs in read("records.jsonl").items():
        if "auc" in runs[0]:
            found = best([of_seeds(runs, "auc", name) for name in OWN])
            of_each = ", ".join(f"{run['auc']['score']:.3f}" for run in sorted(runs, key=lambda run: run["seed"]))
            found.append(of_each)
        else:
            found = ["–"] * (len(OWN) + 1)
        for name in ("share", "precision", "recall"):
            value = of_seeds(runs, "suspected", name)
            found.append("–" if value is None else f"{value:.2f}")
        rows.append([f"{NAMES[task]}, {kind}", *found])
    return table(["", *(f"`{n}`" for n in OWN), "`score`, each seed", "suspected", "precision", "recall"], rows)


def other_scores() -> list[str]:
    """Return the table of the other detectors."""
    found = {place: runs for place, runs in read("records.jsonl").items() if "auc" in runs[0]}
    rows = []
    for (task, kind), runs in found.items():
        values = [
            next((value for name in names if (value := of_seeds(runs, "auc", name)) is not None), None)
            for names in (("score",), *OTHERS.values())
        ]
        rows.append([f"{NAMES[task]}, {kind}", *best(values)])
    return table(["", "`score`", *OTHERS], rows)


def errors() -> list[str]:
    """Return the table of what training again gives."""
    found = read("training_again.jsonl")
    methods = list(next(iter(found.values()))[0]["error"])
    rows = []
    for name in methods:
        rows.append([name])
    for runs in found.values():
        *values, right = [of_seeds(runs, "error", name) for name in methods]
        for row, cell in zip(rows, [*best(values, smallest=True), f"{right:.3f}"]):
            row.append(cell)
    return table(["", *(f"{NAMES[task].split(',')[0]}, {kind}" for task, kind in found)], rows)


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "own scores": own_scores,
    "other detectors": other_scores,
    "training again": errors,
}


def page(text: str) -> str:
    """Return the page with its tables as the records have them."""
    for name, lines in BLOCKS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = "".join([before, start, *(f"{line}\n" for line in lines()), end, rest.split(end)[1]])
    return text


def main() -> None:
    """Print, write or check what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not (options.write or options.check):
        print("\n\n".join("\n".join([name, *lines()]) for name, lines in BLOCKS.items()))
        return
    text = PAGE.read_text()
    new = page(text)
    if options.write:
        PAGE.write_text(new)
    print(f"{PAGE.name} {'is up to date' if text == new else 'was out of date'}.")
    sys.exit(1 if options.check and text != new else 0)


if __name__ == "__main__":
    main()
