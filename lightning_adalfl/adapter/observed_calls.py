"""A module's outermost calls: observed as they happen, answered from memory, evaluated again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adalfl.learning.jvp import JacobianProduct
from lightning_adalfl.learning.recorded_forward import TorchState, Using
from lightning_adalfl.learning.torch_private import InterceptedCalls, is_compiled, map_tensors, tensors_in, version


@dataclass
class Call:
    """One outermost call whose output carries a graph.

    Attributes:
        module: What was called.
        place: The module's id, and how many calls of it came before since :meth:`ObservedCalls.forget`.
        args: Its arguments; containers copied, tensors as they are.
        kwargs: Likewise.
        versions: Of the tensors among them, when it was called.
        before: torch's random state before the call.
        after: And after it.
        output: What it returned.
        returned: Copies that the step got in place of it, or the very output.
        returned_versions: Of the tensors in that, when the step got them.
        kept: What an evaluation may use.
        leaves: What stands for its outputs where it was answered, by their place.
        given: The copies of these that the answer is made of.
        is_answered: Whether it has been.
    """

    module: nn.Module
    place: tuple[int, int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    before: TorchState
    after: TorchState
    output: Any
    returned: Any
    returned_versions: list[int]
    kept: Any
    leaves: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)
    is_answered: bool = False

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return tensors_in((self.args, self.kwargs))

    @property
    def inputs_have_changed(self) -> bool:
        """Whether an argument was changed in place after the call."""
        return [version(t) for t in self.inputs] != self.versions


class ObservedCalls:
    """Watches the outermost calls of a module and its submodules in a training step.

    Args:
        module: The user's module.
        device: Where it draws random numbers.
        on_first: Is run before the first call of which anything is kept for an evaluation.

    Attributes:
        calls: Those observed since :meth:`forget`.
        way: Says what of each call is kept for an evaluation; ``None`` for nothing.
        answers: The calls that have been answered, in their order.
        is_spoilt: Whether the last step has changed an output of which it got no copy.
    """

    def __init__(self, module: nn.Module, device: torch.device, on_first: Callable[[], None]) -> None:
        self._device = device
        self._on_first = on_first
        self.modules = list(_outside_the_compiler(module))
        self._intercepted = InterceptedCalls(self.modules, self._handle)
        self._on_call: Callable[..., Any] | None = None
        self._depth = 0
        self._is_intercepting = False
        self._is_first_call = True
        # Calls whose output a step has changed in place: those of the first step, which gets copies of all, and later.
        self._changed: set[tuple[int, int]] = set()
        self._knows_changed = False
        self.calls: list[Call] = []
        self.way: JacobianProduct | None = None
        self.answers: list[Call] = []
        self.is_spoilt = False

    def _handle(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._depth or self._on_call is None:
            return call(*args, **kwargs)
        return self._on_call(module, call, args, kwargs)

    @contextmanager
    def handling(self, on_call: Callable[..., Any] | None) -> Iterator[None]:
        """Hand the calls in the body to a function; ``None`` lets them run, in a step that is observed too."""
        before = self._on_call, self._depth, self._is_intercepting
        self._on_call, self._depth, self._is_intercepting = on_call, 0, True
        try:
            with nullcontext() if before[2] else self._intercepted:
                yield
        finally:
            self._on_call, self._depth, self._is_intercepting = before

    def _run(self, call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._depth += 1
        try:
            return call(*args, **kwargs)
        finally:
            self._depth -= 1

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Observe the calls in the body."""

        def observed(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            way = self.way
            if way is not None and self._is_first_call and not self.calls:
                self._on_first()
                self._is_first_call = False
            before = TorchState.capture(self._device)
            args, kwargs = map_tensors(lambda t: t, (args, kwargs))
            versions = [version(t) for t in tensors_in((args, kwargs))]
            with nullcontext() if way is None else way.keeping(module) as kept:
                output = self._run(call, args, kwargs)
            if not any(t.requires_grad for t in tensors_in(output)):
                return output
            place = (id(module), sum(c.module is module for c in self.calls))
            is_changed = not self._knows_changed or place in self._changed
            # A copy for the step to change: the output itself stays what the module gave, graph and all.
            returned = map_tensors(lambda t: t.clone() if t.requires_grad else t, output) if is_changed else output
            after = TorchState.capture(self._device)
            found = (output, returned, [version(t) for t in tensors_in(returned)], kept)
            self.calls.append(Call(module, place, args, kwargs, versions, before, after, *found))
            return returned

        with self.handling(observed):
            yield
        # Without a copy of what was changed, the step cannot be learned from; from the next on there is one.
        self.is_spoilt = self._find_changed() and self._knows_changed
        self._knows_changed = self._knows_changed or bool(self.calls)
        self.calls = [] if self.is_spoilt else self.calls

    def forget(self) -> None:
        """Let go of the calls so far, and of their graphs."""
        self._find_changed()
        self.calls, self.answers, self._is_first_call = [], [], True

    def _find_changed(self) -> bool:
        """Note the calls whose output has been changed since; return whether there were others than those known."""
        changed = {c.place for c in self.calls if [version(t) for t in tensors_in(c.returned)] != c.returned_versions}
        is_new = not changed <= self._changed
        self._changed |= changed
        return is_new

    @contextmanager
    def answering(self, choose: Callable[..., Call], before: Callable[[], None]) -> Iterator[None]:
        """Answer the calls in the body with leaves in place of what was observed; others run as they are.

        Args:
            choose: Returns the one of several observed calls of a module that is meant, given the arguments.
            before: Is called before one that was not observed runs.
        """

        def answered(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            left = [c for c in self.calls if c.module is module and not c.is_answered]
            if not left or not torch.is_grad_enabled():
                before()
                return call(*args, **kwargs)
            known = choose(left, args, kwargs)
            known.is_answered = True
            self.answers.append(known)
            known.after.restore()
            count = iter(range(len(tensors_in(known.output))))

            def leaf(tensor: Tensor) -> Tensor:
                place = next(count)
                if not tensor.requires_grad:
                    return tensor
                known.leaves[place] = tensor.detach().requires_grad_()
                known.given[place] = known.leaves[place].clone()  # a leaf itself must not be changed in place
                return known.given[place]

            return map_tensors(leaf, known.output)

        self.answers = []
        with self.handling(answered):
            yield

    def evaluate(
        self, predict: Callable[[], Any], answers: Sequence[Call], wanted: Iterable[tuple[int, int]], using: Using
    ) -> list[Tensor]:
        """Run the answered calls again, with the inputs and random numbers that they had.

        Args:
            predict: What the calls were answered in.
            answers: The calls, in the order in which they were answered.
            wanted: The outputs, each by its call and its place there.
            using: Makes what was kept of a call available.
        """
        found: list[list[Tensor]] = []

        def again(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(found) == len(answers) or answers[len(found)].module is not module:
                return call(*args, **kwargs)
            known = answers[len(found)]
            new_args, new_kwargs = _with_inputs(known, args, kwargs)
            known.before.restore()
            with using(known.kept):
                output = self._run(call, new_args, new_kwargs)
            found.append(tensors_in(output))
            return output

        with self.handling(again):
            predict()
        if len(found) != len(answers):
            raise ValueError(
                "`adalfl_predict` calls other modules when it is run again on the same batch; let it depend on the "
                "batch and the module alone."
            )
        return [found[i][place] for i, place in wanted]


def _with_inputs(known: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the recorded arguments, but for those that depend on the parameters, which come from this call."""
    recorded = known.inputs
    if not any(t.requires_grad for t in recorded):
        return known.args, known.kwargs
    given = tensors_in((args, kwargs))
    if len(given) != len(recorded):
        raise ValueError(
            f"`adalfl_predict` calls {type(known.module).__name__} with {len(given)} tensors and `training_step` with "
            f"{len(recorded)}, of which some depend on the parameters; call it in the same way in both."
        )
    chosen = iter([new if old.requires_grad else old for old, new in zip(recorded, given)])
    return map_tensors(lambda _: next(chosen), (known.args, known.kwargs))


def _outside_the_compiler(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and its submodules, but for those inside a compiled one, which the compiler sees."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if found is module or not is_compiled(found):
            waiting += found.children()


def equal_tensors(known: list[Tensor], given: list[Tensor]) -> bool:
    """Return whether these tensors have the same values; it reads them."""
    return len(known) == len(given) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(known, given)
    )
