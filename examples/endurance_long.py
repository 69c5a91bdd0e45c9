"""A long run with everything on: whether memory, open files, files on disk or the time of a step grow."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import lightning as L
import psutil
from endurance_training import Settings, train

SAMPLES = 40


class Meter(L.Callback):
    """Reads the process and its folder at regular steps."""

    def __init__(self, root: Path, every: int) -> None:
        self.root, self.every = root, every
        self.samples: list[dict[str, float]] = []
        self._times: list[float] = []
        self._began = 0.0
        self._process = psutil.Process()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, which counts the time of this process alone."""
        self._began = time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it, and read the rest from time to time."""
        self._times.append(time.process_time() - self._began)
        if trainer.global_step % self.every:
            return
        gc.collect()
        sizes = {path: path.stat().st_size for path in self.root.rglob("*") if path.is_file()}
        self.samples.append(
            {
                "step": trainer.global_step,
                "memory_mb": self._process.memory_info().rss / 2**20,
                "objects": len(gc.get_objects()),
                "open_files": self._process.num_fds(),
                # The median leaves out the steps that draw a figure or write a checkpoint.
                "step_ms": 1000 * median(self._times),
                "events_mb": sum(size for path, size in sizes.items() if path.name.startswith("events.")) / 2**20,
                "snapshots_kb": sum(size for path, size in sizes.items() if path.suffix in (".npz", ".safetensors"))
                / 2**10,
                "checkpoint_kb": max((size for path, size in sizes.items() if path.suffix == ".ckpt"), default=0)
                / 2**10,
                "files": len(sizes),
            }
        )
        self._times = []


def run_long(steps: int) -> dict[str, Any]:
    """Train for ``steps``; return what there was at the middle and at the end, and the growth between them.

    Args:
        steps: How many; the first half is warm-up.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        meter = Meter(root, max(steps // SAMPLES, 1))
        began = time.perf_counter()
        settings = Settings(steps, offline_steps=50, batches=100, snapshot_every=20, checkpoint_every=100)
        train(root, settings, meter)
        seconds = time.perf_counter() - began
    half = meter.samples[len(meter.samples) // 2 :]
    at = [sample["step"] for sample in half]
    growth = {
        name: round(10_000 * linear_regression(at, [sample[name] for sample in half]).slope, 4)
        for name in half[0]
        if name != "step"
    }
    return {
        "steps": steps,
        "seconds": round(seconds),
        "middle": {name: round(value, 3) for name, value in half[0].items()},
        "end": {name: round(value, 3) for name, value in half[-1].items()},
        "growth_per_10000_steps": growth,
    }
