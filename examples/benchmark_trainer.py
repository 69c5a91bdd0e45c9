"""Whole `Trainer.fit` runs of a plain module and of the same module with a learned loss: what the adapter costs."""

from __future__ import annotations

import copy
import logging
import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from benchmark_cases import Case
from benchmark_engines import BASE_LR
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin


class Classifier(L.LightningModule):
    """A plain module.

    Args:
        model: The base model f_θ.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Log and return the cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=BASE_LR)


class AdaClassifier(AdaLFLMixin, Classifier):
    """The same with a loss that learns."""


class Stopwatch(L.Callback):
    """Times the steps of a fit after the first few, and what other callbacks do before it.

    Args:
        warm: Steps that are not counted.
    """

    def __init__(self, warm: int) -> None:
        self.warm = warm
        self.fit_started = 0.0
        self.started = 0.0
        self.step_seconds = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note when the callbacks before this one have finished."""
        self.fit_started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Start after the last warm step, stop after the last."""
        now = time.perf_counter()
        if trainer.global_step == self.warm:
            self.started = now
        elif trainer.global_step == trainer.max_steps:
            self.step_seconds = (now - self.started) / (trainer.global_step - self.warm)


def fit_seconds(case: Case, steps: int, turns: int) -> dict[tuple[str, int], float]:
    """Return the median seconds a step of each kind of fit, which take turns, by name and `meta_every`."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in tqdm(range(turns), desc=f"{case.name}: Trainer.fit", leave=False):
        for key, module in _modules(case).items():
            times.setdefault(key, []).append(_fit(case, module, steps).step_seconds)
        times.setdefault(("trainer_offline", 1), []).append(_offline_seconds(case, steps))
    return {key: statistics.median(values) for key, values in times.items()}


def _modules(case: Case) -> dict[tuple[str, int], L.LightningModule]:
    modules: dict[tuple[str, int], L.LightningModule] = {("trainer_plain", 1): Classifier(copy.deepcopy(case.model))}
    for meta_every in (1, 1000):
        config = AdaLFLConfig(task="multiclass", meta_every=meta_every)
        modules["trainer_adalfl", meta_every] = AdaClassifier(copy.deepcopy(case.model), adalfl=config)
    return modules


def _offline_seconds(case: Case, steps: int) -> float:
    """Return the seconds of a step of the offline phase."""
    first, last = Stopwatch(0), Stopwatch(0)
    module = AdaClassifier(copy.deepcopy(case.model), adalfl=AdaLFLConfig(task="multiclass"))
    _fit(case, module, 1, [first, AdaLFLInit(steps=steps), last])
    return (last.fit_started - first.fit_started) / steps


def _fit(case: Case, module: L.LightningModule, steps: int, callbacks: list[L.Callback] | None = None) -> Stopwatch:
    # Neither the hardware that was found nor the number of loader workers is news here.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    watch = Stopwatch(warm=2)
    inputs, targets = (torch.cat(parts) for parts in zip(*case.batches * 4))
    data = TensorDataset(inputs, targets)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=watch.warm + steps,
        callbacks=[*(callbacks or []), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=10**6,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module,
            DataLoader(data, case.batch_size, shuffle=True, drop_last=True),
            DataLoader(data, case.batch_size, drop_last=True),
        )
    return watch
