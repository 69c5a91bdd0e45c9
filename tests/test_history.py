"""The history of φ: between snapshots, thinned, in a file, and read back from whatever a run leaves."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from projects import Ada, assert_same, config, loaders, make, trainer
from torch import Tensor

from lightning_adalfl import LossHistory, LossNetwork, LossShapeLogger, TaylorLoss
from lightning_adalfl.files import read_tensors, write_tensors
from lightning_adalfl.inspection import loss_shape, read

NAME = "loss_history.safetensors"
KIND = "loss history"


def at_value(value: float) -> TaylorLoss:
    loss = TaylorLoss("binary")
    with torch.no_grad():
        loss.coefficients.fill_(value)
    return loss


def line(steps: int, **options: Any) -> LossHistory:
    """Return a history whose φ is its step."""
    history = LossHistory(**{"every_n_steps": 1, **options})
    for step in range(steps):
        if history.is_due(step):
            history.append(step, at_value(step))
    return history


def value_at(history: LossHistory, step: float) -> float:
    (values,) = history.at(step).values()
    assert len(set(values.tolist())) == 1
    return float(values[0])


def test_interpolation_is_linear_between_snapshots_and_constant_beyond() -> None:
    history = line(41, every_n_steps=10)
    assert history.steps == [0, 10, 20, 30, 40]
    for step in (0, 3.5, 10, 25, 39.75, 40):
        assert value_at(history, step) == pytest.approx(step, abs=1e-6)
    assert value_at(history, -3) == 0
    assert value_at(history, 1000) == 40


def test_a_snapshot_is_read_bit_for_bit() -> None:
    history, losses = LossHistory(1), [LossNetwork("multiclass", sees_classes=True) for _ in range(3)]
    for step, loss in enumerate(losses):
        history.append(step, loss)
    for step, loss in enumerate(losses):
        assert_same(history.at(step), dict(loss.state_dict()))
        assert_same(dict(history.loss_at(step).state_dict()), dict(loss.state_dict()))


@pytest.mark.parametrize("max_snapshots", [2, 3, 16])
@pytest.mark.parametrize("jump", [1, 3])
def test_thinning_keeps_it_bounded_even_and_complete(max_snapshots: int, jump: int) -> None:
    """Also where several base steps pass between two looks."""
    history = LossHistory(2, max_snapshots)
    for step in range(0, 1000, jump):
        if history.is_due(step):
            history.append(step, at_value(step))
        assert len(history) <= max_snapshots
        assert history.steps[0] == 0
        interval = history.state_dict()["interval"]
        assert step - history.steps[-1] < interval
        assert all(abs(gap - interval) < jump for gap in np.diff(history.steps[:-1]))
    assert len(history) >= max_snapshots // 2


def test_a_newest_snapshot_off_schedule_makes_room_for_the_next() -> None:
    """So that a run which ended and goes on keeps what an uninterrupted one does."""
    history = line(25, every_n_steps=10)
    history.append(25, at_value(25))
    assert history.steps == [0, 10, 20, 25]
    assert not history.is_due(29)
    history.append(30, at_value(30))
    assert history.steps == [0, 10, 20, 30]


def test_what_does_not_belong_is_refused() -> None:
    history = line(3)
    with pytest.raises(ValueError, match="`step` 2 is not after 2; append in the order of training"):
        history.append(2, at_value(2))
    with pytest.raises(ValueError, match=r"and the history is of .* begin a new one"):
        history.append(3, TaylorLoss("binary", "quadratic"))
    with pytest.raises(ValueError, match="`every_n_steps` must be a whole number, 1 or more; got 0"):
        LossHistory(0)
    with pytest.raises(TypeError, match=r"`max_snapshots` must be a whole number, 2 or more; got 2\.5"):
        LossHistory(max_snapshots=2.5)  # type: ignore[arg-type]


def test_an_empty_history_has_nothing_to_give(tmp_path: Path) -> None:
    history = LossHistory()
    restored = line(2)
    restored.load_state_dict(history.state_dict())
    assert (len(restored), history.shapes()) == (0, [])
    with pytest.raises(ValueError, match="the history is empty; append a snapshot first"):
        history.at(0)
    with pytest.raises(ValueError, match="the history is empty; append a snapshot before saving it"):
        history.save(tmp_path / NAME)


@pytest.mark.parametrize("is_added", [True, False])
def test_file_and_state_round_trip_bitwise_and_go_on_alike(is_added: bool, tmp_path: Path) -> None:
    history, loss = LossHistory(3, 8, is_added), LossNetwork("regression", reduction="sum")
    for step in (0, 3, 6, 7):
        loss.reset_parameters()
        history.append(step, loss)
    history.save(tmp_path / "a" / NAME)
    torch.save(history.state_dict(), tmp_path / "state.pt")
    from_state = LossHistory(max_snapshots=8)
    from_state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, again in (("b", LossHistory.load(tmp_path / "a" / NAME)), ("c", from_state)):
        assert (again.steps, again.max_snapshots, again.is_added) == ([0, 3, 6, 7], 8, is_added)
        for step in (0, 2, 7):
            assert_same(again.at(step), history.at(step))
        again.save(tmp_path / name / NAME)
        assert (tmp_path / name / NAME).read_bytes() == (tmp_path / "a" / NAME).read_bytes()
        again.append(9, loss)
        assert again.steps == [0, 3, 6, 9]


def test_a_longer_history_is_thinned_to_the_bound_of_its_reader() -> None:
    reader = LossHistory(max_snapshots=4)
    reader.load_state_dict(line(40).state_dict())
    assert len(reader) <= 4
    assert (reader.steps[0], reader.steps[-1]) == (0, 39)


def test_shapes_are_of_the_first_the_newest_and_some_between() -> None:
    history = line(41)
    assert [shape.step for shape in history.shapes(5)] == [0, 10, 20, 30, 40]
    assert [shape.step for shape in history.shapes(1)] == [40]
    assert len(history.shapes(100, resolution=5)) == 41
    for shape in history.shapes(3, resolution=5):
        wanted = loss_shape(at_value(shape.step), resolution=5, is_added=True)
        np.testing.assert_array_equal(shape.paths[0].slope, wanted.paths[0].slope)


def test_all_shapes_have_the_classes_that_the_newest_loss_has_met() -> None:
    history, loss = LossHistory(1), LossNetwork("multiclass", sees_classes=True)
    history.append(0, loss)
    with torch.no_grad():
        loss.output_embedding[:4].fill_(0.1)
    history.append(1, loss)
    assert [(shape.classes, len(shape.paths), len(shape.pairs)) for shape in history.shapes()] == 2 * [(4, 2, 12)]


# Files that are not what they should be.


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    line(3).save(path)
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cannot read .*: it is truncated, corrupt, or was not written by"):
            LossHistory.load(path)
    at_value(1).save(path)
    with pytest.raises(ValueError, match="it holds 'learned loss' and not a 'loss history'"):
        LossHistory.load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: there is no such file"):
        LossHistory.load(tmp_path / "nowhere.safetensors")


def test_a_folder_a_checkpoint_and_a_loss_in_their_place_are_told_apart(tmp_path: Path) -> None:
    line(3).save(tmp_path / NAME)
    assert LossHistory.load(tmp_path).steps == line(3).steps
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"adalfl": {}}, checkpoint)
    for read_it in (LossHistory.load, LossNetwork.load):
        with pytest.raises(ValueError, match="it is a zip archive, as checkpoints are; take its learned loss"):
            read_it(checkpoint)
    with pytest.raises(FileNotFoundError, match="it is a folder; name the file"):
        LossNetwork.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c, t: t.pop("steps"), "it holds no history of a loss"),
        (lambda c, t: t.update(steps=torch.tensor([0, 2])), "its steps do not fit its snapshots"),
        (lambda c, t: t.update(steps=torch.tensor([0, 2, 2])), "or are not in order"),
        (lambda c, t: t.update(steps=torch.tensor([-1, 0, 1])), "or are not in order"),
        (lambda c, t: t.update(steps=torch.tensor([0.0, 1.0, 2.0])), "or are not in order"),
        (lambda c, t: t.update(steps=torch.tensor(3)), "it holds no history of a loss"),
        (lambda c, t: c.update(interval=0), "`interval` must be a whole number, 1 or more; got 0"),
        (lambda c, t: c.update(is_added=1), "its steps do not fit"),
        (lambda c, t: c.update(max_snapshots=None), "`max_snapshots` must be a whole number"),
        (lambda c, t: c.update(description={"class": "Other"}), "a loss of class 'Other', and known here are"),
        (lambda c, t: t.update({"phi.coefficients": torch.ones(3, 7)}), r"has shape \(8,\), and its φ has \(7,\)"),
        (lambda c, t: t["phi.coefficients"].fill_(torch.nan), "its φ is not finite"),
        (lambda c, t: t.update(steps=torch.tensor([]).long(), **{"phi.coefficients": torch.ones(0, 8)}), "no snapshot"),
    ],
)
def test_contents_that_do_not_fit_are_refused(
    edit: Callable[[dict[str, Any], dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    line(3).save(tmp_path / NAME)
    content, tensors = read_tensors(tmp_path / NAME, KIND, 1)
    edit(content, tensors)
    kept = {name: value for name, value in content.items() if name not in ("kind", "version")}
    write_tensors(tmp_path / NAME, KIND, 1, kept, tensors)
    with pytest.raises(ValueError, match=f"cannot read .*{NAME}: .*{message}"):
        LossHistory.load(tmp_path / NAME)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / NAME, KIND, 2, {}, {})
    with pytest.raises(ValueError, match=r"its format version 2 is newer than 1, .* upgrade lightning_adalfl"):
        LossHistory.load(tmp_path / NAME)


# Whatever a run leaves.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a folder with what a short run leaves, and the module."""
    folder = tmp_path_factory.mktemp("version_0")
    module = make(Ada, adalfl=config())
    fit = trainer(folder, callbacks=[LossShapeLogger(every_n_steps=4)])
    fit.fit(module, *loaders())
    fit.save_checkpoint(folder / "last.ckpt", weights_only=False)
    module.adalfl.loss.save(folder / "loss.safetensors")
    return folder, module


@pytest.mark.parametrize("name", ["", NAME, "last.ckpt", "loss.safetensors"])
def test_every_source_gives_the_same_loss(name: str, run: tuple[Path, Any]) -> None:
    folder, module = run
    random_state = torch.get_rng_state()
    history = read(folder / name)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert history.steps[-1] == (0 if name == "loss.safetensors" else 12)
    assert history.is_added
    assert_same(history.at(12), dict(module.adalfl.loss.state_dict()))


def test_whether_it_is_added_is_known(tmp_path: Path) -> None:
    module = make(Ada, adalfl=config(own_loss=False))
    logger = LossShapeLogger()
    fit = trainer(tmp_path, max_steps=1, max_epochs=1, callbacks=[logger])
    fit.fit(module, *loaders())
    fit.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    module.adalfl.loss.save(tmp_path / "loss.safetensors")
    assert not read(tmp_path).is_added
    assert not read(tmp_path / "a.ckpt").is_added
    assert not read(tmp_path / "loss.safetensors", is_added=False).is_added


def test_a_url_is_read_like_a_path(run: tuple[Path, Any]) -> None:
    folder, module = run
    LossHistory.load(folder / NAME).save(f"memory://logs/version_0/{NAME}")
    for url in ("memory://logs/version_0", f"memory://logs/version_0/{NAME}"):
        assert_same(read(url).at(12), dict(module.adalfl.loss.state_dict()))


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


def only_a_rate(path: Path) -> None:
    module = make(Ada, adalfl=config(learn="lr"))
    runner = trainer(path.parent, max_steps=1)
    runner.fit(module, *loaders())
    runner.save_checkpoint(path, weights_only=False)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.txt", lambda path: path.write_text("x"), "it is truncated, corrupt, or was not written by"),
        ("a.safetensors", lambda path: path.write_bytes(b"x" * 99), "it is truncated, corrupt"),
        (
            "b.safetensors",
            lambda path: write_tensors(path, "recipe", 1, {}, {}),
            "it holds 'recipe' and not a 'loss history'",
        ),
        ("a.ckpt", lambda path: path.write_bytes(b"x" * 99), "it is truncated, corrupt, or holds more than"),
        ("b.ckpt", lambda path: torch.save({"adalfl": Bomb()}, path), "or holds more than tensors and plain values"),
        ("c.ckpt", lambda path: path.write_bytes(pickle.dumps(Bomb())), "it is truncated, corrupt, or holds"),
        ("d.ckpt", lambda path: torch.save({"state_dict": {}}, path), "it has no learned loss; give a checkpoint"),
        ("e.ckpt", only_a_rate, "no loss was learned with `learn='lr'`"),
        ("empty", lambda path: path.mkdir(), f"the folder holds no {NAME}; train with LossShapeLogger"),
    ],
)
def test_what_cannot_be_read_is_a_clear_error(
    name: str, write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot read .*{name}: .*{message}"):
        read(tmp_path / name)


def test_the_folder_above_names_those_below(tmp_path: Path) -> None:
    line(2).save(tmp_path / "run" / "version_3" / NAME)
    with pytest.raises(ValueError, match="version_3 has one; give that"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such file or folder; check the path"):
        read(tmp_path / "run" / "version_4")
