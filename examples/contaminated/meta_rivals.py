"""Rivals that learn from trusted rows what is wrong with the others: weights, corrected labels, a table of confusions.

The first two have the exact one-step meta-gradient that the library has, by the same h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from contaminated_tasks import CLASSES, Loss, Task
from torch import Tensor, nn
from training import Run

from lightning_adalfl import AdaLFLConfig, BaseStep, MetaLearner, hypergradient
from lightning_adalfl.losses import BatchLoss, Descent, Predicted, TrainingObjective

META_RATE = 1e-3  # of Meta-Weight-Net and EMLC
META_EVERY = 10  # base steps, and as many steps of what is learned, as the library has it


# Meta-Weight-Net.


def instance_losses(task: Task, predictions: Tensor, target: Tensor) -> Tensor:
    """Return the own loss of each instance, (N,)."""
    if task.kind == "multiclass":
        return F.cross_entropy(predictions, target, reduction="none")
    return (predictions - target).square().mean(1)


def meta_weight_net(run: Run, meta_loss: Loss) -> None:
    """Train with weights in (0, 1) that are a learned function of an instance's loss (Shu et al., 2019).

    What the held-out loss says of an instance's weight is its influence, ``τ_i · h_i``, so that the meta-gradient is
    ``Σ ∂w_i/∂ψ τ_i · h_i``.
    """
    net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(net.parameters(), lr=META_RATE)
    objective = MetaLearner(AdaLFLConfig(run.task.kind, learn="nothing")).objective
    step = BaseStep(run.model, run.optimizer)
    batches, held_out = run.batches(run.train), run.batches(run.trusted, stream=1)
    while run.step < run.steps:
        predictions, target = step.forward(next(batches))
        losses = instance_losses(run.task, predictions, target)
        weights = net(losses.detach().unsqueeze(1)).squeeze(1).detach().clamp_min(1e-8)
        run.optimizer.zero_grad()
        step.descend(objective, (weights * losses).mean()).backward()
        step.step()
        if (run.step + 1) % META_EVERY == 0:
            (influence,) = hypergradient(step, meta_loss, next(held_out)).influence
            for _ in range(META_EVERY):
                optimizer.zero_grad()
                now = net(losses.detach().unsqueeze(1)).squeeze(1)
                (now * (influence / weights)).sum().backward()
                optimizer.step()
        step.clear()
        run.ended()


# EMLC.


class Teacher(nn.Module):
    """Corrects labels as EMLC does (Taraday & Baskin, 2023): a model of its own, and how far a label is to be kept.

    Args:
        model: A fresh model of the student's kind, whose last layer classifies.
    """

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.features, self.classify = model[:-1], model[-1]
        self.label = nn.Embedding(CLASSES, 64)
        self.keep = nn.Sequential(nn.Linear(self.classify.in_features + 64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the classes, (N, C), and of whether the label is right, (N, 1)."""
        features = self.features(x)
        return self.classify(features), self.keep(torch.cat((features, self.label(labels)), dim=1))

    def corrected(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return corrected labels, probabilities (N, C)."""
        logits, keep = self(x, labels)
        kept = keep.sigmoid()
        return kept * F.one_hot(labels, CLASSES) + (1 - kept) * logits.softmax(1)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return what the teacher learns from trusted rows itself: classes, and which labels were changed."""
        changed = torch.rand(len(labels)) < 0.5
        shown = torch.where(changed, (labels + torch.randint(1, CLASSES, labels.shape)) % CLASSES, labels)
        logits, keep = self(x, shown)
        found = F.binary_cross_entropy_with_logits(keep.squeeze(1), (~changed).float())
        return F.cross_entropy(logits, labels) + found


class CorrectedLabels(TrainingObjective):
    """Cross-entropy with corrected labels in place of the own loss; its slope is ``(p - ỹ) / N``."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.inputs = torch.empty(0)

    def descend(self, own_loss: Tensor, predicted: Predicted) -> Descent:
        """Return the own loss; a hook on the predictions replaces its slope on the way back."""
        return _CorrectedDescent(self.teacher, self.inputs, own_loss, predicted)

    def gradient(self, own_loss: BatchLoss, predictions: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return the slope."""
        return (predictions.softmax(1) - self.teacher.corrected(self.inputs, target)) / len(target)


class _CorrectedDescent(Descent):
    def __init__(self, teacher: Teacher, inputs: Tensor, own_loss: Tensor, predicted: Predicted) -> None:
        super().__init__(own_loss, predicted)
        self._teacher, self._inputs = teacher, inputs
        self.refresh()

    def refresh(self) -> None:
        with torch.enable_grad():
            self._labels = self._teacher.corrected(self._inputs, self.predicted.target)

    def applied(self) -> list[Tensor]:
        return [(self.predicted.predictions.detach().softmax(1) - self._labels.detach()) / len(self._labels)]

    def bent(self, i: int) -> Tensor:
        return self.applied()[i] * self.k

    def vjp(self, tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        names, values = zip(*self._teacher.named_parameters())
        weight = -tangents[0] / len(self._labels)
        return dict(zip(names, torch.autograd.grad(self._labels, values, weight, retain_graph=True)))


def label_correction(run: Run, meta_loss: Loss) -> None:
    """Train with labels that a teacher corrects, which learns by the meta-gradient and from the trusted rows."""
    teacher = Teacher(run.task.build())  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(teacher.parameters(), lr=META_RATE)
    objective = CorrectedLabels(teacher)
    step = BaseStep(run.model, run.optimizer)
    batches, held_out = run.batches(run.train), run.batches(run.trusted, stream=1)
    while run.step < run.steps:
        objective.inputs, labels = next(batches)
        predictions, target = step.forward((objective.inputs, labels))
        run.optimizer.zero_grad()
        step.descend(objective, run.task.own_loss(predictions, target)).backward()
        step.step()
        if (run.step + 1) % META_EVERY == 0:
            trusted = next(held_out)
            found = hypergradient(step, meta_loss, trusted)
            gradients = found.loss
            for k in range(META_EVERY):
                optimizer.zero_grad()
                teacher.loss(*trusted).backward()
                gradients = found.at_present() if k else gradients
                for name, p in teacher.named_parameters():
                    p.grad = gradients[name] if p.grad is None else p.grad + gradients[name]
                optimizer.step()
        step.clear()
        run.ended()


# Gold loss correction.


def gold_loss_correction(run: Run) -> None:
    """Train with the confusions between classes that trusted rows show (Hendrycks et al., 2018).

    A first model, trained on the training rows for as long, gives the table: its mean prediction for the trusted rows
    of each class. The second one's predictions are multiplied by it for training rows, and left for trusted ones.
    """
    first, state = run.task.build(), torch.get_rng_state()
    optimizer = run.task.optimizer(first.parameters())
    batches = run.batches(run.train, stream=2)
    for _ in range(run.steps):
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(first(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        p = first(run.trusted[0]).softmax(1)
        of_class = F.one_hot(run.trusted[1], CLASSES).float()
        table = (of_class.T @ p) / of_class.sum(0).unsqueeze(1)
    torch.set_rng_state(state)
    x = torch.cat((run.train[0], run.trusted[0]))
    y = torch.cat((run.train[1], run.trusted[1] + CLASSES))  # the trusted ones are told by their number

    def loss(predictions: Tensor, target: Tensor) -> Tensor:
        p, is_trusted = predictions.softmax(1), target >= CLASSES
        seen = torch.where(is_trusted.unsqueeze(1), p, p @ table)
        return F.nll_loss(seen.clamp_min(1e-12).log(), target % CLASSES)

    run.descend(loss, run.batches((x, y)))
