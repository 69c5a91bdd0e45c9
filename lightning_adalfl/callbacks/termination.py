"""SIGTERM while no training loop runs: Lightning takes it over only after ``on_fit_start``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl


class Termination:
    """Whether the process has been told to terminate."""

    def __init__(self) -> None:
        self.received = False

    def anywhere(self, trainer: pl.Trainer) -> bool:
        """Return whether any of the Trainer's processes has been."""
        if trainer.world_size == 1:
            return self.received
        return trainer.strategy.reduce_boolean_decision(self.received, all=False)


@contextmanager
def termination_noted() -> Iterator[Termination]:
    """Note SIGTERM in the body instead of dying of it; a handler that was there before is called as well."""
    noted = Termination()
    # Python lets no other thread than the first set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before: Any = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        noted.received = True
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
