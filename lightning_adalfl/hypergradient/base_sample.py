"""h on a random part of the base batch, at that part of the cost: an unbiased estimate of ``⟨m, h⟩``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_adalfl.hypergradient.forward_trace import ForwardTrace
from lightning_adalfl.hypergradient.functional import FunctionalModel


@dataclass(frozen=True)
class BaseSample:
    """Instances of a base batch, drawn without replacement.

    Attributes:
        rows: Their indices, shape (n,).
        count: N, the instances of the whole batch.
        trace: The forward on them alone.
    """

    rows: Tensor
    count: int
    trace: ForwardTrace

    @classmethod
    def draw(cls, trace: ForwardTrace, fraction: float) -> BaseSample:
        """Draw n = ⌈fraction · N⌉ instances from torch's global generator.

        Args:
            trace: The base forward; every tensor in its batch and its predictions have the instances in dimension 0.
            fraction: In (0, 1].

        Raises:
            ValueError: If the tensors of the batch differ in their number of instances.
        """
        count = trace.predictions.shape[0]
        size = math.ceil(fraction * count)
        rows = torch.randperm(count)[:size].to(trace.predictions.device)

        def part(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != count:
                raise ValueError(
                    f"`base_fraction` needs tensors with the {count} instances of the batch in dimension 0; got one of "
                    f"shape {tuple(tensor.shape)}. Use base_fraction=1, which passes the batch on as it is."
                )
            return tensor[rows.to(tensor.device)]

        batch = tree_map_only(Tensor, part, trace.batch)
        return cls(
            rows, count, ForwardTrace(batch, trace.random_state, trace.buffers, part(trace.predictions), trace.target)
        )

    def evaluated(self, model: FunctionalModel, parameters: Mapping[int, Tensor]) -> ForwardTrace:
        """Return the forward on the sample with predictions of its own: BatchNorm and dropout see these alone."""
        with torch.no_grad(), self.trace.random_state.replayed():
            predictions, target = model(self.trace.batch, self.trace.buffers, parameters)
        return ForwardTrace(self.trace.batch, self.trace.random_state, self.trace.buffers, predictions, target)

    def spread(self, h: Tensor) -> Tensor:
        """Return h of the whole batch: that of the sample times N / n, and zero elsewhere."""
        whole = h.new_zeros((self.count, *h.shape[1:]))
        whole[self.rows] = h * (self.count / len(self.rows))
        return whole
