"""Predictions and targets, pair by pair; a learned loss's gradient by them, and its vector-Jacobian product with φ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Pairs that are evaluated at once: what fits the cache of a processor, and more on an accelerator.
CHUNKS = {"cpu": 1 << 13, "other": 1 << 17}
EMBEDDING = 4  # numbers for a class


class Pairs:
    """Predictions and targets as the pairs (f_i, y_i) that a learned loss scores.

    Args:
        prediction: Probabilities for classification, raw values for regression.
        target: The same shape; in {0, 1} for classification, or probabilities. ``None`` where ``labels`` say it.
        weight: What each pair counts in a mean over the batch, of a shape that broadcasts to theirs.
        labels: Class indices, where they are known: the target is one for that class, along dimension 1.
        is_binary: Whether the targets are 0 or 1 by their kind, and not only in this batch.
    """

    def __init__(
        self,
        prediction: Tensor,
        target: Tensor | None,
        weight: Tensor,
        labels: Tensor | None = None,
        is_binary: bool = False,
    ) -> None:
        self.prediction, self.weight, self.labels = prediction, weight, labels
        self.is_binary = is_binary or labels is not None
        self._target = target

    @property
    def target(self) -> Tensor:
        """The targets; one-hot ones are made when they are asked for, since there may be many classes."""
        if self._target is None and self.labels is not None:
            self._target = torch.zeros_like(self.prediction).scatter_(1, self.labels.unsqueeze(1), 1.0)
        return self._target  # type: ignore[return-value]

    def by_class(self, values: Tensor) -> Tensor:
        """Return each instance's value out of one for each class, (N, 1, …), by its target."""
        if self.labels is not None:
            return values[self.labels].unsqueeze(1)
        return self.target.movedim(1, -1).matmul(values.to(self.target)).unsqueeze(1)

    def class_weights(self) -> Tensor:
        """Return what the targets of each class weigh together, (C,)."""
        return (self.target * self.weight).movedim(1, 0).flatten(1).sum(1)


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return an iterator over parts of tensors with the pairs' first dimension: memory does not grow with their number.

    Args:
        *tensors: The pairs, (N, ...), first, then others of that length.
    """
    first = tensors[0]
    rows = max(1, CHUNKS["cpu" if first.is_cpu else "other"] * len(first) // first.numel())
    return zip(*(tensor.split(rows) for tensor in tensors))


def evaluated(function: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """Return an element-wise function of pairs, chunk by chunk.

    The result is filled in place: small parts of it between large temporary tensors would break up the memory.
    """
    result = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    with torch.no_grad():
        for f, y, part in in_chunks(prediction, target, result):
            part.copy_(function(f, y))
    return result


class OutputGradient(ABC):
    """``∂ℓ_φ(y_i, f_i)/∂f_i`` of each pair, as a function of φ.

    Attributes:
        value: The gradient, of the shape of the pairs.
    """

    value: Tensor

    @abstractmethod
    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ Σ_i tangent_i · value_i``, by the parameters that learn; the tangent may be overwritten."""

    @abstractmethod
    def losses(self) -> Tensor:
        """Return ``ℓ_φ(y_i, f_i)`` of each pair, of their shape."""


class AutogradGradient(OutputGradient):
    """For any loss: by autograd, in chunks of instances.

    Args:
        pairwise: ℓ_φ, element-wise.
        phi: φ by name: what :meth:`vjp` is by.
        prediction: f, (N, ...).
        target: y, of that shape.
    """

    def __init__(
        self,
        pairwise: Callable[[Tensor, Tensor], Tensor],
        phi: Mapping[str, Tensor],
        prediction: Tensor,
        target: Tensor,
    ) -> None:
        self._pairwise = pairwise
        self._phi = dict(phi)
        self._pairs = prediction.detach(), target.detach()
        self.value = evaluated(partial(self._gradient, create_graph=False), *self._pairs)

    def losses(self) -> Tensor:
        """Return them chunk by chunk."""
        return evaluated(self._pairwise, *self._pairs)

    def _gradient(self, prediction: Tensor, target: Tensor, create_graph: bool) -> Tensor:
        with torch.enable_grad():
            leaf = prediction.detach().requires_grad_()
            total = self._pairwise(leaf, target).sum()
            (gradient,) = torch.autograd.grad(
                total, leaf, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        return gradient

    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return it by a second backward, chunk by chunk."""
        total = {name: torch.zeros_like(p) for name, p in self._phi.items()}
        for prediction, target, weight in in_chunks(*self._pairs, tangent):
            gradient = self._gradient(prediction, target, create_graph=True)
            if not total or not gradient.requires_grad:  # a loss that is linear in f has a gradient without φ
                continue
            parts = torch.autograd.grad(gradient, list(self._phi.values()), weight, allow_unused=True)
            for name, part in zip(self._phi, parts):
                if part is not None:  # a bias of the last layer moves the loss and not its gradient
                    total[name] += part
        return total


class NetworkGradient(OutputGradient):
    """For a network ``o = wᵀ a_L``, ``a_l = s(z_l)``, ``z_l = W_l a_{l-1} + b_l``, on inputs ``a_0(y, p)``.

    The backward pass is ``f_L = w``, ``e_l = s'(z_l) f_l``, ``f_{l-1} = W_lᵀ e_l``, and the gradient by p is
    ``f_0 · ∂a_0/∂p``. Its product with a tangent p' takes the tangents ``t_l = W_l τ_{l-1}``, ``τ_l = s'(z_l) t_l``
    from ``τ_0 = p' ∂a_0/∂p``, and the adjoints ``q_l = s''(z_l) t_l f_l + s'(z_l) W_{l+1}ᵀ q_{l+1}`` of z_l; then
    ``∂⟨m, p'⟩/∂W_l = Σ (e_l τ_{l-1}ᵀ + q_l a_{l-1}ᵀ)`` over the pairs. The embeddings enter z_1 by a sum.

    Args:
        loss: ℓ_φ, a :class:`~lightning_adalfl.losses.network.LossNetwork`.
        prediction: f.
        target: y.
    """

    def __init__(self, loss: Any, prediction: Tensor, target: Tensor) -> None:
        self._loss = loss
        self._pairs = prediction.detach(), target.detach()
        self._p, self._y = map(rows_of, self._pairs)
        # One pass is kept for the second derivative; of several, each is taken again, so that memory does not grow.
        self._kept: _Pass | None = None
        value = torch.empty_like(self._p)
        with torch.no_grad():
            for part, result in self._passes(value):
                result.copy_(part.by_prediction())
        self.value = pairs_of(value, prediction)

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Return them from the pass that was kept, or chunk by chunk, without derivatives."""
        if self._kept is None:
            return evaluated(self._loss.pairwise, *self._pairs)
        return pairs_of(self._kept.losses(), self._pairs[0])

    def _passes(self, others: Tensor) -> Iterator[tuple[_Pass, Tensor]]:
        """Yield the passes through the chunks of the pairs, each with its part of ``others``."""
        for p, y, other in in_chunks(self._p, self._y, others):
            part = self._kept or _Pass(self._loss, p, y)
            self._kept = part if len(p) == len(self._p) else None
            yield part, other

    @torch.no_grad()
    def vjp(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return ``∂/∂φ Σ_i tangent_i · value_i``; it is zero for the bias of the output."""
        total: dict[str, Tensor] = {}
        for part, weight in self._passes(rows_of(tangent)):
            for name, gradient in part.by_phi(weight.reshape(-1, 1)).items():
                total[name] = total[name] + gradient if name in total else gradient
        return {name: total[name] if name in total else torch.zeros_like(p) for name, p in self._loss.phi().items()}


class _Pass:
    """One pass through the network for pairs (R, C), with what both derivatives share."""

    def __init__(self, loss: Any, p: Tensor, y: Tensor) -> None:
        self._loss, self._p, self._y = loss, p, y
        self._weights: list[Tensor] = [layer.weight for layer in loss.linear]
        self._activation = loss.between
        self._inputs = loss.inputs(p, y)
        z = loss.first(self._inputs, y)
        self._a: list[Tensor] = []
        self._ds: list[Tensor] = []
        for layer in loss.linear[1:-1]:
            a, ds = self._activation.with_slope(z)
            self._a.append(a)
            self._ds.append(ds)
            z = layer(a)
        self._ds.append(self._activation.slope(z))
        self._z = z
        f = self._weights[-1]
        self._f, self._e = [f], [self._ds[-1] * f]
        for weight, ds in zip(reversed(self._weights[1:-1]), reversed(self._ds[:-1])):
            self._f.insert(0, self._e[0] @ weight)
            self._e.insert(0, ds * self._f[0])

    def losses(self) -> Tensor:
        """Return ℓ_φ, (R, C)."""
        return self._loss.linear[-1](self._activation(self._z)).view_as(self._p) * (self._loss.unit * self._loss.spread)

    def by_prediction(self) -> Tensor:
        """Return the gradient by p, (R, C)."""
        if not self._loss.sees_error:
            return (self._e[0] @ self._weights[0][:, 1]).view_as(self._p) * self._loss.unit
        return ((self._e[0] @ self._weights[0]) * self._by_prediction()).sum(1).view_as(self._p) * self._loss.unit

    def _by_prediction(self) -> Tensor:
        """Return ``∂a_0/∂p``, (R · C, inputs)."""
        return self._loss.inputs_by_prediction(self._inputs).view(-1, self._inputs.shape[-1])

    def by_phi(self, tangent: Tensor) -> dict[str, Tensor]:
        """Return the derivative by φ of the inner product with a tangent (R · C, 1)."""
        first, *middle, _ = self._weights
        tangent = tangent * self._loss.unit
        start = tangent * self._by_prediction()
        t, tau = [start @ first[:, : start.shape[1]].T], []
        for weight, ds in zip([*middle, None], self._ds):
            tau.append(ds * t[-1])
            if weight is not None:
                t.append(tau[-1] @ weight.T)
        found = {f"linear.{len(self._ds)}.weight": tau[-1].sum(0, keepdim=True)}
        q = self._adjoint(-1, t[-1])
        for k in range(len(middle), 0, -1):
            found[f"linear.{k}.weight"] = (q.T @ self._a[k - 1]).addmm_(self._e[k].T, tau[k - 1])
            found[f"linear.{k}.bias"] = q.sum(0)
            q = self._adjoint(k - 1, t[k - 1]).addcmul_(self._ds[k - 1], q @ self._weights[k])
        found["linear.0.bias"] = q.sum(0)
        by_weight = (q.T @ self._inputs.view_as(start)).addmm_(self._e[0].T, start)
        if self._loss.sees_classes:
            by_weight = torch.cat([by_weight, *self._by_embeddings(q.view(*self._p.shape, -1), found)], dim=1)
        return {**found, "linear.0.weight": by_weight}

    def _adjoint(self, k: int, t: Tensor) -> Tensor:
        return self._activation.curvature(self._ds[k]).mul_(t).mul_(self._f[k])

    def _by_embeddings(self, q: Tensor, found: dict[str, Tensor]) -> list[Tensor]:
        """Return the derivatives by what the first layer makes of either embedding; add those by the embeddings.

        Args:
            q: The adjoint of z_1, (R, C, width).
            found: To which they are added.
        """
        classes, parts = self._p.shape[1], self._weights[0][:, 2:].split(EMBEDDING, dim=1)
        if not self._loss.tells_apart(classes):
            return [torch.zeros_like(part) for part in parts]
        by_sum = {"label_embedding": self._y.T @ q.sum(1), "output_embedding": q.sum(0)}  # each (C, width)
        by_part = []
        for (name, adjoint), part, embedding in zip(by_sum.items(), parts, self._loss.embeddings(classes)):
            found[name] = torch.zeros_like(getattr(self._loss, name))
            found[name][:classes] = adjoint @ part
            by_part.append(adjoint.T @ embedding)
        return by_part


def rows_of(pairs: Tensor) -> Tensor:
    """Return pairs (N, C, d1, …) as (N · d1 · …, C), and (N,) as (N, 1)."""
    if pairs.ndim == 1:
        return pairs.unsqueeze(1)
    return pairs.movedim(1, -1).reshape(-1, pairs.shape[1])


def pairs_of(rows: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`rows_of`."""
    if like.ndim == 1:
        return rows.squeeze(1)
    return rows.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
