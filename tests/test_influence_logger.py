"""A user attaches InfluenceLogger, and has a list of the training targets to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from projects import Smooth, adaptive, config, make, points, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_adalfl import InfluenceLogger

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


class Weighted(Smooth):
    """Gives instance ``turned`` of the third batch another weight."""

    turned: tuple[int, float] = (0, 0.0)
    optimizer = "SGD"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weight = torch.ones(len(y), dtype=x.dtype)
        if batch_idx == 2:
            weight[self.turned[0]] += self.turned[1]
        return (F.cross_entropy(self(x), y, reduction="none") * weight).mean()

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Normalised(Weighted):
    """The same with BatchNorm."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", [Weighted, Normalised])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_influence_is_the_slope_of_the_held_out_loss_by_the_weight_of_an_instance(
    name: str, kind: type[Weighted], tmp_path: Path
) -> None:
    """Of its loss in the batch: what BatchNorm makes of the instance stays."""
    train = DataLoader(points(30, dtype=torch.float64), 10)
    held_out = points(20, 1, torch.float64)

    def fitted(place: int, change: float, logger: list[Any]) -> float:
        module = make(
            adaptive(kind), adalfl=config(learn="nothing", meta_every=3, meta_batch_size=20, task_loss="handcrafted")
        )
        module.turned, module.optimizer = (place, change), name
        trainer(tmp_path, max_epochs=1, precision="64-true", callbacks=logger).fit(
            module, train, DataLoader(held_out, 20)
        )
        x, y = held_out.tensors
        return F.cross_entropy(module.double().train()(x), y).item()

    logger = InfluenceLogger()
    fitted(0, 0.0, [logger])
    step = 1e-4
    slopes = torch.tensor([fitted(i, step, []) - fitted(i, -step, []) for i in range(10)], dtype=torch.float64) / (
        2 * step
    )
    assert logger.table.mean("seen").tolist() == [0.0] * 20 + [1.0] * 10
    found = torch.from_numpy(logger.table.mean("influence")[20:])
    torch.testing.assert_close(found, slopes / slopes.abs().mean(), rtol=1e-5, atol=1e-6)
