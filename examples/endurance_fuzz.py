"""Damage the files that the library reads, at random, for a bounded time: each is read as it was, or refused."""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from endurance_training import AdaClassifier, quiet
from lightning_adalfl.snapshots import LossShapeHistory, evaluate_loss_shape

from lightning_adalfl import AdaLFLConfig, LearnedLoss, LossNetwork, LossTrajectory, TaylorLoss

Reader = Callable[[Path], Any]


def damaged(data: bytes, other: bytes, generator: random.Random) -> bytes:
    """Return ``data`` cut off, with flipped bits, other bytes, a part lost or doubled, or spliced with ``other``."""
    at = generator.randrange(len(data))
    length = generator.choice((1, 4, 64, len(data)))
    kind = generator.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(generator.choice((1, 1, 8))):
            flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:at] + generator.randbytes(min(length, len(data) - at)) + data[at + length :]
    if kind == 3:
        return data[:at] + data[at + length :]
    if kind == 4:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    return data[:at] + other[generator.randrange(len(other)) :]


def damaged_entry(value: Any, generator: random.Random) -> Any:
    """Return nested containers with one entry lost, or of another type, shape or size."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        if generator.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: damaged_entry(value[key], generator)}
    if isinstance(value, (list, tuple)) and value and generator.random() < 0.7:
        index = generator.randrange(len(value))
        return [*value[:index], damaged_entry(value[index], generator), *value[index + 1 :]]
    return generator.choice((None, -1, 2**70, 1.5, "x", [], {}, torch.zeros(3), torch.zeros(0), True, b"x"))


def fuzz(seconds: float, seed: int = 0) -> dict[str, Any]:
    """Read damaged files and checkpoint entries for ``seconds``; raise if one is neither read nor refused.

    Args:
        seconds: For all readers together.
        seed: Of the damage.

    Returns:
        Executions, and how many were refused, for each reader.
    """
    quiet()
    generator = random.Random(seed)
    executions: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy and torch may warn of what they refuse
        targets = _targets(Path(folder))
        names = list(targets)
        damage = Path(folder, "damaged")
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            name = generator.choice(names)
            data, reader = targets[name]
            other = targets[generator.choice(names)][0]
            damage.write_bytes(damaged(data, other, generator))
            executions[name] += 1
            refused[name] += _refuses(reader, damage, f"{name}, execution {executions[name]} of seed {seed}")
            executions["checkpoint entry"] += 1
            refused["checkpoint entry"] += _refuses_entry(generator)
    return {
        "executions": sum(executions.values()),
        "refused": sum(refused.values()),
        "by_reader": {name: {"executions": executions[name], "refused": refused[name]} for name in executions},
        "crashes": 0,
    }


def _targets(folder: Path) -> dict[str, tuple[bytes, Reader]]:
    network = LossNetwork("regression")
    history = LossShapeHistory()
    trajectory = LossTrajectory(1)
    for step in range(3):
        history.append(evaluate_loss_shape(network, step, resolution=5))
        trajectory.append(step, network)
    network.save(folder / "network")
    TaylorLoss("binary").save(folder / "taylor")
    history.save(folder / "history.npz")
    trajectory.save(folder / "trajectory")
    return {
        "saved network": ((folder / "network").read_bytes(), LearnedLoss.load),
        "saved polynomial": ((folder / "taylor").read_bytes(), LearnedLoss.load),
        "snapshots": ((folder / "history.npz").read_bytes(), LossShapeHistory.load),
        "trajectory": ((folder / "trajectory").read_bytes(), LossTrajectory.load),
    }


def _refuses(reader: Reader, path: Path, what: str) -> bool:
    try:
        reader(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise RuntimeError(f"{what}: the error does not name the file: {error}") from error
        return True
    except Exception as error:
        raise RuntimeError(f"{what}: the reader broke with {error!r} and did not refuse the file.") from error
    return False


def _refuses_entry(generator: random.Random) -> bool:
    """Load a checkpoint whose entry of this library is damaged into a module."""
    module = AdaClassifier(adalfl=AdaLFLConfig(task="multiclass", representation="taylor_cubic"))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    checkpoint["adalfl"] = damaged_entry(checkpoint["adalfl"], generator)
    try:
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
    except ValueError as error:
        if "checkpoint" not in str(error):
            raise RuntimeError(f"the error does not name the checkpoint: {error}") from error
        return True
    except RuntimeError as error:
        # Of another architecture: torch names each entry that does not fit.
        if "Error(s) in loading state_dict" not in str(error):
            raise
        return True
    return False
