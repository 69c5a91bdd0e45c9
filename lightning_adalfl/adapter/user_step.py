"""The user's training step, run once and observed: the loss, and the predictions that it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adalfl.adapter.module_state import ModuleState, unlogged
from lightning_adalfl.adapter.observed_calls import Call, ObservedCalls, equal_tensors
from lightning_adalfl.learning.base_step import Predicted
from lightning_adalfl.learning.jvp import JacobianProduct
from lightning_adalfl.learning.recorded_forward import Predict, RandomState, RecordedForward, TorchState, Using
from lightning_adalfl.learning.torch_private import graph_nodes, leaves_of_graph, map_tensors, tensors_in, version

Found = tuple[Predicted, RecordedForward | None]
_SAY_HOW = """Say how they are predicted, in a method of {name}:

    def adalfl_predict(self, batch):
        x, y = batch
        # prepare {prepare} as training_step does, but for what is random
        return self(x), y
"""


def depends(loss: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Return whether a loss was computed from outputs."""
    wanted = {torch.autograd.graph.get_gradient_edge(o).node for o in outputs if o.requires_grad}
    return any(node in wanted for node in graph_nodes(loss))


class StepObserver:
    """Runs training steps as they are, and finds out from which calls ``adalfl_predict`` would predict.

    The step runs first, and its outermost calls are noted. Then ``predict`` runs on the same batch, with these calls
    answered, so that the predictions are those that the step made.

    Args:
        module: The user's module.
        predict: ``adalfl_predict``, checked.
        says_how: Whether ``predict`` is the user's own, which says how held-out batches are predicted; if it is not,
            the step must predict as it does.
        device: Where random numbers are drawn.
        buffers: Returns copies of the buffers.
    """

    def __init__(
        self,
        module: nn.Module,
        predict: Predict,
        says_how: bool,
        device: torch.device,
        buffers: Callable[[], dict[str, Tensor]],
    ) -> None:
        self._module, self._name = module, type(module).__name__
        self._predict = predict
        self._says_how = says_how
        self._device = device
        self._buffers = buffers
        self._calls = ObservedCalls(module, device, self._keep_start)
        self._state = ModuleState(self._calls.modules)
        self._is_first = True
        self._draws_elsewhere = False
        self._batch: Any = None
        self._loss: Tensor | None = None
        self._first_versions: dict[int, int] = {}
        self._start: dict[str, Any] = {}
        self._wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        # Of each input of an answered call: whether it was the very tensor of the batch.
        self._same: dict[tuple[int, int, int], bool] = {}

    @contextmanager
    def observing(self, batch: Any, way: JacobianProduct | None) -> Iterator[None]:
        """Observe a training step, the body.

        Args:
            batch: What it is given.
            way: Says what is kept for an evaluation; ``None`` where there will be none.
        """
        self._batch = map_tensors(lambda t: t, batch)
        self._first_versions = {id(t): version(t) for t in tensors_in(batch)}
        self.forget(way)
        everything = self._state.capture(everything=True) if self._is_first else None
        try:
            with self._calls.observing():
                yield
        except BaseException:
            self.end()
            raise
        if everything is not None:
            self._state.find_changing(everything)

    def forget(self, way: JacobianProduct | None) -> None:
        """Let go of the calls so far; of those to come ``way`` keeps what it wants."""
        self._calls.forget()
        self._calls.way, self._start = way, {}

    def expect(self, way: JacobianProduct | None) -> None:
        """Let ``way`` keep what it wants of the calls to come, if they are the first."""
        self._calls.way = way

    def end(self) -> None:
        """Let go of all that the step left."""
        self.forget(None)
        self._batch, self._first_versions, self._loss = None, {}, None

    def _keep_start(self) -> None:
        random = RandomState.capture(self._device)
        self._start = {"random": random, "state": self._state.capture(), "buffers": self._buffers()}

    @property
    def has_calls(self) -> bool:
        """Whether a module has been called since :meth:`forget`."""
        return bool(self._calls.calls)

    @property
    def is_spoilt(self) -> bool:
        """Whether the last step cannot be learned from, since it has changed an output in place for the first time."""
        return self._calls.is_spoilt

    def found(self, loss: Tensor | None = None, is_certain: bool = True) -> Found | None:
        """Return what was predicted, and what is needed to do so again, where that was asked for.

        Args:
            loss: Tells calls with the same input apart: those that it came from are meant.
            is_certain: Whether there must be something; if not, predictions of another origin are ``None``.
        """
        if not self.has_calls:
            raise ValueError(
                f"{self._name}.training_step predicts without calling a module under a graph, so that its predictions "
                "cannot be found. Call the module or a submodule; in a checkpoint around it, set `use_reentrant=False`."
            )
        for call in self._calls.calls:
            call.is_answered = False
        self._loss = loss
        with self._put_back() as exchange, torch.enable_grad(), self._calls.answering(self._chosen, exchange):
            predictions, target, *weight = self._predict(map_tensors(lambda t: t, self._batch))
        wanted = self._cut(predictions, is_certain)
        if not wanted and not is_certain:
            return None
        if self._is_first:
            self._check(predictions, [target, *weight])
        if not wanted:
            raise ValueError(
                f"the predictions of `adalfl_predict` do not come from what {self._name}.training_step computed: no "
                "module that it calls was called by the step with a gradient. Let both call the same modules, and do "
                "not detach or round the predictions."
            )
        answers = list(self._calls.answers)
        outputs = [tensors_in(answers[i].output)[place] for i, place in wanted]
        leaves = [answers[i].leaves[place] for i, place in wanted]
        if len(wanted) == 1 and predictions is answers[wanted[0][0]].given[wanted[0][1]]:
            predictions = leaves[0]
        predicted = Predicted(outputs, leaves, predictions, target, *weight)
        self._is_first = False
        return predicted, self._recorded(answers, predicted, wanted) if self._start else None

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Leave the modules' attributes as they are, and its calls unobserved: the body predicts on other batches."""
        state = self._state.capture()
        try:
            with self._calls.handling(None), unlogged(self._module):
                yield
        finally:
            self._state.restore(state)

    def _cut(self, predictions: Tensor, is_certain: bool) -> list[tuple[int, int]]:
        """Return the outputs that the predictions depend on, each by its answer and its place there."""
        answers = self._calls.answers
        shape = tuple(id(c.module) for c in answers)
        if shape not in self._wanted:
            leaves = {(i, place): leaf for i, c in enumerate(answers) for place, leaf in c.leaves.items()}
            gradients: Sequence[Any] = ()
            if predictions.requires_grad and leaves and (is_certain or not _has_parameters(predictions)):
                ends, zero = list(leaves.values()), torch.zeros_like(predictions)
                gradients = torch.autograd.grad(predictions, ends, zero, retain_graph=True, allow_unused=True)
            self._wanted[shape] = [key for key, gradient in zip(leaves, gradients) if gradient is not None]
        return self._wanted[shape]

    @contextmanager
    def _put_back(self) -> Iterator[Callable[[], None]]:
        """Leave logs, random states and attributes as the step did; buffers too, once what is yielded is called."""
        is_whole = self._is_first or self._draws_elsewhere
        random = (RandomState if is_whole else TorchState).capture(self._device)
        state = self._state.capture()
        buffers: list[tuple[nn.Module, dict[str, Tensor | None]]] = []

        def exchange() -> None:
            # Exchanged, since writing values back in place would spoil the graph of the step.
            for module in self._calls.modules if not buffers else ():
                buffers.append((module, own := dict(module._buffers)))
                module._buffers.update({name: None if b is None else b.clone() for name, b in own.items()})

        try:
            with unlogged(self._module):
                yield exchange
        finally:
            for module, own in buffers:
                module._buffers.update(own)
            if isinstance(random, RandomState):
                self._draws_elsewhere = random.draws_elsewhere()
            random.restore()
            self._state.restore(state)

    def _chosen(self, left: Sequence[Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the observed call that has the inputs that are given, or else the first; refuse changed inputs."""
        given = tensors_in((args, kwargs))
        same, loss = [c for c in left if list(map(id, c.inputs)) == list(map(id, given))], self._loss
        if len(same) > 1 and loss is not None:
            same = [c for c in same if depends(loss, tensors_in(c.output))] or same
        known = same[0] if same else None
        if known is None and len(left) > 1:
            known = next((c for c in left if equal_tensors(c.inputs, given)), None)
        known = left[0] if known is None else known
        if known.inputs_have_changed:
            raise ValueError(
                f"{self._name}.training_step changes an input of {type(known.module).__name__} in place after the "
                "call, so that the call cannot be evaluated again. Change a copy: `x = x.clone()`."
            )
        if not self._says_how:
            self._check_inputs(known, given)
        return known

    def _check_inputs(self, known: Call, given: list[Tensor]) -> None:
        """Raise unless the step has predicted from the batch as ``adalfl_predict`` does."""
        answer = len(self._calls.answers)
        pairs = zip(known.inputs, known.versions, given)
        is_changed = len(known.inputs) != len(given)
        for i, (old, at_call, new) in enumerate(pairs):
            is_same = old is new and at_call == self._first_versions.get(id(old), at_call)
            was_same = self._same.get((id(known.module), answer, i))
            self._same.setdefault((id(known.module), answer, i), is_same)
            if is_same or (old is not new and was_same is False and old.shape == new.shape):
                continue  # what was equal by value once is not read again, which would wait for an accelerator
            is_changed = is_changed or old is new or not equal_tensors([old], [new])
        if is_changed:
            raise ValueError(
                f"{self._name}.training_step changes what it predicts from, as by normalisation, noise or mixup, "
                f"before it calls {type(known.module).__name__}; held-out batches would be predicted from unchanged "
                "inputs. " + _SAY_HOW.format(name=self._name, prepare="x")
            )

    def _check(self, predictions: Tensor, targets: list[Tensor]) -> None:
        if not predictions.is_floating_point():
            raise ValueError(
                f"the predictions of `adalfl_predict` must be floating point; got {predictions.dtype}. Return raw "
                "logits or values, not classes."
            )
        if _has_parameters(predictions):
            raise ValueError(
                f"the predictions of `adalfl_predict` depend on a parameter that {self._name}.training_step uses "
                "outside of any module, or in other modules than `adalfl_predict`. Move it into a submodule or the "
                "forward, and call the same modules in both."
            )
        if not self._says_how and any(version(t) != self._first_versions.get(id(t), version(t)) for t in targets):
            raise ValueError(
                f"{self._name}.training_step changes the target in place, which held-out batches would not see. "
                + _SAY_HOW.format(name=self._name, prepare="y")
            )

    def _recorded(self, answers: list[Call], predicted: Predicted, wanted: list[tuple[int, int]]) -> RecordedForward:
        calls, state, start, batch = self._calls, self._state, self._start, self._batch

        def replay(using: Using) -> Sequence[Tensor]:
            copied = map_tensors(lambda t: t, batch)
            return calls.evaluate(lambda: self._predict(copied), answers, wanted, using)

        outputs, replayed = [o.detach() for o in predicted.outputs], state.replayed(replay, start["state"])
        return RecordedForward(replayed, start["random"], start["buffers"], outputs)


def _has_parameters(predictions: Tensor) -> bool:
    return any(isinstance(leaf, nn.Parameter) for leaf in leaves_of_graph(predictions))
