"""What a Trainer does beside a learned loss: accumulation, clipping, schedules, callbacks, loggers, modes."""

from __future__ import annotations

import copy
import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from projects import (
    WATCHING,
    Ada,
    Keep,
    Plain,
    RateTrace,
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_adalfl import AdaLFLConfig, AdaLFLInit

LINEAR = {"meta_optimizer": "SGD", "meta_lr": 0.1}  # an error in the size of the hypergradient shows too


def fit(tmp_path: Any, module: Any, **options: Any) -> Any:
    trainer(tmp_path, **options).fit(module, *loaders())
    return module


def check_as_plain(tmp_path: Any, kind: Any = Plain, callbacks: Any = list, **options: Any) -> Any:
    """Demand that a module trains as its subclass that watches; return one that has learned."""
    plain = fit(tmp_path, make(kind), callbacks=callbacks(), **options)
    watched = fit(tmp_path, make(adaptive(kind), adalfl=WATCHING), callbacks=callbacks(), **options)
    assert_same(tensors(watched), tensors(plain))
    assert watched.trainer.global_step == plain.trainer.global_step
    assert watched.adalfl.base_steps == watched.adalfl.meta_steps
    return fit(tmp_path, make(adaptive(kind), adalfl=config()), callbacks=callbacks(), **options)


def in_double(tmp_path: Any, kind: Any, way: str, shuffle: bool = False, batch_size: int = 16, **options: Any) -> Any:
    """Train in double precision with a meta optimizer that is linear in the hypergradient."""
    module = make(adaptive(kind), adalfl=config(hypergradient=way, **LINEAR, **options.pop("adalfl", {})))
    train, val = loaders(batch_size, shuffle, torch.float64)
    trainer(tmp_path, precision="64-true", **options).fit(module, train, val)
    return module


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=rtol, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


class Residual(Plain):
    """A residual block with BatchNorm and dropout, and two groups of parameters."""

    optimizer: type[Optimizer] = SGD

    def __init__(self) -> None:
        super().__init__(0.05)
        self.model = nn.Conv2d(1, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x.view(-1, 1, 2, 2))
        return self.head((x + self.block(x)).flatten(1))

    def configure_optimizers(self) -> Any:
        decayed = {"params": self.head.parameters(), "weight_decay": 1e-2, "lr": self.lr / 2}
        return self.optimizer([{"params": [*self.model.parameters(), *self.block.parameters()]}, decayed], lr=self.lr)


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW, RMSprop])
def test_groups_of_parameters_of_any_optimizer(tmp_path: Any, optimizer: Any) -> None:
    kind = type("Optimized", (Residual,), {"optimizer": optimizer})
    assert check_as_plain(tmp_path, kind).adalfl.meta_steps == 12


# Accumulated gradients: a base step and at most one meta step for each window of batches.


@pytest.mark.parametrize("way", ["forward", "finite_difference", "reverse"])
@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 0.05}], ids=str)
def test_accumulated_batches_learn_as_one_large_batch_does(tmp_path: Any, way: str, clipping: Any) -> None:
    # The learned loss alone, whose slope has no length to keep within a batch.
    options = {"adalfl": {"own_loss": False, "meta_batch_size": 16}, **clipping}
    large = in_double(tmp_path, Smooth, way, batch_size=48, **copy.deepcopy(options))
    cut = in_double(tmp_path, Smooth, way, batch_size=16, accumulate_grad_batches=3, **copy.deepcopy(options))
    assert cut.adalfl.meta_steps == large.adalfl.meta_steps == 4
    tolerance = 1e-3 if way == "finite_difference" else 1e-7
    assert_close(tensors(large), tensors(cut), tolerance)
    assert_close(phi(large), phi(cut), tolerance)


class Counters(Callback):
    def __init__(self) -> None:
        self.counts: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.counts.append((trainer.global_step, pl_module.adalfl.base_steps, pl_module.adalfl.meta_steps))


def test_a_window_has_at_most_one_meta_step_and_an_epoch_cuts_the_last_short(tmp_path: Any) -> None:
    counters = Counters()
    fit(tmp_path, make(Ada, adalfl=config()), accumulate_grad_batches=2, callbacks=[counters], max_epochs=1)
    assert counters.counts == [(0, 0, 0), (1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2), (3, 3, 3)]
    counters = Counters()
    fit(tmp_path, make(Ada, adalfl=config(meta_every=2)), accumulate_grad_batches=2, callbacks=[counters])
    assert [meta for _, _, meta in counters.counts] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    check_as_plain(tmp_path, accumulate_grad_batches=4)
    found = [phi(in_double(tmp_path, Plain, way, accumulate_grad_batches=4)) for way in ("forward", "reverse")]
    assert_close(*found)


# Lightning says of any module with an `optimizer_step` that it is called once for each window, which is what is wanted.
@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches != 1.`")
def test_a_schedule_of_windows_is_followed(tmp_path: Any) -> None:
    module = check_as_plain(tmp_path, callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 3})])
    assert module.adalfl.meta_steps == module.adalfl.base_steps == 8


class Picky(Plain):
    """Skips every third batch by returning nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 2 else loss


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_the_training_step_skips_moves_nothing(tmp_path: Any, accumulate: int) -> None:
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
    assert check_as_plain(tmp_path, Picky, **options).adalfl.meta_steps == {1: 4, 2: 3, 3: 2}[accumulate]
    assert_close(*(phi(in_double(tmp_path, Picky, way, **options)) for way in ("forward", "reverse")))


class SkipsNan(Plain):
    """Skips a batch with NaN before it is predicted on, so that BatchNorm never sees it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx < 2:
            batch[0][0, 0] = float("nan")
        return None if batch[0].isnan().any() else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_statistics_do_not_see_a_batch_that_is_skipped(tmp_path: Any) -> None:
    module = check_as_plain(tmp_path, SkipsNan)
    assert module.model[1].running_mean.isfinite().all()


# Clipping, by whoever does it; the hypergradient passes through it.

BY_NORM = {"gradient_clip_val": 0.05}
BY_VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}


class GradientNorms(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize("clipping", [BY_NORM, BY_VALUE], ids=str)
def test_clipped_steps_are_those_of_the_plain_module_in_a_second_fit_too(tmp_path: Any, clipping: Any) -> None:
    traces = []
    for kind, arguments in ((Plain, {}), (Ada, {"adalfl": WATCHING})):
        module, norms = make(kind, **arguments), GradientNorms()
        t = trainer(tmp_path, callbacks=[norms], **clipping)
        t.fit(module, *loaders())
        t.fit_loop.max_epochs += 1
        t.fit(module, *loaders())
        traces.append((norms.norms, tensors(module)))
    assert traces[0][0] == traces[1][0]
    assert max(traces[0][0]) <= (0.0501 if clipping is BY_NORM else 0.01 * 163**0.5)  # 163 parameters
    assert_same(traces[0][1], traces[1][1])


class Clips(Plain):
    """Clips in a way of its own: tighter from epoch to epoch."""

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.model.parameters(), lr=0.5)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, 0.1 / (1 + self.current_epoch), "norm")


class ClipsByTorch(Clips):
    def configure_gradient_clipping(self, optimizer: Optimizer, **_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1 / (1 + self.current_epoch))


class ClipsValuesByTorch(Clips):
    def configure_gradient_clipping(self, optimizer: Optimizer, **_: Any) -> None:
        torch.nn.utils.clip_grad_value_(self.parameters(), 0.01)


class ClipsValueThenNorm(Clips):
    def configure_gradient_clipping(self, optimizer: Optimizer, **_: Any) -> None:
        self.clip_gradients(optimizer, 0.03, "value")
        self.clip_gradients(optimizer, 0.05, "norm")


class InAHook(Plain):
    def configure_optimizers(self) -> Optimizer:
        return SGD(self.model.parameters(), lr=0.5)


class ClipsAfterBackward(InAHook):
    def on_after_backward(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClipsBeforeTheStep(InAHook):
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        torch.nn.utils.clip_grad_value_(self.parameters(), 0.01)


class HoldsRows(InAHook):
    """Does not train some rows of a weight."""

    def on_after_backward(self) -> None:
        self.model[0].weight.grad[:8].zero_()


class ClipsByHand(InAHook):
    """The usual lines of manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        optimizer.step()


class LooksOnly(Clips):
    def configure_gradient_clipping(self, optimizer: Optimizer, **_: Any) -> None:
        self.log("norm", torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))


class HalvesTheHead(Clips):
    def configure_gradient_clipping(self, optimizer: Optimizer, **_: Any) -> None:
        self.model[4].weight.grad.mul_(0.5)


class ClippingCallback(Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 0.1)


CLIPPED = [
    (Plain, BY_NORM),
    (Plain, BY_VALUE),
    (Clips, {}),
    (ClipsByTorch, {}),
    (ClipsValuesByTorch, {}),
    (ClipsValueThenNorm, {}),
    (ClipsAfterBackward, {}),
    (ClipsBeforeTheStep, {}),
    (ClipsBeforeTheStep, BY_NORM),  # and Lightning after it
    (HoldsRows, {}),
    (ClipsByHand, {}),
    (InAHook, {"callbacks": [ClippingCallback()]}),
    (LooksOnly, {}),
]


@pytest.mark.parametrize("optimizer", [None, Adam])
@pytest.mark.parametrize(("kind", "options"), CLIPPED)
def test_the_hypergradient_of_a_clipped_step_is_that_of_a_double_backward(
    tmp_path: Any, kind: Any, options: Any, optimizer: Any
) -> None:
    if optimizer is not None:
        kind = type("WithAdam", (kind,), {"configure_optimizers": lambda self: Adam(self.parameters(), 0.05)})
    elif "callbacks" not in options:
        check_as_plain(tmp_path, kind, **options)
    found = [in_double(tmp_path, kind, way, max_epochs=1, **options) for way in ("forward", "reverse")]
    assert_close(*map(phi, found))
    assert_close(*map(tensors, found))
    unclipped = type("Unclipped", (Plain,), {"configure_optimizers": kind.configure_optimizers})
    free = phi(in_double(tmp_path, unclipped, "forward", max_epochs=1))
    differs = any(not torch.allclose(free[name], value, rtol=1e-4) for name, value in phi(found[0]).items())
    assert differs is (kind.configure_gradient_clipping is not LooksOnly.configure_gradient_clipping)


@pytest.mark.parametrize(
    ("kind", "options", "clipping"),
    [
        (ClipsAfterBackward, {}, {"gradient_clip_val": 0.1}),
        (InAHook, {"callbacks": [ClippingCallback()]}, {"gradient_clip_val": 0.1}),
        (ClipsByHand, {}, {"gradient_clip_val": 0.1}),
        (ClipsBeforeTheStep, {}, BY_VALUE),
    ],
)
def test_wherever_a_module_clips_it_learns_as_where_lightning_clips(
    tmp_path: Any, kind: Any, options: Any, clipping: Any
) -> None:
    own = in_double(tmp_path, kind, "forward", max_epochs=1, **options)
    lightnings = in_double(tmp_path, InAHook, "forward", max_epochs=1, **clipping)
    assert_close(phi(own), phi(lightnings))
    assert_close(tensors(own), tensors(lightnings))


def test_a_gradient_that_is_changed_in_another_way_is_refused_before_the_first_step(tmp_path: Any) -> None:
    module = make(adaptive(HalvesTheHead), adalfl=AdaLFLConfig("multiclass"))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(
        ValueError, match=r"changes the gradient in a way.*`self.clip_gradients\(optimizer, .*`meta_every=None`"
    ):
        fit(tmp_path, module)
    assert_same(before, {name: p.detach() for name, p in module.named_parameters()})
    fit(tmp_path, make(adaptive(HalvesTheHead), adalfl=config(meta_every=None)))


# Schedules of the learning rate.


class OneCycle(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=self.lr)
        schedule = OneCycleLR(optimizer, 0.1, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plateau(Plain):
    """The plateau is of a constant, so that both runs see the same values."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("constant", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        schedule = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "constant"}}


class Several(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        by_step = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step", "frequency": 2}
        by_epoch = {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch", "frequency": 2}
        return [optimizer], [by_step, by_epoch]


class OwnStep(Plain):
    """Steps a scheduler in its own way, and warms up in its own `optimizer_step`."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": LinearLR(optimizer, 0.1, 1.0, 10), "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()
        scheduler.step()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.trainer.global_step < 3:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (self.trainer.global_step + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def rates(tmp_path: Any, module: Any, epochs: int, ckpt_path: Any = None, **options: Any) -> list[Any]:
    trace = RateTrace()
    t = trainer(tmp_path, max_epochs=epochs, callbacks=[trace, *options.pop("callbacks", [])], **options)
    t.fit(module, *loaders(), ckpt_path=ckpt_path)
    return trace.rates


@pytest.mark.parametrize("kind", [OneCycle, Plateau, Several, OwnStep])
def test_the_trace_of_rates_equals_that_of_the_plain_module_after_a_resume_too(tmp_path: Any, kind: Any) -> None:
    traces = []
    for cls, arguments in ((kind, {}), (adaptive(kind), {"adalfl": config()})):
        keep = Keep(tmp_path / cls.__name__)
        whole = rates(tmp_path, make(cls, **arguments), 4, callbacks=[keep])
        resumed = rates(tmp_path, make(cls, **arguments), 4, keep.folder / "epoch=1.ckpt")
        traces.append((whole, resumed))
    assert traces[0] == traces[1]
    whole, resumed = traces[1]
    assert len({str(rate) for _, rate in whole}) > 2
    assert len(resumed) == 14  # two epochs of six batches
    # A plateau's epoch ends after its checkpoint is written, in Lightning itself.
    assert kind is Plateau or resumed == whole[-14:]


class OnLoss(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=3.0)
        schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def test_a_plateau_of_the_validation_loss_lowers_the_rate_as_for_the_plain_module(tmp_path: Any) -> None:
    expected = rates(tmp_path, make(OnLoss), 5)
    assert expected[-1] != expected[0]
    assert rates(tmp_path, make(adaptive(OnLoss), adalfl=WATCHING), 5) == expected


def test_a_learned_rate_multiplies_the_schedule_and_leaves_it_alone(tmp_path: Any) -> None:
    expected = rates(tmp_path, make(Several), 3)
    module = make(adaptive(Several), adalfl=config(learn="lr", lr_meta_lr=0.05))
    assert rates(tmp_path, module, 3) == expected
    assert abs(module.adalfl.lr_scale - 1) > 0.05


# Callbacks of Lightning itself.


class Finetuned(Plain):
    """Trains its head, and from the second epoch on its backbone."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.backbone, self.model = nn.Sequential(nn.Linear(4, 16), nn.Tanh()), nn.Linear(16, 3)

    def forward(self, x: Any) -> Any:
        return self.model(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return SGD(self.model.parameters(), lr=self.lr)


class Unfreeze(BaseFinetuning):
    def __init__(self, what: str = "backbone") -> None:
        super().__init__()
        self.what = what

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            part = pl_module.backbone if self.what == "backbone" else pl_module
            self.unfreeze_and_add_param_group(part, optimizer, initial_denom_lr=1)


CALLBACKS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "weight averaging": (Plain, lambda: [WeightAveraging()], {}),
    "exponential averaging": (Plain, lambda: [EMAWeightAveraging()], {}),
    "stochastic averaging": (Plain, lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=2)], {"max_epochs": 4}),
    "pruning": (Plain, lambda: [ModelPruning("l1_unstructured", amount=0.3)], {}),
    "summary": (Plain, lambda: [ModelSummary(max_depth=-1)], {"enable_model_summary": True}),
    "unfreezing a part": (Finetuned, lambda: [Unfreeze()], {}),
    "unfreezing all": (Finetuned, lambda: [Unfreeze("all")], {}),
    "unfreezing a backbone": (
        Finetuned,
        lambda: [BackboneFinetuning(1, backbone_initial_ratio_lr=0.5)],
        {"max_epochs": 3},
    ),
}


@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_of_lightning_do_what_they_do_for_the_plain_module(tmp_path: Any, name: str) -> None:
    kind, callbacks, options = CALLBACKS[name]
    module = check_as_plain(tmp_path, kind, callbacks, **options)
    assert module.adalfl.meta_steps == module.adalfl.base_steps > 0
    learned = {id(p) for p in module.adalfl.learned.values()}
    assert learned.isdisjoint(id(p) for g in module.trainer.optimizers[0].param_groups for p in g["params"])


def test_layers_that_a_callback_unfreezes_are_part_of_the_hypergradient(tmp_path: Any) -> None:
    found = [phi(in_double(tmp_path, Finetuned, way, callbacks=[Unfreeze()])) for way in ("forward", "reverse")]
    assert_close(*found)


class UnfreezeLater(BaseFinetuning):
    """Freezes all there is, and unfreezes a part when an epoch begins."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 0:
            self.make_trainable(pl_module.model[4])
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[0], optimizer)


class HeadFirst(Plain):
    def configure_optimizers(self) -> Optimizer:
        return SGD(self.model[4].parameters(), lr=0.5)


def test_a_module_may_be_frozen_altogether_until_its_first_epoch(tmp_path: Any) -> None:
    module = check_as_plain(tmp_path, HeadFirst, callbacks=lambda: [UnfreezeLater()])
    assert len(module.trainer.optimizers[0].param_groups) == 2


class KeepsCopies(Smooth):
    """Keeps itself and a part of it as they are, in the midst of a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        if batch_idx % 3 == 1:
            self.__dict__["earlier"] = copy.deepcopy(self), copy.deepcopy(self.model)
            torch.save(self.model, io.BytesIO())
        loss = F.cross_entropy(logits, batch[1])
        if batch_idx % 3:
            loss = loss + sum(F.mse_loss(logits, old(batch[0]).detach()) for old in self.__dict__["earlier"])
        return loss


def test_a_module_may_be_copied_in_the_midst_of_its_step(tmp_path: Any) -> None:
    module = check_as_plain(tmp_path, KeepsCopies)
    twin, part = module.__dict__["earlier"]
    x = torch.ones(2, 4)
    torch.testing.assert_close(twin(x), part(x))
    assert twin.adalfl is not module.adalfl


def test_early_stopping_stops_where_it_stops_the_plain_module(tmp_path: Path) -> None:
    def stopping() -> Any:
        return [EarlyStopping("val_loss", patience=0, min_delta=0.05)]

    plain = fit(tmp_path, make(Plain), callbacks=stopping(), max_epochs=30)
    with pytest.warns(UserWarning, match=r"Callbacks monitor \['val_loss'\].*are optimistic. Hold out other data"):
        watched = fit(tmp_path, make(Ada, adalfl=WATCHING), callbacks=stopping(), max_epochs=30)
    assert 0 < watched.trainer.current_epoch == plain.trainer.current_epoch < 30
    assert_same(tensors(watched), tensors(plain))
    # Both remedies: other data, or no meta step.
    for options in ({"meta_data": "train"}, {"meta_every": None}):
        fit(tmp_path, make(Ada, adalfl=config(**options)), callbacks=stopping(), max_epochs=2)


# Loggers.

SCALARS = {
    *("adalfl/learned_loss", "adalfl/task_loss", "adalfl/meta_grad_norm"),
    *("adalfl/implied_lr", "adalfl/evidence", "adalfl/consensus"),
}


def log(tmp_path: Path, logger: Any) -> Any:
    callbacks = [AdaLFLInit(steps=2), *([LearningRateMonitor()] if logger else [])]
    options = {"logger": logger, "callbacks": callbacks, "log_every_n_steps": 3}
    return fit(tmp_path, make(Ada, adalfl=config()), **options)


def test_tensorboard_and_csv_have_the_scalars_and_none_is_needed(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")
    log(tmp_path, [board, table])
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert SCALARS | {"train_loss", "val_loss"} <= set(events.Tags()["scalars"])
    steps = [event.step for event in events.Scalars("adalfl/learned_loss")]
    assert {2, 5, 8, 11} <= set(steps)
    assert "lr: 0.1" in (Path(board.log_dir) / "hparams.yaml").read_text()
    with (Path(table.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["adalfl/learned_loss"]]
    assert set(rows[0]) >= SCALARS
    assert {2, 5, 8, 11} <= {int(row["step"]) for row in rows}
    assert log(tmp_path / "none", False).trainer.callback_metrics.keys() >= SCALARS


# Of wandb and what it brings, where they are imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="project", save_dir=tmp_path, offline=True)
    log(tmp_path, logger)
    run = logger.experiment
    summary = {key for key in run.summary.keys() if key.startswith("adalfl/")}  # noqa: SIM118
    run.finish()
    assert summary >= SCALARS


# Of mlflow and what it brings, where they are imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_mlflow_in_a_local_store(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'runs.db'}"
    logger = MLFlowLogger("experiment", tracking_uri=store, artifact_location=str(tmp_path))
    log(tmp_path, logger)
    assert logger.experiment.get_run(logger.run_id).data.metrics.keys() >= SCALARS


# Shortened, limited and bare runs.


@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_takes_its_steps_and_shortens_the_offline_phase(
    tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    step = "lightning_adalfl.adapter.offline.OfflinePhase.step"
    monkeypatch.setattr(step, lambda phase: (taken.append(1), torch.zeros(()))[1])
    module = check_as_plain(tmp_path, callbacks=lambda: [], fast_dev_run=batches)
    assert module.adalfl.meta_steps == batches
    module = make(Ada, adalfl=config())
    trainer(tmp_path, fast_dev_run=batches, callbacks=[AdaLFLInit(steps=100_000)]).fit(module, *loaders())
    assert len(taken) == module.adalfl.meta_steps == batches
    assert not list(tmp_path.iterdir())


class Quiet(Plain):
    """Logs nothing, as Lightning advises for a bare run."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def test_barebones_logs_nothing_and_trains(tmp_path: Path) -> None:
    module = check_as_plain(tmp_path, Quiet, lambda: [], barebones=True, max_epochs=1, logger=None)
    assert module.trainer.callback_metrics == {}
    assert module.adalfl.meta_steps == 6


class Watching(Plain):
    """Keeps the first features of all rows that it predicts on."""

    def adalfl_predict(self, batch: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), *batch[0][:, 0].tolist()]
        return self(batch[0]), batch[1]


def first_features(train: int, val: int) -> set[float]:
    return {*points().tensors[0][: 16 * train, 0].tolist(), *points(32, 1).tensors[0][: 16 * val, 0].tolist()}


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(
    ("options", "train", "val"),
    [
        ({"limit_train_batches": 1, "limit_val_batches": 1}, 1, 1),
        ({"limit_train_batches": 0.5, "limit_val_batches": 0.5}, 3, 1),
        ({"limit_train_batches": 1.0, "limit_val_batches": 1.0}, 6, 2),
        ({"overfit_batches": 2}, 2, 2),
        ({"overfit_batches": 0.5}, 3, 1),
    ],
    ids=str,
)
def test_limits_hold_for_meta_batches_and_the_offline_phase_too(
    tmp_path: Path, options: dict[str, Any], train: int, val: int
) -> None:
    for meta_data in ("val", "train"):
        module = make(adaptive(Watching), adalfl=config(meta_data=meta_data))
        t = trainer(tmp_path, callbacks=[AdaLFLInit(steps=12)], num_sanity_val_steps=0, **options)
        t.fit(module, *loaders(shuffle=False))
        assert set(module.seen) == first_features(train, val if meta_data == "val" else 0)
        assert module.adalfl.base_steps == 2 * train


def test_without_a_validation_loop_its_data_still_serve_the_meta_objective(tmp_path: Path) -> None:
    assert fit(tmp_path, make(Ada, adalfl=config()), limit_val_batches=0).adalfl.meta_steps == 12


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_need_no_meta_data(tmp_path: Path, stage: str) -> None:
    module = make(Ada, adalfl=config())
    module.test_step = module.validation_step
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    options = {} if stage == "predict" else {"verbose": False}
    found = getattr(trainer(tmp_path), stage)(module, loaders()[1], **options)
    assert found[0].shape == (16, 3) if stage == "predict" else found[0]["val_loss"] > 0


@pytest.mark.parametrize(
    "option", [{"detect_anomaly": True}, {"deterministic": True}, {"inference_mode": False}], ids=str
)
def test_other_switches(tmp_path: Path, option: dict[str, Any]) -> None:
    try:
        assert check_as_plain(tmp_path, max_epochs=1, **option).adalfl.meta_steps == 6
    finally:
        torch.use_deterministic_algorithms(False)


# Compiled modules: the base step runs what was compiled, the meta step what it was compiled from.


class Backend:
    """A compiler that runs graphs as they are, and counts."""

    def __init__(self) -> None:
        self.compiled = self.called = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1

        def run(*arguments: Any) -> Any:
            self.called += 1
            return graph.forward(*arguments)

        return run


def compiled(how: str, module: Any, backend: Any) -> Any:
    torch._dynamo.reset()
    if how == "whole":
        return torch.compile(module, backend=backend)
    if how == "in place":
        module.model.compile(backend=backend)
    else:
        module.model = torch.compile(module.model, backend=backend)
    return module


# Of torch itself, where it traces.
@pytest.mark.filterwarnings(
    "ignore:.*is deprecated:FutureWarning", "ignore:.*is deprecated:DeprecationWarning", "ignore:Dynamo"
)
@pytest.mark.parametrize("how", ["submodule", "in place", "whole"])
def test_a_compiled_module_trains_as_the_plain_one_and_learns_as_one_that_is_not(tmp_path: Path, how: str) -> None:
    plain = fit(tmp_path, make(Plain))
    module, backend = make(Ada, adalfl=WATCHING), Backend()
    trainer(tmp_path).fit(compiled(how, module, backend), *loaders())
    for expected, found in zip(plain.parameters(), module.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    # 12 batches of training and 6 of validation; a graph for each of the two modes, and not one for each batch.
    assert backend.called >= 18
    assert backend.compiled <= (2 if how != "whole" else 8)
    for way in ("forward", "finite_difference", "reverse") if how == "submodule" else ("forward",):
        expected = phi(fit(tmp_path, make(Ada, dropout=0.0, adalfl=config(hypergradient=way, **LINEAR)), max_epochs=1))
        module = make(Ada, dropout=0.0, adalfl=config(hypergradient=way, **LINEAR))
        trainer(tmp_path, max_epochs=1).fit(compiled(how, module, Backend()), *loaders())
        assert module.adalfl.meta_steps == 6
        for name, value in expected.items():
            torch.testing.assert_close(phi(module)[name], value, rtol=1e-3, atol=1e-5)
