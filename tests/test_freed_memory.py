"""That memory which a step frees is there for the next one, without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROUNDS = """
import resource
import torch
from lightning_adalfl.adapter.freed_memory import keep_freed_memory

torch.set_num_threads(1)
if {kept}:
    keep_freed_memory(torch.device("cpu"))
for round in range(20):
    if round == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(2**18) for _ in range(20)]  # of 1 MiB: like the activations of a small model
    del blocks
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def faults(kept: bool) -> float:
    """Page faults a round, in a process of its own: the allocator's limits hold for a whole process."""
    command = [sys.executable, "-c", ROUNDS.format(kept=kept)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other allocators")
def test_steps_stop_faulting_their_memory_in() -> None:
    assert max(faults(kept=True) for _ in range(2)) < 100
    # Whether something else lies on top of the heap, which then stays, differs from process to process.
    assert any(faults(kept=False) > 1000 for _ in range(6))
