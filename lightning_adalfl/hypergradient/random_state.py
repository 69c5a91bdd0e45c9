"""Keep and replay the state of every random generator that a forward pass may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of Python's, NumPy's and torch's generators, the CPU's and one accelerator's."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Read the generators; ``device`` is where the model lives."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        numpy: Any = np.random.get_state(legacy=False)
        return cls(random.getstate(), numpy, torch.get_rng_state(), device, accelerator)

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> RandomState:
        """Return the state after seeding every generator with ``seed``, without touching the current one."""
        before = cls.capture(device)
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            return cls.capture(device)
        finally:
            before.restore()

    def restore(self) -> None:
        """Write the generators back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def to_plain(self) -> dict[str, Any]:
        """Return tensors and plain containers, which a checkpoint may hold."""
        # int64, since not every version of torch can save NumPy's uint32.
        keys = torch.from_numpy(self.numpy["state"]["key"].astype(np.int64))
        numpy = {**self.numpy, "state": {**self.numpy["state"], "key": keys}}
        return {"python": self.python, "numpy": numpy, "cpu": self.cpu, "accelerator": self.accelerator}

    @classmethod
    def from_plain(cls, plain: dict[str, Any], device: torch.device) -> RandomState:
        """Rebuild what :meth:`to_plain` returned."""
        version, internal, gauss = plain["python"]
        keys = plain["numpy"]["state"]["key"].cpu().numpy().astype(np.uint32)
        numpy = {**plain["numpy"], "state": {**plain["numpy"]["state"], "key": keys}}
        accelerator = plain["accelerator"] if device.type != "cpu" else None
        cpu = plain["cpu"].cpu()
        return cls((version, tuple(internal), gauss), numpy, cpu, device, accelerator)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the body from this state; afterwards the generators are as they were before it."""
        before = RandomState.capture(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()


class RandomStream:
    """A stream of random numbers of its own: bodies run under it go on where the last one stopped.

    Args:
        state: Where the stream begins.
    """

    def __init__(self, state: RandomState) -> None:
        self.state = state

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Run the body on this stream; the generators outside it do not notice."""
        with self.state.replayed():
            try:
                yield
            finally:
                self.state = RandomState.capture(self.state.device)
