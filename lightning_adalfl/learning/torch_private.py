"""What torch does not promise, in one place; a test of each fails when torch changes."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

# The tangent of an activation times its derivative, from the activation's own result.
TANGENT_RULES: dict[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys((torch.tanh, Tensor.tanh), torch.ops.aten.tanh_backward),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), torch.ops.aten.sigmoid_backward),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), partial(torch.ops.aten.threshold_backward, threshold=0)),
}
weight_norm: Callable[..., Tensor] = torch._weight_norm
if hasattr(torch.utils.checkpoint, "_NoopSaveInputs"):  # by which older torch notes the inputs of a checkpoint
    torch.utils.checkpoint._NoopSaveInputs.jvp = staticmethod(lambda ctx, *tangents: torch.zeros(0))

# Handed a module, what a call of it runs, and the arguments.
CallHandler = Callable[..., Any]


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return BatchNorm in training mode, with the mean and the inverse standard deviation of each channel."""
    return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)


def batch_norm_input_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    """Return the gradient of BatchNorm in training mode by its input."""
    by_input, _, _ = torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, None, None, mean, inverse_std, True, eps, [True, False, False]
    )
    return by_input


def version(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers and dataclasses, in their order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return copies of nested containers and dataclasses, with ``function`` of each tensor in its place."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            twin = copy.copy(leaf)
            for name in (f.name for f in dataclasses.fields(leaf) if hasattr(leaf, f.name)):
                object.__setattr__(twin, name, map_tensors(function, getattr(leaf, name)))
            return twin
        return leaf

    return tree_map(of_leaf, value)


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of a module go through the compiler."""
    dynamo = sys.modules.get("torch._dynamo")
    return module._compiled_call_impl is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))


class _Interception(partial[Any]):
    """What stands in the place of a module's call; a copy of the module, made meanwhile, has its own call again."""

    def __reduce__(self) -> Any:
        return getattr, (self.args[0], "_call_impl")


class InterceptedCalls:
    """Hands every call of some modules to a function, in place of the module; hooks and the compiler are behind it.

    Args:
        modules: The modules.
        handler: ``handler(module, call, *args, **kwargs)``, where ``call`` is what would have run.
    """

    def __init__(self, modules: Iterable[nn.Module], handler: CallHandler) -> None:
        self._entries: list[tuple[dict[str, Any], str, Any, Any]] = []
        for module in modules:
            name = "_call_impl" if module._compiled_call_impl is None else "_compiled_call_impl"
            wrapped = _Interception(handler, module, getattr(module, name))
            self._entries.append((module.__dict__, name, module.__dict__.get(name), wrapped))

    def __enter__(self) -> None:
        for attributes, name, _, wrapped in self._entries:
            attributes[name] = wrapped

    def __exit__(self, *_: object) -> None:
        for attributes, name, own, _ in self._entries:
            if own is None:
                attributes.pop(name, None)
            else:
                attributes[name] = own


@contextmanager
def recurrence_by_steps() -> Iterator[None]:
    """Let recurrent layers in the body go step by step: the fused kernels of oneDNN and cuDNN have no forward mode."""
    with ExitStack() as stack:
        for backend in (torch.backends.mkldnn, torch.backends.cudnn):
            stack.callback(setattr, backend, "enabled", backend.enabled)
            backend.enabled = False  # type: ignore[attr-defined]
        yield


def checkpoints_run_through() -> AbstractContextManager[None]:
    """Let reentrant checkpoints in the body keep their activations: they would pass no tangent."""
    return _checkpoints(lambda run, preserve, *args: run(*args))


def checkpoints_not_reentrant() -> AbstractContextManager[None]:
    """Let reentrant checkpoints in the body be those of the other kind, which ``torch.autograd.grad`` accepts."""
    checkpoint = torch.utils.checkpoint.checkpoint
    return _checkpoints(lambda run, preserve, *args: checkpoint(run, *args, use_reentrant=False))


@contextmanager
def _checkpoints(apply: Callable[..., Any]) -> Iterator[None]:
    function = torch.utils.checkpoint.CheckpointFunction
    function.apply = apply
    try:
        yield
    finally:
        del function.apply


def graph_nodes(tensor: Tensor) -> Iterator[Any]:
    """Yield the nodes of a tensor's graph."""
    seen: set[Any] = {None}
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [parent for parent, _ in node.next_functions]


def leaves_of_graph(tensor: Tensor) -> list[Tensor]:
    """Return the leaves that a tensor's graph leads to."""
    return [node.variable for node in graph_nodes(tensor) if hasattr(node, "variable")]


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm over a list of tensors."""
    return whole(torch.nn.utils.get_total_norm(tensors))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return a tensor with the parts of all processes; all of them must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def here(tensors: Sequence[Any]) -> list[Tensor]:
    """Return the parts of tensors that this process holds."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]


def dot(a: Sequence[Tensor], b: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """Return ``⟨a, b⟩`` over lists of tensors, in double precision, where the device has it."""
    device = device or a[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    return sum((_dot(x, y).to(wide) for x, y in zip(a, b)), torch.zeros((), dtype=wide, device=device))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    if is_sharded(a):
        return whole((a.to(dtype) * b.to(dtype)).sum())
    a, b = a.flatten().to(dtype), b.flatten().to(dtype)
    # torch's gradient by a complex parameter is that of both its parts.
    return torch.vdot(a, b).real if dtype.is_complex else torch.dot(a, b)
