"""What the rows of Table 1 on CIFAR-10, CIFAR-100 and SVHN cost on a machine: a few steps on images of noise.

python examples/paper/step_times.py                      # a quarter of an hour on one core, most of it two WideResNets
python examples/paper/step_times.py --models vgg16 allcnnc --steps 100 --accelerator gpu
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from experiment_methods import find_method
from experiment_run import AdaptiveLearner, BaseLearner
from experiment_tables import head, line
from in_memory import InMemory
from tasks import Task, in_order

CLASSES = {"vgg16": 10, "allcnnc": 10, "resnet18": 10, "squeezenet": 10, "wrn28_10": 100, "wrn16_8": 10}
IMAGE = (3, 32, 32)
STEPS, OFFLINE_STEPS = 10_000, 2_500
RATE = 0.01


class Stopwatch(L.Callback):
    """Times all steps of a fit but the first."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin after the first step; end after the last."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if trainer.global_step == 1:
            self.seconds = -time.perf_counter()
        elif trainer.global_step == trainer.max_steps:
            self.seconds += time.perf_counter()


def step_seconds(model: str, method: str, options: argparse.Namespace) -> float:
    """Return the seconds of a base step, with the meta step if the method has one."""
    torch.manual_seed(0)
    rows = 2 * options.batch_size
    noise = InMemory(torch.randn(rows, *IMAGE), torch.randint(CLASSES[model], (rows,)))
    task = Task("noise", "multiclass", noise, noise, noise, IMAGE, CLASSES[model])
    if method == "baseline":
        module: BaseLearner = BaseLearner(task, model, lambda step: RATE)
    else:
        config, _ = find_method(method).build(task.kind)
        module = AdaptiveLearner(task, model, lambda step: RATE, adalfl=config)
    watch = Stopwatch()
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=options.steps + 1,
        callbacks=[watch],
        accelerator=options.accelerator,
        devices=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, in_order(noise, options.batch_size), in_order(noise, options.batch_size))
    return watch.seconds / options.steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each model as it is timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be 1 or more; got {options.steps}.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    columns = ["", "handcrafted, s a step", "AdaLFL, s a step", "handcrafted, hours", "AdaLFL, hours"]
    print("\n".join(head(columns)), flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers
        for model in options.models:
            plain, adaptive = (step_seconds(model, method, options) for method in ("baseline", "adalfl"))
            # An offline step costs what a base step and its meta step do.
            hours = STEPS * plain / 3600, (OFFLINE_STEPS + STEPS) * adaptive / 3600
            print(line([model, f"{plain:.2f}", f"{adaptive:.2f}", *(f"{h:.1f}" for h in hours)]), flush=True)


if __name__ == "__main__":
    main()
