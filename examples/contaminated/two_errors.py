"""Draws the picture of the README: test errors over training, of values that are too low and of mixed-up digits.

    python examples/contaminated/two_errors.py        # two minutes on a CPU

The modules and data are those of ``examples/regression.py`` and ``examples/noisy_labels.py``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
import noisy_labels
import regression

from lightning_adalfl import AdaLFLConfig

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "two_errors.png"
OWN, OTHER, OURS = "tab:red", "tab:gray", "tab:blue"
POINTS = 40


class Curve(L.Callback):
    """Errors on the trusted and the test rows over training."""

    def __init__(self, error: Any, trusted: TensorDataset, test: TensorDataset) -> None:
        self.error, self.rows = error, (trusted, test)
        self.steps: list[int] = []
        self.errors: list[tuple[float, float]] = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Look, forty times a run."""
        if trainer.global_step % max(1, trainer.max_steps // POINTS):
            return
        module.eval()
        trusted, test = (float(self.error(module(x), y)) for x, y in (rows.tensors for rows in self.rows))
        module.train()
        self.steps.append(trainer.global_step)
        self.errors.append((trusted, test))

    def draw(self, axes: Axes, label: str, color: str, stops: bool = False) -> None:
        """Draw the test error, and a circle where the trusted rows would have stopped."""
        axes.plot(self.steps, [test for _, test in self.errors], color=color, label=label)
        if stops:
            best = min(range(len(self.steps)), key=lambda k: self.errors[k][0])
            place = self.steps[best], self.errors[best][1]
            axes.plot(*place, "o", mfc="white", color=color, label=f"{label.split(',')[0]}, early-stopped", zorder=3)


def fit(make: Callable[[], L.LightningModule], curve: Curve, train: TensorDataset, steps: int, **options: Any) -> Curve:
    """Train what is made from the same random state each time, and return the curve."""
    L.seed_everything(0, verbose=False)
    module = make()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_steps=steps, callbacks=[curve], accelerator="cpu", enable_model_summary=False, **quiet, **options
    )
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
    return curve


def draw_values(axes: Axes, steps: int) -> None:
    """Draw values of which 30% are too low."""
    train, trusted, test = regression.load_rows(0.3, 0)

    def draw(make: Callable[[], L.LightningModule], *how: Any, **options: Any) -> None:
        fit(make, Curve(F.mse_loss, trusted, test), train, steps).draw(axes, *how, **options)

    config = AdaLFLConfig("regression", meta_data=DataLoader(trusted, batch_size=64, shuffle=True))
    draw(regression.LitRegressor, "own loss, squared error", OWN, stops=True)
    draw(partial(regression.LitRegressor, loss=F.l1_loss), "absolute error", OTHER)
    draw(partial(regression.AdaRegressor, adalfl=config), "with lightning_adalfl", OURS)
    axes.set(title="30% of the values are too low", ylabel="test error, mean squared", yscale="log")


def draw_digits(axes: Axes, steps: int) -> None:
    """Draw digits of which 40% have another class's label."""
    train, trusted, test = noisy_labels.load_digits(0.4, 300, 0)

    def error(predictions: Tensor, target: Tensor) -> Tensor:
        return (predictions.argmax(1) != target).float().mean()

    def draw(make: Callable[[], L.LightningModule], *how: Any, **options: Any) -> None:
        curve = fit(make, Curve(error, trusted, test), train, steps, gradient_clip_val=5.0)
        curve.draw(axes, *how, **options)

    config = AdaLFLConfig("multiclass", meta_data=DataLoader(trusted, batch_size=64))
    draw(noisy_labels.LitDigits, "own loss, cross-entropy", OWN, stops=True)
    draw(partial(noisy_labels.AdaDigits, adalfl=config), "with lightning_adalfl", OURS)
    axes.set(title="40% of the digits have another's label", ylabel="test error, share of digits", ylim=(0, None))


def main(arguments: list[str] | None = None) -> None:
    """Draw both, side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=(3000, 2000), help="of values and of digits")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(not have many workers|LeafSpec|defined a `validation_step`).*")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = zip(figure.subplots(1, 2), (draw_values, draw_digits), options.steps, (0.5, 0.45))
    for axes, draw, steps, height in panels:
        draw(axes, steps)
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
        axes.legend(loc=(0.46, height))
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
