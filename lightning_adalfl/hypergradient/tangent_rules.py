"""Forward-mode rules for the layers that cost, with the base forward's own results as primals.

``torch.autograd.forward_ad`` computes every layer's value again beside its tangent. The base step has computed that
value already, so a convolution or matrix product needs two products and not three, and an activation one cheap kernel;
and a BatchNorm's tangent needs two fused kernels and not ten element-wise ones. Every other function goes to torch's
own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_adalfl.hypergradient.linear_factors import LinearFactors

# A result that took fewer multiplications a value is cheaper to compute again than to keep in memory ...
KEEP_FROM_MULTIPLICATIONS = 768
# ... unless the model is small: a tape takes results of so many as long as it is not larger than this.
SMALL_FROM_MULTIPLICATIONS = 64
SMALL_BYTES = 6 * 2**20


class PrimalTape:
    """The results of the base forward's costly functions, in the order of their calls."""

    def __init__(self) -> None:
        self._results: list[tuple[Tensor, int] | None] = []
        self._next = 0
        self._bytes = 0

    def keep(self, result: Tensor, multiplications: int) -> None:
        """Append a result that took so many multiplications a value, if it is worth its memory."""
        size = self._bytes + result.numel() * result.element_size()
        is_small = size <= SMALL_BYTES and multiplications >= SMALL_FROM_MULTIPLICATIONS
        if is_small or multiplications >= KEEP_FROM_MULTIPLICATIONS:
            self._bytes = size
            self._results.append((result.detach(), result._version))
        else:
            self._results.append(None)

    def take(self) -> Tensor | None:
        """Return the next result, or ``None`` if it was not kept or was overwritten in place since."""
        entry = self._results[self._next] if self._next < len(self._results) else None
        self._next += 1
        if entry is None or entry[0]._version != entry[1]:
            return None
        return entry[0]

    def rewind(self) -> None:
        """Begin again at the first call."""
        self._next = 0


class RecordPrimals(TorchFunctionMode):
    """Fill a tape with what the base forward computes."""

    def __init__(self, tape: PrimalTape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            self.tape.keep(result, weight.numel() // weight.shape[0])
        elif func in _AVERAGES or _is_activation(func, args, kwargs):
            # On a CPU a tanh or a pooling window takes about as long as this many multiplications; a ReLU takes none.
            self.tape.keep(result, 1 if func in _RELUS else SMALL_FROM_MULTIPLICATIONS)
        return result


class ReplayPrimals(TorchFunctionMode):
    """Apply the rules of this file to dual tensors, with a tape's results as primals.

    Args:
        tape: The results.
        factors: What the tangents of weights that are not dual are the product of, by the weights' ids.
    """

    def __init__(self, tape: PrimalTape, factors: Mapping[int, LinearFactors]) -> None:
        super().__init__()
        self.tape = tape
        self.factors = factors

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            # The model has stopped the gradient here, so that the base step did not see what follows.
            args, kwargs = tree_map_only(Tensor, _primal, (args, kwargs))
        if func in _PRODUCTS:
            return _product(func, self.tape.take(), self.factors, *args, **kwargs)
        if self.factors:
            # What is no linear layer here was one in the meta step's forward.
            args = tuple(self._dual(a) for a in args)
            kwargs = {name: self._dual(value) for name, value in kwargs.items()}
        if _is_activation(func, args, kwargs):
            return _activation(func, self.tape.take(), *args, **kwargs)
        if func in _AVERAGES:
            return _average(func, self.tape.take(), *args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _dual(self, value: Any) -> Any:
        factors = self.factors.get(id(value))
        return value if factors is None else forward_ad.make_dual(value, factors.product())


_PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_RELUS = (F.relu, torch.relu, Tensor.relu)
_AVERAGES = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
# The derivative of each of these follows from its value y alone; the kernel returns it times the tangent.
_ACTIVATIONS: dict[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys((torch.tanh, Tensor.tanh), torch.ops.aten.tanh_backward),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), torch.ops.aten.sigmoid_backward),
    **dict.fromkeys(_RELUS, partial(torch.ops.aten.threshold_backward, threshold=0)),
}


def _is_activation(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    # In place, the input must carry the tangent afterwards; torch sees to that.
    in_place = args[1] if len(args) > 1 else (kwargs or {}).get("inplace", False)
    return func in _ACTIVATIONS and not in_place


def _primal(value: Tensor) -> Tensor:
    return forward_ad.unpack_dual(value).primal


def _unpack(value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if value is None:
        return None, None
    primal, tangent = forward_ad.unpack_dual(value)
    return primal, tangent


def _product(
    func: Callable[..., Tensor],
    kept: Tensor | None,
    factors: Mapping[int, LinearFactors],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *options: Any,
    **more: Any,
) -> Tensor:
    """Bilinear in input and weight: the tangent of ``x * w + b`` is ``x * w' + b' + x' * w``."""
    x, x_tangent = _unpack(input)
    w, w_tangent = _unpack(weight)
    b, b_tangent = _unpack(bias)
    primal = func(x, w, b, *options, **more) if kept is None else kept
    terms = []
    factored = factors.get(id(weight))
    if factored is not None and x is not None:
        terms.append(factored.transposed_times(x, b_tangent))
        b_tangent = None
    elif w_tangent is not None:
        terms.append(func(x, w_tangent, b_tangent, *options, **more))
        b_tangent = None
    if x_tangent is not None:
        terms.append(func(x_tangent, w, None, *options, **more))
    if not terms and b_tangent is None:
        return primal
    tangent = terms[0] if terms else torch.zeros_like(primal)
    if len(terms) == 2:
        tangent += terms[1]
    if b_tangent is not None:
        tangent = tangent + b_tangent.view(-1, *[1] * (w.ndim - 2))  # type: ignore[union-attr]
    return forward_ad.make_dual(primal, tangent.to(primal.dtype))


def _activation(func: Callable[..., Tensor], kept: Tensor | None, input: Tensor, inplace: bool = False) -> Tensor:
    x, x_tangent = _unpack(input)
    primal = func(x) if kept is None else kept
    return primal if x_tangent is None else forward_ad.make_dual(primal, _ACTIVATIONS[func](x_tangent, primal))


def _average(func: Callable[..., Tensor], kept: Tensor | None, input: Tensor, *options: Any, **more: Any) -> Tensor:
    """Linear, so that the tangent of the average is the average of the tangent."""
    x, x_tangent = _unpack(input)
    primal = func(x, *options, **more) if kept is None else kept
    return primal if x_tangent is None else forward_ad.make_dual(primal, func(x_tangent, *options, **more))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / ‖v‖``, whose fused kernel has no forward mode; the norm is over all dimensions but ``dim``, if not -1."""
    others = [d for d in range(v.ndim) if d != dim]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The Jacobian of normalisation is symmetric per channel, so the fused backward kernel is its forward mode too."""
    x, x_tangent = _unpack(input)
    w, w_tangent = _unpack(weight)
    b, b_tangent = _unpack(bias)
    # Under autocast x may be narrower than the weights, which the fused backward does not take on every device.
    if not training or x is None or (w is not None and w.dtype != x.dtype):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    output, mean, inverse_std = torch.native_batch_norm(x, w, b, None, None, True, momentum, eps)
    tangent = None
    if x_tangent is not None:
        tangent, _, _ = torch.ops.aten.native_batch_norm_backward(
            x_tangent, x, w, None, None, mean, inverse_std, True, eps, [True, False, False]
        )
    if w_tangent is not None or b_tangent is not None:
        variance = inverse_std.reciprocal().square_().sub_(eps)
        scale = torch.zeros_like(mean) if w_tangent is None else w_tangent
        affine = F.batch_norm(x, mean, variance, scale, b_tangent, False, momentum, eps)
        tangent = affine if tangent is None else tangent.add_(affine)
    return output if tangent is None else forward_ad.make_dual(output, tangent)
