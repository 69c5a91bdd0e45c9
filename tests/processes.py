"""Two processes of a test's own, joined by gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch


def in_two_processes(script: str | Path, folder: Path, *arguments: str, timeout: float = 240) -> None:
    """Run a script of the tests in two processes at once, and demand that both end well.

    Args:
        script: It begins with :func:`joined`.
        folder: Where both leave what they have found.
        *arguments: Of the script.
        timeout: Seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `seed_everything` left behind in another test would seed both processes alike.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(port), str(folder), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output


def joined() -> tuple[int, int, Path, list[Any]]:
    """Make this process one of :func:`in_two_processes`; return rank, number of processes, folder and arguments."""
    rank, world_size, port = sys.argv[1:4]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=rank, NODE_RANK="0", WORLD_SIZE=world_size)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return int(rank), int(world_size), Path(sys.argv[4]), sys.argv[5:]
