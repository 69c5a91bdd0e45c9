"""Measure what the library endures: kills, damaged files, and a long run; the figures of docs/robustness.md.

python examples/endurance.py --kills 25 --fuzz-seconds 60 --steps 20000 --json endurance.json
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import lightning
import torch
from endurance_fuzz import fuzz
from endurance_kills import stop_by_sigterm, survive_kills
from endurance_long import run_long


def main() -> None:
    """Run what is asked for, one after the other, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="processes to kill; 0 for none")
    parser.add_argument("--fuzz-seconds", type=float, default=60, help="seconds of reading damaged files; 0 for none")
    parser.add_argument("--steps", type=int, default=20_000, help="steps of the long run; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the kills and of the damage")
    parser.add_argument("--json", type=Path, help="where the figures go, besides the terminal")
    args = parser.parse_args()
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
    if args.kills:
        figures["sigterm"] = stop_by_sigterm()
        figures["kills"] = survive_kills(args.kills, args.seed)
    if args.fuzz_seconds:
        figures["fuzz"] = fuzz(args.fuzz_seconds, args.seed)
    if args.steps:
        figures["long_run"] = run_long(args.steps)
    text = json.dumps(figures, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
