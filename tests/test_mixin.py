"""What the mixin asks of a module, and what it leaves as it is: the learner is no part of the module."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_summary import ModelSummary
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
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLInit, AdaLFLMixin, LossNetwork, LossShapeLogger
from lightning_adalfl.losses import Descent


def fit(tmp_path: Any, module: Any, **options: Any) -> Any:
    trainer(tmp_path, **options).fit(module, *loaders())
    return module


# Modules of every style.


class OneArgument(Plain):
    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch, 0)


class AnyArguments(Plain):
    def training_step(self, *arguments: Any) -> Tensor:
        assert len(arguments) == 2
        return super().training_step(*arguments)


class CallsTheModel(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss)
        return loss


class ReturnsMore(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": super().training_step(batch, batch_idx), "size": len(batch[0])}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.calls = [*getattr(self, "calls", []), (outputs["size"], float(outputs["loss"]))]


class HasHooks(Plain):
    """Uses the hooks of a step for what users use them for."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls = [*getattr(self, "calls", []), "zero"]

    def on_after_backward(self) -> None:
        self.calls.append("backward")
        self.model[0].weight.grad.mul_(0.5)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append("step")
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters()]).norm())

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor) -> None:
        (2 * loss).backward()


class LooksTwice(Plain):
    """A second forward, with a gradient, that is none of the predictions."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.log("noisy_loss", F.cross_entropy(self.model(x + 1), y))
        return super().training_step(batch, batch_idx)


class Metrics(Plain):
    def on_train_epoch_end(self) -> None:
        self.calls = [*getattr(self, "calls", []), int(self.accuracy.tp.sum() + self.accuracy.fn.sum())]


class InitialisedInSetup(Plain):
    """Weights are drawn in `setup`, over all parameters and all modules."""

    def setup(self, stage: str) -> None:
        def initialise(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                module.bias.data.fill_(0.01)

        self.apply(initialise)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


class FrozenWhole(Plain):
    """Transfer learning as usual: all is frozen, and then the head alone trained."""

    def setup(self, stage: str) -> None:
        self.requires_grad_(False)
        self.model[4].requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model[4].parameters(), 0.1)


class SkipsBadGradients(Plain):
    """The usual recipe: a gradient that is not finite is cleared before the step."""

    def on_after_backward(self) -> None:
        if self.global_step == 2:
            self.zero_grad()


class Stops(Plain):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trainer.should_stop = self.trainer.global_step >= 4


STYLES = [
    OneArgument,
    AnyArguments,
    CallsTheModel,
    ReturnsMore,
    HasHooks,
    LooksTwice,
    Metrics,
    InitialisedInSetup,
    FrozenWhole,
    SkipsBadGradients,
    Stops,
]


@pytest.mark.parametrize("kind", STYLES)
def test_modules_of_every_style_train_as_they_do_by_themselves(tmp_path: Any, kind: Any) -> None:
    plain = fit(tmp_path, make(kind))
    watched = fit(tmp_path, make(adaptive(kind), adalfl=WATCHING))
    assert_same(tensors(watched), tensors(plain))
    metrics = plain.trainer.callback_metrics
    assert {name: watched.trainer.callback_metrics[name] for name in metrics} == metrics
    assert getattr(watched, "calls", None) == getattr(plain, "calls", None)
    module = fit(tmp_path, make(adaptive(kind), adalfl=config()))
    steps = {SkipsBadGradients: 11, Stops: 4}.get(kind, 12)  # a step without gradients counts for nothing
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (steps, steps)


def test_it_logs_its_scalars_beside_the_users_own(tmp_path: Any) -> None:
    names = {"learned_loss", "task_loss", "meta_grad_norm", "implied_lr", "evidence"}
    module = fit(tmp_path, make(Ada, adalfl=config()))
    metrics = module.trainer.callback_metrics
    assert {f"adalfl/{name}" for name in names} | {"train_loss", "train_accuracy", "val_loss"} <= metrics.keys()
    assert all(torch.isfinite(value) for value in metrics.values())
    both = fit(tmp_path, make(Ada, adalfl=config(learn="both")))
    assert both.trainer.callback_metrics["adalfl/lr_scale"] == pytest.approx(both.adalfl.lr_scale)


def test_meta_every_counts_base_steps(tmp_path: Any) -> None:
    module = fit(tmp_path, make(Ada, adalfl=config(meta_every=5)))
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (12, 2)
    never = fit(tmp_path, make(Ada, adalfl=config(meta_every=None)))
    assert (never.adalfl.base_steps, never.adalfl.meta_steps) == (12, 0)


def test_hooks_may_stand_in_the_module_itself(tmp_path: Any) -> None:
    """Right of the mixin, for a module that is prepared for it; they work as in the subclass."""

    class Prepared(Plain):
        def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
            x, y = batch
            predicted.append(len(x))
            return self(x), y

        def adalfl_meta_dataloader(self) -> Any:
            return DataLoader(points(32, 3), 8, shuffle=True)

    class Subclass(Ada):
        adalfl_predict = Prepared.adalfl_predict
        adalfl_meta_dataloader = Prepared.adalfl_meta_dataloader

    predicted: list[int] = []
    found = [phi(fit(tmp_path, make(kind, adalfl=config()))) for kind in (adaptive(Prepared), Subclass)]
    assert {8, 16} == set(predicted)
    assert_same(*found)
    assert any(
        not torch.equal(value, found[0][name]) for name, value in phi(fit(tmp_path, make(Ada, adalfl=config()))).items()
    )


# Refused where the class is defined, or before the first step.


def test_a_method_in_its_way_is_refused_where_the_class_is_defined(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match=r"Wrong.training_step hides that of AdaLFLMixin in Wrong; move it to a base"):

        class Wrong(AdaLFLMixin, Plain):
            def training_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.raises(TypeError, match=r"put AdaLFLMixin left of Plain: class Turned\(AdaLFLMixin, Plain\)"):

        class Turned(Plain, AdaLFLMixin):
            pass

    with pytest.raises(TypeError, match=r"Forgets.on_save_checkpoint hides"):

        class Forgets(AdaLFLMixin, Plain):
            def on_save_checkpoint(self, checkpoint: Any) -> None: ...

    with pytest.raises(TypeError, match=r"Alone is no LightningModule; put AdaLFLMixin left of yours"):

        class Alone(AdaLFLMixin, nn.Module):
            pass

    # Both remedies.
    class Base(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)

    class Calls(AdaLFLMixin, Base):
        @torch.enable_grad()
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)

    assert fit(tmp_path, make(Calls, adalfl=config())).adalfl.meta_steps == 12


class OfLBFGS(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Sharpness(torch.optim.SGD):
    """Sharpness-aware minimisation: calls the closure twice, the second time elsewhere."""

    def step(self, closure: Any) -> Any:
        weights = [p for group in self.param_groups for p in group["params"]]
        ascent, _ = [p.detach().clone() for p in weights], closure()
        torch._foreach_add_([p.data for p in weights], ascent, alpha=0.05)
        closure()
        torch._foreach_add_([p.data for p in weights], ascent, alpha=-0.05)
        return super().step()


class OfSharpness(Plain):
    def configure_optimizers(self) -> Any:
        return Sharpness(self.parameters(), 0.1)


class Fetches(Plain):
    def training_step(self, dataloader_iter: Any) -> None: ...


class NoOptimizer(Plain):
    def configure_optimizers(self) -> None:
        return None


class ForeignParameters(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.model.requires_grad_(False)


class Words(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.model = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.table(x[:, 0].abs().long().clamp(max=9)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (OfLBFGS, {}, "`optimizer` is LBFGS, whose step evaluates the loss several times"),
        (OfSharpness, {}, "`optimizer` is Sharpness, which has no differentiable step"),
        (OfSharpness, {"hypergradient": "finite_difference"}, "`optimizer` is Sharpness"),
        (Fetches, {}, "takes `dataloader_iter` has no batch to learn from; take `batch`"),
        (NoOptimizer, {}, "`configure_optimizers` returned no optimizer"),
        (ForeignParameters, {}, "`optimizer` holds parameters that `model` does not own"),
        (Frozen, {}, "no parameter that requires a gradient; unfreeze a part"),
        (Words, {}, "build the embedding with `sparse=False`"),
    ],
)
def test_modules_that_cannot_learn_are_refused_before_the_first_step(
    tmp_path: Any, kind: Any, options: Any, message: str
) -> None:
    module = make(adaptive(kind), adalfl=config(**options))
    before = tensors(module)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, num_sanity_val_steps=0)
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])


# The learner is no part of the module.


class Scriptable(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


VIEWS = {
    "parameters": lambda m: [p.shape for p in m.parameters()],
    "named_parameters": lambda m: [name for name, _ in m.named_parameters()],
    "named_buffers": lambda m: [name for name, _ in m.named_buffers()],
    "named_modules": lambda m: [name for name, _ in m.named_modules()],
    "children": lambda m: [type(child).__name__ for child in m.children()],
    "state_dict": lambda m: [(name, t.shape) for name, t in m.state_dict().items()],
    "summary": lambda m: str(ModelSummary(m, max_depth=-1)),
    "modes": lambda m: [part.training for part in m.eval().modules()],
    "repr": lambda m: repr(m).partition("(")[2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("when", ["fresh", "fitted"])
def test_a_look_at_the_module_shows_the_plain_one(tmp_path: Any, view: str, when: str) -> None:
    modules = make(Plain), make(Ada, adalfl=config())
    if when == "fitted":
        for module in modules:
            fit(tmp_path, module)
    plain, ada = map(VIEWS[view], modules)
    assert ada == plain


def test_what_is_done_to_all_parts_of_the_module_leaves_the_learned_loss_alone(tmp_path: Any) -> None:
    module = fit(tmp_path, make(Ada, adalfl=config(learn="both")))
    before = phi(module)
    seen: list[nn.Module] = []
    module.apply(seen.append)
    module.requires_grad_(False).double().zero_grad()
    module.bfloat16()
    assert seen == [module, *module.model, *module.accuracy.modules(), module.model] or len(seen) == len(
        [*module.modules()]
    )
    assert_same(phi(module), before)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in module.adalfl.learned.values())
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert_same(phi(module), before)


def test_its_state_dict_loads_into_the_plain_module_and_back(tmp_path: Any) -> None:
    module = fit(tmp_path, make(Ada, adalfl=config()))
    plain = make(Plain, seed=3)
    plain.load_state_dict(module.state_dict(), strict=True)
    assert_same(tensors(plain), tensors(module))
    other = make(Ada, seed=4, adalfl=config())
    start = phi(other)
    other.load_state_dict(plain.state_dict(), strict=True)
    assert_same(tensors(other), tensors(module))
    assert_same(phi(other), start)
    # φ by hand.
    other.adalfl.load_state_dict(module.adalfl.state_dict())
    assert_same(phi(other), phi(module))


@pytest.mark.parametrize(("method", "options"), [("script", {}), ("trace", {"example_inputs": torch.randn(2, 4)})])
@pytest.mark.filterwarnings("ignore:.*to_torchscript", "ignore:.*torch.jit")  # of Lightning and torch themselves
def test_it_becomes_torchscript_as_the_plain_module_does(tmp_path: Any, method: str, options: Any) -> None:
    x = torch.randn(5, 4)
    module = make(adaptive(Scriptable), adalfl=config())
    assert torch.equal(module.to_torchscript(method=method, **options)(x), make(Scriptable)(x))


def by_file(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Unlogged(Smooth):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)


class Copied(AdaLFLMixin, Unlogged):
    """A class that a pickle finds."""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_file])
@pytest.mark.parametrize("when", ["fresh", "fitted", "in a fit"])
def test_a_copy_has_a_learner_of_its_own(tmp_path: Any, copied: Any, when: str) -> None:
    module = make(Copied, adalfl=config(learn="both"))
    twins: list[Any] = []

    class Copies(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3 and when == "in a fit":
                trained, pl_module._trainer = pl_module._trainer, None  # a Trainer is in no pickle
                twins.append(copied(pl_module))
                twins.append(phi(pl_module))
                pl_module._trainer = trained

    if when != "fresh":
        fit(tmp_path, module, callbacks=[Copies()])
    if not twins:
        module._trainer = None
        twins = [copied(module), phi(module)]
    twin, before = twins
    assert_same(phi(twin), before)
    learned = {id(p) for p in module.adalfl.learned.values()}
    held = {id(p) for group in twin.adalfl._optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in twin.adalfl.learned.values()}
    assert not held & learned
    before = phi(module)
    fit(tmp_path, twin, max_epochs=1)
    assert any(not torch.equal(value, before[name]) for name, value in phi(twin).items())
    assert_same(phi(module), before)


# Random numbers.


class RandomNumbers(L.Callback):
    """Keeps what every generator would draw next, at the end of each batch, and the order of the data."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self.drawn.append((torch.rand(3).tolist(), random.random(), np.random.rand(), batch[0][:, 0].tolist()))
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])


@pytest.mark.parametrize("options", [{}, {"learn": "both"}, {"own_loss": False, "meta_lr": 1e-5}], ids=str)
def test_one_seed_draws_the_same_with_the_mixin_and_without(tmp_path: Any, options: dict[str, Any]) -> None:
    """Initial weights, the order of the data, masks and augmentations; and BatchNorm counts no meta batch."""
    drawn = []
    for kind, given in ((Plain, {}), (Ada, {"adalfl": config(**options)})):
        L.seed_everything(5, verbose=False)
        module, numbers = kind(**given), RandomNumbers()
        start = tensors(module)
        fit(tmp_path, module, callbacks=[numbers])
        drawn.append((start, numbers.drawn, module.model[1].num_batches_tracked))
    assert_same(drawn[0][0], drawn[1][0])
    assert drawn[0][1] == drawn[1][1]
    assert drawn[0][2] == drawn[1][2] == 12


@pytest.mark.usefixtures("only_new_garbage")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 4, None])
def test_steps_leave_nothing_behind(tmp_path: Any, every: int | None, accumulate: int) -> None:
    """What hangs on the graph of a step holds the graph, and no garbage collector sees that."""
    alive: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            gc.collect()
            alive.append(sum(issubclass(type(thing), Descent) for thing in gc.get_objects()))

    given = LossNetwork("multiclass", bias=True, sees_classes=True)
    module = make(Ada, adalfl=config(meta_every=every, loss=given))
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[Count()]).fit(module, *loaders())
    assert len(alive) == 12
    assert max(alive) <= alive[0] + 2 * accumulate


class StepsOnEven(Smooth):
    """Goes backward on each batch, and steps on every other."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=closure)
        else:
            closure()


@pytest.mark.usefixtures("only_new_garbage")
def test_a_batch_without_a_step_takes_no_meta_step_away_and_leaves_nothing_behind(tmp_path: Any) -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Descent) for thing in gc.get_objects())

    before, module = alive(), fit(tmp_path, make(adaptive(StepsOnEven), adalfl=config()), max_epochs=3)
    assert module.adalfl.meta_steps == module.adalfl.base_steps == 9
    assert alive() <= before + 1


def test_a_module_may_be_built_without_data(tmp_path: Any) -> None:
    plain = make(Smooth)
    with torch.device("meta"):
        module = adaptive(Smooth)(adalfl=config())
    module.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert fit(tmp_path, module).adalfl.meta_steps == 12


@pytest.mark.parametrize("name", ["setup", "on_fit_start", "on_train_batch_end", "configure_gradient_clipping"])
def test_a_hook_that_would_switch_a_part_off_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Own.{name} hides that of AdaLFLMixin in Own; move it to a base class right"):
        type("Own", (AdaLFLMixin, Smooth), {name: lambda self, *args: None})

    class Base(Smooth):
        def on_fit_start(self) -> None:
            self.hello = 1

    class Calls(AdaLFLMixin, Base):
        def on_fit_start(self) -> None:
            super().on_fit_start()

    assert issubclass(Calls, AdaLFLMixin)


@pytest.mark.parametrize("callback", [AdaLFLInit(steps=2), LossShapeLogger()])
def test_a_module_without_a_configuration_is_told_so(callback: Any, tmp_path: Any) -> None:
    module = AdaSmooth()
    with pytest.raises(ValueError, match=r"AdaSmooth has no configuration .*adalfl=AdaLFLConfig"):
        trainer(tmp_path, callbacks=[callback]).fit(module, *loaders())
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).validate(Smooth(), loaders()[1])
