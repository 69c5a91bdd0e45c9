"""Kill training runs at random moments, start them again, and compare them with the run that was left alone."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from endurance_training import Settings, newest_checkpoint, run_child
from lightning_adalfl.snapshots import LossShapeHistory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_adalfl import LossTrajectory

# Of what a run is doing when it dies; "any" is a moment by the clock.
MOMENTS = ("adalfl_offline", "any", "backward", "/tmp/", "loss_shape", "optimizer", "any", "events")
KILLS_A_RUN = 5


def survive_kills(kills: int, seed: int = 0, settings: Settings | None = None) -> dict[str, Any]:
    """Kill runs with SIGKILL until there have been ``kills``; raise if one of them ends unlike the run left alone.

    Args:
        kills: How many, in runs of five each.
        seed: Of the moments.
        settings: What a run does.

    Returns:
        The kills by moment and by what the run had left, and how many files were read afterwards.
    """
    settings = settings or Settings()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["endurance_training"])  # importing takes longer than the run
    generator = random.Random(seed)
    by_moment: Counter[str] = Counter()
    found: Counter[str] = Counter()
    moments = itertools.cycle(MOMENTS)
    runs = 0
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "alone")
        began = time.perf_counter()
        if _start(context, alone, settings) != 0:
            raise RuntimeError("the run that was left alone has failed; see its error above.")
        duration = time.perf_counter() - began
        while sum(by_moment.values()) < kills:
            root = Path(folder, f"run_{runs}")
            runs += 1
            killed_here = 0
            while True:
                wanted = killed_here < KILLS_A_RUN and sum(by_moment.values()) < kills
                moment = next(moments) if wanted else ""
                delay = generator.random() * duration if moment == "any" else None
                code = _start(context, root, settings, moment, generator.randrange(2**31), delay)
                found.update(check_files(root))
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    raise RuntimeError(f"a run ended with exit code {code} and not by SIGKILL; see its error above.")
                killed_here += 1
                by_moment[moment] += 1
                found[_stage(root)] += 1
            differing = differences(alone, root)
            if differing:
                raise RuntimeError(f"after {killed_here} kills the run differs from the one left alone in {differing}.")
            shutil.rmtree(root)
    return {
        "kills": sum(by_moment.values()),
        "runs": runs,
        "runs_equal_bitwise": runs,
        "by_moment": dict(by_moment),
        "after": dict(found),
    }


def stop_by_sigterm(settings: Settings | None = None) -> dict[str, Any]:
    """Send SIGTERM in the offline phase; the run must stop by itself, and end as one left alone when started again."""
    settings = settings or Settings(offline_steps=200)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["endurance_training"])
    with tempfile.TemporaryDirectory() as folder:
        alone, root = Path(folder, "alone"), Path(folder, "run")
        _start(context, alone, settings)
        process = context.Process(target=run_child, args=(root, settings, "", 0))
        process.start()
        while process.is_alive() and not list(root.glob("adalfl_offline_*.pt")):
            time.sleep(0.005)
        sent = time.perf_counter()
        os.kill(process.pid or 0, signal.SIGTERM)
        process.join(60)
        seconds = time.perf_counter() - sent
        if process.exitcode != 0 or newest_checkpoint(root) is not None:
            raise RuntimeError(f"after SIGTERM in the offline phase the run ended with exit code {process.exitcode}.")
        check_files(root)
        if _start(context, root, settings) != 0:
            raise RuntimeError("a run that was stopped by SIGTERM could not go on; see its error above.")
        if differing := differences(alone, root):
            raise RuntimeError(f"a run that was stopped by SIGTERM differs from the one left alone in {differing}.")
    return {"seconds_to_stop": round(seconds, 3), "equal_bitwise": True}


def _start(
    context: Any, root: Path, settings: Settings, moment: str = "", seed: int = 0, delay: float | None = None
) -> int:
    """Run a child to its end, or kill it after ``delay`` seconds; return its exit code."""
    root.mkdir(parents=True, exist_ok=True)
    inside = "" if moment == "any" else moment
    process: BaseProcess = context.Process(target=run_child, args=(root, settings, inside, seed))
    process.start()
    process.join(delay)
    if process.is_alive() and delay is not None:
        process.kill()
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise RuntimeError("a run did not end within five minutes.")
    return process.exitcode


def _stage(root: Path) -> str:
    if newest_checkpoint(root) is not None:
        return "killed_with_a_checkpoint"
    return "killed_in_the_offline_phase" if list(root.glob("adalfl_offline_*.pt")) else "killed_before_any_file"


def check_files(root: Path) -> Counter[str]:
    """Read every file that a run has left under its final name; raise if one cannot be read."""
    read: Counter[str] = Counter()
    for path in root.rglob("*"):
        # A name with a dot in front, or in the folder of temporary files, is none that anything reads.
        if path.name.startswith(".") or path.parent.name == "tmp" or not path.is_file():
            continue
        if path.suffix in (".ckpt", ".pt"):
            torch.load(path, weights_only=True)
            read["checkpoints_read"] += 1
        elif path.suffix == ".npz":
            LossShapeHistory.load(path)
            read["snapshot_files_read"] += 1
        elif path.suffix == ".safetensors":
            LossTrajectory.load(path)
            read["trajectory_files_read"] += 1
        elif path.name.startswith("events."):
            EventAccumulator(str(path)).Reload()
            read["event_files_read"] += 1
    return read


def differences(alone: Path, root: Path) -> list[str]:
    """Return in what the end of one run differs from that of another, bit by bit."""
    found = []
    ends = [newest_checkpoint(folder) for folder in (alone, root)]
    states = [torch.load(path, weights_only=True) for path in ends if path is not None]
    for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "adalfl"):
        found += unequal(states[0][key], states[1][key], key)
    # The file beside the log may lack the end, where a run was killed between its last checkpoint and its end.
    histories = [state["callbacks"]["LossShapeLogger"]["history"] for state in states]
    trajectories = [state["callbacks"]["TrajectoryRecorder"] for state in states]
    return found + unequal(*histories, "loss_shape") + unequal(*trajectories, "loss_trajectory")


def unequal(a: Any, b: Any, name: str) -> list[str]:
    """Return the names of what is not equal, bit by bit, in two nested containers of tensors and plain values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        equal = a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy(), equal_nan=True)
        return [] if equal else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in unequal(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in unequal(x, y, f"{name}.{i}")]
    return [] if type(a) is type(b) and bool(a == b) else [name]
