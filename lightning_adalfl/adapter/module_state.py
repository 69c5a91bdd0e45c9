"""What modules keep beside parameters and buffers: hidden states, counters, generators of their own."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_adalfl.learning.torch_private import version

T = TypeVar("T")
_CONTAINERS = (list, dict, set, deque)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LARGEST = 1_000_000  # elements of a tensor that may be a counter; a larger one is data, and no copy is made of it
# What torch itself keeps there; its contents have owners of their own.
_TORCH = frozenset(vars(nn.Module()))


class ModuleState:
    """The Python attributes of modules that a training step changes.

    Which these are shows when the first step has run: :meth:`find_changing` compares. Later only those are kept.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._names: list[tuple[nn.Module, str]] | None = None
        self._new: set[tuple[int, str]] = set()  # which came up in a first step

    def capture(self, everything: bool = False) -> list[tuple[nn.Module, str, Any, Any]]:
        """Return the attributes and what they hold, to be given to :meth:`restore`.

        Args:
            everything: Whether also those that are not known to change, for :meth:`find_changing`.
        """
        names = self._names
        if names is None or everything:
            names = [(m, name) for m in self._modules for name in vars(m) if name not in _TORCH]
        return [(m, name, value := vars(m).get(name, _ABSENT), _content(value)) for m, name in names]

    def find_changing(self, before: list[tuple[nn.Module, str, Any, Any]]) -> None:
        """Keep from now on what differs from ``before``: everything, captured before a first step."""
        known = {(id(m), name) for m, name, _, _ in before}
        new = [(m, name) for m in self._modules for name in vars(m) if name not in _TORCH]
        new = [(m, name) for m, name in new if (id(m), name) not in known]
        changed = [(m, key) for m, key, value, kept in before if _differs(vars(m).get(key, _ABSENT), value, kept)]
        found = {(id(m), name): (m, name) for m, name in [*(self._names or ()), *changed, *new]}
        self._names = list(found.values())
        self._new |= {(id(m), name) for m, name in new}

    def narrowed(self, state: list[tuple[nn.Module, str, Any, Any]]) -> list[tuple[nn.Module, str, Any, Any]]:
        """Return what is kept of a ``state`` that may have been captured before that was known."""
        if self._names is None:
            return state
        known: dict[tuple[int, str], Any] = dict.fromkeys(self._new, (_ABSENT, None))
        known.update({(id(m), name): (value, content) for m, name, value, content in state})
        return [(m, name, *known[id(m), name]) for m, name in self._names if (id(m), name) in known]

    def replayed(self, function: Callable[..., T], state: list[tuple[nn.Module, str, Any, Any]]) -> Callable[..., T]:
        """Return a function that runs under a state from before; the present one is put back."""

        def run(*args: Any) -> T:
            now = self.capture()
            self.restore(self.narrowed(state))
            try:
                return function(*args)
            finally:
                self.restore(now)

        return run

    @staticmethod
    def restore(state: list[tuple[nn.Module, str, Any, Any]]) -> None:
        """Put back what :meth:`capture` returned."""
        for module, name, value, content in state:
            attributes = vars(module)
            if value is _ABSENT:
                attributes.pop(name, None)
                continue
            attributes[name] = value
            if isinstance(value, Tensor) and content is not None and version(value) != content[0]:
                value.detach().copy_(content[1])
            elif type(value) in _CONTAINERS:
                value.clear()
                (value.update if type(value) in (dict, set) else value.extend)(content)
            elif isinstance(value, GENERATORS):
                _set_generator(value, content)


_ABSENT = object()


@contextmanager
def unlogged(module: nn.Module) -> Iterator[None]:
    """Leave out what a module logs in the body, where it predicts for the learned loss alone."""
    attributes = vars(module)
    before = {"log": attributes["log"]} if "log" in attributes else {}
    attributes["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del attributes["log"]
        attributes.update(before)


def _content(value: Any) -> Any:
    if type(value) in _CONTAINERS:
        return copy.copy(value)
    if isinstance(value, Tensor):
        return (version(value), value.detach().clone()) if value.numel() <= _LARGEST else None
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return copy.deepcopy(value.bit_generator.state)
    return value.getstate() if isinstance(value, random.Random) else None


def _set_generator(value: Any, content: Any) -> None:
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        value.set_state(content)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = content
    else:
        value.setstate(content)


def _differs(now: Any, value: Any, content: Any) -> bool:
    if now is not value:
        return True
    if isinstance(value, Tensor):
        return content is not None and version(value) != content[0]
    if type(value) is dict:
        return value.keys() != content.keys() or any(value[key] is not content[key] for key in content)
    if type(value) in (list, deque):
        return len(value) != len(content) or any(a is not b for a, b in zip(value, content))
    # A generator may be drawn from in any step, also where the first one did not.
    return isinstance(value, GENERATORS) or (type(value) is set and value != content)
