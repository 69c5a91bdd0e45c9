"""The peak memory of a training step, each measured in a process of its own (Linux).

python examples/benchmark_memory.py resnet18 forward --batch 64
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmark_cases import SETTINGS, build_case
from benchmark_engines import ALL_ENGINES

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 3


def peak_extra_mb(model: str, engine: str, batch_size: int) -> float | None:
    """Return how many MB a process that trains holds at its peak above one that has the model alone.

    Returns:
        The MB, or ``None`` where the system does not tell a process its peak, or stopped it for want of memory.
    """
    if not CLEAR.exists():
        return None
    command = [sys.executable, "-W", "ignore", __file__, model, engine, "--batch", str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode < 0:  # killed by a signal
        return None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout)


def _resident_mb(field: str) -> float:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SETTINGS)
    parser.add_argument("engine", choices=ALL_ENGINES)
    parser.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()
    case = build_case(args.model, args.batch)
    before = _resident_mb("VmRSS")
    CLEAR.write_text("5")  # sets the peak to what is held now
    step = ALL_ENGINES[args.engine](case.model, case.loss)
    for k in range(STEPS):
        step(case.batches[k], case.batches[k + 1])
    print(_resident_mb("VmHWM") - before)


if __name__ == "__main__":
    main()
