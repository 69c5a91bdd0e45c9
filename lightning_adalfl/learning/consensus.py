"""Whether two halves of the held-out instances agree on how the learned loss is to change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_adalfl.learning.torch_private import dot
from lightning_adalfl.losses.learned_loss import LearnedLoss

EVERY = 20  # base steps: a look costs nearly as much as the rest of a meta step
_KEPT = 0.8  # of the mean at each look
_LOSS = 0.2  # the most that ℓ_φ loses at each look


class Consensus:
    """Tells when two halves of the held-out instances disagree, and takes the learned loss back then.

    Few instances can be learned by heart. What helps them alone helps one half of them and harms the other.

    Attributes:
        mean: A moving average of the cosine between the gradients by φ that either half gives, a scalar in [-1, 1].
    """

    def __init__(self) -> None:
        self.mean = torch.zeros(())

    @torch.no_grad()
    def look(self, whole: Mapping[str, Tensor], half: Mapping[str, Tensor], loss: LearnedLoss) -> Tensor:
        """Take in the gradient by φ of all instances, and of half of them if there is one; return the mean."""
        if half:
            one, other = list(half.values()), [2 * whole[name] - part for name, part in half.items()]
            cosine = dot(one, other) / (dot(one, one) * dot(other, other)).sqrt()
            self.mean = _KEPT * self.mean.to(cosine) + (1 - _KEPT) * cosine.nan_to_num(0.0, 0.0, 0.0)
            if type(loss).scale_ is not LearnedLoss.scale_:
                smaller = 1 + _LOSS * self.mean.clamp(max=0.0)
                loss.scale_(torch.where(cosine.isfinite(), smaller, 1.0).to(loss.dtype))
        return self.mean
