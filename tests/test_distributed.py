"""Two processes stay equal to the bit, and learn what one process learns from the joint batch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ddp_run
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)
from processes import in_two_processes
from projects import Ada, Smooth, assert_same, config, make

from lightning_adalfl.adapter.refusals import check_trainer

CASES = ["plain", "both", "unused", "static", "accumulated", "manual", "joint", "joint alone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every case in the same two processes, since it is their start that takes time."""
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(Path(__file__).parent / "ddp_run.py", folder, *CASES)
    return folder


def saved(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_processes_end_with_equal_models_and_losses(folder: Path, case: str) -> None:
    first, second = (saved(folder, f"{case}-{rank}") for rank in (0, 1))
    assert first["meta_steps"] == second["meta_steps"] == 20
    assert not torch.equal(first["drawn"], second["drawn"])  # each has random numbers of its own
    for kind in ("theta", "phi"):
        assert_same(first[kind], second[kind])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ["joint", "joint alone"])
def test_two_processes_learn_what_one_learns_from_the_joint_batch(folder: Path, tmp_path: Path, case: str) -> None:
    """A bent loss in its first step, where no length is cut, which each process does by itself; the other in all."""
    first, second = (saved(folder, f"{case}-{rank}") for rank in (0, 1))
    ddp_run.run(0, 1, tmp_path, case)
    alone = saved(tmp_path, f"{case}-0")
    for kind in ("base_gradient", "hypergradient"):
        assert len(first[kind]) == len(alone[kind]) > 0
        for two, other, one in zip(first[kind], second[kind], alone[kind]):
            assert torch.equal(two, other)
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-9)
    for kind in ("theta", "phi") if case == "joint alone" else ():
        for name, value in first[kind].items():
            torch.testing.assert_close(value, alone[kind][name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_of_two_processes_equals_one_that_was_not_stopped(folder: Path) -> None:
    for rank in (0, 1):
        whole, resumed = saved(folder, f"plain-{rank}"), saved(folder, f"plain-{rank}-resumed")
        assert_same(whole["phi"], resumed["phi"])
        assert_same(whole["theta"], resumed["theta"])


def test_a_checkpoint_of_two_processes_loads_into_the_plain_module(folder: Path) -> None:
    module = Smooth.load_from_checkpoint(folder / "plain" / "epoch=4.ckpt", weights_only=True)
    theta = saved(folder, "plain-0")["theta"]
    assert_same({name: p.detach() for name, p in module.named_parameters()}, theta)
    checkpoint = torch.load(folder / "plain" / "epoch=4.ckpt", weights_only=True)
    assert len(checkpoint["adalfl"]["processes"]) == 2


SPAWNED = """
    import sys, warnings
    sys.path.insert(0, {tests!r})
    import torch
    from projects import *

    if __name__ == "__main__":
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        module = make(AdaSmooth, adalfl=config(learn="both"))
        before = phi(module)
        quiet = {{"strategy": "ddp_spawn", "devices": 1, "max_epochs": 1}}
        trainer({root!r}, **quiet).fit(module, *loaders())
        assert any(not torch.equal(value, before[name]) for name, value in phi(module).items())
        assert module.adalfl.meta_steps == module.adalfl.base_steps == 6, module.adalfl.base_steps
        assert module.state_dict().keys() == make(Smooth).state_dict().keys()
        trainer({root!r}, max_epochs=1).fit(module, *loaders())
        assert module.adalfl.meta_steps == 12
"""


def test_what_a_spawned_process_has_learned_comes_back(tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(textwrap.dedent(SPAWNED.format(tests=str(Path(__file__).parent), root=str(tmp_path))))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_split_parameters_are_refused_by_name(strategy: Any) -> None:
    # Without its constructor, which may need a package; it is a kind of DDP all the same.
    made = strategy.__new__(strategy)
    with pytest.raises(ValueError, match=f"`strategy` is {strategy.__name__},.*strategy='ddp'.*fits one device"):
        check_trainer(SimpleNamespace(strategy=made), None)
    module = make(Ada, adalfl=config())
    module.trainer = SimpleNamespace(strategy=made)
    with pytest.raises(ValueError, match="needs every parameter whole on each device"):
        module.setup("fit")


def test_one_device_and_ddp_are_accepted() -> None:
    check_trainer(SimpleNamespace(strategy=DDPStrategy()), None)
    check_trainer(SimpleNamespace(strategy=SingleDeviceStrategy("cpu")), None)
