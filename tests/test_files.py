"""Files that are whole or not there: read as they were written, or refused by name; nothing in them is run."""

from __future__ import annotations

import ast
import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from projects import Ada, config, loaders, make, trainer
from torch import Tensor

import lightning_adalfl
from lightning_adalfl import LearnedLoss, LossHistory, LossNetwork, files
from lightning_adalfl.files import (
    atomic_write,
    exists,
    kind_of,
    read_bytes,
    read_tensors,
    remove,
    write_tensors,
)

PACKAGE = Path(lightning_adalfl.__file__).parent
TENSORS = {"b": torch.randn(2, 3).T, "a": torch.tensor([1, 2]), "c": torch.zeros(0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder" / "file.safetensors"


@pytest.mark.parametrize("place", ["local", "memory"])
def test_tensors_and_plain_values_come_back(place: str, path: Path) -> None:
    where: Any = path if place == "local" else "memory://run/file.safetensors"
    write_tensors(where, "thing", 3, {"step": 7, "names": ["x", None]}, TENSORS)
    content, tensors = read_tensors(where, "thing", 3)
    assert content == {"kind": "thing", "version": 3, "step": 7, "names": ["x", None]}
    torch.testing.assert_close(tensors, TENSORS, rtol=0, atol=0)
    assert kind_of(where) == "thing"
    first = read_bytes(where)
    write_tensors(where, "thing", 3, {"step": 7, "names": ["x", None]}, dict(reversed(TENSORS.items())))
    assert read_bytes(where) == first
    assert exists(where)
    remove(where)
    assert not exists(where)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(path, "thing", 1, {}, TENSORS)
    before = path.read_bytes()

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "mv", full)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(path, "thing", 2, {}, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_folder_is_no_place_for_a_file(place: str, path: Path) -> None:
    where: Any = path.parent if place == "local" else "memory://folder"
    write_tensors(f"{where}/file.safetensors", "thing", 1, {}, TENSORS)
    with pytest.raises(IsADirectoryError, match=r"cannot write .*folder: it is a folder; give the path of a file"):
        write_tensors(where, "thing", 1, {}, TENSORS)
    assert path.parent.exists() == (place == "local")
    assert place == "memory" or os.listdir(where) == ["file.safetensors"]


def test_a_table_of_twelve_million_instances_can_be_written() -> None:
    assert files._MAX_FILE_BYTES > 12_000_000 * 24


@pytest.mark.parametrize(("bound", "size"), [("_MAX_FILE_BYTES", 100), ("_MAX_HEADER_BYTES", 20)])
def test_what_could_not_be_read_again_is_not_written(
    bound: str, size: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, bound, size)
    with pytest.raises(ValueError, match=r"cannot write .*: a thing of .* bytes is larger than what can be read again"):
        write_tensors(path, "thing", 1, {}, TENSORS)
    assert not path.exists()


def test_a_file_that_is_missing_or_over_the_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (read_bytes, kind_of, LearnedLoss.load):
        with pytest.raises(FileNotFoundError, match=r"cannot read .*file.safetensors: there is no such file; check"):
            read(path)
    write_tensors(path, "thing", 1, {}, TENSORS)
    monkeypatch.setattr(files, "_MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match=r"cannot read .* it has more than 100 bytes; give another file"):
        read_tensors(path, "thing", 1)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (4, "its format version 4 is newer than 3, which this version of lightning_adalfl reads; upgrade lightning_ad"),
        (0, "its format version 0 is no positive number; save it again"),
        (True, "its format version True is no positive number"),
        ("1", "its format version '1' is no positive number"),
    ],
)
def test_other_kinds_and_formats(version: Any, message: str, path: Path) -> None:
    write_tensors(path, "thing", version, {}, TENSORS)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_tensors(path, "thing", 3)
    with pytest.raises(ValueError, match="it holds 'thing' and not a 'loss history'; give another file"):
        read_tensors(path, "loss history", 3)


def test_every_truncation_and_every_flipped_bit_is_a_clear_error(path: Path) -> None:
    LossNetwork("binary", hidden=(2,)).save(path)
    data = path.read_bytes()
    damaged = [data[:length] for length in range(len(data))]
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << random.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for bad in damaged:
        path.write_bytes(bad)
        try:
            LearnedLoss.load(path)
        except ValueError as error:
            assert str(error).startswith(f"cannot read {path}: ")  # noqa: PT017
            refused += 1
    # A flip may leave a header that means the same, such as blanks that fill it up.
    assert refused > 0.98 * len(damaged)


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
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    for read in (kind_of, LearnedLoss.load):
        with pytest.raises(ValueError, match=r"cannot read .* truncated, corrupt, or was not written .* restore it"):
            read(path)


# Code in files.


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("read", [LearnedLoss.load, LossHistory.load])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, read: Any) -> None:
    path, touched = tmp_path / "loss.safetensors", tmp_path / "run"
    torch.save({"state_dict": Payload(touched)}, path)
    with pytest.raises(ValueError, match=re.escape(f"cannot read {path}")):
        read(path)
    assert not touched.exists()


@pytest.mark.parametrize("part", [None, 0.0, 0.5, 0.999])
def test_a_checkpoint_with_code_or_cut_off_is_refused_and_not_run(tmp_path: Path, part: float | None) -> None:
    path, touched = tmp_path / "bad.ckpt", tmp_path / "run"
    entry: Tensor | Payload = Payload(touched) if part is None else torch.zeros(1000)
    torch.save({"state_dict": {}, "adalfl": entry}, path)
    if part is not None:
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    module = make(Ada, adalfl=config())
    before = module.adalfl.state_dict()
    # These are torch's own errors, and come before any hook of a module.
    kinds = (pickle.UnpicklingError,) if part is None else (EOFError, OSError, RuntimeError)
    with pytest.raises(kinds):
        trainer(tmp_path).fit(module, *loaders(), ckpt_path=path)
    assert not touched.exists()
    torch.testing.assert_close(module.adalfl.state_dict()["phi"], before["phi"], rtol=0, atol=0)


def keyword(call: ast.Call, name: str) -> object:
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_load_path_unpickles_or_runs_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), name
        assert name != "torch.load" or keyword(call, "weights_only") is True, "torch.load without weights_only=True"
        assert name not in ("np.load", "numpy.load") or keyword(call, "allow_pickle") is False, name
        assert not name.startswith("yaml.") or name == "yaml.safe_load", name


def test_installing_runs_no_code_of_the_project_and_every_dependency_has_a_bound() -> None:
    root = PACKAGE.parent
    assert not list(root.glob("setup.*"))
    text = (root / "pyproject.toml").read_text()
    assert 'build-backend = "setuptools.build_meta"' in text
    assert "backend-path" not in text
    assert "cmdclass" not in text
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    lines = listed.group(1).splitlines()
    for line in lines:
        assert re.fullmatch(r'    "[\w-]+>=[\d.]+",\s+# \S.*', line), f"{line} lacks a lower bound or a reason"
    assert len(lines) <= 8
