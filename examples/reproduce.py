"""The paper's experiments: runs methods on a task over seeds and prints the result beside the paper's.

    python examples/reproduce.py --task diabetes --model mlp --methods baseline ml3 metalr adalfl --seeds 2 --steps 300

With ``--json`` each run is written as it ends, and runs that the file holds are not repeated. ``--ablation`` runs the
rows of one of the paper's ablations instead of ``--methods``; ``--figures`` draws learning curves and learned losses.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from base_models import MODELS
from experiment_figures import draw_figures, snapshot_folder
from experiment_methods import ABLATIONS, ALL_METHODS, METHODS
from experiment_run import Job, Record, matched_rate, run
from experiment_tables import table
from tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(argv)
    command = shlex.join(["python", "examples/reproduce.py", *argv])
    methods = list(ABLATIONS[options.ablation]) if options.ablation else options.methods
    task, model = options.task, options.model
    jobs = [
        Job(task, model, method, seed, options.steps, options.data, options.init_steps, options.batch_size)
        for method in ordered(methods)
        for seed in seeds(options.seeds)
    ]
    records = read(options.json)
    known = {record_key(record) for record in records}
    missing = [job for job in jobs if job.key not in known]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there already.", flush=True)
    for record in results(missing, records, options.workers, options.figures):
        records.append({**record, "command": command})
        if options.json:
            write(options.json, records)
        print(f"{record['method']}, seed {record['seed']}: {record['test']} after {record['seconds']} s", flush=True)
    wanted = {job.key for job in jobs}
    chosen = [record for job in jobs for record in records if record_key(record) == job.key]
    print("\n" + table(chosen))
    if options.figures:
        for path in draw_figures([r for r in records if record_key(r) in wanted], Path(options.figures)):
            print(f"wrote {path}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
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
    parser.add_argument("--seeds", nargs="+", type=int, default=[3], help="how many (one number), or which (several)")
    parser.add_argument("--steps", type=int, default=10_000, help="base steps")
    parser.add_argument("--init-steps", type=int, help="offline meta steps; by default the method's own")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--data", default="data", help="the folder of the data sets")
    parser.add_argument("--json", type=Path, help="where the records are kept; what it holds is not run again")
    parser.add_argument("--figures", help="a folder for figures")
    parser.add_argument("--workers", type=int, help="processes; by default as many as there are cores")
    options = parser.parse_args(argv)
    for name in ("steps", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more; got {getattr(options, name)}.")
    return options


def seeds(values: Sequence[int]) -> list[int]:
    """Return the seeds: ``3`` means 0, 1 and 2; ``3 4`` means these two."""
    return list(range(values[0])) if len(values) == 1 else list(values)


def ordered(methods: Sequence[str]) -> list[str]:
    """Return the methods with the control last, and AdaLFL, which it is matched to, among them."""
    if "baseline_matched" not in methods:
        return list(methods)
    others = [method for method in methods if method != "baseline_matched"]
    return [*others, *([] if "adalfl" in others else ["adalfl"]), "baseline_matched"]


def results(missing: Sequence[Job], records: Sequence[Record], workers: int | None, figures: str | None) -> Any:
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
                running.append(pool.submit(execute, job, reference if job in control else None, figures))
            for future in as_completed(running):
                record = future.result()
                done[record_key(record)] = record
                yield record


def prepare() -> None:
    """Keep each run to one core: these models are too small for more, and threads that wait for a core cost time."""
    torch.set_num_threads(1)


def execute(job: Job, reference: Record | None, figures: str | None) -> Record:
    """Run one job, in a process of its own; the control with the rate of the run that it is matched to."""
    snapshots = snapshot_folder(Path(figures), vars(job)) if figures else None
    return run(job, matched_rate(reference) if reference else None, snapshots)


def record_key(record: Record) -> tuple[Any, ...]:
    """Return what a record is told apart by, as `Job.key`."""
    return tuple(record[name] for name in ("task", "model", "method", "seed", "steps"))


def read(path: Path | None) -> list[Record]:
    """Return the records of an earlier, perhaps half-done, sweep."""
    return json.loads(path.read_text()) if path and path.exists() else []


def write(path: Path, records: Sequence[Record]) -> None:
    """Write all records, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(list(records), indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
