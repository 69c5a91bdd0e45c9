"""The structure that the package promises: which way imports point, and what is public."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_adalfl

PACKAGE = Path(lightning_adalfl.__file__).parent
# Each layer may import from those before it and from itself.
LAYERS = ["arguments", "atomic_file", "losses", "config", "hypergradient", "adapter", "mixin", "callbacks", "__init__"]
# Pictures and files of a learned loss know nothing of training.
BESIDE = {"loss_shape", "snapshots", "plotting", "trajectory", "inspection"}


def runtime_imports(path: Path) -> set[str]:
    """Return the parts of the package that a file imports when it runs, type checking aside."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    modules = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing_only
    ]
    return {name.split(".")[1] for name in modules if name.startswith("lightning_adalfl.")}


def layer_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    layer = layer_of(path)
    imported = runtime_imports(path)
    if layer in LAYERS:
        allowed = set(LAYERS[: LAYERS.index(layer) + 1])
        if layer in ("callbacks", "__init__"):
            allowed |= BESIDE
        if layer == "__init__":
            allowed |= {"callbacks"}
        assert imported <= allowed, f"{layer} must not import {sorted(imported - allowed)}"
    elif layer in BESIDE:
        assert imported <= BESIDE | {"arguments", "atomic_file", "losses", "config"}
    else:
        assert layer == "__main__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_one_concept(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    assert path.name != "utils.py"


def test_the_pure_torch_core_knows_no_lightning() -> None:
    for path in [*(PACKAGE / "hypergradient").glob("*.py"), *(PACKAGE / "losses").glob("*.py")]:
        tree = ast.parse(path.read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not any(name == "lightning" or name.startswith("lightning.") for name in names), path


def test_the_contract_of_public_names() -> None:
    contract = {
        "AdaLFLConfig",
        "AdaLFLInit",
        "AdaLFLMixin",
        "LearnedLoss",
        "LossNetwork",
        "LossShapeLogger",
        "TaylorLoss",
        "hypergradient",
    }
    assert contract <= set(lightning_adalfl.__all__)
    assert all(hasattr(lightning_adalfl, name) for name in lightning_adalfl.__all__)
    assert callable(lightning_adalfl.hypergradient)


def test_examples_use_public_names_only() -> None:
    public = set(lightning_adalfl.__all__) | {"__version__"}
    allowed_modules = {"lightning_adalfl", "lightning_adalfl.plotting", "lightning_adalfl.snapshots"}
    for path in (PACKAGE.parent / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_adalfl":
                assert node.module in allowed_modules, f"{path.name} imports from {node.module}"
                if node.module == "lightning_adalfl":
                    assert {alias.name for alias in node.names} <= public, path.name
