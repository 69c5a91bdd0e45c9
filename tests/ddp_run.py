"""What each process of the distributed tests runs: ``python ddp_run.py rank world_size port folder cases…``.

For each case it writes θ, φ and the gradients of the first step to ``folder/case-rank.pt``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from processes import joined
from projects import AdaSmooth, Keep, Smooth, config, phi, points, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLInit, AdaLFLMixin, LossShapeLogger


class Partial(Smooth):
    """Has a part that no batch uses."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.unused = nn.Linear(3, 3)


class AdaPartial(AdaLFLMixin, Partial):
    """The same with a learned loss."""


class AdaManual(AdaLFLMixin, Smooth):
    """Takes its own steps."""

    automatic_optimization = False

    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


class FirstGradients(Callback):
    """Keeps the base gradient of the first step, and the hypergradient through the first move of φ."""

    def __init__(self) -> None:
        self.base: list[Tensor] = []
        self.learned: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.base:
            self.base = [p.grad.detach().clone() for p in pl_module.model.parameters()]
            self.before = phi(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.learned and pl_module.adalfl.meta_steps:
            self.learned = [self.before[name] - value for name, value in phi(pl_module).items()]


def strategy(case: str) -> DDPStrategy:
    """Return the strategy of a case, for processes that somebody else has started."""
    options = {"unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}.get(case, {})
    return DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment(), **options)


def run(rank: int, world_size: int, folder: Path, case: str, ckpt: Path | None = None) -> None:
    """Train 20 steps and save what the process ended with."""
    # The learner has random numbers of its own; those of each process are its own too.
    torch.manual_seed(rank)
    joint = case.startswith("joint")
    # Cases that are compared with one process take all data in one batch, which no order changes.
    options: dict[str, Any] = {"meta_optimizer": "SGD", "meta_lr": 0.1, "meta_data": "train"} if joint else {}
    if case == "joint alone":
        options |= {"own_loss": False, "loss": "paper"}
    if case == "both":
        options["learn"] = "both"
    kind = {"unused": AdaPartial, "manual": AdaManual}.get(case, AdaSmooth)
    module = kind(adalfl=config(**options))
    if joint:
        torch.manual_seed(1)  # of the draws that cut no length in the first step
        for parameter in [*module.parameters(), *module.adalfl.loss.parameters()]:
            nn.init.normal_(parameter, std=0.3)
        module.adalfl.set_phi(module.adalfl.loss.state_dict())
        torch.manual_seed(rank)
    size = 96 // world_size if joint else 12
    dtype = torch.float64 if joint else torch.float32
    train = DataLoader(points(96, dtype=dtype), size, shuffle=not joint)
    val = DataLoader(points(32, 1, dtype), 8)
    gradients = FirstGradients()
    callbacks: list[Any] = [gradients, *([Keep(folder / case)] if ckpt is None else [])]
    t_options: dict[str, Any] = {"precision": "64-true" if joint else "32-true"}
    if case != "manual":
        t_options |= {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2 if case == "accumulated" else 1}
    if case == "both":  # a callback looks for what is monitored in every process
        callbacks += [LossShapeLogger(every_n_steps=5), EarlyStopping("adalfl/flatness", patience=99)]
    if not joint:
        callbacks.append(AdaLFLInit(steps=5, lr=1e-2))
    if world_size > 1:
        t_options |= {"strategy": strategy(case), "devices": world_size}
    # With a number of steps, Lightning itself resumes with another order of the data.
    t_options |= {"max_epochs": 5} if case == "plain" else {"max_epochs": -1, "max_steps": 20}
    t = trainer(folder, callbacks=callbacks, **t_options)
    t.fit(module, train, val, ckpt_path=ckpt)
    saved = {
        "theta": {name: p.detach() for name, p in module.named_parameters()},
        "phi": phi(module),
        "meta_steps": module.adalfl.meta_steps,
        "base_gradient": gradients.base,
        "hypergradient": gradients.learned,
        "drawn": torch.rand(1),
    }
    torch.save(saved, folder / f"{case}-{rank}{'' if ckpt is None else '-resumed'}.pt")


if __name__ == "__main__":
    rank, world_size, folder, cases = joined()
    for case in cases:
        run(rank, world_size, folder, case)
    run(rank, world_size, folder, "plain", folder / "plain" / "epoch=1.ckpt")
