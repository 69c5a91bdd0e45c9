"""Two processes stay equal to the bit, and learn what one process learns from the joint batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ddp_run
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from projects import Ada, Smooth, config, loaders, make, trainer

from lightning_adalfl.adapter.requirements import check_strategy

CASES = ["plain", "unused", "static", "accumulated", "joint"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every case in the same two processes, since it is their start that takes time."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).parent / "ddp_run.py")]
    # What `seed_everything` left behind in another test would seed both processes alike.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(port), str(folder), *CASES],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
    return folder


def saved(folder: Path, case: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"{case}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_processes_end_with_equal_models_and_losses(folder: Path, case: str) -> None:
    first, second = saved(folder, case, 0), saved(folder, case, 1)
    assert first["meta_steps"] == second["meta_steps"] == 20
    assert not torch.equal(first["drawn"], second["drawn"])  # each has random numbers of its own
    for kind in ("theta", "phi"):
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_processes_learn_what_one_learns_from_the_joint_batch(folder: Path, tmp_path: Path) -> None:
    first, second = saved(folder, "joint", 0), saved(folder, "joint", 1)
    ddp_run.run(0, 1, tmp_path, "joint")
    alone = saved(tmp_path, "joint", 0)
    for kind in ("base_gradient", "hypergradient"):
        assert len(first[kind]) == len(alone[kind]) > 0
        for two, other, one in zip(first[kind], second[kind], alone[kind]):
            torch.testing.assert_close(two, other, rtol=0, atol=0)
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)
    for kind in ("theta", "phi"):
        for name, value in first[kind].items():
            torch.testing.assert_close(value, alone[kind][name], rtol=1e-7, atol=1e-9)


def test_a_checkpoint_of_two_processes_loads_into_the_plain_module(folder: Path) -> None:
    module = Smooth.load_from_checkpoint(folder / "plain" / "step=20.ckpt", weights_only=True)
    theta = saved(folder, "plain", 0)["theta"]
    for name, value in module.named_parameters():
        assert torch.equal(value, theta[name])


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_split_parameters_are_refused_by_name(strategy: Any) -> None:
    module = make(Ada, adalfl=config())
    module.trainer = SimpleNamespace(strategy=strategy())
    with pytest.raises(MisconfigurationException, match=f"does not work with {strategy.__name__}.*strategy='ddp'"):
        module.setup("fit")


def test_deepspeed_is_refused_though_it_is_a_kind_of_ddp() -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    # Made without its constructor, which needs the package.
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    assert isinstance(strategy, DDPStrategy)
    with pytest.raises(MisconfigurationException, match="does not work with DeepSpeedStrategy"):
        check_strategy(SimpleNamespace(strategy=strategy))


def test_one_device_and_ddp_are_accepted(tmp_path: Path) -> None:
    check_strategy(SimpleNamespace(strategy=DDPStrategy()))
    check_strategy(SimpleNamespace(strategy=SingleDeviceStrategy("cpu")))
    module = make(Ada, adalfl=config())
    trainer(tmp_path, fast_dev_run=1).fit(module, *loaders())
    assert module.adalfl.meta_steps == 1
