"""What a meta step costs: time, memory and error of each way to compute it, beside ordinary training.

    python examples/benchmark.py --models resnet18 --json resnet18.json

The methods take turns in one process, so that whatever else runs on the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from math import ceil

import torch
from base_models import build_model
from benchmark_engines import ENGINES, Batch, Step, between
from torch import nn

from lightning_adalfl import LossNetwork

# The shape of an input and the batch size of each model.
SETTINGS = {
    "lenet5": ((1, 28, 28), 128),
    "mlp": ((1, 28, 28), 128),
    "allcnnc": ((3, 32, 32), 32),
    "resnet18": ((3, 32, 32), 32),
    "vit_small": ((3, 32, 32), 32),
}
CLASSES = 10
MIN_TURN_SECONDS = 0.05


@dataclass
class Record:
    """One row of the table."""

    model: str
    batch: int
    engine: str
    meta_every: int
    step_ms: float
    ratio_to_baseline: float
    peak_extra_mb: float | None = None
    rel_error: float | None = None


def random_batch(shape: tuple[int, ...], size: int) -> Batch:
    """Draw noise images and labels: the time of a step does not depend on what they show."""
    return torch.randn(size, *shape), torch.randint(0, CLASSES, (size,))


def step_times(steps: dict[str, Step], batches: list[Batch], repeats: int) -> dict[str, float]:
    """Return the median seconds of each step, over turns that they take one after the other."""
    for step in steps.values():
        for _ in range(2):
            step(batches[0], batches[1])
    started = time.perf_counter()
    steps["handcrafted"](batches[0], batches[1])
    # Short steps are taken several at a time, so that each begins with the caches as it left them.
    in_a_row = ceil(MIN_TURN_SECONDS / (time.perf_counter() - started))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            for k in range(in_a_row):
                step(batches[k % len(batches)], batches[(k + 1) % len(batches)])
            times[name].append((time.perf_counter() - started) / in_a_row)
        print(f"\r  turn {turn + 1}/{repeats}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 20, end="\r", file=sys.stderr)
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark_model(name: str, engines: list[str], repeats: int) -> list[Record]:
    """Time every engine on one model."""
    shape, size = SETTINGS[name]
    torch.manual_seed(0)
    model, loss = build_model(name, shape, CLASSES), LossNetwork("multiclass")
    batches = [random_batch(shape, size) for _ in range(4)]

    def fresh() -> tuple[nn.Module, LossNetwork]:
        return copy.deepcopy(model), copy.deepcopy(loss)

    steps = {engine: ENGINES[engine](*fresh()) for engine in engines}
    steps["between"] = between(*fresh())
    seconds = step_times(steps, batches, repeats)
    plain = seconds["between"]
    rows = [(engine, 1, seconds[engine]) for engine in engines]
    # A step in k is a meta step.
    rows += [("forward", k, ((k - 1) * plain + seconds["forward"]) / k) for k in (10, 100) if "forward" in seconds]
    return [Record(name, size, e, k, s * 1e3, s / seconds["handcrafted"]) for e, k, s in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    engines = ["handcrafted", *(e for e in args.engines if e != "handcrafted")]
    for name in args.models:
        for record in benchmark_model(name, engines, args.repeats):
            print(" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in asdict(record).values()))


if __name__ == "__main__":
    main()
