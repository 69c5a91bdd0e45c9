"""Parameters sharded by `fully_shard` over two processes: they end where one process does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import in_two_processes, joined
from projects import Smooth, adaptive, config, make, phi, points, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLInit
from lightning_adalfl.adapter.refusals import check_trainer

CASES = ["SGD", "clipped", "AdamW", "RMSprop", "half", "Muon", "bent"]


class Shards(Smooth):
    """Shards its layers where there is more than one process."""

    def __init__(self, case: str = "SGD") -> None:
        super().__init__()
        self.case = case
        self.double()

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.model[0], mesh=mesh)
            if self.case != "half":
                fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim == 2] if self.case == "Muon" else self.parameters()
        options = {"momentum": 0.9} if self.case == "SGD" else {}
        kind = getattr(torch.optim, "SGD" if self.case in ("half", "clipped", "bent") else self.case)
        return kind(matrices, lr=0.1 if kind is torch.optim.SGD else 0.01, **options)


def run(rank: int, world_size: int, folder: Path, case: str) -> dict[str, Any]:
    """Train 20 steps on the joint batch; return whole θ and φ."""
    options = {"hypergradient": "finite_difference", "meta_optimizer": "SGD", "meta_lr": 0.1, "meta_data": "train"}
    # The learned loss alone, which knows no batch: a bent one finds its length in each process by itself.
    shape = {} if case == "bent" else {"own_loss": False, "loss": "paper"}
    module = make(adaptive(Shards), case=case, adalfl=config(**options, **shape))
    for parameter in [*module.parameters(), *module.adalfl.loss.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    module.adalfl.set_phi(module.adalfl.loss.state_dict())
    theta = {name: p.detach().clone() for name, p in module.named_parameters()}
    start = {"theta": theta, "phi": phi(module)}
    how: dict[str, Any] = {}
    if world_size > 1:
        strategy = ModelParallelStrategy(world_size, 1, process_group_backend="gloo")
        strategy.cluster_environment = LightningEnvironment()
        how = {"strategy": strategy, "devices": world_size}
    clip = {"gradient_clip_val": 5e-3} if case == "clipped" else {}
    train = DataLoader(points(96, dtype=torch.float64), 96 // world_size, shuffle=False)
    val = DataLoader(points(32, 1, torch.float64), 8)
    t = trainer(folder, max_epochs=-1, max_steps=20, **how, **clip)
    t.fit(module, train, val)
    theta = {name: whole(p).detach().clone() for name, p in module.named_parameters()}
    found = {"theta": theta, "phi": phi(module), "meta_steps": module.adalfl.meta_steps, "start": start}
    return {**found, "consensus": module.adalfl.consensus.mean}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    in_two_processes(__file__, folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ["SGD", "clipped", "AdamW", "RMSprop"])
def test_two_processes_with_shards_end_where_one_ends(folder: Path, tmp_path: Path, case: str) -> None:
    alone = run(0, 1, tmp_path, case)
    for rank in (0, 1):
        found = torch.load(folder / f"{case}-{rank}.pt", weights_only=True)
        assert found["meta_steps"] == alone["meta_steps"] == 20
        for kind in ("theta", "phi"):
            for name, value in alone[kind].items():
                torch.testing.assert_close(found[kind][name], value, rtol=1e-4, atol=1e-6)
        # What they agree in has moved by far more than that.
        for kind, moved in (("theta", 1e-3), ("phi", 1e-4)):
            assert max(float((alone[kind][n] - t).abs().max()) for n, t in alone["start"][kind].items()) > moved


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_processes_have_the_same_consensus(folder: Path) -> None:
    first, second = (torch.load(folder / f"bent-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert 0 < abs(float(first["consensus"])) <= 1
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["half", "Muon"])
def test_models_that_are_sharded_in_part_and_steps_that_mix_elements_are_refused(folder: Path, case: str) -> None:
    message = torch.load(folder / f"{case}-0.pt", weights_only=True)["error"]
    assert "apply `fully_shard` to all of the model" in message
    assert ("2 of 4 sharded" if case == "half" else "2 of 2 sharded, FiniteDifference and Muon") in message


@pytest.mark.parametrize(
    ("options", "size", "callbacks", "named"),
    [
        ({"hypergradient": "forward"}, 1, [], "hypergradient='forward'"),
        ({"learn": "both"}, 1, [], "learn='both'"),
        ({}, 1, [AdaLFLInit(steps=1)], "an offline phase"),
        ({}, 2, [], "tensor parallelism"),
    ],
)
def test_what_is_not_known_of_shards_is_refused(options: Any, size: int, callbacks: Any, named: str) -> None:
    strategy = ModelParallelStrategy()
    mesh = SimpleNamespace(size=lambda: size)
    strategy._device_mesh = {"tensor_parallel": mesh}  # type: ignore[assignment]
    module = make(adaptive(Shards), adalfl=config(**{"hypergradient": "finite_difference", **options}))
    module.trainer = SimpleNamespace(strategy=strategy, callbacks=callbacks)
    with pytest.raises(ValueError, match=f"`strategy` is ModelParallelStrategy.*got {named}.*strategy='ddp'"):
        check_trainer(module.trainer, module)


if __name__ == "__main__":
    rank, world_size, folder_of_both, _ = joined()
    for case in CASES:
        try:
            saved = run(rank, world_size, folder_of_both, case)
        except ValueError as error:
            saved = {"error": str(error)}
        torch.save(saved, folder_of_both / f"{case}-{rank}.pt")
