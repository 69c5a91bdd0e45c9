"""What it costs: time and peak memory of a training step, as a multiple of the plain module's.

python examples/benchmark/benchmark.py --cases LeNet-5                 # eight minutes on one core; all of them hours
python examples/benchmark/benchmark.py --device cuda --cases ResNet-18

`Trainer.fit` of a plain module is compared with fits of the same module with the mixin, and a loop of one's own with
the paper's algorithm in this package, in a script of forward mode, in `higher`, in TorchOpt and in BOAT, where they are
installed. The ways take turns, so that whatever else runs on the machine slows all of them alike, and the median of the
turns stands in the table. Memory is on a GPU what the allocator has given at most; on Linux it is measured for each way
in a process of its own, as the peak of the resident memory above that of the process before it trains.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmark_cases import CASES, FITS, Case, build_module
from benchmark_steps import STEPS, Step
from torch.nn.attention import SDPBackend, sdpa_kernel

WARM = 11  # steps that are not counted: with `meta_every=10` the first meta step is among them
TURN_SECONDS = 1.0  # of the plain fit or loop
BASELINES = {"fit": "plain", "loop": "plain loop"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stopwatch(L.Callback):
    """Times the steps of a fit after the first few."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Start after the last warm step, and stop after the last."""
        if trainer.global_step == WARM:
            self.began = _now()
        elif trainer.global_step == trainer.max_steps:
            self.seconds = (_now() - self.began) / (trainer.max_steps - WARM)


def step_seconds(case: Case, way: str, steps: int, device: str, precision: str) -> float:
    """Train in one of the ways, and return the seconds of one of the steps that are counted."""
    if way in FITS:
        return fit_seconds(case, way, steps, device, precision)
    return loop_seconds(case, way, steps, device)


def fit_seconds(case: Case, way: str, steps: int, device: str, precision: str) -> float:
    """Return the seconds of one step of a whole fit."""
    watch, loader = Stopwatch(), case.loader()
    trainer = L.Trainer(
        max_steps=WARM + steps,
        callbacks=[watch],
        accelerator=device,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=10**6,
        num_sanity_val_steps=0,
    )
    with plain_attention(way):
        trainer.fit(build_module(case, way), loader, case.loader())
    return watch.seconds


def loop_seconds(case: Case, way: str, steps: int, device: str) -> float:
    """Return the seconds of one step of a loop."""
    torch.manual_seed(0)
    batches = [(x.to(device), y.to(device)) for x, y in case.batches()]
    with plain_attention(way):
        step = STEPS[way](case.model().to(device))
        run(step, batches, WARM)
        began = _now()
        run(step, batches, steps)
    return (_now() - began) / steps


def run(step: Step, batches: list[Any], steps: int) -> None:
    """Take steps, each with the next batch as the held-out one."""
    for k in range(steps):
        step(batches[k % len(batches)], batches[(k + 1) % len(batches)])


def plain_attention(way: str) -> AbstractContextManager[Any]:
    """Return plain attention for what differentiates twice or forward: the fused kernels have neither."""
    is_needed = "reverse" in way or "unrolled" in way or "by hand" in way
    return sdpa_kernel(SDPBackend.MATH) if is_needed else nullcontext()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a record for each way to train, with the median over turns that they take one after the other."""
    case, seconds = CASES[name], partial(step_seconds, CASES[name], device=args.device, precision=args.precision)
    baseline, ways = BASELINES[kind], list(FITS if kind == "fit" else STEPS)
    steps = 10 * max(1, min(100, round(args.seconds / seconds(baseline, 10) / 10)))
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.turns):
        for way in ways:
            times[way].append(seconds(way, steps))
    medians = {way: statistics.median(values) for way, values in times.items()}
    return [
        {
            "case": name,
            "batch": case.batch,
            "way": way,
            "step_ms": 1e3 * each,
            "ratio": each / medians[baseline],
            "peak_mb": peak_mb(name, way, args) if args.memory else None,
        }
        for way, each in medians.items()
    ]


def peak_mb(name: str, way: str, args: argparse.Namespace) -> float | None:
    """Return the peak memory of training in this way; ``None`` where the system does not tell."""
    if args.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        step_seconds(CASES[name], way, 1, args.device, args.precision)
        return torch.cuda.max_memory_allocated() / 2**20
    if not CLEAR.exists():
        return None
    command = [sys.executable, "-W", "ignore", __file__, "--memory-of", name, way]
    command += ["--precision", args.precision, "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def print_own_peak(name: str, way: str, precision: str) -> None:
    """Train in this process, and print its peak in MB."""
    before = _resident_mb("VmRSS")
    CLEAR.write_text("5")  # the peak is now what is held
    step_seconds(CASES[name], way, 1, "cpu", precision)
    print(_resident_mb("VmHWM") - before)


def _resident_mb(field: str) -> float:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) / 1024


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a table in Markdown."""
    lines = ["| model, batch | | step, ms | times plain | peak, MB |", "|---|---|---|---|---|"]
    for r in records:
        memory = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
        lines.append(f"| {r['case']}, {r['batch']} | {r['way']} | {r['step_ms']:.2f} | {r['ratio']:.2f} | {memory} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table, and write and return the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--kinds", nargs="+", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--turns", type=int, default=5, help="that the ways take")
    parser.add_argument("--seconds", type=float, default=TURN_SECONDS, help="of a turn of the plain fit or loop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="32-true", help="of the fits, as the Trainer has it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peaks, or times alone")
    parser.add_argument("--json", type=Path, help="where the records go, besides the table")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.turns < 1:
        parser.error(f"--turns must be at least 1; got {args.turns}")
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    records: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if args.memory_of:
            print_own_peak(*args.memory_of, args.precision)
            return records
        for name in args.cases:
            for kind in args.kinds:
                records += measure(name, kind, args)
                if args.json:  # as they stand, so that a run that ends early keeps what it measured
                    args.json.write_text(json.dumps(records, indent=1) + "\n")
    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads of {platform.machine()}"
    )
    print(f"torch {torch.__version__}, {device}, {args.precision}\n\n{table(records)}")
    return records


if __name__ == "__main__":
    main()
