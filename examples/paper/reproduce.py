"""The paper's experiments: runs methods on a task over seeds and prints the result beside the paper's.

    python examples/paper/reproduce.py --task diabetes --model mlp --methods baseline ml3 metalr adalfl --seeds 3

Each run is written into ``--records`` as it ends, and runs that are there are not repeated. ``--ablation`` runs the
rows of one of the paper's ablations instead of ``--methods``. ``results_report.py`` makes the tables and figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from base_models import MODELS
from experiment_methods import ABLATIONS, ALL_METHODS, METHODS
from experiment_run import Job, Record, matched_rate, run
from experiment_tables import table
from tasks import TASKS

RECORDS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says."""
    options = parse(arguments)
    methods = list(ABLATIONS[options.ablation]) if options.ablation else options.methods
    task, model, batch = options.task, options.model, options.batch_size
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    jobs = [
        Job(task, model, method, seed, options.steps, options.data, options.init_steps, batch, options.accelerator)
        for method in ordered(methods)
        for seed in seeds
    ]
    path = options.records / f"{task}_{model}.jsonl"
    records = read(path)
    known = {record_key(record) for record in records}
    missing = [job for job in jobs if job.key not in known]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there already.", flush=True)
    for record in results(missing, records, options.workers):
        records.append(record)
        append(path, record)
        print(f"{record['method']}, seed {record['seed']}: {record['test']} after {record['seconds']} s", flush=True)
    chosen = [record for job in jobs for record in records if record_key(record) == job.key]
    print("\n" + table(chosen))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(ALL_METHODS),
        default=["baseline", "ml3", "metalr", "adalfl"],
        metavar="METHOD",
        help=f"{', '.join(METHODS)}, or a row of an ablation",
    )
    parser.add_argument("--ablation", choices=list(ABLATIONS), help="instead of --methods")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10_000, help="base steps")
    parser.add_argument("--init-steps", type=int, help="offline meta steps; by default the method's own")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--data", default="data", help="the folder of the data sets")
    parser.add_argument("--records", type=Path, default=RECORDS, help="the folder of the records")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--workers", type=int, help="processes; by default as many as there are cores")
    options = parser.parse_args(argv)
    for name in ("seeds", "steps", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more; got {getattr(options, name)}.")
    return options


def ordered(methods: Sequence[str]) -> list[str]:
    """Return the methods with the control last, and AdaLFL, which it is matched to, among them."""
    if "baseline_matched" not in methods:
        return list(methods)
    others = [method for method in methods if method != "baseline_matched"]
    return [*others, *([] if "adalfl" in others else ["adalfl"]), "baseline_matched"]


def results(missing: Sequence[Job], records: Sequence[Record], workers: int | None) -> Iterator[Record]:
    """Yield the records of the missing runs as they end."""
    cores = os.cpu_count() or 1
    workers = min(workers or cores, len(missing)) or 1
    done = {record_key(record): record for record in records}
    control = [job for job in missing if job.method == "baseline_matched"]
    rounds = ([job for job in missing if job.method != "baseline_matched"], control)
    # Spawned, since torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, get_context("spawn"), prepare) as pool:
        for jobs in rounds:
            running: list[Future[Record]] = []
            for job in jobs:
                reference = done.get(Job(**{**vars(job), "method": "adalfl"}).key)
                running.append(pool.submit(execute, job, reference if job in control else None))
            for future in as_completed(running):
                record = future.result()
                done[record_key(record)] = record
                yield record


def prepare() -> None:
    """Keep each run to one core: these models are too small for more, and threads that wait for a core cost time."""
    torch.set_num_threads(1)


def execute(job: Job, reference: Record | None) -> Record:
    """Run one job, in a process of its own; the control with the rate of the run that it is matched to."""
    return {**run(job, matched_rate(reference) if reference else None), "command": command(job)}


def command(job: Job) -> str:
    """Return what repeats a run."""
    words = ["--task", job.task, "--model", job.model, "--methods", job.method, "--seeds", "1"]
    words += ["--first-seed", str(job.seed), "--steps", str(job.steps)]
    words += [] if job.init_steps is None else ["--init-steps", str(job.init_steps)]
    words += [] if job.batch_size == 128 else ["--batch-size", str(job.batch_size)]
    words += [] if job.accelerator == "cpu" else ["--accelerator", job.accelerator]
    return shlex.join(["python", "examples/paper/reproduce.py", *words])


def record_key(record: Record) -> tuple[Any, ...]:
    """Return what a record is told apart by, as `Job.key`."""
    return tuple(record[name] for name in ("task", "model", "method", "seed", "steps"))


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
