"""Base steps whose gradient is not finite: whether the learned loss is to blame, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

LIMIT = 100  # steps left out in a row


class FiniteSteps:
    """Keeps a gradient of the learned loss that is not finite away from θ.

    Where predictions and targets are finite and the gradient is not, the loss made it so: the step is left out. Where
    they are not, plain training would take the step too, so it is taken and reported. A gradient scaler leaves out such
    steps by itself.

    Args:
        trainer: Whose processes decide together.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._seen: list[Tensor] = []
        self._reported = False
        self._in_a_row = 0
        self._skipped = False

    def note(self, predictions: Tensor, target: Tensor) -> None:
        """Remember what a gradient will come from."""
        if not self._scaled:
            self._seen += [predictions.detach(), target]

    def allow(self, parameters: Iterable[nn.Parameter], step: int) -> bool:
        """Return whether the step may be taken; if not, there is no gradient any more.

        Args:
            parameters: θ, with the gradient that the optimizer is about to use.
            step: Base steps taken before.

        Raises:
            RuntimeError: If a hundred steps in a row had to be left out.
        """
        seen, self._seen = self._seen, []
        stepped = [p for p in parameters if p.grad is not None]
        if self._scaled or not seen or _all_finite([p.grad for p in stepped if p.grad is not None]):
            self._in_a_row = 0
            return True
        # Gradients are equal on all processes, and so all of them come here; the predictions are not.
        if not self._trainer.strategy.reduce_boolean_decision(_all_finite(seen), all=True):
            if not self._reported:
                self._reported = True
                rank_zero_warn(
                    f"Predictions or targets at base step {step} are not finite, so its gradient is not either, with "
                    "any loss; the step is taken as it is without AdaLFL, and meta steps wait for finite ones. Look "
                    "for such values in the batch, or for their origin with `Trainer(detect_anomaly=True)`."
                )
            return True
        for parameter in stepped:
            parameter.grad = None
        self._in_a_row += 1
        if not self._skipped:
            self._skipped = True
            rank_zero_warn(
                f"The gradient of the learned loss at base step {step} is not finite, though predictions and targets "
                "are, so the step was left out; further ones are counted in `adalfl/skipped_base_steps`. Clip the "
                "gradient, lower `meta_lr`, or give predictions of a moderate size."
            )
        if self._in_a_row == LIMIT:
            raise RuntimeError(
                f"The last {LIMIT} base steps had to be left out, since the gradient of the learned loss was not "
                "finite: the loss is broken. Go back to an earlier checkpoint, or begin anew with a lower `meta_lr`."
            )
        return False


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether all values are finite, read from the device once."""
    dense = [t for t in tensors if (t.is_floating_point() or t.is_complex()) and not t.is_sparse and t.numel()]
    if not dense:
        return True
    norms = torch.stack([norm.float().to(dense[0].device) for norm in torch._foreach_norm(dense)])
    # The norm of finite values may overflow, so they are looked at one by one where it has.
    return bool(torch.isfinite(norms).all()) or all(bool(torch.isfinite(t).all()) for t in dense)
