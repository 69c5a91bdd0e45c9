"""A base forward, recorded, and run again at other parameters; and the random numbers that it drew."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

T = TypeVar("T")
# `predict(batch)` gives (predictions, target), or (predictions, target, weight).
Predict = Callable[[Any], tuple[Tensor, ...]]
# Makes what was kept of a forward available to a part of it that runs again.
Using = Callable[[Any], AbstractContextManager[Any]]


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
        numpy: Any = np.random.get_state(legacy=False)
        return cls(random.getstate(), numpy, *TorchState.capture(device))

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> RandomState:
        """Return the state after seeding these generators with ``seed``, without touching the current one."""
        with cls.capture(device).replayed():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                with torch.get_device_module(device).device(device):
                    torch.get_device_module(device).manual_seed(seed)
            return cls.capture(device)

    def draws_elsewhere(self) -> bool:
        """Return whether Python's or NumPy's generator has been drawn from since."""
        numpy: Any = np.random.get_state(legacy=False)
        same = (self.numpy["state"]["key"] == numpy["state"]["key"]).all()
        return random.getstate() != self.python or not same or self.numpy["state"]["pos"] != numpy["state"]["pos"]

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        TorchState(self.cpu, self.device, self.accelerator).restore()

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


class TorchState(NamedTuple):
    """The states of torch's generators alone, the CPU's and one accelerator's: a microsecond to read."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> TorchState:
        """Read the generators."""
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), device, accelerator)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


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


@dataclass
class RecordedForward:
    """One base forward at θ_t.

    Attributes:
        replay: Runs it again under the parameters that the model has then, and returns its outputs o.
        random_state: The generators before it, for the same dropout masks.
        buffers: The buffers before it.
        outputs: What it gave, detached.
    """

    replay: Callable[[Using], Sequence[Tensor]]
    random_state: RandomState
    buffers: dict[str, Tensor]
    outputs: list[Tensor]


class _Runner(nn.Module):
    """Gives ``functional_call``, which redirects ``forward`` alone, a forward that runs any function of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class Model:
    """A module as a function of parameters θ and buffers; its own are not touched.

    Args:
        module: The base model f.
        parameters: The parameters θ that vary, in the order in which values are given.
        predict: A function of ``module``.

    Raises:
        ValueError: If one of ``parameters`` is not a parameter of ``module``.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], predict: Predict) -> None:
        # A tensor may be a parameter of several modules; each module is named once, under whatever names it has.
        names: dict[int, list[str]] = {}
        for path, part in module.named_modules(prefix="model"):
            for name, parameter in part.named_parameters(path, recurse=False, remove_duplicate=False):
                names.setdefault(id(parameter), []).append(name)
        missing = [tuple(p.shape) for p in parameters if id(p) not in names]
        if missing:
            raise ValueError(
                f"`optimizer` holds parameters that `model` does not own, of shapes {missing}; "
                "build it from `model.parameters()`."
            )
        self.predict = predict
        self._names = [names[id(parameter)] for parameter in parameters]
        varying = {id(parameter) for parameter in parameters}
        self._others = [(names[id(p)], p) for p in module.parameters() if id(p) not in varying]
        self._runner = _Runner(module)

    def buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers, such as BatchNorm's running statistics, as they are now."""
        # Looked up afresh, since a module may have put another tensor in place.
        modules = self._runner.named_modules()
        return _clones({name: b for path, part in modules for name, b in part.named_buffers(path, False, False)})

    def record(self, batch: Any, device: torch.device, kept: Any = None) -> tuple[RecordedForward, tuple[Tensor, ...]]:
        """Predict on ``batch``, and return what is needed to do so again beside what ``predict`` gave.

        Args:
            batch: What ``predict`` takes.
            device: Where random numbers are drawn.
            kept: What a replay may use.
        """
        random_state, buffers = RandomState.capture(device), self.buffers()
        found = self.predict(batch)

        def replay(using: Using) -> Sequence[Tensor]:
            with using(kept):
                return [self.predict(batch)[0]]

        return RecordedForward(replay, random_state, buffers, [found[0].detach()]), found

    def at(
        self,
        forward: RecordedForward,
        values: Mapping[int, Tensor],
        using: Using,
        then: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Return the outputs of a recorded forward at other values of θ, given by their index.

        Args:
            forward: The base forward.
            values: Values of θ by their index.
            using: See :attr:`RecordedForward.replay`.
            then: What is to be made of the outputs while the values are in place: a checkpoint looks at them then.
        """

        def outputs() -> list[Tensor]:
            found = list(forward.replay(using))
            return found if then is None else then(found)

        with forward.random_state.replayed():
            return self.run(outputs, forward.buffers, values)

    def run(
        self, function: Callable[[], T], buffers: Mapping[str, Tensor], values: Mapping[int, Tensor] | None = None
    ) -> T:
        """Run a function of the module with other buffers, and with other values of θ where they are given.

        Args:
            function: Takes no argument.
            buffers: The buffers to use; they are copied, so that neither they nor the module's own are updated.
            values: Values of θ by their index; parameters not named keep the module's own.
        """
        replaced = _clones(buffers)
        if values is not None:
            # A derivative along θ alone: what else might ask for a gradient is to build no graph.
            named = [(self._names[index], value) for index, value in values.items()]
            named += [(names, p.detach()) for names, p in self._others if p.requires_grad]
            replaced.update((name, value) for names, value in named for name in names)
        # Tied weights are named above already; torch would look for them again in each call.
        return functional_call(self._runner, replaced, (function,), tie_weights=False)

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor], again: bool = False) -> Sequence[Tensor | None]:
        """Return the gradients of a loss that the module has just given; ``None`` where it does not depend on one.

        The graph stays for another loss of the same predictions if ``again``.
        """
        return torch.autograd.grad(loss, parameters, retain_graph=again, allow_unused=True)


def _clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies; what is one tensor under several names stays one."""
    copies = {id(tensor): tensor.detach().clone() for tensor in tensors.values()}
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}
