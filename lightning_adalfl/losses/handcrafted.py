"""The handcrafted loss of each task, output by output: where a learned loss may start from."""

from __future__ import annotations

import torch
from torch import Tensor


def handcrafted_pairwise(task: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Return ``-y log f`` (multiclass), the binary cross-entropy, or ``(f - y)²`` element-wise.

    Args:
        task: As :func:`lightning_adalfl.losses.pairing.to_pairs` takes it.
        prediction: Any shape: probabilities for classification, raw values for regression.
        target: The same shape.
    """
    if task == "regression":
        return (prediction - target).square()
    tiny = torch.finfo(prediction.dtype).tiny
    loss = -target * prediction.clamp_min(tiny).log()
    return loss if task == "multiclass" else loss - (1 - target) * (1 - prediction).clamp_min(tiny).log()
