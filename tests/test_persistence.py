"""A learned loss is a thing one keeps: in a file, in another process, in a training loop without Lightning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_adalfl import LearnedLoss, LossNetwork, TaylorLoss
from lightning_adalfl.losses import safe_file

LOSSES: dict[str, Callable[[], LearnedLoss]] = {
    "network": lambda: LossNetwork("multiclass"),
    "every option": lambda: LossNetwork(
        "regression", (3, 7, 2), "relu", "softplus", bias=True, weight_init="xavier_uniform", reduction="sum"
    ),
    "ml3": lambda: LossNetwork.ml3("multilabel"),
    "taylor": lambda: TaylorLoss("binary", "quadratic", "target_powers", "sum"),
}


class Scaled(LearnedLoss):
    """A representation of a user's own."""

    def __init__(self, task: str, power: int = 2) -> None:
        super().__init__(task)
        self.power = power
        self.scale = nn.Parameter(torch.rand(()))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * (prediction - target) ** self.power


class Forgetful(Scaled):
    def __init__(self, task: str, exponent: int = 2) -> None:
        super().__init__(task, exponent)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "loss.safetensors"


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["lightning_adalfl"])


def forge(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """Write the file at ``path`` again with other header entries or tensors."""
    tensors = safetensors.torch.load(path.read_bytes()) if tensors is None else tensors
    header = {**header_of(path), "crc32": safe_file.checksum(tensors), **changes}
    path.write_bytes(safetensors.torch.save(tensors, {"lightning_adalfl": json.dumps(header)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", LOSSES)
def test_round_trip_is_bitwise(kind: str, dtype: torch.dtype, path: Path) -> None:
    loss = LOSSES[kind]().to(dtype)
    loss.save(path)
    random_state = torch.get_rng_state()
    loaded = LearnedLoss.load(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert repr(loaded) == repr(loss)
    assert vars(loaded).keys() == vars(loss).keys()
    public = [name for name in vars(loss) if not name.startswith("_") and name != "layers"]
    assert all(getattr(loaded, name) == getattr(loss, name) for name in public)
    expected = dict(loss.named_parameters())
    assert [name for name, _ in loaded.named_parameters()] == list(expected)
    for name, phi in loaded.named_parameters():
        assert (phi.dtype, phi.requires_grad) == (dtype, True)
        assert torch.equal(phi, expected[name])
    again = path.with_name("again.safetensors")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_a_subclass_loads_its_own_alone(path: Path) -> None:
    TaylorLoss("binary").save(path)
    assert isinstance(TaylorLoss.load(path), TaylorLoss)
    with pytest.raises(ValueError, match=r"class 'TaylorLoss', and known here are \['LossNetwork'\]; load it as"):
        LossNetwork.load(path)


def test_a_class_of_the_users_own(path: Path) -> None:
    loss = Scaled("regression", power=4)
    loss.save(path)
    loaded = LearnedLoss.load(path)
    assert isinstance(loaded, Scaled)
    assert loaded.power == 4
    assert torch.equal(loaded.scale, loss.scale)


def test_a_class_that_forgets_its_arguments_says_what_to_keep(path: Path) -> None:
    with pytest.raises(TypeError, match=r"`exponent` cannot be read back .* Keep it as the attribute `exponent`"):
        Forgetful("regression").save(path)
    assert not path.exists()


def test_a_class_that_is_not_imported_says_so(path: Path) -> None:
    LossNetwork("binary").save(path)
    forge(path, **{"class": "TheirLoss"})
    with pytest.raises(ValueError, match=r"class 'TheirLoss', and known here are .* import the module"):
        LearnedLoss.load(path)


def test_a_diverged_loss_is_not_kept(path: Path) -> None:
    loss = TaylorLoss("binary")
    with torch.no_grad():
        loss.coefficients[3] = float("nan")
    with pytest.raises(ValueError, match=r"cannot save the loss to .*loss.safetensors: 'coefficients' is not finite"):
        loss.save(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LossNetwork("binary").save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        LossNetwork("binary").save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_could_not_be_read_again_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_file, "_MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"cannot write .*loss.safetensors: .* larger than what can be read again"):
        LossNetwork("binary").save(path)
    assert not path.exists()


def test_no_such_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot read .*loss.safetensors: there is no such file; check"):
        LearnedLoss.load(path)


def test_every_truncation_is_a_clear_error(path: Path) -> None:
    LossNetwork("binary", hidden=(2,)).save(path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=re.escape(f"cannot read {path}: it is truncated, corrupt, or was not")):
            LearnedLoss.load(path)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x04\x95 not a pickle that anyone runs", id="pickle"),
        pytest.param((2**63).to_bytes(8, "little") + b"{}", id="header larger than memory"),
        pytest.param((200_000).to_bytes(8, "little") + b"[" * 200_000, id="header over the bound"),
        pytest.param((60_000).to_bytes(8, "little") + b"[" * 60_000, id="header nested too deep"),
        pytest.param(safetensors.torch.save({"w": torch.ones(2)}), id="no header"),
        pytest.param(safetensors.torch.save({"w": torch.ones(2)}, {"lightning_adalfl": "[1]"}), id="header a list"),
    ],
)
def test_files_of_others_are_refused(data: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read .* truncated, corrupt, or was not written .* restore it"):
        LearnedLoss.load(path)


def test_a_file_over_the_bound_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LossNetwork("binary").save(path)
    monkeypatch.setattr(safe_file, "_MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"cannot read .* it has more than 1,000 bytes; give another file"):
        LearnedLoss.load(path)


WIDE = {"hidden": [2**20, 2**20], "task": "binary"}  # four terabytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "trajectory"}, "it holds 'trajectory' and not a 'learned loss'"),
        ({"version": 2}, "its format version 2 is newer than 1, .* upgrade lightning_adalfl"),
        ({"version": "1"}, "its format version '1' is no positive number"),
        ({"options": None}, "its options None build no LossNetwork"),
        ({"options": {"task": "ranking"}}, "build no LossNetwork .`task` must be one of"),
        ({"options": {"task": "binary", "evil": 1}}, "build no LossNetwork .*'evil'"),
        ({"options": {"task": "binary", "hidden": [10**30]}}, "build no LossNetwork .*Overflow"),
        # Refused for its shapes, before it is built.
        ({"options": WIDE}, r"whose 'layers.0.weight' has shape \(1048576, 2\), and its φ has \(40, 2\)"),
        ({"options": {"task": "binary", "bias": True}}, r"whose 'layers.0.bias' has shape \(40,\), and its φ has None"),
        ({"class": 7}, "loss of class 7"),
    ],
)
def test_headers_that_do_not_fit(changes: dict[str, Any], message: str, path: Path) -> None:
    LossNetwork("binary").save(path)
    forge(path, **changes)
    with pytest.raises(ValueError, match=f"cannot read .*loss.safetensors: .*{message}"):
        LearnedLoss.load(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(7), r"whose 'coefficients' has shape \(8,\), and its φ has \(7,\) there"),
        (torch.zeros(8, dtype=torch.int64), "dtypes .'torch.int64'., where one floating dtype is wanted"),
        (torch.full((8,), float("inf")), "its φ cannot be used: 'coefficients' is not finite"),
    ],
)
def test_phi_that_does_not_fit(value: Tensor, message: str, path: Path) -> None:
    TaylorLoss("binary").save(path)
    forge(path, {"coefficients": value})
    with pytest.raises(ValueError, match=f"cannot read .*loss.safetensors: .*{message}"):
        LearnedLoss.load(path)


PLAIN = """
import sys, torch
from lightning_adalfl.losses import LearnedLoss
loss = LearnedLoss.load(sys.argv[1]).requires_grad_(False)
torch.manual_seed(0)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
x = torch.randn(64, 2)
y = (x[:, 0] > 0).long()
for _ in range(200):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
assert all(p.grad is None for p in loss.parameters())
print(float((model(x).argmax(1) == y).float().mean()))
"""


def test_a_loaded_loss_trains_in_a_plain_loop_in_another_process(path: Path) -> None:
    loss = TaylorLoss("multiclass")  # (f - y)² up to a constant
    with torch.no_grad():
        loss.coefficients.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, -2.0, 0.0, 0.0]))
    loss.save(path)
    done = subprocess.run([sys.executable, "-c", PLAIN, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.95
