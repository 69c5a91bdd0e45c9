"""The command line: ``python -m lightning_adalfl inspect LOG_OR_FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_adalfl.inspection import in_words, inspect_shape, plot_inspection, read_source
from lightning_adalfl.plotting import plot_loss_shapes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 if it could not be done, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m lightning_adalfl")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="draw and describe a learned loss")
    inspect.add_argument("path", type=Path, help="a .safetensors file, a checkpoint, loss_shape.npz, or a log folder")
    inspect.add_argument("--output", type=Path, help="the PNG; by default inspection.png beside what was read")
    inspect.add_argument("--classes", type=int, default=10, help="multiclass: the number of classes (default 10)")
    inspect.add_argument("--targets", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="regression: targets")
    inspect.add_argument("--error-range", type=float, default=1.0, help="regression: the largest error")
    options = parser.parse_args(arguments)
    try:
        print(_inspect(options))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _inspect(options: argparse.Namespace) -> str:
    source = read_source(options.path, targets=options.targets, error_range=options.error_range)
    newest = source.shapes[-1]
    report = inspect_shape(newest, classes=options.classes, reduction=source.reduction)
    output = options.output or source.path.with_name("inspection.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    plot_inspection(report).savefig(output, format="png")
    drawn = [f"Figure: {output}"]
    if len(source.shapes) > 1:
        evolution = output.with_name(f"{output.stem}_evolution{output.suffix}")
        plot_loss_shapes(source.shapes).savefig(evolution, format="png")
        drawn.append(f"Figure of all {len(source.shapes)} snapshots: {evolution}")
    head = f"{source.path}: {source.what}, task {newest.task}, at base step {newest.step:,}."
    return "\n\n".join([head, in_words(report, source.gain), "\n".join(drawn)])


if __name__ == "__main__":
    sys.exit(main())
