"""How the targets of a batch fare with the model and the held-out data, and how others in their place would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_adalfl.losses.tasks import Task

SCORES = ("agreement", "loss", "margin", "misclassified")
_MOST = 99  # other targets that are thought of, for one instance
_VALUES = 8  # the same, for regression


@torch.no_grad()
def target_scores(
    task: Task, predictions: Tensor, target: Tensor, tangent: Tensor, weight: Tensor | None, instances: int
) -> Tensor:
    """Return four scores of each instance's target, (N, 4): agreement, loss, margin, misclassified.

    Agreement is the cosine between h and the gradient of the handcrafted loss by the instance's predictions: its
    influence, whatever the length of the step and of the gradient; positive where it hurts. The margin is the target's
    logit less the largest other one. Regression has no margin and no class to miss: these are NaN.

    Args:
        task: How predictions and targets go together.
        predictions: Raw. An instance may have several rows, as a sequence has tokens; they follow one another.
        target: As the task takes it; class probabilities count as the largest of them.
        tangent: h, of the shape of the predictions.
        weight: Of each target, or ``None``; what has none is left out.
        instances: N.
    """
    f, h = predictions.detach().float(), tangent.detach().float()
    if task.name == "multiclass":
        f, h = (t.movedim(1, -1).reshape(instances, -1, t.shape[1]) for t in (f, h))
        y = (target.argmax(1) if target.is_floating_point() else target).reshape(f.shape[:2])
        w = torch.ones_like(f[..., 0]) if weight is None else weight.float().reshape(y.shape)
        w = w if task.ignore_index is None else w * (y != task.ignore_index)
        y, counts = y.masked_fill(w == 0, 0).unsqueeze(2), w
        tau, own = f.softmax(2).scatter_add(2, y, -torch.ones_like(f)), f.gather(2, y).squeeze(2)
        loss = f.logsumexp(2) - own
        margin = own - f.scatter(2, y, -torch.inf).amax(2)
    else:
        f, h, y = (t.reshape(instances, -1).float() for t in (f, h, target))
        w = torch.ones_like(f) if weight is None else weight.float().reshape(f.shape)
        y, counts = y.masked_fill(w == 0, 0.0), w
        if task.name == "regression":
            tau, loss, margin = f - y, (f - y).square(), torch.full_like(f, torch.nan)
        else:
            tau, loss = f.sigmoid() - y, F.binary_cross_entropy_with_logits(f, y, reduction="none")
            margin = (2 * y - 1) * f
    missed = torch.where(margin.isnan(), margin, (margin < 0).float())
    means = [(t.masked_fill(counts == 0, 0) * counts).sum(1) / counts.sum(1) for t in (loss, margin, missed)]
    # By the largest number first: squares of the smallest, where a prediction is very sure, would underflow.
    tau, h = (
        F.normalize((t * w.view(*w.shape, *[1] * (t.ndim - 2))).flatten(1), torch.inf, eps=1e-38) for t in (tau, h)
    )
    return torch.stack([F.cosine_similarity(tau, h), *means], 1)


def other_targets(
    task: Task, predictions: Tensor, target: Tensor, batch: tuple[Tensor, Tensor], seed: int
) -> tuple[Tensor, Tensor] | None:
    """Return wrong targets for held-out instances, (N, K, …), and what each weighs, (N, K).

    They err as the training targets do. For classes, the other class c weighs as often as c is predicted in the
    training batch where the target is the held-out instance's. For values, the other target is as far from the
    prediction as one of the training batch is from its own, and weighs the square of its distance from the right one.

    Args:
        task: As above.
        predictions: Of the held-out instances.
        target: Of the held-out instances.
        batch: Predictions and targets of a training batch.
        seed: Of what is drawn.

    Returns:
        ``None`` where an instance has several targets that are classes, or no error is finite.
    """
    generator = torch.Generator().manual_seed(seed)
    f, y = predictions.detach().float(), target
    if task.name == "regression":
        error = (batch[1] - batch[0].detach()).float()
        error = error[error.reshape(len(error), -1).isfinite().all(1)]  # a target under a mask may be NaN
        if not len(error):
            return None
        error = error[error.reshape(len(error), -1).sum(1).argsort()]
        ranks = (torch.rand(len(f), _VALUES, generator=generator) * len(error)).long().to(f.device)
        others = f.unsqueeze(1) + error[ranks]
        return others, (others - y.unsqueeze(1)).square().reshape(*others.shape[:2], -1).mean(2).nan_to_num()
    if task.name != "multiclass":
        flips = torch.eye(f[0].numel(), device=f.device)[:_MOST].reshape(-1, *f.shape[1:])
        return (y.unsqueeze(1).float() - flips).abs(), torch.ones(len(f), len(flips), device=f.device)
    if f.ndim > 2 or y.is_floating_point() or task.ignore_index is not None:
        return None
    classes = f.shape[1]
    shifts = torch.randperm(classes - 1, generator=generator)[:_MOST].to(y.device) + 1
    others = (y.unsqueeze(1) + shifts) % classes
    confused = f.new_zeros(classes, classes).index_add_(0, batch[1], batch[0].detach().float().softmax(1))
    return others, confused[y].gather(1, others)
