"""``h = J_t u`` by forward-mode AD, with rules for the layers that cost.

``torch.autograd.forward_ad`` computes every layer's value again beside its tangent. The base step has computed that
value already, so a convolution or matrix product needs two products and not three, and an activation one cheap kernel;
and a BatchNorm's tangent needs two fused kernels and not ten element-wise ones. Every other function goes to torch's
own rules.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from lightning_adalfl.learning.jvp import JacobianProduct
from lightning_adalfl.learning.recorded_forward import Model, RecordedForward
from lightning_adalfl.learning.torch_private import (
    TANGENT_RULES,
    batch_norm,
    batch_norm_input_gradient,
    is_compiled,
    map_tensors,
    recurrence_by_steps,
    version,
    weight_norm,
)

# A result of fewer multiplications a value is computed again, if nobody else keeps it as one does predictions ...
KEEP_FROM_MULTIPLICATIONS = 768
# ... unless the model is small: a tape takes results of so many as long as it is not larger than this.
SMALL_FROM_MULTIPLICATIONS = 64
SMALL_BYTES = 6 * 2**20


class ForwardModeError(RuntimeError):
    """The model has an operation without forward-mode AD, or one that lets no tangent pass."""


class ForwardMode(JacobianProduct):
    """Exact; dual tensors in a forward, with the results that the base forward has kept."""

    @contextmanager
    def keeping(self, module: nn.Module) -> Iterator[PrimalTape | None]:
        """Yield a tape that the body fills; none for a compiled module, whose calls do not show."""
        if any(is_compiled(part) for part in module.modules()):
            yield None
            return
        tape = PrimalTape()
        with _RecordPrimals(tape):
            yield tape

    def using(self, kept: PrimalTape | None) -> AbstractContextManager[Any]:
        """Return a context in which the tape's results are the primals of dual tensors."""
        tape = PrimalTape() if kept is None else kept
        tape.next = 0
        return _ReplayPrimals(tape)

    def __call__(
        self, model: Model, forward: RecordedForward, before: Mapping[int, Tensor], direction: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the tangents of the outputs.

        Raises:
            ForwardModeError: If an operation has no forward-mode derivative; says what works instead.
        """
        _load_decompositions()
        # No parameter asks for a gradient, so there is no graph; where the model itself forbids one, no tangent passes.
        with torch.enable_grad(), forward_ad.dual_level():
            duals = {i: forward_ad.make_dual(p, u) for (i, p), u in zip(before.items(), direction)}
            try:
                tangents = [forward_ad.unpack_dual(o).tangent for o in self._run(model, forward, duals)]
            except RuntimeError as error:
                if isinstance(error, NotImplementedError) or any(words in str(error) for words in _OF_FORWARD_MODE):
                    raise _no_forward_mode(error) from error
                raise
            if any(tangent is None for tangent in tangents):
                raise ForwardModeError(
                    "the predictions depend on the parameters, and no derivative reached them in forward mode: a part "
                    "of the model hides it, such as a custom autograd Function without a `jvp`. Write its `jvp`, or "
                    "choose `hypergradient='reverse'`."
                )
            return [tangent.detach() for tangent in tangents]


@functools.cache
def _load_decompositions() -> None:
    # torch scripts some decompositions at the first dual tensor, and warns that scripting is deprecated.
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


# The last two where the model takes a gradient in its own forward, whose graph does not lead to what it asks for.
_OF_FORWARD_MODE = ("forward AD", "forward mode", "does not require grad", "not have been used in the graph")


def _no_forward_mode(error: Exception) -> ForwardModeError:
    reason = str(error).splitlines()[0]
    other = ", or 'finite_difference', which needs no derivative but holds for smooth operations only"
    # The backward of a user's own Function may be another than its forward's, which a difference does not see.
    return ForwardModeError(
        f"an operation of the model has no forward-mode derivative ({reason}); choose `hypergradient='reverse'`, a "
        f"second backward{'' if 'autograd.Function' in reason else other}."
    )


class PrimalTape:
    """The results of the base forward's costly functions, in the order of their calls; ``next`` is taken next."""

    def __init__(self) -> None:
        self._results: list[tuple[Tensor | weakref.ref[Tensor] | None, int]] = []
        self.next = 0
        self._bytes = 0

    def keep(self, result: Tensor, multiplications: int) -> None:
        """Append a result that took so many multiplications a value; hold on to it if it is worth its memory."""
        size = self._bytes + result.numel() * result.element_size()
        is_small = size <= SMALL_BYTES and multiplications >= SMALL_FROM_MULTIPLICATIONS
        if is_small or multiplications >= KEEP_FROM_MULTIPLICATIONS:
            self._bytes = size
            self._results.append((result.detach(), version(result)))
        elif torch.compiler.is_compiling():  # which knows neither weak references nor versions
            self._results.append((None, 0))
        else:
            self._results.append((weakref.ref(result), version(result)))

    def take(self) -> Tensor | None:
        """Return the next result, or ``None`` if it is gone or was overwritten in place since."""
        found, then = self._results[self.next] if self.next < len(self._results) else (None, 0)
        self.next += 1
        result = found() if isinstance(found, weakref.ref) else found
        return None if result is None or version(result) != then else result.detach()


class _RecordPrimals(TorchFunctionMode):
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


class _ReplayPrimals(TorchFunctionMode):
    """Apply the rules of this file to dual tensors, with a tape's results as primals."""

    def __init__(self, tape: PrimalTape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            # The model has stopped the gradient here, so that the base step did not see what follows.
            args, kwargs = map_tensors(lambda t: forward_ad.unpack_dual(t).primal, (args, kwargs))
        if func in _PRODUCTS:
            return _product(func, self.tape.take(), *args, **kwargs)
        if func in _AVERAGES or _is_activation(func, args, kwargs):
            return _of_one(func, self.tape.take(), *args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is weight_norm:
            return _weight_norm(*args, **kwargs)
        with recurrence_by_steps() if func in _RECURRENT else nullcontext():
            return func(*args, **kwargs)


_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_RELUS = (F.relu, torch.relu, Tensor.relu)
_AVERAGES = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}


def _is_activation(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    # In place, the input must carry the tangent afterwards; torch sees to that.
    in_place = args[1] if len(args) > 1 else (kwargs or {}).get("inplace", False)
    return func in TANGENT_RULES and not in_place


def _unpack(value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if value is None else forward_ad.unpack_dual(value)


def _product(
    func: Callable[..., Tensor],
    kept: Tensor | None,
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
    if w_tangent is not None:
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


def _of_one(func: Callable[..., Tensor], kept: Tensor | None, input: Tensor, *options: Any, **more: Any) -> Tensor:
    """An activation by its rule, or an average: linear, so that its tangent is the average of the tangent."""
    x, x_tangent = _unpack(input)
    primal = func(x, *options, **more) if kept is None else kept
    if x_tangent is None:
        return primal
    rule = TANGENT_RULES.get(func)
    return forward_ad.make_dual(primal, rule(x_tangent, primal) if rule else func(x_tangent, *options, **more))


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
    output, mean, inverse_std = batch_norm(x, w, b, eps)
    tangent = None
    if x_tangent is not None:
        tangent = batch_norm_input_gradient(x_tangent, x, w, mean, inverse_std, eps)
    if w_tangent is not None or b_tangent is not None:
        variance = inverse_std.reciprocal().square_().sub_(eps)
        scale = torch.zeros_like(mean) if w_tangent is None else w_tangent
        affine = F.batch_norm(x, mean, variance, scale, b_tangent, False, momentum, eps)
        tangent = affine if tangent is None else tangent.add_(affine)
    return output if tangent is None else forward_ad.make_dual(output, tangent)
