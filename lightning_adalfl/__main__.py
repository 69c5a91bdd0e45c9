"""The command line: ``python -m lightning_adalfl inspect PATH``, ``influence PATH`` and ``doctor PATH``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_adalfl.inspection import diagnose, plot_heatmap, plot_history, plot_influence, read, report
from lightning_adalfl.inspection.influence import InfluenceTable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 if it could not be done, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m lightning_adalfl")
    commands = parser.add_subparsers(dest="command", required=True)
    example = "example: python -m lightning_adalfl {} lightning_logs/version_0"
    words = "draw and describe a learned loss"
    inspect = commands.add_parser("inspect", help=words, epilog=example.format("inspect"))
    inspect.add_argument("path", help="a log folder, a checkpoint, or a .safetensors file; also a URL")
    output: Any = {"type": Path, "help": "the PNG; by default %(default)s"}
    inspect.add_argument("--output", default=Path("learned_loss.png"), **output)
    inspect.add_argument("--classes", type=int, help="multiclass: how many classes, where the loss does not know it")
    inspect.add_argument("--alone", action="store_true", help="a saved loss: it trains alone, with own_loss=False")
    inspect.add_argument("--targets", type=float, nargs="+", help="regression: targets; by default as trained on")
    inspect.add_argument("--error-range", type=float, help="regression: the largest error; likewise")
    inspect.set_defaults(run=_inspect)
    words = "list and draw which training instances hurt"
    influence = commands.add_parser("influence", help=words, epilog=f"{example.format('influence')} --rows 50")
    influence.add_argument("path", help="a log folder with influence.safetensors, or such a file; also a URL")
    influence.add_argument("--rows", type=int, default=20, help="how many of the worst; by default %(default)s")
    influence.add_argument("--csv", type=Path, help="where a table of all instances is to be written")
    influence.add_argument("--output", default=Path("influence.png"), **output)
    influence.set_defaults(run=_influence)
    words = "say in words how a run went, and what to do about it"
    doctor = commands.add_parser("doctor", help=words, epilog=example.format("doctor"))
    doctor.add_argument("path", help="a checkpoint, or a log folder")
    doctor.add_argument("--classes", type=int, help="a multiclass loss that trains alone: the number of classes")
    doctor.set_defaults(run=lambda options: diagnose(options.path, options.classes))
    options = parser.parse_args(arguments)
    try:
        print(options.run(options))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _inspect(options: argparse.Namespace) -> str:
    history = read(options.path, is_added=not options.alone)
    shapes = history.shapes(classes=options.classes, targets=options.targets, error_range=options.error_range)
    newest, loss = shapes[-1], history.loss_at(history.steps[-1])
    text = str(report(newest, loss.reduction))
    figures = {options.output: plot_history(shapes)}
    if newest.heat is not None:
        figures[options.output.with_stem(f"{options.output.stem}_heatmap")] = plot_heatmap(newest)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for path, figure in figures.items():
        figure.savefig(path, format="png")
    numbers = sum(p.numel() for p in loss.phi().values())
    head = (
        f"{options.path}: a {type(loss).__name__} of {numbers:,} numbers for task {loss.task!r}, "
        f"{'added to your own loss' if history.is_added else 'alone'}, at base step {newest.step:,}."
    )
    return "\n\n".join([head, text, f"Figures: {', '.join(map(str, figures))}."])


def _influence(options: argparse.Namespace) -> str:
    table = InfluenceTable.load(options.path)
    columns, worst = table.columns(), table.ranking()[: max(options.rows, 0)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    plot_influence(table).savefig(options.output, format="png")
    if options.csv is not None:
        table.to_csv(options.csv)
    seen, suspected = int((columns["seen"] > 0).sum()), int((columns["label_quality"] < 0.5).sum())
    head = f"{options.path}: of {seen:,} instances seen, {suspected:,} have a label quality below 0.5."
    rows = [f"{i:>9}" + "".join(f"{values[i]:>15.4g}" for values in columns.values()) for i in worst]
    names = "    index" + "".join(f"{name:>15}" for name in columns)
    return "\n".join([head, "", names, *rows, "", f"Figure: {options.output}."])


if __name__ == "__main__":
    sys.exit(main())
