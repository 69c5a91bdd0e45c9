"""The gradient of a linear layer's weight as the product of two thin matrices, which need not be multiplied.

``∂L/∂W = δᵀ a`` with the layer's inputs a, (n, in), and the gradient δ by its outputs, (n, out). The hypergradient asks
for ``x (∂L/∂W)ᵀ`` alone, and ``(x aᵀ) δ`` costs less than that wherever a batch has fewer instances than the layer is
wide: an exact meta step then costs less than one ordinary step and two thirds, which is the limit if v is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LinearFactors(NamedTuple):
    """``∂L/∂W = gradientsᵀ inputs``.

    Attributes:
        inputs: a, shape (n, in).
        gradients: δ, shape (n, out).
    """

    inputs: Tensor
    gradients: Tensor

    def transposed_times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x (∂L/∂W)ᵀ + bias`` for x of shape (..., in)."""
        return F.linear(x @ self.inputs.T, self.gradients.T, bias)

    def product(self) -> Tensor:
        """Return ``∂L/∂W``."""
        return self.gradients.T @ self.inputs

    def squared_norm(self) -> Tensor:
        """Return ``‖∂L/∂W‖²``, the inner product of the two Gram matrices."""
        return ((self.inputs @ self.inputs.T) * (self.gradients @ self.gradients.T)).sum()


class FactorLinear(TorchFunctionMode):
    """Keeps the weights of wide linear layers out of a graph, and what their gradients are the product of.

    Args:
        parameters: θ; layers with other weights are left as they are.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._parameters = list(parameters)
        self._index = {id(p): i for i, p in enumerate(parameters) if p.ndim == 2}
        self._calls: list[tuple[int, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        index = self._index.get(id(weight))
        if index is None or not _pays(input, weight):
            return F.linear(input, weight, bias)
        # One bias for each instance: its gradient is δ, whatever happens to the outputs in place afterwards.
        biases = (weight.new_zeros(1) if bias is None else bias).expand(len(input), len(weight))
        if not biases.requires_grad:
            biases.requires_grad_()
        self._calls.append((index, input.detach(), biases))
        return torch.addmm(biases, input, weight.detach().T)

    def gradients(self, value: Tensor) -> tuple[list[Tensor | None], dict[int, LinearFactors]]:
        """Differentiate ``value``, which was computed under this mode; call it there, for checkpointed layers.

        Returns:
            The gradient by each parameter, and by index those that are left as factors and ``None`` in the first.
        """
        calls = list(self._calls)
        wanted = [*self._parameters, *(biases for _, _, biases in calls)]
        found: list[Tensor | None] = list(torch.autograd.grad(value, wanted, allow_unused=True))
        explicit, by_outputs = found[: len(self._parameters)], found[len(self._parameters) :]
        parts: dict[int, list[LinearFactors]] = {}
        for (index, inputs, _), gradients in zip(calls, by_outputs):
            if gradients is not None:
                parts.setdefault(index, []).append(LinearFactors(inputs, gradients))
        factors: dict[int, LinearFactors] = {}
        for index, some in parts.items():
            known = explicit[index]
            if known is None:
                factors[index] = some[0] if len(some) == 1 else LinearFactors(*map(torch.cat, zip(*some)))
            else:  # it is used in another way as well
                explicit[index] = known + sum(part.product() for part in some)
        return explicit, factors


class MoveLinear(TorchFunctionMode):
    """Evaluates linear layers as if their weights had been moved along their factors.

    Args:
        factors: By the weights' ids.
        step: How far, a scalar.
    """

    def __init__(self, factors: Mapping[int, LinearFactors], step: Tensor) -> None:
        super().__init__()
        self._factors = factors
        self._step = step

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        # What is no linear layer here was one in the meta step's forward.
        return func(*map(self._moved, args), **{name: self._moved(value) for name, value in kwargs.items()})

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        factors = self._factors.get(id(weight))
        result = F.linear(input, weight, bias)
        return result if factors is None else result.addcmul_(factors.transposed_times(input), self._step)

    def _moved(self, value: Any) -> Any:
        factors = self._factors.get(id(value))
        return value if factors is None else value + self._step * factors.product()


def _pays(input: Tensor, weight: Tensor) -> bool:
    """Whether the factors take less than half the multiplications, for a base batch as large as this one."""
    if input.ndim != 2 or input.dtype != weight.dtype:
        return False
    outputs, inputs = weight.shape
    return len(input) * (inputs + outputs) < inputs * outputs
