"""Steps that mix the elements of a gradient, and that torch does not differentiate: Muon's and Adafactor's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adafactor, Muon


def muon_change(p: Tensor, g: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Return what Muon adds to p, as a differentiable function of g; torch rounds it to bfloat16 on the way.

    Args:
        p: θ of a matrix, before the step.
        g: Its gradient, of the same shape.
        state: The optimizer's of this parameter, before the step.
        group: The options.
    """
    momentum = state.get("momentum_buffer", torch.zeros_like(g)).to(g.dtype).lerp(g, 1 - group["momentum"])
    update = g.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    is_tall = p.shape[0] > p.shape[1]
    x = update.T if is_tall else update
    x = x / x.norm().clamp_min(group["eps"])
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):  # Newton-Schulz, towards the orthogonal matrix nearest to the update
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    rows, columns = p.shape
    ratio = {
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral_unclamped": (rows / columns) ** 0.5,
    }.get(group["adjust_lr_fn"], max(1.0, rows / columns) ** 0.5)
    return -float(group["lr"]) * ((x.T if is_tall else x) * ratio + group["weight_decay"] * p)


def adafactor_change(p: Tensor, g: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Return what Adafactor adds to p, as a differentiable function of g; the arguments are those of Muon's."""
    g = -g if group["maximize"] else g
    step, lr = float(state.get("step", 0)) + 1, float(group["lr"])
    eps1, eps2 = group["eps"]
    eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
    weight, squares = step ** group["beta2_decay"], g.square()

    def averaged(name: str, value: Tensor) -> Tensor:
        return state[name].to(g.dtype).lerp(value, weight) if state.get(name) is not None else weight * value

    if g.ndim > 1:
        rows, columns = averaged("row_var", squares.mean(-1, keepdim=True)), averaged("col_var", squares.mean(-2, True))
        variance = rows @ columns / rows.mean(-2, keepdim=True).clamp_min(eps1)
    else:
        variance = averaged("variance", squares)
    update = g * variance.clamp_min(eps1**2).rsqrt()
    size = p.norm() / p.numel() ** 0.5
    alpha = size.clamp_min(eps2) * min(lr, step**-0.5)
    longest = (update.norm() / (update.numel() ** 0.5 * group["d"])).clamp_min(1.0)
    return -alpha / longest * update - lr * group["weight_decay"] * p


CHANGES: dict[type, Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]] = {
    Muon: muon_change,
    Adafactor: adafactor_change,
}
