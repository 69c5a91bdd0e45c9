"""What one base forward's backward descends, and what the hypergradient needs of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_adalfl.losses.predicted import Predicted


class Descent(ABC):
    """What one base forward's backward descends, and its derivative by φ.

    Args:
        loss: What the backward starts from.
        predicted: Of the forward.

    Attributes:
        loss, predicted: As above.
        scale: k, the factor that accumulation, a gradient scaler or the user puts on the loss; known once the backward
            has run, ``None`` before.
        own: τ, the gradient of the user's loss by each output, once the backward has run.
        is_reached: Whether the backward has come to an output.
    """

    def __init__(self, loss: Tensor, predicted: Predicted) -> None:
        self.loss = loss
        self.predicted = predicted
        self.scale: Tensor | None = None
        self.is_reached = False
        self.own: list[Tensor] = [torch.zeros_like(o, dtype=precise(o)) for o in predicted.leaves]
        self._handles = [loss.register_hook(self._note_scale)]
        for i, output in enumerate(predicted.outputs):
            self._handles.append(output.register_hook(partial(self._note_own, i)))

    def _note_scale(self, gradient: Tensor) -> None:
        self.scale = gradient.detach().to(precise(gradient))

    def _note_own(self, i: int, gradient: Tensor) -> Tensor | None:
        if self.scale is None:
            return None  # a gradient of something else
        # Any later gradient through this output would run the hook again.
        self._handles[i + 1].remove()
        self.is_reached = True
        self.own[i] = gradient.detach().to(precise(gradient)) / self.scale
        bend = self._bend(i)
        return None if bend is None else gradient + (self.scale * bend).to(gradient.dtype)

    def _bend(self, i: int) -> Tensor | None:
        """Return what is added to τ of an output."""
        return None

    def release(self) -> None:
        """Remove what hangs on the graph of the forward, and let go of it."""
        for handle in self._handles:
            handle.remove()
        self.predicted.outputs = []
        self.loss = self.loss.detach()

    @abstractmethod
    def refresh(self) -> None:
        """Take in that φ has moved."""

    @abstractmethod
    def applied(self) -> list[Tensor]:
        """Return m of each output: what was descended in place of τ."""

    @abstractmethod
    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return ``∂/∂φ ⟨m, tangents⟩`` at the φ of the last :meth:`refresh`."""

    def value(self) -> Tensor:
        """Return the value of what is descended, the learned loss included."""
        return self.loss.detach()

    def implied_scale(self) -> Tensor:
        """Return ``⟨m, τ⟩ / ⟨τ, τ⟩``: how far a step goes along the user's own, per unit of it (section 5.5)."""
        return ratio(self.applied(), self.own)

    def evidence(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return ``⟨τ, h⟩ - ⟨m, h⟩``: to first order, how much lower the held-out loss is for the bend."""
        differences = [((tau - m) * h.to(m.dtype)).sum() for tau, m, h in zip(self.own, self.applied(), tangents)]
        return torch.stack(differences).sum()

    def influence(self, tangents: Sequence[Tensor]) -> Tensor:
        """Return ``τ_i · h_i`` of each instance, (N,): how the held-out loss answers to its weight, to first order.

        Raises:
            ValueError: If the loss is computed from outputs without a row for each instance.
        """
        count, shapes = len(self.predicted.predictions), [tuple(h.shape) for h in tangents]
        if any(shape[:1] != (count,) for shape in shapes):
            raise ValueError(
                f"the influence of {count} instances cannot be told from outputs of shapes {shapes}; let the modules "
                "that `training_step` calls return a row for each instance."
            )
        parts = [(tau * h.to(tau.dtype)).reshape(count, -1).sum(1) for tau, h in zip(self.own, tangents)]
        return torch.stack(parts).sum(0)


def ratio(m: Sequence[Tensor], tau: Sequence[Tensor]) -> Tensor:
    """Return ``⟨m, τ⟩ / ⟨τ, τ⟩`` over lists of tensors."""
    along = torch.stack([(a * b).sum() for a, b in zip(m, tau)]).sum()
    size = torch.stack([b.square().sum() for b in tau]).sum()
    return along / size.clamp_min(torch.finfo(size.dtype).tiny)


def precise(tensor: Tensor) -> torch.dtype:
    """Return the tensor's precision, and never less than single."""
    return torch.promote_types(tensor.dtype, torch.float32)
