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
from experiment_methods import find_method, offline_steps
from experiment_run import AUGMENTED, learner_of, paper_learning_rate, quiet_trainer
from experiment_tables import PAPER, STEPS, head, line
from in_memory import InMemory
from tasks import TASKS, Task, in_order

# The task of each model.
LARGE = {
    model: task for task, _, model in (row.partition("/") for row in PAPER["table1_final_test"]) if task in AUGMENTED
}
IMAGE = (3, 32, 32)


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


def step_seconds(model: str, method: str, options: argparse.Namespace) -> tuple[float, int]:
    """Return the seconds of a base step, with the meta step if the method has one, and how many steps its run has."""
    torch.manual_seed(0)
    rows, source = 2 * options.batch_size, TASKS[LARGE[model]]
    noise = InMemory(torch.randn(rows, *IMAGE), torch.randint(source.outputs, (rows,)))
    task = Task(LARGE[model], source.kind, noise, noise, noise, IMAGE, source.outputs)
    rate = paper_learning_rate(task.kind)
    module, init = learner_of(task, model, find_method(method), lambda step: rate)
    watch = Stopwatch()
    trainer = quiet_trainer(options.steps + 1, [watch], options.accelerator)
    trainer.fit(module, in_order(noise, options.batch_size), in_order(noise, options.batch_size))
    # An offline step costs what a base step and its meta step do.
    return watch.seconds / options.steps, STEPS + offline_steps(init)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each model as it is timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(LARGE), default=list(LARGE))
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
            timed = [step_seconds(model, method, options) for method in ("baseline", "adalfl")]
            seconds = [f"{each:.2f}" for each, _ in timed]
            print(line([model, *seconds, *(f"{each * steps / 3600:.1f}" for each, steps in timed)]), flush=True)


if __name__ == "__main__":
    main()
