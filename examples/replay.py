"""Record the losses that AdaLFL trains with, and replay them on another seed at the cost of ordinary training.

python examples/replay.py                                   # Fashion-MNIST, LeNet-5; record on seed 0, replay on seed 1
python examples/replay.py --replay-model mlp --seeds 1 2 3  # another model, several seeds

Every method starts from the same parameters and sees the same batches for a seed: the handcrafted loss, the same at the
learning rate times the largest gain of the schedule, AdaLFL itself, the recorded schedule, and two frozen losses of it,
with the largest gain and the last.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from base_models import build_model
from tasks import Task, load_task, loaders

from lightning_adalfl import (
    AdaLFLConfig,
    AdaLFLInit,
    AdaLFLMixin,
    LossTrajectory,
    TrajectoryRecorder,
    TrajectoryReplay,
)


class Learner(L.LightningModule):
    """A base model with plain SGD."""

    def __init__(self, task: Task, model: str, lr: float) -> None:
        super().__init__()
        self.model = build_model(model, task.inputs, task.outputs)
        self.task_loss = F.cross_entropy if task.kind == "multiclass" else F.mse_loss
        self.lr = lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits or values."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the task loss."""
        x, y = batch
        return self.task_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class AdaLearner(AdaLFLMixin, Learner):
    """The same with a learned loss."""


def train(
    task: Task,
    model: str,
    seed: int,
    args: argparse.Namespace,
    callbacks: list[L.Callback],
    rate: float,
    **options: Any,
) -> dict[str, Any]:
    """Train from the parameters of ``seed``; return the test error and what the whole fit took."""
    data = loaders(task, batch_size=128, seed=seed)
    L.seed_everything(seed, verbose=False)
    # The base parameters are drawn first, so they are the same with and without a learned loss.
    module = AdaLearner(task, model, rate, **options) if options else Learner(task, model, rate)
    trainer = L.Trainer(
        max_steps=args.max_steps,
        callbacks=callbacks,
        default_root_dir=args.log_dir,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        accelerator="cpu",
    )
    start, start_cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, data.train, data.val)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    module.eval()
    with torch.no_grad():
        wrong = [module(x).argmax(1) != y for x, y in data.test]
    error = torch.cat(wrong).float().mean().item()
    return {"test_error": round(error, 4), "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}


def frozen(trajectory: LossTrajectory, step: int, path: Path) -> Path:
    """Keep the loss of one step as a schedule that never changes."""
    loss = trajectory.build()
    trajectory.write_into(loss, step)
    still = LossTrajectory()
    still.append(0, loss)
    still.save(path)
    return path


def main() -> None:
    """Record, replay, and print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["fashion_mnist", "mnist", "mnist5k"], default="fashion_mnist")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are kept")
    parser.add_argument("--model", default="lenet5", help="the model that the losses are recorded with")
    parser.add_argument("--replay-model", help="the model that they are replayed with; by default the same")
    parser.add_argument("--recipe", choices=["library", "paper"], default="library")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--max-steps", type=int, default=2000, help="base steps of each run")
    parser.add_argument("--init-steps", type=int, default=0, help="meta steps of an offline phase")
    parser.add_argument("--record-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds to replay on")
    parser.add_argument("--log-dir", type=Path, default=Path("lightning_logs/replay"))
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    args = parser.parse_args()

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")

    task = load_task(args.data, args.root, args.record_seed)
    config = AdaLFLConfig.paper(task.kind) if args.recipe == "paper" else AdaLFLConfig(task.kind)
    replaying = AdaLFLConfig.from_dict({**config.to_dict(), "online": False})
    replay_model = args.replay_model or args.model

    def init() -> list[L.Callback]:
        return [AdaLFLInit(steps=args.init_steps)] if args.init_steps else []

    recorder = TrajectoryRecorder()
    recorded = train(task, args.model, args.record_seed, args, [*init(), recorder], args.lr, adalfl=config)
    print(f"recorded on seed {args.record_seed}: {recorded}", flush=True)
    path = args.log_dir / "loss_trajectory.safetensors"
    trajectory = LossTrajectory.load(path)
    peak_step = max(trajectory.steps, key=trajectory.gain_at)
    peak = frozen(trajectory, peak_step, args.log_dir / "peak.safetensors")
    last = frozen(trajectory, trajectory.steps[-1], args.log_dir / "last.safetensors")

    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        runs: dict[str, tuple[list[L.Callback], dict[str, Any]]] = {
            "handcrafted": ([], {}),
            "matched rate": ([], {}),
            "AdaLFL": (init(), {"adalfl": config}),
            "replay": ([TrajectoryReplay(path, steps=args.max_steps)], {"adalfl": replaying}),
            "frozen peak": ([TrajectoryReplay(peak)], {"adalfl": replaying}),
            "frozen last": ([TrajectoryReplay(last)], {"adalfl": replaying}),
        }
        for name, (callbacks, options) in runs.items():
            rate = args.lr * trajectory.gain_at(peak_step) if name == "matched rate" else args.lr
            row = train(task, replay_model, seed, args, callbacks, rate, **options)
            rows.append({"loss": name, "seed": seed, "lr": rate, **row})
            print(rows[-1], flush=True)

    print(f"\n{replay_model} on {args.data}, {args.max_steps} steps, lr {args.lr}, seeds {args.seeds}\n")
    print(f"{'loss':14} {'test error':>11} {'seconds':>8} {'CPU seconds':>12}")
    for name in dict.fromkeys(row["loss"] for row in rows):
        own = [row for row in rows if row["loss"] == name]
        mean = {key: sum(row[key] for row in own) / len(own) for key in ("test_error", "seconds", "cpu_seconds")}
        print(f"{name:14} {mean['test_error']:11.4f} {mean['seconds']:8.1f} {mean['cpu_seconds']:12.1f}")
    if args.output:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        settings = {name: value for name, value in settings.items() if name not in ("root", "log_dir", "output")}
        gains = {step: round(trajectory.gain_at(step), 4) for step in trajectory.steps}
        result = {"settings": settings, "recorded": recorded, "bytes": path.stat().st_size, "gain": gains, "runs": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
