"""What each process of the influence test runs: ``python ddp_influence.py rank world_size port folder``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from processes import joined
from projects import AdaSmooth, Keep, config, make, points, trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_adalfl import InfluenceLogger
from lightning_adalfl.inspection import InfluenceTable


def run(world_size: int, folder: Path, shuffle: bool, ckpt: Path | None = None) -> InfluenceTable:
    """Train two epochs of four steps on 96 instances, 24 a step; return the table."""
    module = make(AdaSmooth, adalfl=config(learn="nothing", meta_batch_size=32 // world_size))
    logger, data, sampler = InfluenceLogger(), points(96, dtype=torch.float64), None
    options: dict[str, Any] = {}
    if world_size > 1:
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
        options = {"strategy": strategy, "devices": world_size}
    if world_size > 1 and not shuffle:  # Lightning's own sampler shuffles always
        sampler = DistributedSampler(data, world_size, int(os.environ["LOCAL_RANK"]), shuffle=False)
        options["use_distributed_sampler"] = False
    train = DataLoader(data, 24 // world_size, shuffle=shuffle, sampler=sampler)
    held_out = DataLoader(points(32, 1, torch.float64), 16)
    callbacks = [logger, *([Keep(folder)] if ckpt is None else [])]
    t = trainer(folder, callbacks=callbacks, precision="64-true", **options)
    t.fit(module, train, held_out, ckpt_path=ckpt)
    return logger.table


if __name__ == "__main__":
    rank, world_size, folder, _ = joined()
    tables = {"joint": run(world_size, folder / "joint", False), "whole": run(world_size, folder / "whole", True)}
    tables["resumed"] = run(world_size, folder / "resumed", True, folder / "whole" / "epoch=0.ckpt")
    for name, table in tables.items():
        torch.save({k: t for k, t in vars(table).items() if isinstance(t, torch.Tensor)}, folder / f"{name}-{rank}.pt")
