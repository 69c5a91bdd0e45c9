"""A fit is a fresh start: what lives for one is made when it begins, and asked for from the Trainer at each use."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from projects import (
    WATCHING,
    Ada,
    AdaSmooth,
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
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLInit


def marked(value: float) -> list[DataLoader]:
    """Return loaders whose held-out rows carry a mark."""
    x, y = points(32, 1).tensors
    return [loaders()[0], DataLoader(TensorDataset(torch.full_like(x, value), y), 16)]


class Marks(Smooth):
    """Keeps the marks of the held-out rows that it predicts on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        if x.unique().numel() == 1:
            self.seen.append(float(x[0, 0]))
        return self(x), y


class Look(L.Callback):
    """Sees whether what is in use is of this fit."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        run = module._adalfl_run
        self.right.append(run.trainer is trainer and run.optimizer is trainer.optimizers[0])


class Breaks(L.Callback):
    """Ends a fit in one of the ways in which fits end."""

    def __init__(self, error: BaseException, hook: str) -> None:
        self.error = error
        setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step >= 3 or not trainer.sanity_checking:
            raise self.error


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_epoch_end"]
)
@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()], ids=repr)
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_a_fit_after_one_that_ended_in_an_error_uses_its_own_data_and_optimizer(
    tmp_path: Any, hook: str, error: BaseException
) -> None:
    module, look = make(adaptive(Marks), adalfl=config()), Look()
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, callbacks=[Breaks(error, hook)]).fit(module, *marked(100.0))
    module.seen.clear()
    before = module.adalfl.meta_steps
    trainer(tmp_path, callbacks=[look]).fit(module, *marked(200.0))
    assert set(module.seen) == {200.0}
    assert look.right == [True] * 12
    assert module.adalfl.meta_steps - before == 12
    # Nothing of a fit is kept when it is over.
    assert module._adalfl_run is None


def test_a_step_that_ends_in_an_error_leaves_nothing_behind(tmp_path: Any) -> None:
    """Neither forwards, whose hypergradient would be another, nor the graph that hangs on them."""
    graphs: list[Any] = []

    class Fails(Smooth):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self(x)
            graphs.append(weakref.ref(logits))
            if self.trainer.global_step == 2 and batch_idx == 2 and self.fails:
                raise RuntimeError("out of memory")
            return F.cross_entropy(logits, y)

        fails = True

    module = make(adaptive(Fails), adalfl=config())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path).fit(module, *loaders(shuffle=False))
    assert not module._adalfl_run.base_step.forwards
    assert not module._adalfl_run._observer.has_calls
    gc.collect()
    assert sum(graph() is not None for graph in graphs) == 0


def test_one_module_in_two_trainers_and_one_trainer_twice(tmp_path: Any) -> None:
    module = make(Ada, adalfl=config())
    t = trainer(tmp_path, gradient_clip_val=0.5, callbacks=[AdaLFLInit(steps=2)])
    t.fit(module, *loaders())
    t.fit_loop.max_epochs = 4
    t.fit(module, *loaders())
    assert module.adalfl.meta_steps == module.adalfl.base_steps == 24
    (val,) = t.validate(module, loaders()[1], verbose=False)
    assert val["val_loss"] > 0
    trainer(tmp_path, max_epochs=1).fit(module, *loaders())
    assert module.adalfl.meta_steps == 30


def test_a_loss_goes_on_learning_over_folds_with_weights_put_back(tmp_path: Any) -> None:
    module = make(AdaSmooth, adalfl=config())
    initial, steps = copy.deepcopy(module.state_dict()), []
    x, y = points(96).tensors
    for fold in range(3):
        module.load_state_dict(initial)
        held_out, before = torch.arange(96) % 3 == fold, module.adalfl.meta_steps
        data = [DataLoader(TensorDataset(x[rows], y[rows]), 16) for rows in (~held_out, held_out)]
        trainer(tmp_path).fit(module, *data)
        steps.append(module.adalfl.meta_steps - before)
    assert steps == [8, 8, 8]


class Exchanges(L.Callback):
    """Gives the Trainer another optimizer in mid-run."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers = [SGD(module.parameters(), lr=0.01)]


def test_an_optimizer_that_is_exchanged_is_seen(tmp_path: Any) -> None:
    ends = []
    for kind, given in ((Plain, {}), (Ada, {"adalfl": WATCHING})):
        module = make(kind, **given)
        trainer(tmp_path, callbacks=[Exchanges()]).fit(module, *loaders())
        ends.append(tensors(module))
    assert_same(*ends)
    look, found = Look(), []
    for way in ("forward", "reverse"):
        module = make(AdaSmooth, adalfl=config(hypergradient=way))
        t = trainer(tmp_path, callbacks=[Exchanges(), look], precision="64-true")
        t.fit(module, *loaders(shuffle=False, dtype=torch.float64))
        assert module.adalfl.meta_steps == 12
        found.append(phi(module))
    assert look.right == [True] * 24
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


# Tuners train before the fit, and put everything back.


def finder(**options: Any) -> LearningRateFinder:
    return LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=30, early_stop_threshold=None, **options)


def test_the_learning_rate_finder_finds_what_it_finds_for_the_plain_module(tmp_path: Any) -> None:
    found, ends = [], []
    for kind, given in ((Plain, {}), (Ada, {"adalfl": WATCHING})):
        module, callback = make(kind, **given), finder()
        trainer(tmp_path, callbacks=[callback], max_epochs=6).fit(module, *loaders())
        found.append((callback.optimal_lr.results, module.lr))
        ends.append(tensors(module))
    assert found[0] == found[1]
    assert module.lr != 0.1
    assert_same(*ends)


@pytest.mark.parametrize("order", [1, -1])
def test_the_learning_rate_finder_leaves_nothing_behind(tmp_path: Any, order: int) -> None:
    """Whichever of the two comes first, the offline phase or the finder."""
    seen: dict[str, Any] = {}

    class Start(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.update(state=copy.deepcopy(module.adalfl.state_dict()), place=module._adalfl_run.state_dict())

    states = []
    for callbacks in ([finder(update_attr=False)], []):
        module = make(Ada, adalfl=config())
        module.lr = 0.1
        trainer(tmp_path, callbacks=[*[AdaLFLInit(steps=2), *callbacks][::order], Start()]).fit(module, *loaders())
        assert seen["state"]["base_steps"] == seen["state"]["meta_steps"] == 0
        assert not seen["state"]["meta_optimizer"]["state"]
        assert seen["place"]["meta_batches"]["drawn"] == 0
        assert module.adalfl.meta_steps == module.adalfl.base_steps == 12
        assert module.adalfl.is_initialised
        states.append(seen["state"]["phi"])
    assert_same(*states)


def test_a_tuner_outside_of_a_fit_leaves_the_learned_loss_as_it_was(tmp_path: Any) -> None:
    module = make(AdaSmooth, adalfl=config())
    before = phi(module)
    Tuner(trainer(tmp_path)).lr_find(module, *loaders(), num_training=20, early_stop_threshold=None)
    assert_same(phi(module), before)
    assert module.adalfl.base_steps == 0


class Sized(Smooth):
    """Runs out of memory with large batches, after its forward or in its backward."""

    where = "step"

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 8

    def train_dataloader(self) -> Any:
        return DataLoader(points(), self.batch_size)

    def val_dataloader(self) -> Any:
        return loaders()[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if len(x) > 40 and self.where == "step":
            raise RuntimeError("CUDA out of memory.")
        return loss

    def backward(self, loss: Tensor) -> None:
        if self.batch_size > 40 and self.where == "backward":
            raise RuntimeError("CUDA out of memory.")
        super().backward(loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


@pytest.mark.parametrize("where", ["step", "backward"])
def test_the_batch_size_finder_leaves_no_forward_of_its_trials(
    tmp_path: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It takes half a second each time, and frees an accelerator's memory.
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)
    recorded: list[int] = []

    class Count(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
            if hasattr(module, "_adalfl_run"):
                recorded.append(len(module._adalfl_run.base_step.forwards))

    sizes = []
    for kind, given in ((Sized, {}), (adaptive(Sized), {"adalfl": config(meta_data="train")})):
        module = make(kind, **given)
        module.where = where
        callback = BatchSizeFinder(mode="binsearch", init_val=32, steps_per_trial=2, max_trials=2)
        trainer(tmp_path, callbacks=[callback, Count()], max_epochs=1).fit(module)
        sizes.append(module.batch_size)
    assert sizes[0] == sizes[1]
    assert set(recorded) == {1}
    assert module.adalfl.base_steps == module.adalfl.meta_steps == module.trainer.global_step


class EveryThird(Smooth):
    """Steps every third batch, and calls the closure alone on the others: a recipe of Lightning's documentation."""

    every = 1

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        if (batch_idx + 1) % self.every == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_forwards_whose_gradient_is_cleared_have_no_part_in_a_step(tmp_path: Any) -> None:
    """The first hypergradient is that of a run that sees the stepping batch alone."""
    x, y = points(12).tensors
    found = []
    for every, data in ((1, TensorDataset(x[8:], y[8:])), (3, TensorDataset(x, y))):
        module = make(adaptive(EveryThird), adalfl=config())
        module.every = every
        trainer(tmp_path, max_epochs=1).fit(module, DataLoader(data, 4), DataLoader(points(16, 1), 16))
        found.append((phi(module), tensors(module)))
        assert module.adalfl.base_steps == 1
    assert_same(found[0][1], found[1][1])
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value)


@pytest.mark.usefixtures("only_new_garbage")
def test_nothing_grows_with_the_steps(tmp_path: Any) -> None:
    counts: list[int] = []

    class Count(L.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch in (2, 6):
                gc.collect()
                counts.append(sum(type(thing) is Tensor for thing in gc.get_objects()))

    module = make(Ada, adalfl=config(learn="both"))
    trainer(tmp_path, max_epochs=7, callbacks=[Count()]).fit(module, *loaders())
    assert counts[1] <= counts[0] + 3


class Fails(Smooth):
    """Fails in the middle of a step, with a learned rate in force."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 8:
            raise RuntimeError("stop here")
        return super().training_step(batch, batch_idx)


class FailsByHand(Smooth):
    """Fails in the closure of a step of manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            if self.global_step == 8:
                raise RuntimeError("stop here")
            loss = super(FailsByHand, self).training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


@pytest.mark.parametrize("kind", [Fails, FailsByHand])
def test_a_fit_that_fails_leaves_the_optimizer_its_own_rate(tmp_path: Any, kind: type) -> None:
    module = make(adaptive(kind), adalfl=config(learn="lr", lr_meta_lr=0.1))
    fitting = trainer(tmp_path, max_epochs=4)
    with pytest.raises(RuntimeError, match="stop here"):
        fitting.fit(module, *loaders())
    assert module.adalfl.lr_scale != 1.0
    assert fitting.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
    assert fitting.optimizers[0].param_groups[0]["lr"] == make(Smooth).lr


def test_a_fresh_fit_after_a_failed_one_and_a_checkpoint_begins_at_the_start(tmp_path: Any) -> None:
    path = tmp_path / "whole.ckpt"
    first = trainer(tmp_path, max_epochs=1, callbacks=[SaveAtEnd(path)])
    first.fit(make(AdaSmooth, adalfl=config()), *loaders())
    module = make(adaptive(Fails), adalfl=config())
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(tmp_path, max_epochs=4).fit(module, *loaders())
    trainer(tmp_path).validate(module, loaders()[1], ckpt_path=path)
    starts = Starts()
    trainer(tmp_path, max_epochs=1, callbacks=[starts]).fit(module, *loaders())
    assert starts.position == (0, 0)


class SaveAtEnd(L.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.path)


class Starts(L.Callback):
    """Sees where the held-out batches begin."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        state = module._adalfl_run.batches.state_dict()
        self.position = state["pass"], state["drawn"]
