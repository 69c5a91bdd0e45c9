"""Checkpoints: the plain module's, with one entry beside it; a run that is resumed equals one that was not stopped."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from projects import (
    Ada,
    AdaSmooth,
    Keep,
    Plain,
    Smooth,
    adaptive,
    assert_same,
    config,
    loaders,
    make,
    phi,
    points,
    tensors,
    trainer,
)
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, RandomSampler

from lightning_adalfl import AdaLFLInit


def fit(folder: Path, module: Any, **options: Any) -> Path:
    t = trainer(folder, max_epochs=1, **options)
    t.fit(module, *loaders())
    t.save_checkpoint(folder / "run.ckpt", weights_only=False)
    return folder / "run.ckpt"


# Whose checkpoint it is.


def test_checkpoints_are_named_and_chosen_as_for_the_plain_module(tmp_path: Path) -> None:
    names = []
    for kind, arguments in ((Plain, {}), (Ada, {"adalfl": config(meta_every=3)})):
        keep = ModelCheckpoint(tmp_path / kind.__name__, every_n_train_steps=10, save_top_k=-1)
        module = make(kind, **arguments)
        t = trainer(tmp_path, max_steps=50, max_epochs=-1, callbacks=[keep])
        t.fit(module, *loaders())
        names.append(sorted(path.name for path in (tmp_path / kind.__name__).iterdir()))
    assert names[1] == names[0]
    assert {int(name.split("step=")[1].removesuffix(".ckpt")) for name in names[1]} == set(range(10, 51, 10))
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (50, 16)
    # One that is chosen by a metric of the user's step, and has been written with it.
    best = ModelCheckpoint(tmp_path / "best", monitor="train_accuracy", mode="max", filename="{epoch}", save_last=True)
    t = trainer(tmp_path, max_epochs=3, callbacks=[best])
    t.fit(make(Ada, adalfl=config(meta_data="train")), *loaders())
    for path in (best.best_model_path, best.last_model_path):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["adalfl"]["learner"]["base_steps"] == checkpoint["global_step"]


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_of_the_subclass_is_one_of_the_plain_module(tmp_path: Path, weights_only: bool) -> None:
    module = make(Ada, adalfl=config())
    path = fit(tmp_path, module)
    module.trainer.save_checkpoint(path, weights_only=weights_only)
    checkpoint = torch.load(path, weights_only=True)
    expected = torch.load(fit(tmp_path / "plain", make(Plain)), weights_only=True)
    assert checkpoint["state_dict"].keys() == expected["state_dict"].keys()
    assert checkpoint["hyper_parameters"] == expected["hyper_parameters"]
    plain = make(Plain, seed=3)
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert_same(tensors(plain), tensors(module))
    assert_same(tensors(Plain.load_from_checkpoint(path, weights_only=True)), tensors(module))
    loaded = Ada.load_from_checkpoint(path, weights_only=True)
    assert_same(tensors(loaded), tensors(module))
    assert_same(phi(loaded), phi(module))
    if not weights_only:
        resumed = make(Plain, seed=4)
        trainer(tmp_path, max_epochs=2).fit(resumed, *loaders(), ckpt_path=path)
        assert resumed.trainer.global_step == 12


def test_a_checkpoint_of_the_plain_module_starts_or_resumes_the_subclass(tmp_path: Path) -> None:
    plain = make(Plain)
    path = fit(tmp_path, plain)
    loaded = Ada.load_from_checkpoint(path, adalfl=config(), weights_only=True)
    assert_same(tensors(loaded), tensors(plain))
    module = make(Ada, seed=3, adalfl=config())
    # The loss is learned first: there is nothing of it in the checkpoint.
    trainer(tmp_path, max_epochs=2, callbacks=[AdaLFLInit(steps=2)]).fit(module, *loaders(), ckpt_path=path)
    assert module.adalfl.is_initialised
    assert (module.adalfl.base_steps, module.trainer.global_step) == (6, 12)
    assert module.trainer.optimizers[0].state_dict()["state"]


def test_a_loaded_module_trains_on_with_the_state_of_its_meta_optimizer(tmp_path: Path) -> None:
    loaded = Ada.load_from_checkpoint(fit(tmp_path, make(Ada, adalfl=config(meta_every=2))), weights_only=True)
    trainer(tmp_path, max_epochs=1).fit(loaded, *loaders())
    assert (loaded.adalfl.base_steps, loaded.adalfl.meta_steps) == (12, 6)
    states = loaded.adalfl.state_dict()["meta_optimizer"]["state"]
    assert {int(state["step"]) for state in states.values()} == {12}  # a move of φ for each base step
    fixed = Ada.load_from_checkpoint(tmp_path / "run.ckpt", adalfl=config(meta_every=None), weights_only=True)
    trainer(tmp_path, max_epochs=1).fit(fixed, *loaders())
    assert (fixed.adalfl.base_steps, fixed.adalfl.meta_steps) == (12, 3)


class KeepsItsHead(Plain):
    """Saves its last layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name.startswith("model.4")}


def test_a_module_that_saves_a_part_of_its_weights_keeps_the_learned_loss(tmp_path: Path) -> None:
    module = make(adaptive(KeepsItsHead), adalfl=config())
    path = fit(tmp_path, module)
    again = make(adaptive(KeepsItsHead), adalfl=config())
    trainer(tmp_path, max_epochs=1).fit(again, *loaders(), ckpt_path=path)
    assert_same(phi(again), phi(module))
    assert again.adalfl.base_steps == 6


# What is damaged is refused, and nothing of it is taken over.


def without(*keys: str) -> Callable[[Any], None]:
    def damage(entry: Any) -> None:
        for key in keys[:-1]:
            entry = entry[key]
        del entry[keys[-1]]

    return damage


def replaced(value: Any, *keys: Any) -> Callable[[Any], None]:
    def damage(entry: Any) -> None:
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value

    return damage


UNREADABLE = "entry 'adalfl' cannot be read: it is damaged or of another version.*Take another checkpoint, or delete"
DAMAGED = [
    (replaced(None, "learner"), UNREADABLE),
    (without("learner", "config"), UNREADABLE),
    (replaced(-1, "learner", "base_steps"), UNREADABLE),
    (replaced("none", "learner", "is_initialised"), UNREADABLE),
    (replaced({"a": 1}, "learner", "phi"), UNREADABLE),
    (without("learner", "meta_optimizer", "state"), UNREADABLE),
    (without("learner", "phi", "linear.0.weight"), "(?s)φ does not fit `loss='network'`.*linear.0.weight"),
    (replaced(torch.zeros(2, 2), "learner", "phi", "linear.0.weight"), "φ does not fit `loss='network'`"),
    (replaced([{"params": [0]}], "learner", "meta_optimizer", "param_groups"), "meta optimizer does not fit"),
    (
        replaced(None, "learner", "loss"),
        r"written with `learn='loss'` and this learner has `learn='loss'`|does not fit",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_damaged_entry_is_refused_and_nothing_is_taken_over(tmp_path: Path, damage: Any, message: str) -> None:
    path = fit(tmp_path, make(Ada, adalfl=config()))
    checkpoint = torch.load(path, weights_only=True)
    damage(checkpoint["adalfl"])
    torch.save(checkpoint, path)
    module = make(Ada, seed=3, adalfl=config())
    before = copy.deepcopy(module.adalfl.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_epochs=2).fit(module, *loaders(), ckpt_path=path)
    assert_equal(module.adalfl.state_dict(), before)
    # Both remedies.
    del checkpoint["adalfl"]
    torch.save(checkpoint, path)
    trainer(tmp_path, max_epochs=2).fit(module, *loaders(), ckpt_path=path)
    assert module.adalfl.base_steps == 6


def test_another_kind_of_learner_is_refused(tmp_path: Path) -> None:
    path = fit(tmp_path, make(Ada, adalfl=config()))
    with pytest.raises(ValueError, match="written with `learn='loss'` and this learner has `learn='lr'`; give what"):
        Ada.load_from_checkpoint(path, adalfl=config(learn="lr"), weights_only=True)
    with pytest.raises(ValueError, match="φ does not fit `loss='taylor_cubic'`"):
        Ada.load_from_checkpoint(path, adalfl=config(loss="taylor_cubic"), weights_only=True)


def test_damaged_random_states_are_none(tmp_path: Path) -> None:
    """φ and counters are what counts; the run goes on with other random numbers, as the plain module's does."""
    path = fit(tmp_path, make(Ada, adalfl=config()))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["adalfl"]["processes"] = [{"global": 3}]
    torch.save(checkpoint, path)
    module = make(Ada, adalfl=config())
    trainer(tmp_path, max_epochs=2).fit(module, *loaders(), ckpt_path=path)
    assert module.adalfl.base_steps == 12


# Resumed runs.


class StatefulLoader(DataLoader):
    """Knows its order and its place in it, as loaders do that can go on in the middle of an epoch."""

    def __init__(self, size: int = 16) -> None:
        self.order = torch.Generator().manual_seed(7)
        super().__init__(points(), size, sampler=RandomSampler(points(), generator=self.order))
        self.start, self.done, self.resumed = self.order.get_state(), 0, False

    def __iter__(self) -> Iterator[Any]:
        skipped = self.done if self.resumed else 0
        if not self.resumed:
            self.start, self.done = self.order.get_state(), 0
        self.order.set_state(self.start)
        self.resumed = False
        state = torch.get_rng_state()
        batches = list(super().__iter__())
        torch.set_rng_state(state)
        for batch in batches[skipped:]:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.done, self.resumed = state["start"], state["done"], True


class Cycled(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=self.lr)
        schedule = OneCycleLR(optimizer, 0.05, total_steps=24)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Trace(L.Callback):
    """Keeps what is logged of each meta step."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Tensor]] = {}
        self.seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen = pl_module.adalfl.meta_steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.adalfl.meta_steps != self.seen:
            self.rows[trainer.global_step] = dict(pl_module.adalfl.scalars)
        self.seen = pl_module.adalfl.meta_steps


def run(folder: Path, module: Any, train: Any, ckpt: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train four epochs, and return everything that a resumed run must agree on."""
    trace = Trace()
    callbacks = [trace, AdaLFLInit(steps=3), *options.pop("callbacks", [])]
    folder.mkdir(exist_ok=True)
    t = trainer(folder, max_epochs=4, callbacks=callbacks, **options)
    t.fit(module, train, loaders()[1], ckpt_path=ckpt)
    t.save_checkpoint(folder / "end.ckpt", weights_only=False)
    end = torch.load(folder / "end.ckpt", weights_only=True)
    names = ("optimizer_states", "lr_schedulers", "adalfl", "state_dict")
    return {"rows": trace.rows, "drawn": torch.rand(3), **{name: end[name] for name in names}}


def assert_equal(first: Any, second: Any, path: str = "") -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for i, (a, b) in enumerate(zip(first, second)):
            assert_equal(a, b, f"{path}.{i}")
    else:
        assert first == second or first != first, path


def assert_resumed(whole: dict[str, Any], resumed: dict[str, Any], after: int) -> None:
    rows, later = whole.pop("rows"), resumed.pop("rows")
    assert sorted(later) == [step for step in sorted(rows) if step > after] != []
    assert_equal({key: rows[key] for key in later}, later)
    assert_equal(whole, resumed)


CONFIGS = [
    {},
    {"learn": "both", "meta_every": 4},
    {"hypergradient": "finite_difference", "meta_data": "train"},
    {"own_loss": False, "loss": "paper", "meta_lr": 1e-4},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_a_run_resumed_at_the_end_of_an_epoch_equals_one_that_was_not_stopped(tmp_path: Path, options: Any) -> None:
    kind = adaptive(Cycled)
    whole = run(tmp_path / "whole", make(kind, adalfl=config(**options)), loaders()[0], callbacks=[Keep(tmp_path)])
    # Another seed: everything must come from the checkpoint.
    module = make(kind, seed=5, adalfl=config(**options))
    resumed = run(tmp_path / "resumed", module, loaders()[0], tmp_path / "epoch=1.ckpt")
    assert_resumed(whole, resumed, 12)


@pytest.mark.parametrize("options", CONFIGS[:2], ids=str)
def test_it_goes_on_in_the_middle_of_an_epoch_with_a_stateful_loader(tmp_path: Path, options: Any) -> None:
    kind, keep = adaptive(Cycled), Keep(tmp_path, steps=[9])
    whole = run(tmp_path / "whole", make(kind, adalfl=config(**options)), StatefulLoader(), callbacks=[keep])
    module = make(kind, seed=5, adalfl=config(**options))
    resumed = run(tmp_path / "resumed", module, StatefulLoader(), tmp_path / "step=9.ckpt")
    assert_resumed(whole, resumed, 9)


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_it_goes_on_with_other_features_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", make(Ada, adalfl=config()), loaders()[0], callbacks=[Keep(tmp_path)], **options)
    module = make(Ada, seed=5, adalfl=config())
    resumed = run(tmp_path / "resumed", module, loaders()[0], tmp_path / "epoch=1.ckpt", **options)
    assert_resumed(whole, resumed, 12 // options.get("accumulate_grad_batches", 1))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_without_a_stateful_loader_it_goes_on_as_the_plain_module_does(tmp_path: Path) -> None:
    """In mid-epoch, and with an average of the weights: whatever Lightning makes of it."""
    found = []
    for kind, arguments in ((Smooth, {}), (AdaSmooth, {"adalfl": config(learn="nothing")})):
        keep = Keep(tmp_path / kind.__name__, steps=[9])
        whole, resumed = make(kind, **arguments), make(kind, **arguments)
        options: dict[str, Any] = {"max_epochs": 3}
        trainer(tmp_path, callbacks=[keep, EMAWeightAveraging()], **options).fit(whole, *loaders(shuffle=False))
        t = trainer(tmp_path, callbacks=[EMAWeightAveraging()], **options)
        t.fit(resumed, *loaders(shuffle=False), ckpt_path=keep.folder / "step=9.ckpt")
        found.append({**tensors(resumed), "step": torch.tensor(t.global_step)})
    assert_same(*found)


def test_the_offline_phase_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(Ada, adalfl=config())
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2), Keep(tmp_path)]).fit(module, *loaders())
    resumed = make(Ada, adalfl=config())
    monkeypatch.setattr("lightning_adalfl.callbacks.adalfl_init.OfflinePhase", None)
    t = trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)], max_epochs=3)
    t.fit(resumed, *loaders(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.adalfl.base_steps == 18
    t.fit_loop.max_epochs = 4  # nor in a second fit
    t.fit(resumed, *loaders())
    assert resumed.adalfl.base_steps == 24


KILLED = """
    import sys, time, warnings
    sys.path.insert(0, {tests!r})
    import torch
    from projects import *
    from lightning_adalfl.callbacks.adalfl_init import AdaLFLInit

    class Slow(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            print(trainer.global_step, flush=True)
            time.sleep(0.05)

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = make(Ada, adalfl=config())
    keep = Keep(Path({root!r}))
    fitted = trainer({root!r}, max_epochs=6, callbacks=[AdaLFLInit(steps=4, save_every=2), Slow(), keep])
    fitted.fit(module, *loaders())
"""


def test_a_run_that_is_killed_ends_as_one_that_is_left_alone(tmp_path: Path) -> None:
    code = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent), root=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "20":
                process.send_signal(signal.SIGKILL)
                break
    ends = []
    for folder, ckpt in ((tmp_path, tmp_path / "epoch=2.ckpt"), (tmp_path / "alone", None)):
        module = make(Ada, adalfl=config())
        callbacks = [AdaLFLInit(steps=4, save_every=2), Keep(folder)]
        trainer(folder, max_epochs=6, callbacks=callbacks).fit(module, *loaders(), ckpt_path=ckpt)
        ends.append({**tensors(module), **phi(module)})
    assert_same(*ends)
