"""What a meta step costs: time, memory and error of each way to compute it, beside ordinary training.

python examples/benchmark.py --models resnet18 --json resnet18.json

The methods take turns in one process, so that whatever else runs on the machine slows all of them alike; memory is
measured in a process of its own for each. `ratio_to_baseline` is the time of a step over that of ordinary training with
a handcrafted loss, and for the rows of `Trainer.fit` over that of the plain module's fit. `rel_error` is against the
unrolled hypergradient, `reverse`: what other exact methods differ from it is float32's rounding.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path

import torch
from benchmark_cases import SETTINGS, Batch, Case, build_case
from benchmark_engines import ALL_ENGINES, CHEAPER, ENGINES, INNER_LOOPS, Step
from benchmark_memory import peak_extra_mb
from benchmark_trainer import fit_seconds
from tqdm.auto import tqdm

PARTS = ("time", "error", "memory", "trainer", "inner")
META_EVERY = (10, 100)
# Where memory is measured at another batch size than time.
MEMORY_BATCHES = {"resnet18": 64}
INNER_LOOP_MODEL = "allcnnc"
# Short steps are taken several at a time, so that each begins with the caches as it left them.
TURN_SECONDS = 0.05
FIT_SECONDS = 4.0


@dataclass
class Record:
    """One row of the table; ``None`` is what was not measured."""

    model: str
    batch: int
    engine: str
    meta_every: int = 1
    step_ms: float | None = None
    ratio_to_baseline: float | None = None
    peak_extra_mb: float | None = None
    rel_error: float | None = None


class Table:
    """The rows, by what they are about, in the order in which they came up."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, str, int], Record] = {}

    def write(self, path: Path | None) -> None:
        """Write one record per row as they stand, so that a run that ends early keeps what it measured."""
        if path is not None:
            path.write_text(json.dumps([asdict(row) for row in self.rows.values()], indent=1))

    def row(self, model: str, batch: int, engine: str, meta_every: int = 1) -> Record:
        """Return a row, a new one if need be."""
        key = (model, batch, engine, meta_every)
        return self.rows.setdefault(key, Record(*key))

    def __str__(self) -> str:
        lines = ["| model | batch | engine | meta_every | step, ms | ratio | extra MB | rel. error |", "|---" * 8 + "|"]
        for r in self.rows.values():
            numbers = (_shown(r.step_ms, ".1f"), _shown(r.ratio_to_baseline, ".2f"), _shown(r.peak_extra_mb, ".0f"))
            cells = (r.model, r.batch, r.engine, r.meta_every, *numbers, _shown(r.rel_error, ".1e"))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)


def _shown(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def measure_times(case: Case, repeats: int, table: Table) -> None:
    """Time every engine, and by its median what `meta_every` makes of the forward-mode one."""
    seconds = step_seconds(case, {**ENGINES, **CHEAPER, "between": ALL_ENGINES["between"]}, repeats)
    rows = [(engine, 1, seconds[engine]) for engine in (*ENGINES, *CHEAPER)]
    # One step in k is followed by a meta step.
    rows += [("forward", k, ((k - 1) * seconds["between"] + seconds["forward"]) / k) for k in META_EVERY]
    for engine, meta_every, each in rows:
        row = table.row(case.name, case.batch_size, engine, meta_every)
        row.step_ms, row.ratio_to_baseline = each * 1e3, each / seconds["handcrafted"]


def step_seconds(case: Case, engines: dict[str, object], repeats: int) -> dict[str, float]:
    """Return the median seconds of each engine's step, over turns that they take one after the other."""
    steps: dict[str, Step] = {name: ALL_ENGINES[name](*case.copies()) for name in engines}
    for step in steps.values():
        _timed(step, case.batches, 2)
    in_a_row = ceil(TURN_SECONDS / _timed(steps["handcrafted"], case.batches, 1))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(repeats), desc=f"{case.name}: steps", leave=False):
        for name, step in steps.items():
            times[name].append(_timed(step, case.batches, in_a_row))
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(step: Step, batches: list[Batch], count: int) -> float:
    started = time.perf_counter()
    for k in range(count):
        step(batches[k % len(batches)], batches[(k + 1) % len(batches)])
    return (time.perf_counter() - started) / count


def measure_errors(case: Case, table: Table) -> None:
    """Compare each hypergradient with the unrolled one, all in float32; the median over steps on other batches."""
    errors: dict[str, list[float]] = {engine: [] for engine in ENGINES if engine != "handcrafted"}
    for k in tqdm(range(len(case.batches) - 1), desc=f"{case.name}: errors", leave=False):
        expected = _hypergradient(case, "reverse", k)
        for engine, values in errors.items():
            values.append(float((_hypergradient(case, engine, k) - expected).norm() / expected.norm()))
    for engine, values in errors.items():
        table.row(case.name, case.batch_size, engine).rel_error = statistics.median(values)


def _hypergradient(case: Case, engine: str, first: int) -> torch.Tensor:
    model, loss = case.copies()
    torch.manual_seed(first)  # the same dropout masks for all engines
    ENGINES[engine](model, loss)(case.batches[first], case.batches[first + 1])
    return torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])


def measure_memory(name: str, batch_size: int, engines: dict[str, object], table: Table) -> None:
    """Measure each engine's peak memory."""
    for engine in tqdm(engines, desc=f"{name}: memory", leave=False):
        table.row(name, batch_size, engine).peak_extra_mb = peak_extra_mb(name, engine, batch_size)


def measure_trainer(case: Case, repeats: int, table: Table) -> None:
    """Time whole fits, fewer turns of more steps."""
    step = ENGINES["handcrafted"](*case.copies())
    _timed(step, case.batches, 1)
    steps = max(3, ceil(FIT_SECONDS / _timed(step, case.batches, 2)))
    seconds = fit_seconds(case, steps, ceil(repeats / 4))
    for (engine, meta_every), each in seconds.items():
        row = table.row(case.name, case.batch_size, engine, meta_every)
        row.step_ms, row.ratio_to_baseline = each * 1e3, each / seconds["trainer_plain", 1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=20, help="turns that the engines take")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch", type=int, default=None, help="in place of each model's own batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=None, help="where to write one record per row")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {args.repeats}")
    torch.set_num_threads(args.threads)
    table = Table()
    for name in args.models:
        case = build_case(name, args.batch)
        measures: dict[str, Callable[[], None]] = {
            "time": partial(measure_times, case, args.repeats, table),
            "error": partial(measure_errors, case, table),
            "memory": partial(
                measure_memory, name, args.batch or MEMORY_BATCHES.get(name, case.batch_size), ENGINES, table
            ),
            "trainer": partial(measure_trainer, case, args.repeats, table),
        }
        if name == INNER_LOOP_MODEL:
            measures["inner"] = partial(measure_memory, name, case.batch_size, INNER_LOOPS, table)
        for part, measure in measures.items():
            if part in args.parts:
                measure()
                table.write(args.json)
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.processor() or platform.machine()}\n")
    print(table)


if __name__ == "__main__":
    main()
