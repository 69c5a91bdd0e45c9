"""The offline phase: it learns before training begins, leaves no other trace, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import fsspec
import lightning as L
import pytest
import torch
from projects import Ada, AdaSmooth, Plain, adaptive, assert_same, config, loaders, make, phi, points, tensors, trainer
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLInit
from lightning_adalfl.adapter.meta_batches import train_loader
from lightning_adalfl.adapter.offline import OfflinePhase
from lightning_adalfl.callbacks.adalfl_init import OfflineFile


def fixed(**options: Any) -> AdaLFLConfig:
    """Return a configuration that learns nothing in training."""
    return config(meta_every=None, **options)


def initialise(tmp_path: Any, module: Any, *callbacks: Any, **options: Any) -> Any:
    """Run the offline phase and one base step that learns nothing."""
    t = trainer(tmp_path, max_steps=1, callbacks=list(callbacks), **options)
    t.fit(module, *loaders())
    return module


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the task loss of each step of a phase."""
    losses: list[Any] = []
    step = OfflinePhase.step
    monkeypatch.setattr(
        OfflinePhase, "step", lambda self: (losses.append(float(step(self))), torch.tensor(losses[-1]))[1]
    )
    return losses


def test_its_inner_steps_have_the_learned_rate(tmp_path: Path) -> None:
    module, seen = make(Ada, adalfl=fixed(learn="lr")), []

    def note(optimizer: Any, *_: Any) -> None:
        group = optimizer.param_groups[0]
        if group.get("momentum") == 0:  # neither the meta optimizer nor that of training
            seen.append((group["lr"], module.adalfl.lr_scale))

    handle = register_optimizer_step_pre_hook(note)
    try:
        initialise(tmp_path, module, AdaLFLInit(steps=4, lr=0.2))
    finally:
        handle.remove()
    assert len({scale for _, scale in seen}) == 4
    assert [rate for rate, _ in seen] == pytest.approx([0.1 * scale for _, scale in seen])


# What it is given.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "`steps` must be a whole number, 0 or more; got -1"),
        ({"steps": 2.5}, "`steps` must be a whole number, 0 or more; got 2.5"),
        ({"inner_steps": 0}, "`inner_steps` must be a whole number, 1 or more; got 0"),
        ({"inner_steps": True}, "`inner_steps` must be a whole number, 1 or more; got True"),
        ({"save_every": 0}, "`save_every` must be a whole number, 1 or more; got 0"),
        ({"save_every": None}, "`save_every` must be a whole number, 1 or more; got None"),
        ({"lr": 0}, "`lr` must be positive; got 0"),
        ({"lr": float("nan")}, "`lr` must be finite; got nan"),
        ({"lr": "1e-3"}, "`lr` must be a number; got '1e-3'"),
        ({"reset": "never"}, "`reset` must be one of 'fresh', 'initial'; got 'never'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        AdaLFLInit(**arguments)


def test_a_module_without_a_learned_loss_is_refused(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match=r"AdaLFLInit needs .*got Plain. Put AdaLFLMixin left of it: class AdaPlain\("):
        initialise(tmp_path, make(Plain), AdaLFLInit(steps=1))


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_refused_until_they_have_a_shape(tmp_path: Any) -> None:
    module = make(adaptive(Lazy), adalfl=config())
    with pytest.raises(ValueError, match=r"lazy layers have no shape.*model.0.weight.* on a batch"):
        initialise(tmp_path, module, AdaLFLInit(steps=2))
    module(torch.zeros(1, 4))
    assert initialise(tmp_path, module, AdaLFLInit(steps=2)).adalfl.is_initialised


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from (points()[i] for i in range(96))


def test_a_stream_that_ends_is_drawn_from_and_an_iterator_refused(tmp_path: Any) -> None:
    t = trainer(tmp_path, max_steps=1, callbacks=[AdaLFLInit(steps=9)])
    module = make(Ada, adalfl=fixed())
    t.fit(module, DataLoader(Stream(), 16), loaders()[1])
    assert module.adalfl.is_initialised

    class Once:
        def __init__(self) -> None:
            self.batches = iter(loaders()[0])

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return next(self.batches)

    t = trainer(tmp_path, max_steps=1, callbacks=[AdaLFLInit(steps=2)])
    with pytest.raises(ValueError, match="the training data is Once, which can be gone through only once"):
        t.fit(make(Ada, adalfl=fixed()), Once(), loaders()[1])
    # The remedy: another loader for the phase.
    module = make(Ada, adalfl=fixed())
    t = trainer(tmp_path, max_steps=1, callbacks=[AdaLFLInit(steps=2, train_dataloader=loaders()[0])])
    t.fit(module, Once(), loaders()[1])
    assert module.adalfl.is_initialised


def test_without_training_data_it_says_what_to_do(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="no training data to draw from; give `fit` a loader, or AdaLFLInit one"):
        train_loader(trainer(tmp_path))


# What it learns.


def test_the_recipe_of_the_paper() -> None:
    assert (AdaLFLInit.paper().steps, AdaLFLInit.paper().lr, AdaLFLInit.paper(steps=3).steps) == (2500, 1e-3, 3)


@pytest.mark.parametrize("reset", ["fresh", "initial"])
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("options", [{}, {"learn": "both"}, {"own_loss": False, "loss": "paper"}], ids=str)
def test_equal_seeds_learn_equal_losses_and_others_do_not(
    tmp_path: Any, reset: str, inner_steps: int, options: dict[str, Any]
) -> None:
    def learned(seed: int) -> dict[str, Tensor]:
        module = make(Ada, adalfl=fixed(**options))
        start = phi(module)
        torch.manual_seed(seed)
        initialise(tmp_path, module, AdaLFLInit(4, 1e-2, inner_steps, reset))
        assert any(not torch.equal(value, start[name]) for name, value in phi(module).items())
        return phi(module)

    first = learned(3)
    assert_same(first, learned(3))
    assert any(not torch.equal(value, first[name]) for name, value in learned(4).items())


@pytest.mark.parametrize("reset", ["fresh", "initial"])
def test_what_it_learns_makes_single_steps_better(tmp_path: Any, phases: list[float], reset: str) -> None:
    """The task loss after one step falls against a phase that draws the same and learns next to nothing."""
    ends = []
    for lr in (1e-12, 3e-2):
        phases.clear()
        options = fixed(own_loss=False, loss="paper", task_loss="handcrafted")
        initialise(tmp_path, make(AdaSmooth, lr=0.5, adalfl=options), AdaLFLInit(steps=100, lr=lr, reset=reset))
        assert len(phases) == 100
        ends.append(sum(phases[50:]) / 50)
    assert ends[1] < 0.95 * ends[0]


class HeadOnly(Ada):
    def configure_optimizers(self) -> Any:
        self.model[0].requires_grad_(False)
        return SGD(self.model.parameters(), lr=0.5)


def test_it_steps_at_the_rates_of_the_base_optimizer_and_trains_what_that_trains(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(HeadOnly, adalfl=fixed())
    moved: list[list[bool]] = []
    rates: list[float] = []
    start = [module.model[i].weight.detach().clone() for i in (0, 4)]
    original = OfflinePhase._inner_step

    def watched(self: Any, step: Any) -> None:
        original(self, step)
        moved.append([not torch.equal(module.model[i].weight, value) for i, value in zip((0, 4), start)])
        rates.append(step.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(OfflinePhase, "_inner_step", watched)
    initialise(tmp_path, module, AdaLFLInit(steps=2, reset="initial"))
    assert moved == [[False, True]] * 2
    assert rates == [0.5] * 2


class OwnReset(Plain):
    """With a draw of its own, which stands in the module itself."""

    draws: ClassVar[list[float]] = []

    def adalfl_reset_parameters(self) -> None:
        self.draws.append(torch.rand(1).item())
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.1)


def test_a_reset_of_the_users_own_is_called_before_each_step(tmp_path: Any) -> None:
    OwnReset.draws.clear()
    module = make(adaptive(OwnReset), adalfl=fixed())
    before = tensors(module)
    initialise(tmp_path, module, AdaLFLInit(steps=3), limit_train_batches=0)
    assert len(set(module.draws)) == 3
    assert_same(tensors(module), before)


def test_base_batches_may_come_from_elsewhere(tmp_path: Any) -> None:
    seen: list[float] = []

    class Watching(Ada):
        def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
            seen.append(float(batch[0].max()))
            return super().adalfl_predict(batch)

    elsewhere = DataLoader([(torch.full((4,), 7.0), 0)] * 8, 4)
    initialise(tmp_path, make(Watching, adalfl=fixed()), AdaLFLInit(steps=2, train_dataloader=elsewhere))
    assert seen.count(7.0) >= 2
    assert seen.count(7.0) < len(seen) - 2  # beside meta batches and the step of the run


class Standardises(Plain):
    """Computes statistics of the data in `on_fit_start`, without which it cannot predict."""

    def on_fit_start(self) -> None:
        self.mean = points().tensors[0].mean(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x - self.mean)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def test_it_waits_for_the_modules_own_on_fit_start(tmp_path: Any) -> None:
    assert initialise(tmp_path, make(adaptive(Standardises), adalfl=fixed()), AdaLFLInit(steps=2)).adalfl.is_initialised


def test_it_runs_once_and_not_over_a_loss_from_a_file(tmp_path: Any, phases: list[float]) -> None:
    module = make(Ada, adalfl=fixed())
    start = phi(module)
    initialise(tmp_path, module, AdaLFLInit(steps=0))
    assert_same(phi(module), start)
    assert module.adalfl.is_initialised
    initialise(tmp_path, module, AdaLFLInit(steps=3))
    path = tmp_path / "loss.safetensors"
    module.adalfl.loss.save(path)
    initialise(tmp_path, make(Ada, adalfl=fixed(loss=path)), AdaLFLInit(steps=3))
    assert phases == []
    initialise(tmp_path, make(Ada, adalfl=fixed()), AdaLFLInit(steps=3))
    assert len(phases) == 3
    # There is nothing to learn where nothing is learned.
    initialise(tmp_path, make(Ada, adalfl=fixed(learn="nothing")), AdaLFLInit(steps=3))
    assert len(phases) == 3


# What it leaves.


@pytest.mark.parametrize("learn", ["loss", "lr", "both"])
@pytest.mark.parametrize("init", [{"reset": "fresh"}, {"reset": "initial", "inner_steps": 2}])
def test_it_leaves_the_run_as_if_it_had_not_run(tmp_path: Any, learn: str, init: dict[str, Any]) -> None:
    class Forget(L.Callback):
        """Throws away what was learned, so that the rest must not know of it."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            learner = pl_module.adalfl
            assert learner.is_initialised
            assert learner.meta_steps == 0
            assert any(not torch.equal(p, before[name]) for name, p in learner.learned.items())
            with torch.no_grad():
                for name, p in learner.learned.items():
                    p.copy_(before[name])

    results, before = [], {}
    for callbacks in ([], [AdaLFLInit(steps=3, lr=1e-2, **init), Forget()]):
        module = make(Ada, adalfl=fixed(learn=learn))
        before = phi(module)
        t = trainer(tmp_path, callbacks=callbacks)
        t.fit(module, *loaders())
        results.append((module, t, torch.rand(3)))
    (first, one, drawn), (second, other, drawn_again) = results
    assert_same(tensors(first), tensors(second))
    assert torch.equal(drawn, drawn_again)
    assert all(p.grad is None or torch.equal(p.grad, q.grad) for p, q in zip(first.parameters(), second.parameters()))
    torch.testing.assert_close(one.optimizers[0].state_dict(), other.optimizers[0].state_dict(), rtol=0, atol=0)


class Failing(Dataset):
    """Cannot read one of its instances."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        if index == 40:
            raise OSError(f"instance {index} cannot be read")
        return points()[index]


def test_a_loader_that_fails_leaves_the_base_model_alone(tmp_path: Any) -> None:
    module = make(Ada, adalfl=config())
    before = tensors(module)
    with pytest.raises(OSError, match="instance 40 cannot be read"):
        trainer(tmp_path, callbacks=[AdaLFLInit(steps=20)]).fit(module, DataLoader(Failing(), 16), loaders()[1])
    assert_same(tensors(module), before)


def test_broken_data_leave_the_loss_as_it_was_and_say_so(tmp_path: Any) -> None:
    x, y = points().tensors
    broken = DataLoader(TensorDataset(torch.full_like(x, float("nan")), y), 16)
    module = make(Ada, adalfl=fixed(meta_data="train"))
    before = phi(module)
    t = trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[AdaLFLInit(steps=5)])
    with pytest.warns(UserWarning, match="A meta step .* was left out, since the hypergradient .* not finite"):
        t.fit(module, broken, loaders()[1])
    assert_same(phi(module), before)


# A phase that is stopped.


class Stopped(Exception):
    pass


def crash(*_: Any) -> None:
    raise Stopped


def fit(root: Any, seed: int = 0, options: dict[str, Any] | None = None, dropout: float = 0.2, **init: Any) -> Any:
    L.seed_everything(seed, verbose=False)
    module = Ada(dropout=dropout, adalfl=config(meta_data="train", **(options or {})))
    callbacks = [AdaLFLInit(**{"steps": 20, "save_every": 6, **init})]
    t = trainer(root, max_steps=4, callbacks=callbacks, limit_val_batches=0, enable_checkpointing=True)
    t.fit(module, *loaders())
    return module


def files(root: Path) -> list[Path]:
    return list(root.glob("*adalfl_offline*"))


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the phase's step of that number crash; it counts those taken."""
    original = OfflinePhase.step
    counted = [0]

    def install(number: int) -> list[int]:
        counted[0] = 0

        def step(phase: OfflinePhase) -> Tensor:
            counted[0] += 1
            if counted[0] == number:
                crash()
            return original(phase)

        monkeypatch.setattr(OfflinePhase, "step", step)
        return counted

    return install


def interrupted(root: Path, stop_at: Any, **options: Any) -> Path:
    stop_at(17)
    with pytest.raises(Stopped):
        fit(root, **options)
    stop_at(100)
    (path,) = files(root)
    return path


def same_end(first: Any, second: Any) -> None:
    assert_same(phi(first), phi(second))
    assert_same(tensors(first), tensors(second))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"options": {"learn": "both"}, "inner_steps": 2},
        {"options": {"loss": "taylor_cubic"}, "reset": "initial"},
    ],
    ids=str,
)
def test_a_phase_that_crashed_goes_on_and_ends_as_one_that_did_not(tmp_path: Path, stop_at: Any, options: Any) -> None:
    uninterrupted = fit(tmp_path / "a", **options)
    interrupted(tmp_path / "b", stop_at, **options)
    taken = stop_at(100)
    resumed = fit(tmp_path / "b", **options)
    # The first step of every start, and those after the twelfth.
    assert taken[0] == 1 + 20 - 12
    same_end(resumed, uninterrupted)
    assert not files(tmp_path / "b"), "a phase whose result has been trained with is not to be taken over"


def test_a_finished_phase_is_taken_over_until_there_is_a_checkpoint(tmp_path: Path, stop_at: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ada, "on_train_start", crash)
        with pytest.raises(Stopped):
            fit(tmp_path)
    taken = stop_at(100)
    fit(tmp_path)
    assert taken[0] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"",
        lambda d: d[: len(d) // 2],
        lambda d: b"x" * 99,
        lambda d: d[:3000] + bytes([d[3000] ^ 1]) + d[3001:],
    ],
)
def test_a_file_that_cannot_be_read_is_reported_and_the_phase_starts_over(
    tmp_path: Path, stop_at: Any, damage: Any
) -> None:
    path = interrupted(tmp_path, stop_at)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"starts over: .*adalfl_offline_\w+\.pt cannot be read"):
        resumed = fit(tmp_path)
    same_end(resumed, fit(tmp_path / "other"))


def test_a_phase_of_another_model_is_reported_and_not_taken_over(tmp_path: Path, stop_at: Any) -> None:
    interrupted(tmp_path, stop_at, seed=3)
    with pytest.warns(UserWarning, match=r"starts over: .* model, data or code have changed since"):
        resumed = fit(tmp_path, seed=3, dropout=0.9)
    same_end(resumed, fit(tmp_path / "other", seed=3, dropout=0.9))


def test_a_file_of_another_number_of_processes_is_not_taken_over(tmp_path: Path, stop_at: Any) -> None:
    path = interrupted(tmp_path, stop_at)
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "processes": saved["processes"] * 2}, path)
    with pytest.warns(UserWarning, match=r"starts over: .* for 2 processes where there are 1"):
        fit(tmp_path)


def test_a_run_at_another_base_rate_has_a_file_of_its_own(tmp_path: Path) -> None:
    paths = []
    for rate in (1e-3, 3e-3):
        callback = AdaLFLInit(steps=0)
        module = make(Ada, lr=rate, adalfl=config())
        trainer(tmp_path, fast_dev_run=1, callbacks=[callback]).fit(module, *loaders())
        paths.append(OfflineFile(module.trainer, callback._settings(module, 0)).path)
    assert paths[0] != paths[1]


@pytest.mark.parametrize("other", [{"seed": 1}, {"lr": 2e-3}, {"inner_steps": 2}, {"steps": 21}], ids=str)
def test_a_run_with_other_settings_has_a_file_of_its_own(tmp_path: Path, stop_at: Any, other: dict[str, Any]) -> None:
    path = interrupted(tmp_path, stop_at)
    before = path.read_bytes()
    taken = stop_at(100)
    fit(tmp_path, **other)
    assert taken[0] == other.get("steps", 20)
    assert path.read_bytes() == before


def test_the_file_is_kept_in_a_remote_folder_too(tmp_path: Path, stop_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = "memory://runs/offline"
    stop_at(17)
    with pytest.raises(Stopped):
        fit(root)
    memory = fsspec.filesystem("memory")
    assert [name for name in memory.find("/runs/offline") if name.endswith(".pt")]
    taken = stop_at(100)
    resumed = fit(root)
    assert taken[0] == 1 + 20 - 12
    assert not [name for name in memory.find("/runs/offline") if name.endswith(".pt")]
    assert not list(tmp_path.iterdir())
    same_end(resumed, fit(tmp_path / "local"))


def test_no_file_is_written_where_the_trainer_keeps_no_checkpoints(tmp_path: Path, stop_at: Any) -> None:
    for options in ({"enable_checkpointing": False}, {"enable_checkpointing": True, "fast_dev_run": 2}):
        t = trainer(tmp_path, **options)
        file = OfflineFile(t, {})
        assert not file.is_enabled
        assert file.load(0.0) is None
        t = trainer(tmp_path, callbacks=[AdaLFLInit(steps=3, save_every=1)], max_steps=1, **options)
        t.fit(make(Ada, adalfl=fixed()), *loaders())
    assert not files(tmp_path)


def test_progress_is_shown_only_where_the_trainer_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        t = trainer(tmp_path, max_steps=1, enable_progress_bar=shown, callbacks=[AdaLFLInit(steps=2)])
        t.fit(make(Ada, adalfl=fixed()), *loaders())
        assert ("Offline phase" in capsys.readouterr().err) is shown
