"""Two ways to get ``h = J_t u``, the derivative of the predictions along a direction in parameter space."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_adalfl.hypergradient.forward_trace import ForwardTrace
from lightning_adalfl.hypergradient.functional import FunctionalModel
from lightning_adalfl.hypergradient.linear_factors import LinearFactors, MoveLinear
from lightning_adalfl.hypergradient.tangent_rules import PrimalTape, ReplayPrimals


class ForwardModeError(RuntimeError):
    """The model has an operation without forward-mode AD."""


def forward_mode(
    model: FunctionalModel,
    trace: ForwardTrace,
    parameters: Mapping[int, Tensor],
    direction: Sequence[Tensor],
    factors: Mapping[int, LinearFactors] | None = None,
) -> Tensor:
    """Return ``J u`` by forward-mode AD, exact, of the shape of the predictions.

    Args:
        model: The base model as a function of θ.
        trace: The base forward to differentiate.
        parameters: θ_t by index.
        direction: u, one tensor for each of ``parameters``.
        factors: What u is the product of, by index, for weights whose element of ``direction`` is not to be used.

    Raises:
        ForwardModeError: If an operation has no forward-mode derivative; says what works instead.
    """
    _load_decompositions()
    with ExitStack() as stack:
        # No parameter asks for a gradient, so there is no graph; where the model itself forbids one, no tangent passes.
        stack.enter_context(torch.enable_grad())
        stack.enter_context(forward_ad.dual_level())
        # Fused attention has no forward mode on any device; the plain formula has.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(trace.random_state.replayed())
        factors = factors or {}
        duals = {
            i: p if i in factors else forward_ad.make_dual(p, t) for (i, p), t in zip(parameters.items(), direction)
        }
        by_weight = {id(parameters[i]): product for i, product in factors.items() if i in parameters}
        tape = PrimalTape() if trace.tape is None else trace.tape
        tape.rewind()
        stack.enter_context(ReplayPrimals(tape, by_weight))
        try:
            predictions, _ = model(trace.batch, trace.buffers, duals)
        except NotImplementedError as error:
            raise _no_forward_mode(error) from error
        except RuntimeError as error:
            if "forward AD" not in str(error) and "forward mode" not in str(error):
                raise
            raise _no_forward_mode(error) from error
        tangent = forward_ad.unpack_dual(predictions).tangent
        return torch.zeros_like(trace.predictions) if tangent is None else tangent.detach()


@functools.cache
def _load_decompositions() -> None:
    # torch scripts some decompositions at the first dual tensor, and warns that scripting is deprecated.
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def _no_forward_mode(error: Exception) -> ForwardModeError:
    return ForwardModeError(
        "an operation of the model has no forward-mode derivative "
        f"({str(error).splitlines()[0]}); choose `hypergradient='finite_difference'`, which needs none."
    )


def moved_parameters(
    parameters: Mapping[int, Tensor],
    direction: Sequence[Tensor],
    epsilon: float,
    factors: Mapping[int, LinearFactors] | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Return ``θ + δu`` with ``δ = epsilon / ‖u‖``, and δ; where it can, it is written over ``direction``.

    Weights whose u is given by ``factors`` stay where they are.
    """
    factors = {i: product for i, product in (factors or {}).items() if i in parameters}
    direction = _writable([t for i, t in zip(parameters, direction) if i not in factors])
    whole = [i for i in parameters if i not in factors]
    with torch.no_grad():
        norms = [*torch._foreach_norm(direction), *(f.squared_norm().sqrt() for f in factors.values())]
        norm = torch.stack(norms).norm()
        # A zero direction has the derivative zero; the clamp keeps it from becoming 0/0.
        step = epsilon / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        if direction:
            torch._foreach_mul_(direction, step)
            torch._foreach_add_(direction, [parameters[i] for i in whole])
        return {**parameters, **dict(zip(whole, direction))}, step


def _writable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return ``tensors``, or copies of those that share memory: parameters that are added have one gradient."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        shared = tensor.data_ptr() in seen or 0 in tensor.stride()
        seen.add(tensor.data_ptr())
        result.append(tensor.clone(memory_format=torch.contiguous_format) if shared else tensor)
    return result


def finite_difference(
    model: FunctionalModel,
    trace: ForwardTrace,
    moved: Mapping[int, Tensor],
    step: Tensor,
    factors: Mapping[int, LinearFactors] | None = None,
) -> Tensor:
    """Return ``J u ≈ (f(θ + δu) - f(θ)) / δ``: one forward pass, no AD; f(θ) is what the base forward gave.

    Args:
        model: The base model as a function of θ.
        trace: The base forward to differentiate.
        moved: ``θ + δu`` by index.
        step: δ, a scalar.
        factors: What u is the product of, by index, for weights that are not moved.
    """
    by_weight = {id(moved[i]): product for i, product in (factors or {}).items() if i in moved}
    with torch.no_grad(), trace.random_state.replayed(), MoveLinear(by_weight, step) if by_weight else nullcontext():
        predictions, _ = model(trace.batch, trace.buffers, moved)
        return (predictions - trace.predictions) / step.to(predictions.dtype)
