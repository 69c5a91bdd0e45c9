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
from base_models import build_model
from experiment_methods import TUNING_GRID, find_method
from tasks import Loaders, Task, load_task, loaders
from torch import Tensor

from lightning_adalfl import AdaLFLMixin, LossShapeLogger

Record = dict[str, Any]
CURVE_POINTS = 20
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
    """

    task: str
    model: str
    method: str
    seed: int
    steps: int
    data: str = "data"
    init_steps: int | None = None
    batch_size: int = 128

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
    """

    def __init__(self, task: Task, model: str, rate: Callable[[int], float]) -> None:
        super().__init__()
        self.model = build_model(model, task.inputs, task.outputs)
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


class Recorder(L.Callback):
    """Keeps the errors on validation and test data, and the implied learning rate, at evenly spaced steps.

    Seconds are those of this process alone, which has one thread: what else the machine does is not counted.
    """

    def __init__(self, task: Task, data: Loaders, steps: int) -> None:
        self.task, self.data = task, data
        self.every = max(1, steps // CURVE_POINTS)
        self.curve: list[dict[str, float | None]] = []
        self.seconds = 0.0
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, where it is time to."""
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        start = time.process_time()
        scalars = pl_module.adalfl.scalars if isinstance(pl_module, AdaLFLMixin) else {}
        rate = scalars.get("adalfl/implied_lr", trainer.optimizers[0].param_groups[0]["lr"])
        self.curve.append(
            {
                "step": step,
                "seconds": round(start - self.started - self.seconds, 2),
                "val": number(error(pl_module, self.data.val, self.task.kind)),
                "test": number(error(pl_module, self.data.test, self.task.kind)),
                "implied_lr": number(float(rate)),
            }
        )
        self.seconds += time.process_time() - start  # looking is no part of learning


def paper_learning_rate(kind: str) -> float:
    """Return the paper's α (section 4.4)."""
    return 0.001 if kind == "regression" else 0.01


def number(value: float) -> float | None:
    """Return the value, or ``None``, which JSON can hold, where the run diverged."""
    return value if math.isfinite(value) else None


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


def run(job: Job, rate: Callable[[int], float] | None = None, snapshots: Path | None = None) -> Record:
    """Train once and return its record; a run that diverges has a test error of ``None``.

    Args:
        job: What to run; ``"baseline_tuned"`` tries every rate of the grid, ``"baseline_matched"`` needs ``rate``.
        rate: Replaces the paper's learning rate.
        snapshots: A folder for snapshots of the learned loss; by default none are taken.
    """
    if job.method == "baseline_tuned":
        return _tuned(job)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = load_task(job.task, Path(job.data), job.seed)
    data = loaders(task, job.batch_size, job.seed)
    method, init = find_method(job.method), None
    alpha = method.rate_factor * paper_learning_rate(task.kind)
    rate = rate or (lambda step: alpha)
    torch.manual_seed(job.seed)  # the base model is drawn first, so every method begins with the same one
    recorder = Recorder(task, data, job.steps)
    callbacks: list[L.Callback] = [recorder]
    if method.recipe == "handcrafted":
        module: L.LightningModule = BaseLearner(task, job.model, rate)
    else:
        config, init = method.build(task.kind, job.init_steps)
        module = AdaptiveLearner(task, job.model, rate, adalfl=config)
        callbacks += [init] if init else []
        callbacks += [LossShapeLogger(max(1, job.steps // CURVE_POINTS))] if snapshots and config.learns_loss else []
    recorder.started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers, and of hypergradients that are not finite: the record tells
        trainer = L.Trainer(
            max_steps=job.steps,
            callbacks=callbacks,
            default_root_dir=snapshots,
            accelerator="cpu",
            limit_val_batches=0,
            log_every_n_steps=recorder.every,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data.train, data.val)
    seconds = time.process_time() - recorder.started - recorder.seconds
    record: Record = {
        **{name: getattr(job, name) for name in ("task", "model", "method", "seed", "steps")},
        "test": recorder.curve[-1]["test"],
        "seconds": round(seconds, 2),
        "curve": recorder.curve,
    }
    return record if init is None else {**record, "init_steps": init.steps}


def matched_rate(record: Record) -> Callable[[int], float]:
    """Return the implied learning rate of a recorded run as a schedule, linear between the recorded steps."""
    points = [(p["step"], p["implied_lr"]) for p in record["curve"] if p["implied_lr"] is not None]

    def rate(step: int) -> float:
        step += 1  # the one about to be taken; records count those that have been
        earlier = [point for point in points if point[0] <= step] or points[:1]
        later = [point for point in points if point[0] > step] or points[-1:]
        (a, left), (b, right) = earlier[-1], later[0]
        return max(0.0, left if a >= b else left + (right - left) * (step - a) / (b - a))

    return rate


def _tuned(job: Job) -> Record:
    """Train with every rate of the grid; keep the run with the least validation error, and the time of all."""
    plain = Job(**{**vars(job), "method": "baseline"})
    kind = load_task(job.task, Path(job.data), job.seed).kind
    runs = []
    for factor in TUNING_GRID:
        alpha = factor * paper_learning_rate(kind)
        runs.append({**run(plain, lambda step, alpha=alpha: alpha), "lr": alpha})
    last = [r["curve"][-1]["val"] for r in runs]
    best = min(range(len(runs)), key=lambda i: math.inf if last[i] is None else last[i])
    return {**runs[best], "method": job.method, "seconds": round(sum(r["seconds"] for r in runs), 2)}
