"""An offline phase that is stopped goes on where it was, and only where it is the same phase."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from projects import Plain, loaders

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin
from lightning_adalfl.adapter.offline_phase import OfflinePhase
from lightning_adalfl.callbacks.offline_progress import OfflineProgress


class Stopped(Exception):
    pass


class Ada(AdaLFLMixin, Plain):
    pass


def fit(root: Path, seed: int = 0, config: AdaLFLConfig | None = None, dropout: float = 0.2, **init: Any) -> Ada:
    L.seed_everything(seed, verbose=False)
    module = Ada(dropout=dropout, adalfl=config or AdaLFLConfig(task="multiclass", meta_data="train"))
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        callbacks=[AdaLFLInit(**{"steps": 20, "save_every": 6, **init})],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=root,
    )
    trainer.fit(module, *loaders())
    return module


def files(root: Path) -> list[Path]:
    return list(root.glob("*adalfl_offline*"))


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the phase's step of that number end as ``how`` has it; it counts those taken."""
    original = OfflinePhase.step
    counted = [0]

    def install(number: int, how: Any) -> list[int]:
        counted[0] = 0

        def step(phase: OfflinePhase) -> float:
            counted[0] += 1
            if counted[0] == number:
                how()
            return original(phase)

        monkeypatch.setattr(OfflinePhase, "step", step)
        return counted

    return install


def crash() -> None:
    raise Stopped


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, AdaLFLConfig(task="multiclass", meta_data="train")),
        ({"inner_steps": 2, "imitation_steps": 3}, AdaLFLConfig(task="multiclass", meta_data="train", learn="both")),
        ({"reset": "initial"}, AdaLFLConfig(task="multiclass", meta_data="train", representation="taylor_cubic")),
    ],
)
def test_a_phase_that_crashed_goes_on_and_ends_as_one_that_did_not(
    tmp_path: Path, stop_at: Any, options: dict[str, Any], config: AdaLFLConfig
) -> None:
    uninterrupted = fit(tmp_path / "a", config=config, **options)
    stop_at(17, crash)
    with pytest.raises(Stopped):
        fit(tmp_path / "b", config=config, **options)
    assert len(files(tmp_path / "b")) == 1
    taken = stop_at(100, crash)
    resumed = fit(tmp_path / "b", config=config, **options)
    # The first step of every start, and those after the twelfth.
    assert taken[0] == 1 + 20 - 12
    assert equal(resumed, uninterrupted)
    assert not files(tmp_path / "b"), "a phase whose result has been trained with is not to be taken over"


def test_sigterm_stops_the_phase_at_its_next_step_and_keeps_that_step(tmp_path: Path, stop_at: Any) -> None:
    uninterrupted = fit(tmp_path / "a")
    taken = stop_at(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        fit(tmp_path / "b")
    assert taken[0] == 9
    taken = stop_at(100, crash)
    assert equal(fit(tmp_path / "b"), uninterrupted)
    assert taken[0] == 1 + 20 - 9


def test_a_finished_phase_is_taken_over_until_there_is_a_checkpoint(tmp_path: Path, stop_at: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ada, "on_train_start", lambda module: crash())
        with pytest.raises(Stopped):
            fit(tmp_path)
    taken = stop_at(100, crash)
    fit(tmp_path)
    assert taken[0] == 1


def interrupted(root: Path, stop_at: Any) -> Path:
    stop_at(17, crash)
    with pytest.raises(Stopped):
        fit(root)
    stop_at(100, crash)
    (path,) = files(root)
    return path


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * 99])
def test_a_file_that_cannot_be_read_is_reported_and_the_phase_starts_over(
    tmp_path: Path, stop_at: Any, damage: Any
) -> None:
    path = interrupted(tmp_path, stop_at)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"starts over: .*adalfl_offline_\w+\.pt cannot be read"):
        resumed = fit(tmp_path)
    assert equal(resumed, fit(tmp_path / "other"))


def test_a_phase_of_another_model_is_reported_and_not_taken_over(tmp_path: Path, stop_at: Any) -> None:
    interrupted(tmp_path, stop_at)
    with pytest.warns(UserWarning, match=r"starts over: .* model, data or code have changed since"):
        resumed = fit(tmp_path, dropout=0.9)
    assert equal(resumed, fit(tmp_path / "other", dropout=0.9))


def test_a_file_of_another_number_of_processes_is_not_taken_over(tmp_path: Path, stop_at: Any) -> None:
    path = interrupted(tmp_path, stop_at)
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "processes": saved["processes"] * 2}, path)
    with pytest.warns(UserWarning, match=r"starts over: .* for 2 processes where there are 1"):
        fit(tmp_path)


@pytest.mark.parametrize("other", [{"seed": 1}, {"lr": 2e-3}, {"inner_steps": 2}, {"steps": 21}])
def test_a_run_with_other_settings_has_a_file_of_its_own(tmp_path: Path, stop_at: Any, other: dict[str, Any]) -> None:
    path = interrupted(tmp_path, stop_at)
    before = path.read_bytes()
    taken = stop_at(100, crash)
    fit(tmp_path, **other)
    assert taken[0] == other.get("steps", 20)
    assert path.read_bytes() == before


def test_no_file_is_written_where_the_trainer_keeps_no_checkpoints(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    progress = OfflineProgress(trainer, {}, 1)
    assert not progress.due(1)
    progress.save({"step": 1})
    assert not files(tmp_path)
    assert progress.load(0.0) is None


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "often", None])
def test_save_every_is_checked(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"`save_every` must be a whole number, 1 or more"):
        AdaLFLInit(save_every=value)
