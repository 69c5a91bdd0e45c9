"""Files from elsewhere: read as they were written, or refused by name; nothing in them is run."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endurance_fuzz import fuzz
from projects import Ada, config, loaders, make, trainer

import lightning_adalfl
from lightning_adalfl import LearnedLoss, LossTrajectory
from lightning_adalfl.snapshots import LossShapeHistory

PACKAGE = Path(lightning_adalfl.__file__).parent
READERS = [LearnedLoss.load, LossShapeHistory.load, LossTrajectory.load]


def test_damaged_files_are_read_or_refused() -> None:
    result = fuzz(5, seed=1)
    assert result["executions"] > 50
    assert result["refused"] > 0.8 * result["executions"]


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", ["torch", "numpy"])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, reader: Any, writer: str) -> None:
    path, touched = tmp_path / "loss.npz", tmp_path / "run"
    if writer == "torch":
        torch.save({"state_dict": Payload(touched)}, path)
    else:
        np.savez(path, targets=np.array([Payload(touched)], dtype=object), version=np.asarray(1))
    with pytest.raises(ValueError, match=re.escape(f"cannot read {path}")):
        reader(path)
    assert not touched.exists()


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, touched = tmp_path / "bad.ckpt", tmp_path / "run"
    torch.save({"state_dict": {}, "adalfl": Payload(touched)}, path)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        trainer(tmp_path).fit(make(Ada, adalfl=config()), *loaders(), ckpt_path=path)
    assert not touched.exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    fitter = trainer(root, max_steps=2, limit_val_batches=1)
    fitter.fit(make(Ada, adalfl=config()), *loaders())
    fitter.save_checkpoint(root / "good.ckpt")
    return root / "good.ckpt"


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_checkpoint_that_is_cut_off_is_refused(checkpoint: Path, tmp_path: Path, part: float) -> None:
    data = checkpoint.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: int(part * len(data))])
    module = make(Ada, adalfl=config())
    before = module.adalfl.progress()
    # These are torch's own errors, and come before any hook of a module.
    with pytest.raises((EOFError, OSError, RuntimeError)):
        trainer(tmp_path).fit(module, *loaders(), ckpt_path=tmp_path / "cut.ckpt")
    assert module.adalfl.progress() == before


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([], "it is no dictionary"),
        ({}, "`state_dict` is no dictionary"),
        ({"state_dict": {"a": 1}}, "`state_dict` holds values that are no tensors"),
        ({"progress": None}, "`progress` is no dictionary"),
        ({"base_steps": -1}, "`progress` has no count `base_steps`"),
        ({"meta_steps": True}, "`progress` has no count `meta_steps`"),
        ({"initialised": 1}, "`progress` has no switch `initialised`"),
        ({"meta_optimizer": {"state": []}}, "`meta_optimizer` is no optimizer's state"),
        ({"safeguard": {}}, "`safeguard` is no safeguard's state"),
        ({"gain_horizon": {"average": [1.0]}}, "`gain_horizon` has no average"),
        ({"gain_horizon": {"average": []}}, "`gain_horizon` has no place"),
        ({"processes": [None]}, "`processes` holds no random states"),
    ],
)
def test_a_damaged_entry_is_refused_by_name(checkpoint: Path, entry: Any, reason: str) -> None:
    state = torch.load(checkpoint, weights_only=True)
    if isinstance(entry, dict) and entry:
        (name,) = entry
        place = state["adalfl"] if name in ("state_dict", "progress", "processes") else state["adalfl"]["progress"]
        place[name] = entry[name]
    else:
        state["adalfl"] = entry
    with pytest.raises(ValueError, match=f"checkpoint's entry 'adalfl' cannot be read: {reason}.*another checkpoint"):
        make(Ada, adalfl=config()).on_load_checkpoint(state)


def test_a_checkpoint_of_another_loss_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    module = make(Ada, adalfl=config(representation="taylor_cubic"))
    with pytest.raises(RuntimeError, match=r"adalfl\.loss\.coefficients"):
        trainer(tmp_path).fit(module, *loaders(), ckpt_path=checkpoint)


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_load_path_unpickles_or_runs_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess"}
    for name, call in calls(tree):
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), name
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, "torch.load without weights_only=True unpickles"
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") is False, "say allow_pickle=False"
        assert not (name.startswith("yaml.") and name != "yaml.safe_load"), name


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
