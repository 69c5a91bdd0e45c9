"""How the targets of a batch fare with the model and with the held-out data, and how others in their place would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_adalfl.losses.tasks import Task

SCORES = ("agreement", "loss", "margin", "misclassified")
_MOST_CLASSES = 1000
_MOST = 99  # other targets of an instance
_OF_VALUES = 8


@torch.no_grad()
def target_scores(
    task: Task,
    predictions: Tensor,
    target: Tensor,
    tangent: Tensor,
    weight: Tensor | None = None,
    instances: int | None = None,
) -> Tensor:
    """Return four scores of each instance's target, (N, 4): agreement, loss, margin, misclassified.

    Agreement is the cosine between the gradient of the handcrafted loss by the instance's predictions and h: the
    influence of the target whatever the length of the step and of the gradient, positive where it hurts. The margin is
    the target's logit less the largest other one. Regression has no margin and no class to miss: these are NaN.

    Args:
        task: How predictions and targets go together.
        predictions: Raw; where an instance has several rows of them, they follow one another.
        target: As the task takes it; class probabilities count as the largest of them.
        tangent: h, of the shape of the predictions.
        weight: Of each target; what has none is left out.
        instances: N; by default there is one for each row of the predictions.
    """
    f, h, y, w = _rows(task, predictions, target, tangent, weight)
    return _summed(_fits(task, f, h, y.unsqueeze(1), w), w, instances or len(predictions)).squeeze(1)


@torch.no_grad()
def scores_in_thought(
    task: Task, batch: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor, Tensor], seed: int
) -> tuple[Tensor, Tensor] | None:
    """Return the scores of held-out targets and of K others in the place of each, (R, 1 + K, 4), and what each weighs.

    The weights (R, K) say how far the training targets err in that way: for classes, how often class c is predicted
    where the target is that other class; for values, the other target stands as far from the prediction as a training
    target does, and weighs the square of its distance from the right one.

    Args:
        task: As above.
        batch: Predictions and targets of a training batch.
        held_out: Predictions, targets and tangent of held-out instances, in the direction of the batch's.
        seed: Of what is drawn; with the same seed the same others are thought of.

    Returns:
        ``None`` where an instance has several targets or more than a thousand classes.
    """
    f, h, y, _ = _rows(task, *held_out)
    generator = torch.Generator().manual_seed(seed)
    if task.name == "multiclass":
        classes = f.shape[1]
        if held_out[0].ndim > 2 or task.ignore_index is not None or classes > _MOST_CLASSES:
            return None
        p, _, given, _ = _rows(task, *batch, batch[0])
        shifts = torch.randperm(classes - 1, generator=generator)[:_MOST].to(y.device) + 1
        others = (y.unsqueeze(1) + shifts) % classes
        confused = p.new_zeros(classes, classes).index_add_(1, given, p.softmax(1).t())
        weight = confused[y].gather(1, others)
    elif task.name == "regression":
        predicted, _, given, _ = _rows(task, *batch, batch[0])
        errors = (given - predicted)[(given - predicted).sum(1).argsort()]
        ranks = torch.rand(len(y), _OF_VALUES, generator=generator).mul(len(errors)).long().to(y.device)
        others = f.unsqueeze(1) + errors[ranks]
        weight = (others - y.unsqueeze(1)).square().mean(2)
    else:
        if f.shape[1] > _MOST:
            return None
        others = (y.unsqueeze(1) - torch.eye(f.shape[1]).to(y)).abs()
        weight = others.new_ones(others.shape[:2])
    targets, w = torch.cat([y.unsqueeze(1), others], 1), torch.ones_like(f[:, :1])
    return _summed(_fits(task, f, h, targets, w), w, len(f)), weight


def _rows(
    task: Task, predictions: Tensor, target: Tensor, tangent: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return predictions and h (M, C), targets (M,) or (M, C), and their weights (M, 1) or (M, C)."""
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    f, h = predictions.detach().to(dtype), tangent.detach().to(dtype)
    if task.name == "multiclass":
        y = target.argmax(1) if target.is_floating_point() else target
        w = torch.ones_like(y, dtype=dtype) if weight is None else weight.to(dtype)
        w = (w if task.ignore_index is None else w * (y != task.ignore_index)).reshape(-1, 1)
        f, h = (t.movedim(1, -1).flatten(0, -2) for t in (f, h))
        return f, h, torch.where(w[:, 0] == 0, 0, y.reshape(-1)), w
    f, h, y = (t.reshape(len(f), -1).to(dtype) for t in (f, h, target))
    w = torch.ones_like(f) if weight is None else weight.reshape(f.shape).to(dtype)
    return f, h, torch.where(w == 0, 0.0, y), w


def _fits(task: Task, f: Tensor, h: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Return ``τ · h``, ``‖τ‖²``, ``‖h‖²``, loss and margin of each row with each of its K targets, (M, K, 5)."""
    if task.name == "multiclass":
        tau = f.softmax(1).unsqueeze(1) - F.one_hot(y, f.shape[1])
        (first, second), own = f.topk(2, 1).values.t().unsqueeze(2), f.gather(1, y)
        loss = f.logsumexp(1, keepdim=True) - own
        margin = own - torch.where(own == first, second, first)
    else:
        f, h, w = f.unsqueeze(1), (h * w).unsqueeze(1), w.unsqueeze(1)
        share = w / w.sum(2, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        if task.name == "regression":
            tau, each, margin = f - y, (f - y).square(), torch.full_like(y[..., 0], torch.nan)
        else:
            tau, each = f.sigmoid() - y, F.binary_cross_entropy_with_logits(f.expand_as(y), y, reduction="none")
            margin = ((2 * y - 1) * f).masked_fill(w == 0, torch.inf).amin(2)
        tau, loss, h = tau * w, (each * share).sum(2), h.squeeze(1)
    dot, size = torch.einsum("mkc,mc->mk", tau, h), h.square().sum(1, keepdim=True).expand(y.shape[:2])
    return torch.stack([dot, tau.square().sum(2), size, loss, margin], 2)


def _summed(fits: Tensor, w: Tensor, instances: int) -> Tensor:
    """Return the scores of each instance, (N, K, 4), over its rows."""
    row = w if w.shape[1] == 1 else (w > 0).any(1, keepdim=True).to(w.dtype)
    margin = fits[..., 4:]
    misses = torch.where(margin.isnan(), margin, (margin < 0).to(margin.dtype))
    parts = torch.cat([fits, misses], 2)
    parts = torch.where(row.unsqueeze(2) > 0, parts * row.unsqueeze(2), 0.0)
    parts = parts.reshape(instances, -1, *parts.shape[1:]).sum(1)
    count = row.reshape(instances, -1).sum(1).clamp_min(torch.finfo(row.dtype).tiny).view(-1, 1, 1)
    length = (parts[..., 1] * parts[..., 2]).sqrt().clamp_min(torch.finfo(row.dtype).tiny)
    return torch.cat([(parts[..., 0] / length).unsqueeze(2), parts[..., 3:] / count], 2)
