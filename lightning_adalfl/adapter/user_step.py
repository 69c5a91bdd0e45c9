"""The user's training step, run once and observed: the loss, and the predictions that it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adalfl.adapter.lightning_private import loss_of
from lightning_adalfl.adapter.module_state import ModuleState
from lightning_adalfl.adapter.observed_calls import Call, ObservedCalls
from lightning_adalfl.learning.jvp import JacobianProduct
from lightning_adalfl.learning.recorded_forward import Predict, RandomState, RecordedForward, TorchState, Using
from lightning_adalfl.learning.torch_private import map_tensors, leaves_of_graph, tensors_in, version
from lightning_adalfl.losses.training_objective import Predicted

_SAY_HOW = """Say how they are predicted, in a method of {name}:

    def adalfl_predict(self, batch):
        x, y = batch
        # prepare {prepare} as training_step does, but for what is random
        return self(x), y
"""


@dataclass
class UserStep:
    """What a training step did.

    Attributes:
        output: What it returned.
        loss: The loss in it; ``None`` where it skips the batch.
        predicted: The predictions as a function of the outputs that the loss was computed from.
        recorded: What an evaluation of these outputs needs, where it was asked for.
    """

    output: Any
    loss: Tensor | None = None
    predicted: Predicted | None = None
    recorded: RecordedForward | None = None


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
        self._name = type(module).__name__
        self._predict = predict
        self._says_how = says_how
        self._device = device
        self._buffers = buffers
        self._calls = ObservedCalls(module, device)
        self._state = ModuleState(self._calls.modules)
        self._is_first = True
        self._draws_elsewhere = False
        self._wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        # Of each input of an answered call: whether it was the very tensor of the batch.
        self._same: dict[tuple[int, int], bool] = {}

    def run(self, step: Callable[[], Any], batch: Any, way: JacobianProduct | None) -> UserStep:
        """Run a training step.

        Args:
            step: Runs it on ``batch``.
            batch: What it is given.
            way: Says what is kept for an evaluation; ``None`` where there will be none.

        Raises:
            ValueError: If its predictions cannot be found, or held-out batches would be predicted otherwise.
        """
        copied = map_tensors(lambda t: t, batch)
        versions = {id(t): version(t) for t in tensors_in(batch)}
        start: dict[str, Any] = {}

        def keep_state() -> None:
            start.update(random=RandomState.capture(self._device), state=self._state.capture(), buffers=self._buffers())

        everything = self._state.capture() if self._is_first else None
        with self._calls.observing(way, keep_state if way is not None else None):
            output = step()
        if everything is not None:
            self._state.find_changing(everything)
        loss = loss_of(output)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            self._calls.calls = []
            return UserStep(output)  # a skipped batch, or what Lightning has a word to say about
        predicted, wanted = self._predicted(copied, versions)
        recorded = self._recorded(copied, predicted, wanted, start) if way is not None else None
        self._calls.calls, self._is_first = [], False
        return UserStep(output, loss, predicted, recorded)

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Leave the modules' attributes as they are: the body predicts on other batches."""
        state = self._state.capture()
        try:
            yield
        finally:
            self._state.restore(state)

    def _predicted(self, batch: Any, versions: dict[int, int]) -> tuple[Predicted, list[tuple[int, int]]]:
        calls = self._calls

        def choose(left: Sequence[Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            return self._chosen(left, tensors_in((args, kwargs)), versions)

        if not calls.calls:
            raise ValueError(
                f"{self._name}.training_step predicts without calling a module under a graph, so that its predictions "
                "cannot be found. Call the module or a submodule; in a checkpoint around it, set `use_reentrant=False`."
            )
        with self._put_back(), torch.enable_grad(), calls.answering(choose):
            predictions, target, *weight = self._predict(map_tensors(lambda t: t, batch))
        if self._is_first:
            self._check(predictions, [target, *weight], versions)
        wanted = self._cut(predictions)
        answers = calls.answers
        outputs = [tensors_in(answers[i].output)[place] for i, place in wanted]
        leaves = [answers[i].leaves[place] for i, place in wanted]
        if len(wanted) == 1 and predictions is answers[wanted[0][0]].given[wanted[0][1]]:
            predictions = leaves[0]
        return Predicted(outputs, leaves, predictions, target, weight[0] if weight else None), wanted

    def _cut(self, predictions: Tensor) -> list[tuple[int, int]]:
        """Return the outputs that the predictions depend on, each by its answer and its place there."""
        answers = self._calls.answers
        shape = tuple(id(c.module) for c in answers)
        if shape not in self._wanted:
            leaves = {(i, place): leaf for i, c in enumerate(answers) for place, leaf in c.leaves.items()}
            gradients: Sequence[Any] = ()
            if predictions.requires_grad and leaves:
                zero = torch.zeros_like(predictions)
                gradients = torch.autograd.grad(
                    predictions, list(leaves.values()), zero, retain_graph=True, allow_unused=True
                )
            self._wanted[shape] = [key for key, gradient in zip(leaves, gradients) if gradient is not None]
        if not self._wanted[shape]:
            raise ValueError(
                f"the predictions of `adalfl_predict` do not come from what {self._name}.training_step computed: no "
                "module that it calls was called by the step with a gradient. Let both call the same modules, and do "
                "not detach or round the predictions."
            )
        return self._wanted[shape]

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """Leave random states and the modules' attributes, in the first step their buffers too, as the step did."""
        random: RandomState | TorchState
        if self._is_first or self._draws_elsewhere:
            random = RandomState.capture(self._device)
        else:
            random = TorchState.capture(self._device)
        state = self._state.capture()
        # Exchanged, since writing values back in place would spoil the graph of the step.
        is_exchanged = self._is_first or self._calls.has_run
        buffers = [(m, dict(m._buffers)) for m in self._calls.modules if m._buffers] if is_exchanged else []
        for module, own in buffers:
            module._buffers.update({name: None if b is None else b.clone() for name, b in own.items()})
        try:
            yield
        finally:
            for module, own in buffers:
                module._buffers.update(own)
            if isinstance(random, RandomState):
                self._draws_elsewhere = random.draws_elsewhere()
            random.restore()
            self._state.restore(state)

    def _chosen(self, left: Sequence[Call], given: list[Tensor], versions: dict[int, int]) -> Call:
        """Return the observed call that has the inputs that are given, or else the first; refuse changed inputs."""
        known = next((c for c in left if _identical(c.inputs, given)), None)
        if known is None and len(left) > 1:
            known = next((c for c in left if _equal(c.inputs, given)), None)
        known = left[0] if known is None else known
        if known.inputs_have_changed:
            raise ValueError(
                f"{self._name}.training_step changes an input of {type(known.module).__name__} in place after the "
                "call, so that the call cannot be evaluated again. Change a copy: `x = x.clone()`."
            )
        if not self._says_how:
            self._check_inputs(known, given, versions)
        return known

    def _check_inputs(self, known: Call, given: list[Tensor], versions: dict[int, int]) -> None:
        """Raise unless the step has predicted from the batch as ``adalfl_predict`` does."""
        answer = len(self._calls.answers)
        pairs = zip(known.inputs, known.versions, given)
        is_changed = len(known.inputs) != len(given)
        for i, (old, at_call, new) in enumerate(pairs):
            is_same = old is new and at_call == versions.get(id(old), at_call)
            was_same = self._same.setdefault((answer, i), is_same)
            if is_same or (old is not new and not self._is_first and not was_same and old.shape == new.shape):
                continue  # what was equal by value once is not read again, which would wait for an accelerator
            is_changed = is_changed or old is new or not _equal([old], [new])
        if is_changed:
            raise ValueError(
                f"{self._name}.training_step changes what it predicts from, as by normalisation, noise or mixup, before "
                f"it calls {type(known.module).__name__}; held-out batches would be predicted from unchanged inputs. "
                + _SAY_HOW.format(name=self._name, prepare="x")
            )

    def _check(self, predictions: Tensor, targets: list[Tensor], versions: dict[int, int]) -> None:
        if not predictions.is_floating_point():
            raise ValueError(
                f"the predictions of `adalfl_predict` must be floating point; got {predictions.dtype}. Return raw "
                "logits or values, not classes."
            )
        if any(isinstance(leaf, nn.Parameter) for leaf in leaves_of_graph(predictions)):
            raise ValueError(
                f"the predictions of `adalfl_predict` depend on a parameter that {self._name}.training_step uses "
                "outside of any module, or in other modules than `adalfl_predict`. Move it into a submodule or the "
                "forward, and call the same modules in both."
            )
        if not self._says_how and any(version(t) != versions.get(id(t), version(t)) for t in targets):
            raise ValueError(
                f"{self._name}.training_step changes the target in place, which held-out batches would not see. "
                + _SAY_HOW.format(name=self._name, prepare="y")
            )

    def _recorded(
        self, batch: Any, predicted: Predicted, wanted: list[tuple[int, int]], start: dict[str, Any]
    ) -> RecordedForward:
        calls, answers, state = self._calls, list(self._calls.answers), self._state

        def replay(using: Using) -> Sequence[Tensor]:
            now = state.capture()
            state.restore(start["state"])
            try:
                copied = map_tensors(lambda t: t, batch)
                return calls.evaluate(lambda: self._predict(copied), answers, wanted, using)
            finally:
                state.restore(now)

        outputs = [o.detach() for o in predicted.outputs]
        return RecordedForward(replay, start["random"], start["buffers"], outputs, predicted.target, predicted.weight)


def _identical(known: list[Tensor], given: list[Tensor]) -> bool:
    return len(known) == len(given) and all(a is b for a, b in zip(known, given))


def _equal(known: list[Tensor], given: list[Tensor]) -> bool:
    return len(known) == len(given) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(known, given)
    )
