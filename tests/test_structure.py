"""The structure that the package promises: its six rules, its size, and what is public."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import torch
from projects import Smooth, adaptive, config, loaders, make, trainer

import lightning_adalfl

PACKAGE = Path(lightning_adalfl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Top to bottom; a room imports only from those below it, and from itself.
ROOMS = [
    "__init__",
    "callbacks",
    "adapter",
    "__main__",
    "inspection",
    "learning",
    "config",
    "losses",
    "files",
    "checks",
]


def named(path: Path) -> str:
    """Return the dotted name of a file within the package, its face by that of the folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {named(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the files of the package that a file imports anywhere, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_adalfl":
            module = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                found.add(inner if inner in NAMES else module or "__init__")
    return found


def foreign(path: Path) -> set[str]:
    """Return the other packages that a file imports."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def room(name: str) -> str:
    return name.split(".")[0]


GRAPH = {named(path): imports(path) for path in FILES}


def test_a_room_imports_only_what_stands_below_it() -> None:
    for name, imported in GRAPH.items():
        allowed = set(ROOMS[ROOMS.index(room(name)) :])
        assert {room(other) for other in imported} <= allowed, name


def test_lightning_is_touched_in_adapter_and_callbacks_alone_and_by_name_nowhere() -> None:
    for path in FILES:
        known = {name.split(".")[0] for name in foreign(path)}
        assert not known & {"lightning", "pytorch_lightning"}, path
        if room(named(path)) not in ("adapter", "callbacks"):
            assert "lightning_utilities" not in known, path


def test_losses_and_learning_know_no_configuration_but_for_who_is_made_from_one() -> None:
    knowing = {
        name for name, imported in GRAPH.items() if "config" in imported and room(name) in ("losses", "learning")
    }
    assert knowing == {"learning.meta_learner"}


def test_inspection_needs_neither_a_trainer_nor_learning() -> None:
    for name, imported in GRAPH.items():
        if room(name) == "inspection":
            assert not {room(other) for other in imported} & {"learning", "adapter", "callbacks", "config"}, name


def test_there_is_no_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in GRAPH.get(name, ()):
                if other != name:
                    visit(other, (*above, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_few_arrows_lead_from_room_to_room() -> None:
    arrows = {(room(a), room(b)) for a, others in GRAPH.items() for b in others if room(a) != room(b)}
    between = {(a, b) for a, b in arrows if a != "__init__"}
    assert len(between) <= 16, sorted(between)


def test_what_torch_and_lightning_do_not_promise_is_in_two_files() -> None:
    private = {
        "learning.torch_private": ("torch._", "torch.ops", ".utils._pytree", "._version", "_call_impl", "_dynamo"),
        "adapter.lightning_private": ("._data_source", "_combined_loader", "_logger_connector", "_MultiProcessing"),
    }
    for path in FILES:
        text = path.read_text().replace("torch._foreach", "")
        for owner, marks in private.items():
            if named(path) != owner:
                # Losses may not import what is learned with them, and must know whether φ has moved.
                marks = tuple(mark for mark in marks if (named(path), mark) != ("losses.knots", "._version"))
                assert not [mark for mark in marks if mark in text], path


def test_the_package_is_small() -> None:
    lines = {named(path): len(path.read_text().splitlines()) for path in FILES}
    assert max(lines.values()) <= 300, max(lines, key=lambda name: lines[name])
    assert len(FILES) <= 57
    assert sum(lines.values()) <= 10052
    assert not any(path.name == "utils.py" for path in FILES)


class Traced(Smooth):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def test_one_training_step_runs_through_few_files(tmp_path: Any) -> None:
    """Rule six: who follows a default step and its meta step reads these files and no other."""
    seen: set[str] = set()
    module = make(adaptive(Traced), adalfl=config(meta_every=10))

    def trace(frame: Any, event: str, argument: Any) -> None:
        if str(PACKAGE) in frame.f_code.co_filename and event == "call":
            seen.add(named(Path(frame.f_code.co_filename)))

    class Follow(lightning_adalfl.callbacks.adalfl_init.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 19:
                sys.setprofile(trace)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            sys.setprofile(None)

    trainer(tmp_path, max_epochs=-1, max_steps=20, callbacks=[Follow()]).fit(module, *loaders())
    assert module.adalfl.meta_steps == 2
    assert {"adapter.mixin", "adapter.online", "learning.hypergradient", "losses.network"} <= seen
    assert len(seen) <= 25, sorted(seen)


def test_the_contract_of_public_names() -> None:
    contract = {
        "AdaLFLConfig",
        "AdaLFLInit",
        "AdaLFLMixin",
        "BaseStep",
        "InfluenceLogger",
        "LearnedLoss",
        "LossHistory",
        "LossNetwork",
        "LossReplay",
        "LossShapeLogger",
        "MetaLearner",
        "TaylorLoss",
        "hypergradient",
    }
    assert contract <= set(lightning_adalfl.__all__)
    assert all(hasattr(lightning_adalfl, name) for name in lightning_adalfl.__all__)
    assert callable(lightning_adalfl.hypergradient)


def test_examples_use_public_names_only() -> None:
    public = set(lightning_adalfl.__all__) | {"__version__"}
    for path in (PACKAGE.parent / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_adalfl":
                faces = ("lightning_adalfl", "lightning_adalfl.inspection", "lightning_adalfl.losses")
                assert node.module in faces, f"{path.name}: {node.module}"
                if node.module == "lightning_adalfl":
                    assert {alias.name for alias in node.names} <= public, path.name
