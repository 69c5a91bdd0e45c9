"""One setting against everybody: trains with each method on tasks whose targets are partly wrong, and keeps the errors.

    python examples/contaminated/regret.py --tasks friedman1_up mnist5k_next --methods ours own gce --trusted 0.05

Each run is a line of ``<task>.jsonl`` in ``--records`` as it ends, and runs that are there are not repeated.
``regret_report.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contaminated_tasks import TASKS, trusted_rows
from rivals import METHODS, run_as
from training import Run, badness, number

Record = dict[str, Any]
RECORDS = Path(__file__).parents[1] / "results"
FRACTIONS = (0.01, 0.05, 0.2)


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Attributes:
        task: A key of `contaminated_tasks.TASKS`.
        method: A key of `rivals.METHODS`.
        trusted: The trusted rows, as a fraction of the training rows. A method that has no use for them but to stop
            early is run once, at the largest of `FRACTIONS`; its curve has the validation errors of all.
        seed: Of the rows, the first parameters and the order of the batches.
        steps: Base steps; by default the task's.
    """

    task: str
    method: str
    trusted: float
    seed: int
    steps: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a record is told apart by."""
        return (self.task, self.method, self.trusted, self.seed, self.steps or TASKS[self.task].steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says."""
    options = parse(arguments)
    torch.set_num_threads(1)  # these models are too small for more
    for job in jobs(options.tasks, options.methods, options.trusted, options.seeds, options.steps):
        path = options.records / f"{job.task}.jsonl"
        if job.key in {record_key(record) for record in read(path)}:
            continue
        record = run(job)
        append(path, record)
        print(
            f"{job.task} {job.method} {job.trusted} seed {job.seed}: {record['test']} at the end, "
            f"{best_step(record)['test']} at the best step, {record['seconds']} s",
            flush=True,
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--trusted", nargs="+", type=float, default=[0.05], help="fractions of the training rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="base steps; by default the task's")
    parser.add_argument("--records", type=Path, default=RECORDS, help="the folder of the records")
    return parser.parse_args(arguments)


def jobs(
    tasks: Sequence[str], methods: Sequence[str], fractions: Sequence[float], seeds: Sequence[int], steps: int | None
) -> Iterator[Job]:
    """Yield what there is to run: what a method has no use for is left out."""
    for task in tasks:
        for seed in seeds:
            for method in methods:
                if not METHODS[method].fits(TASKS[task]) or run_as(task, method) != task:
                    continue
                wanted = fractions if METHODS[method].learns_from_trusted else [max(FRACTIONS)]
                for fraction in wanted:
                    yield Job(task, method, fraction, seed, steps)


def run(job: Job) -> Record:
    """Train once and return the record; a run that diverges has a test error of ``None``."""
    task = TASKS[job.task]
    data = task.draw(job.seed)
    torch.manual_seed(job.seed)  # the model is drawn first, so that every method begins with the same one
    fractions = [job.trusted] if METHODS[job.method].learns_from_trusted else FRACTIONS
    validation = {f"{fraction:g}": trusted_rows(task, data, fraction) for fraction in fractions}
    trusted = trusted_rows(task, data, job.trusted)
    training = Run(task, data.train, trusted, validation, data.test, job.seed, job.steps)
    started = time.process_time()
    METHODS[job.method].train(training)
    training.look()  # if the last step was not one to look at
    seconds = time.process_time() - started - training.looking
    return {
        **{"task": job.task, "method": job.method, "trusted": job.trusted, "seed": job.seed},
        "steps": job.steps or task.steps,
        "test": training.curve["test"][-1],
        "seconds": round(seconds, 2),
        **({} if training.rate is None else {"rate": number(training.rate)}),
        "curve": training.curve,
    }


def best_step(record: Record, fraction: float | None = None) -> dict[str, Any]:
    """Return the point of the curve with the least validation error on the trusted rows.

    Args:
        record: Of a run.
        fraction: Of the trusted rows that validate, one of `FRACTIONS`; by default the run's own.
    """
    curve = record["curve"]
    name = f"{record['trusted'] if fraction is None else fraction:g}"
    k = min(range(len(curve["step"])), key=lambda k: badness(curve, name, k))
    return {"step": curve["step"][k], "test": curve["test"][k]}


def record_key(record: Record) -> tuple[Any, ...]:
    """Return what a record is told apart by, as `Job.key`."""
    return tuple(record[name] for name in ("task", "method", "trusted", "seed", "steps"))


def read(path: Path) -> list[Record]:
    """Return the records of an earlier, perhaps half-done, sweep."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """Add a record, a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
