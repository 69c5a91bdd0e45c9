"""``h = J_t u``, the derivative of a base forward along a direction in parameter space: three ways, one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_adalfl.learning.recorded_forward import Model, Predict, RecordedForward, Using
from lightning_adalfl.learning.torch_private import checkpoints_run_through, here, norm

T = TypeVar("T")
Then = Callable[[list[Tensor]], list[Tensor]]


class JacobianProduct(ABC):
    """A way to compute h.

    Attributes:
        is_exact: Whether its error is rounding alone.
        runs_compiled: Whether compiled parts of a model run compiled; else they run as the Python that they were.
    """

    is_exact = True
    runs_compiled = False

    def keeping(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Return a context for the base forward of a module; what it yields is handed to :meth:`using`."""
        return nullcontext()

    def using(self, kept: Any) -> AbstractContextManager[Any]:
        """Return a context for the same forward when it runs again."""
        return nullcontext()

    def check(self, model: Model, forward: RecordedForward, before: Mapping[int, Tensor]) -> None:
        """Raise a ``ValueError`` if the forward cannot be run again with the same result; it costs a forward."""
        with torch.no_grad():
            again = self._run(model, forward, before, using=lambda kept: self.using(None))
        for new, old in zip(again, forward.outputs):
            # Half of the digits, since another kernel may have rounded otherwise; a GPU's own have ten bits (TF32).
            tolerance = max(torch.finfo(old.dtype).eps, 2.0**-10 * (old.is_cuda and old.dtype == torch.float32)) ** 0.4
            if new.shape != old.shape or not torch.allclose(new, old, tolerance, tolerance, equal_nan=True):
                raise ValueError(
                    "the forward of the base step gives another result when it is run again, so that its derivative "
                    "would be wrong. Look for what it draws or keeps outside torch's, NumPy's and Python's global "
                    "generators and its own attributes, for dropout in a compiled part or in fused attention on an "
                    "accelerator (`hypergradient='finite_difference'` runs both as they are), or for a step that "
                    "changes features between two parts of the model. Or set `meta_every=None`."
                )

    @abstractmethod
    def __call__(
        self, model: Model, forward: RecordedForward, before: Mapping[int, Tensor], direction: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return h.

        Args:
            model: The base model as a function of θ.
            forward: The base forward to differentiate.
            before: θ_t, by index.
            direction: u, one tensor for each of ``before``.

        Returns:
            Tensors of the shapes of the forward's outputs.
        """

    def _run(
        self,
        model: Model,
        forward: RecordedForward,
        values: Mapping[int, Tensor],
        then: Then | None = None,
        using: Using | None = None,
    ) -> list[Tensor]:
        using = using or self.using
        if not self.runs_compiled:
            return run_plain(model, forward, values, using, then)
        with checkpoints_run_through():
            return model.at(forward, values, using, then)


def run_plain(
    model: Model, forward: RecordedForward, values: Mapping[int, Tensor], using: Using, then: Then | None = None
) -> list[Tensor]:
    """Return the outputs of a recorded forward at other values of θ, by operations that can be differentiated again.

    Compiled parts and fused attention know neither dual tensors nor a second backward.

    Args:
        model: The base model.
        forward: The base forward.
        values: Values of θ by their index.
        using: See :attr:`RecordedForward.replay`.
        then: What is to be made of the outputs while the values are in place, as checkpoints need it.
    """
    with checkpoints_run_through(), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        return model.at(forward, values, using, then)


class FiniteDifference(JacobianProduct):
    """``(f(θ + δu) - f(θ)) / δ``: one forward, no AD; f(θ) is what the base forward gave.

    The parameters are moved by the square root of the precision of the outputs in Euclidean norm, 3e-4 in float32,
    which balances rounding and curvature.
    """

    is_exact = False
    runs_compiled = True

    @torch.no_grad()
    def __call__(
        self, model: Model, forward: RecordedForward, before: Mapping[int, Tensor], direction: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the difference."""
        size = torch.finfo(forward.outputs[0].dtype).eps ** 0.5
        length = norm(direction)
        # A zero direction has the derivative zero; the clamp keeps it from becoming 0/0.
        step = size / length.clamp_min(torch.finfo(length.dtype).tiny)
        moved = torch._foreach_mul(list(direction), step)
        torch._foreach_add_(moved, list(before.values()))
        outputs = self._run(model, forward, dict(zip(before, moved)))
        # A logit that a mask has made infinite stays so.
        return [torch.where(a == b, 0.0, (a - b) / step.to(a.dtype)) for a, b in zip(outputs, forward.outputs)]


class DoubleBackward(JacobianProduct):
    """u through a second backward: exact, and as general as the model's own backward; the name is ``"reverse"``."""

    def __call__(
        self, model: Model, forward: RecordedForward, before: Mapping[int, Tensor], direction: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the derivative by w of ``⟨Jᵀ w, u⟩``."""
        values = {i: p.detach().requires_grad_() for i, p in before.items()}

        def twice_transposed(outputs: list[Tensor]) -> list[Tensor]:
            vectors = [torch.zeros_like(o).requires_grad_() for o in outputs]
            transposed = torch.autograd.grad(
                outputs, list(values.values()), vectors, create_graph=True, materialize_grads=True, allow_unused=True
            )
            pairs = [(t, u) for t, u in zip(transposed, direction) if t.requires_grad]
            product = torch.autograd.grad(
                [t for t, _ in pairs], vectors, [u for _, u in pairs], allow_unused=True, materialize_grads=True
            )
            return list(product)

        with torch.enable_grad():
            return self._run(model, forward, values, twice_transposed)


class ShardedModel(Model):
    """A module under ``fully_shard``, whose hooks gather the parameters' own memory, and reduce ``.grad``."""

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], predict: Predict) -> None:
        self._parameters, self._module = list(parameters), module
        super().__init__(module, parameters, predict)
        part: Any
        for part in module.modules():
            if hasattr(part, "set_reshard_after_forward"):
                # The outermost keeps what it has gathered; a forward at other values would not see them.
                part.set_reshard_after_forward(True, recurse=False)

    def run(
        self, function: Callable[[], T], buffers: Mapping[str, Tensor], values: Mapping[int, Tensor] | None = None
    ) -> T:
        """Run it with values of θ put into the parameters, and back."""
        chosen = [p.detach() for p in here([self._parameters[i] for i in values or ()])]
        now = [p.clone() for p in chosen]
        try:
            for p, value in zip(chosen, here(list((values or {}).values()))):
                p.copy_(value.detach())
            return super().run(function, buffers)
        finally:
            for p, value in zip(chosen, now):
                p.copy_(value)

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor], again: bool = False) -> Sequence[Tensor | None]:
        """Return the gradients, averaged over processes as those of a base step."""
        known = [(p, p.grad) for p in self._module.parameters()]
        for p, _ in known:
            p.grad = None
        try:
            loss.backward(retain_graph=again)
            return [p.grad for p in parameters]
        finally:
            for p, gradient in known:
                p.grad = gradient
