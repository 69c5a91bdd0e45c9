"""The methods: the library's, and its rivals, each with one setting over all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from contaminated_tasks import CLASSES, Loss, Task, mlp, pinball
from meta_rivals import gold_loss_correction, label_correction, meta_weight_net
from rate_rivals import mechanic, prodigy, schedule_free_adamw, schedule_free_sgd
from torch import Tensor
from training import Run

from lightning_adalfl import AdaLFLConfig, LossHistory, MetaLearner

BOTH = ("multiclass", "regression")
OTHER_ROWS = 1000  # from a seed to that of a recording
PAPER, TUNED = "_paper", "_tuned"  # how the names of a pair of clean tasks end


@dataclass(frozen=True)
class Method:
    """How a method trains.

    Attributes:
        label: Its name in the tables.
        train: Trains a run.
        kinds: Of the tasks that it is for.
        learns_from_trusted: Whether trusted rows have a part in training, and not in stopping early alone.
        knows_more: Whether it is told what is wrong with the targets, or has it from another run: it is no rival then.
        groups: Of the tasks that it is for; all by default.
        sees_rate: Whether it begins from the task's learning rate. If not, it is run at the paper's rate alone, and
            stands for the tuned one as well.
    """

    label: str
    train: Callable[[Run], None]
    kinds: tuple[str, ...] = BOTH
    learns_from_trusted: bool = True
    knows_more: bool = False
    groups: tuple[str, ...] | None = None
    sees_rate: bool = True

    def fits(self, task: Task) -> bool:
        """Return whether the method is for a task."""
        is_of_group = self.groups is None or task.group in self.groups
        return is_of_group and task.kind in self.kinds


# The library.


def ours(run: Run, **changes: Any) -> None:
    """Train as the library's defaults say, with the trusted rows as held-out data; ``changes`` are for experiments."""
    if run.task.task_loss is not None:
        changes.setdefault("task_loss", run.task.task_loss)
    torch_state = torch.get_rng_state()
    torch.manual_seed(run.seed)
    learner = MetaLearner(AdaLFLConfig(run.task.kind, **changes))
    torch.set_rng_state(torch_state)
    learn(run, learner)


def replayed(run: Run) -> None:
    """Replay the losses that a network of two hidden layers of 32 has learned on other rows, with trusted rows there.

    The other rows are wrong in the same way. Its own trusted rows have no part.
    """
    seed, outputs = run.seed + OTHER_ROWS, 1 if run.task.kind == "regression" else CLASSES
    data = run.task.draw(seed)
    narrow = replace(run.task, build=partial(mlp, data.train[0][0].numel(), 32, 32, outputs))
    trusted = tuple(part[: len(run.trusted[1])] for part in data.trusted)
    recording = Run(narrow, data.train, trusted, {}, trusted, seed, run.steps)  # type: ignore[arg-type]
    history = LossHistory(every_n_steps=max(1, run.steps // 60))
    learn(recording, MetaLearner(AdaLFLConfig(run.task.kind)), history)
    learn(run, MetaLearner(AdaLFLConfig(run.task.kind, meta_every=None)), history)


def learn(run: Run, learner: MetaLearner, history: LossHistory | None = None) -> None:
    """Train with a learner, as the mixin does; keep its losses in a history, or take them from it if it learns none."""
    batches, held_out = run.batches(run.train), run.batches(run.trusted, stream=1)
    step = learner.new_base_step(run.model, run.optimizer)
    while run.step < run.steps:
        if history is not None and learner.config.meta_every is None:
            learner.set_phi(history.at(run.step))
        elif history is not None and history.is_due(run.step):
            history.append(run.step, learner.loss)  # type: ignore[arg-type]
        predictions, target = step.forward(next(batches))
        run.optimizer.zero_grad()
        step.descend(learner.objective, run.task.own_loss(predictions, target)).backward()
        step.step()
        learner.end_base_step(step, held_out)
        run.ended()
    if learner.rate is not None:
        run.rate = learner.lr_scale * run.optimizer.param_groups[0]["lr"]


# Losses.


def with_loss(run: Run, loss: Loss | None = None) -> None:
    """Train on the training rows alone, by default with the own loss."""
    run.descend(loss or run.task.own_loss, run.batches(run.train))


def generalised_cross_entropy(predictions: Tensor, target: Tensor, q: float = 0.7) -> Tensor:
    """Return ``(1 - p_y^q) / q`` (Zhang & Sabuncu, 2018), with the exponent of that paper."""
    return (-torch.expm1(q * _own_log_probability(predictions, target)) / q).mean()


def symmetric_cross_entropy(predictions: Tensor, target: Tensor, alpha: float = 0.1, beta: float = 1.0) -> Tensor:
    """Return ``α CE + β RCE`` with log 0 = -4 (Wang et al., 2019), with that paper's values for CIFAR-10."""
    log_p = _own_log_probability(predictions, target)
    return (-alpha * log_p + beta * 4 * (1 - log_p.exp())).mean()


def huber(predictions: Tensor, target: Tensor) -> Tensor:
    """Return the Huber loss that is quadratic up to 0.1 of the targets' range."""
    return F.huber_loss(predictions, target, delta=0.1)


def with_class_weights(run: Run) -> None:
    """Train with cross-entropy weighted by the inverse of the classes' counts."""
    weight = 1 / _priors(run.train[1])
    with_loss(run, partial(F.cross_entropy, weight=weight / weight.mean()))


def with_adjusted_logits(run: Run) -> None:
    """Train with logit adjustment (Menon et al., 2021): cross-entropy of logits plus the logarithm of the priors."""
    prior = _priors(run.train[1]).log()
    with_loss(run, lambda predictions, target: F.cross_entropy(predictions + prior, target))


def _priors(labels: Tensor) -> Tensor:
    return torch.bincount(labels, minlength=CLASSES).clamp_min(1).float() / len(labels)


def _own_log_probability(predictions: Tensor, target: Tensor) -> Tensor:
    return predictions.log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)


def told_pinball(run: Run) -> None:
    """Train with the pinball loss of the quantile that is right for the task."""
    if run.task.told is None:
        raise ValueError("the task has no quantile that is right; leave the method out.")
    with_loss(run, pinball(run.task.told))


# Trusted rows as training rows.


def robust_loss(task: Task) -> Loss:
    """Return generalised cross-entropy, or the absolute error."""
    return generalised_cross_entropy if task.kind == "multiclass" else F.l1_loss


def alone(run: Run) -> None:
    """Train on the trusted rows alone."""
    run.descend(run.task.own_loss, run.batches(run.trusted))


def fine_tuned(run: Run, robust: bool = False, part: float = 0.1) -> None:
    """Train with the own or a robust loss; the last tenth of the steps, from the best one on, is on the trusted rows.

    It has the own loss there.
    """
    run.keeps_best = True
    last = round(part * run.steps)
    loss = robust_loss(run.task) if robust else run.task.own_loss
    run.descend(loss, run.batches(run.train), run.steps - last)
    run.go_back_to_best()
    run.optimizer = run.task.optimizer(run.model.parameters())
    run.descend(run.task.own_loss, run.batches(run.trusted, stream=1))


def added(run: Run, robust: bool = False) -> None:
    """Train on the training and the trusted rows."""
    rows = tuple(torch.cat(parts) for parts in zip(run.train, run.trusted))
    run.descend(robust_loss(run.task) if robust else run.task.own_loss, run.batches(rows))  # type: ignore[arg-type]


def added_by_halves(run: Run, robust: bool = False) -> None:
    """Train on batches of which one half is training rows and the other trusted rows, each with its loss."""
    loss, own = robust_loss(run.task) if robust else run.task.own_loss, run.task.own_loss
    of_train, of_trusted = run.batches(run.train), run.batches(run.trusted, stream=1)

    def both() -> Iterator[tuple[Tensor, Any]]:
        for (x, y), (clean_x, clean_y) in zip(of_train, of_trusted):
            yield torch.cat((x, clean_x)), (y, clean_y)

    def halves(predictions: Tensor, targets: Any) -> Tensor:
        y, clean_y = targets
        return 0.5 * (loss(predictions[: len(y)], y) + own(predictions[len(y) :], clean_y))

    run.descend(halves, both())  # type: ignore[arg-type]


def by_meta_gradient(run: Run, train: Callable[[Run, Loss], None]) -> None:
    """Train with a rival that has a meta-objective: the library's."""
    library = MetaLearner(AdaLFLConfig(run.task.kind, learn="nothing"))
    train(run, run.task.task_loss or library.task_loss)


REGRESSION, CLASSES_ONLY = ("regression",), ("multiclass",)
_LOSS: Mapping[str, Any] = {"learns_from_trusted": False}
_CLEAN: Mapping[str, Any] = {"groups": ("clean",)}
_RATE: Mapping[str, Any] = {**_LOSS, **_CLEAN, "sees_rate": False}
METHODS: dict[str, Method] = {
    "ours": Method("the library's defaults", ours),
    "own": Method("own loss", with_loss, **_LOSS),
    "l1": Method("absolute error", partial(with_loss, loss=F.l1_loss), REGRESSION, **_LOSS),
    "huber": Method("Huber", partial(with_loss, loss=huber), REGRESSION, **_LOSS),
    "pinball": Method("pinball 0.3", partial(with_loss, loss=pinball(0.3)), REGRESSION, **_LOSS),
    "pinball_told": Method(
        "pinball, told the quantile",
        told_pinball,
        REGRESSION,
        knows_more=True,
        groups=("regression", "held-out"),
        **_LOSS,
    ),
    "gce": Method(
        "generalised cross-entropy", partial(with_loss, loss=generalised_cross_entropy), CLASSES_ONLY, **_LOSS
    ),
    "sce": Method("symmetric cross-entropy", partial(with_loss, loss=symmetric_cross_entropy), CLASSES_ONLY, **_LOSS),
    "smoothing": Method(
        "label smoothing 0.1",
        partial(with_loss, loss=partial(F.cross_entropy, label_smoothing=0.1)),
        CLASSES_ONLY,
        **_LOSS,
    ),
    "class_weights": Method("class weights", with_class_weights, CLASSES_ONLY, **_LOSS),
    "logit_adjustment": Method("logit adjustment", with_adjusted_logits, CLASSES_ONLY, **_LOSS),
    "alone": Method("trusted rows alone", alone),
    "finetuned": Method("own loss, fine-tuned on trusted rows", fine_tuned),
    "finetuned_robust": Method("robust loss, fine-tuned on trusted rows", partial(fine_tuned, robust=True)),
    "added": Method("trusted rows added", added),
    "added_robust": Method("trusted rows added, robust loss", partial(added, robust=True)),
    "halves": Method("half of each batch trusted", added_by_halves),
    "halves_robust": Method("half of each batch trusted, robust loss", partial(added_by_halves, robust=True)),
    "mwn": Method("Meta-Weight-Net", partial(by_meta_gradient, train=meta_weight_net)),
    "emlc": Method("EMLC's label correction", partial(by_meta_gradient, train=label_correction), CLASSES_ONLY),
    "glc": Method("gold loss correction", gold_loss_correction, CLASSES_ONLY),
    "replayed": Method(
        "a loss of another run, replayed", replayed, knows_more=True, groups=("regression", "classification")
    ),
    "both": Method('the library, `learn="both"`', partial(ours, learn="both"), **_CLEAN),
    "lr": Method('the library, `learn="lr"`', partial(ours, learn="lr"), **_CLEAN),
    "prodigy": Method("Prodigy", prodigy, **_RATE),
    "mechanic": Method("Mechanic, SGD", mechanic, **_RATE),
    "schedule_free_sgd": Method("Schedule-Free SGD", schedule_free_sgd, **_LOSS, **_CLEAN),
    "schedule_free_adamw": Method("Schedule-Free AdamW", schedule_free_adamw, **_RATE),
}


def run_as(task: str, method: str) -> str:
    """Return the task under which a method is run: that of the paper's rate, if it does not see the rate."""
    return task if METHODS[method].sees_rate else task.replace(TUNED, PAPER)
