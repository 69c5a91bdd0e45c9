"""One run of one method on one task: through Lightning, with the library's public names only."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from base_models import MODELS, build_model, draw_parameters
from experiment_methods import Method, find_method, implied_rate, learned_values, offline_steps
from in_memory import InMemory
from tasks import Loaders, Task, in_order, load_task, loaders
from torch import Tensor
from torch.utils.data import Subset

from lightning_adalfl import AdaLFLInit, AdaLFLMixin

Record = dict[str, Any]
CURVE_POINTS = 20
EARLY_POINTS = (1, 10, 30, 100, 300)
RATE_POINTS = 200
LOSS_POINTS = 8
TRAINING_ROWS = 2_000  # that the training error is measured on
LOSSES_KEPT = 2  # seeds whose learned losses are kept
RUN_AWAY = 1e6  # a training error from which no run has come back; from 8, where few rows are far off, some have
AUGMENTED = ("cifar10", "cifar100", "svhn")


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Attributes:
        task: A key of `tasks.TASKS`.
        model: A key of `base_models.MODELS`.
        method: A key of `experiment_methods.METHODS`, or a row of an ablation.
        seed: Of the split, the initial parameters, the order of the batches and the initial loss.
        steps: Base steps.
        data: The folder of the data sets.
        init_steps: Of the offline phase; by default the method's own.
        batch_size: Instances in a batch.
        accelerator: Lightning's name of the device.
    """

    task: str
    model: str
    method: str
    seed: int
    steps: int
    data: str = "data"
    init_steps: int | None = None
    batch_size: int = 128
    accelerator: str = "cpu"

    @property
    def key(self) -> tuple[Any, ...]:
        """What a record is told apart by."""
        return (self.task, self.model, self.method, self.seed, self.steps)


class BaseLearner(L.LightningModule):
    """The base model, trained with the handcrafted loss by SGD as the paper does (section 4.4).

    Args:
        task: The learning task.
        model: A key of `base_models.MODELS`.
        rate: α as a function of the number of base steps taken.
        draw: The first draw of θ, a key of `base_models.DRAWS`; by default the model's own.
    """

    def __init__(self, task: Task, model: str, rate: Callable[[int], float], draw: str | None = None) -> None:
        super().__init__()
        self.draw = draw or MODELS[model].draw
        self.model = build_model(model, task.inputs, task.outputs, self.draw)
        self.loss = F.cross_entropy if task.kind == "multiclass" else F.mse_loss
        self.rate = rate
        self.augmented = task.name in AUGMENTED

    def forward(self, x: Tensor) -> Tensor:
        """Return predictions (N, outputs)."""
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the handcrafted loss."""
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self) -> Any:
        """Return SGD at `rate`, with momentum and weight decay where the paper has them."""
        momentum = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4} if self.augmented else {}
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0, **momentum)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AdaptiveLearner(AdaLFLMixin, BaseLearner):
    """The same with a loss that learns."""

    def adalfl_reset_parameters(self) -> None:
        """Draw θ for the offline phase as it is drawn for training."""
        draw_parameters(self.model, self.draw)


class Recorder(L.Callback):
    """Keeps errors, the implied learning rate and the learned loss at a few steps; ends a run that has run away.

    Seconds are those of this process alone, which has one thread: what else the machine does is not counted.

    Args:
        task: The learning task.
        data: Its loaders.
        steps: Base steps of the run.
        keep_losses: Whether the learned loss is kept.

    Attributes:
        curve: Columns of one length: steps, seconds, errors on training, validation and test data, implied rate.
        rates: The implied learning rate at more steps, for the control that follows it.
        losses: ℓ_φ on a grid.
    """

    def __init__(self, task: Task, data: Loaders, steps: int, keep_losses: bool) -> None:
        self.kind, self.steps = task.kind, steps
        self.every = max(1, steps // CURVE_POINTS)
        self.rate_every = max(1, steps // RATE_POINTS)
        self.loss_every = max(1, steps // LOSS_POINTS)
        size = 1_000 if isinstance(task.train, InMemory) else data.train.batch_size or 1
        rows = Subset(task.train, range(min(TRAINING_ROWS, len(task.train))))  # type: ignore[arg-type]
        # A subset of InMemory gives whole batches too.
        train = InMemory(*rows.__getitems__(list(rows.indices))) if isinstance(task.train, InMemory) else rows
        self.parts = {
            name: in_order(part, size) for name, part in (("train", train), ("val", task.val), ("test", task.test))
        }
        self.curve: dict[str, list[Any]] = {
            name: [] for name in ("step", "seconds", "train", "val", "test", "implied_lr")
        }
        self.rates: dict[str, list[Any]] = {"step": [], "implied_lr": []}
        targets, grid = ([0.0, 0.5, 1.0], (-0.5, 1.5)) if self.kind == "regression" else ([0.0, 1.0], (0.0, 1.0))
        self.grid = {"target": targets, "prediction": torch.linspace(*grid, 31).tolist()}
        self.losses: dict[str, list[Any]] | None = {"step": [], "value": []} if keep_losses else None
        self.seconds = 0.0
        self.started = time.process_time()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the loss that training begins with."""
        self._keep_loss(pl_module, 0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, where it is time to."""
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        start = time.process_time()
        is_adaptive = isinstance(pl_module, AdaLFLMixin)
        rate = implied_rate(pl_module) if is_adaptive else trainer.optimizers[0].param_groups[0]["lr"]
        if is_adaptive and rate is not None and (step % self.rate_every == 0 or step in EARLY_POINTS):
            self.rates["step"].append(step)
            self.rates["implied_lr"].append(number(rate))
        if step % self.loss_every == 0 or last:
            self._keep_loss(pl_module, step)
        if step % self.every == 0 or step in EARLY_POINTS or last:
            point = {name: number(error(pl_module, part, self.kind)) for name, part in self.parts.items()}
            point |= {"step": step, "seconds": number(start - self.started - self.seconds)}
            point["implied_lr"] = None if rate is None else number(rate)
            for name, value in point.items():
                self.curve[name].append(value)
            if point["train"] is None or point["train"] > RUN_AWAY:
                trainer.should_stop = True
        self.seconds += time.process_time() - start  # looking is no part of learning

    def _keep_loss(self, pl_module: L.LightningModule, step: int) -> None:
        if self.losses is not None and isinstance(pl_module, AdaLFLMixin):
            values = learned_values(pl_module, self.grid["target"], self.grid["prediction"])
            if values is not None:
                self.losses["step"].append(step)
                self.losses["value"].append([[number(value) for value in row] for row in values])

    @property
    def ran_away(self) -> bool:
        """Whether the run was ended because its errors had no bound."""
        return self.curve["step"][-1] != self.steps or self.curve["test"][-1] is None


def paper_learning_rate(kind: str) -> float:
    """Return the paper's α (section 4.4)."""
    return 0.001 if kind == "regression" else 0.01


def number(value: float) -> float | None:
    """Return the value to five digits, or ``None``, which JSON can hold, where the run diverged."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


@torch.no_grad()
def error(module: L.LightningModule, data: Any, kind: str) -> float:
    """Return the error rate, or the mean squared error, over all of a loader."""
    training = module.training
    module.eval()
    total, count = 0.0, 0
    for x, y in data:
        predictions = module(x.to(module.device))
        y = y.to(module.device)
        if not torch.isfinite(predictions).all():
            total = math.nan
        elif kind == "multiclass":
            total += float((predictions.argmax(1) != y).sum())
        else:
            total += float((predictions - y).square().mean(1).sum())
        count += len(y)
    module.train(training)
    return total / count


def run(job: Job, rate: Callable[[int], float] | None = None) -> Record:
    """Train once and return its record; a run that diverges has a test error of ``None``.

    Args:
        job: What to run; ``"baseline_matched"`` needs ``rate``.
        rate: Replaces the paper's learning rate.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = load_task(job.task, Path(job.data), job.seed)
    data = loaders(task, job.batch_size, job.seed)
    method = find_method(job.method)
    alpha = method.rate_factor * paper_learning_rate(task.kind)
    rate = rate or (lambda step: alpha)
    torch.manual_seed(job.seed)  # the base model is drawn first, so every method begins with the same one
    recorder = Recorder(task, data, job.steps, job.seed < LOSSES_KEPT)
    module, init = learner_of(task, job.model, method, rate, job.init_steps)
    recorder.started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers, and of hypergradients that are not finite: the record tells
        callbacks = [recorder, *([init] if init else [])]
        trainer = quiet_trainer(job.steps, callbacks, job.accelerator, log_every_n_steps=min(10, recorder.rate_every))
        trainer.fit(module, data.train, data.val)
    seconds = time.process_time() - recorder.started - recorder.seconds
    record: Record = {
        **{name: getattr(job, name) for name in ("task", "model", "method", "seed", "steps")},
        "test": None if recorder.ran_away else recorder.curve["test"][-1],
        "seconds": round(seconds, 2),
        "curve": recorder.curve,
    }
    if method.learns:
        record |= {"init_steps": offline_steps(init), "rates": recorder.rates}
    if recorder.losses and recorder.losses["step"]:
        record["losses"] = {**recorder.grid, **recorder.losses}
    return record


def learner_of(
    task: Task, model: str, method: Method, rate: Callable[[int], float], init_steps: int | None = None
) -> tuple[BaseLearner, AdaLFLInit | None]:
    """Return a module that trains as a method does, and its offline phase."""
    if not method.learns:
        return BaseLearner(task, model, rate, method.draw), None
    config, init = method.build(task.kind, init_steps)
    return AdaptiveLearner(task, model, rate, method.draw, adalfl=config), init


def quiet_trainer(steps: int, callbacks: list[L.Callback], accelerator: str, **options: Any) -> L.Trainer:
    """Return a trainer for a number of base steps on one device, which shows and keeps nothing by itself."""
    return L.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator=accelerator,
        devices=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def matched_rate(record: Record) -> Callable[[int], float]:
    """Return the implied learning rate of a recorded run as a schedule, linear between the recorded steps."""
    steps, rates = record["rates"]["step"], record["rates"]["implied_lr"]
    points = [(step, rate) for step, rate in zip(steps, rates) if rate is not None]

    def rate(step: int) -> float:
        step += 1  # the one about to be taken; records count those that have been
        earlier = [point for point in points if point[0] <= step] or points[:1]
        later = [point for point in points if point[0] > step] or points[-1:]
        (a, left), (b, right) = earlier[-1], later[0]
        return max(0.0, left if a >= b else left + (right - left) * (step - a) / (b - a))

    return rate
