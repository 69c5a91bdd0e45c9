"""Keep memory that a step frees for the next one."""

from __future__ import annotations

import torch

# glibc takes no larger freed block for a hint than 32 MiB, this block's header and alignment included.
HINT_BYTES = 31 * 2**20


def keep_freed_memory(device: torch.device) -> None:
    """Let the CPU's allocator keep what a step frees, up to 62 MiB, instead of giving it back and faulting it in again.

    glibc gives memory at the top of its heap back as soon as more is free there than twice the largest block that was
    ever freed. A small model frees more than that in every step, and the thousands of page faults after it can take as
    long as the step. Freeing one large block, which is never touched, moves that limit; other allocators ignore it.
    """
    if device.type == "cpu":
        torch.empty(HINT_BYTES, dtype=torch.uint8)
