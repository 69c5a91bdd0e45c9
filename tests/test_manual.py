"""Manual optimization: the module's own steps, and the steps of a module that returns a loss, taken by the mixin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from projects import CLASSES, WATCHING, Plain, adaptive, assert_same, config, loaders, make, phi, tensors, trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin


class Manual(Plain):
    """Takes its own steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer, loss = self.optimizers(), self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class ByClosure(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class EverySecond(Manual):
    """Sums the gradients of two batches, and clips the sum."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer, loss = self.optimizers(), self.loss(batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return loss


class TwiceABatch(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            super().training_step(batch, batch_idx)


class RawOptimizer(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.zero_grad()


class Skips(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)


class TwoOptimizers(Manual):
    """As Muon beside AdamW: each has a part of the parameters, and both step on one loss."""

    def configure_optimizers(self) -> Any:
        return [Adam(self.model[:2].parameters(), 0.01), SGD(self.model[2:].parameters(), 0.1, momentum=0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers, loss = self.optimizers(), self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class Adversarial(Manual):
    """A classifier, and a discriminator of its features whose steps are none of the learned loss's business."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Linear(CLASSES, 1)

    def configure_optimizers(self) -> Any:
        return [SGD(self.discriminator.parameters(), 0.1), SGD(self.model.parameters(), 0.1, momentum=0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, y), (first, second) = batch, self.optimizers()
        self.toggle_optimizer(first)
        judged = self.discriminator(self(x).detach())
        self.manual_backward(F.softplus(judged).mean())
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        logits = self(x)
        self.manual_backward(F.cross_entropy(logits, y) - 0.1 * F.softplus(self.discriminator(logits)).mean())
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)


class Generating(Adversarial):
    """Predicts once more for the discriminator, without a graph, and counts and logs each prediction."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if self.training:
            self.log("size", logits.detach().square().mean(), on_step=False, on_epoch=True)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, y), (first, second) = batch, self.optimizers()
        with second.toggle_model():
            second.zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            second.step()
        with first.toggle_model():
            first.zero_grad()
            self.manual_backward(F.softplus(self.discriminator(self(x).detach())).mean())
            first.step()


def fit(tmp_path: Any, kind: Any, adalfl: AdaLFLConfig | None = None, **options: Any) -> Any:
    module = make(kind) if adalfl is None else make(kind, adalfl=adalfl)
    trainer(tmp_path, **options).fit(module, *loaders(shuffle=False))
    return module


OWN_STEPS = [Manual, ByClosure, EverySecond, TwiceABatch, RawOptimizer, Skips, TwoOptimizers, Adversarial, Generating]


@pytest.mark.parametrize("kind", OWN_STEPS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_module_that_steps_itself_trains_as_without_the_mixin(tmp_path: Any, kind: Any, precision: str) -> None:
    chosen = {TwoOptimizers: 0, Adversarial: 1, Generating: 1}.get(kind)
    plain = fit(tmp_path, kind, precision=precision)
    watching = AdaLFLConfig("multiclass", learn="nothing", meta_every=1, optimizer=chosen)
    module = fit(tmp_path, adaptive(kind), watching, precision=precision)
    assert_same(tensors(module), tensors(plain))
    logged = plain.trainer.callback_metrics
    assert_same({name: module.trainer.callback_metrics[name] for name in logged}, logged)
    assert module.trainer.global_step == plain.trainer.global_step
    steps = {EverySecond: 6, TwiceABatch: 24, Skips: 8}.get(kind, 12)
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (steps, steps)


# What is trained so is trained by automatic optimization too.
@pytest.mark.parametrize("kind", [Manual, ByClosure, RawOptimizer])
@pytest.mark.parametrize("options", [{}, {"own_loss": False, "meta_lr": 1e-4}, {"learn": "both"}], ids=str)
def test_it_learns_what_automatic_optimization_learns(tmp_path: Any, kind: Any, options: dict[str, Any]) -> None:
    expected = fit(tmp_path, adaptive(Plain), config(**options))
    module = fit(tmp_path, adaptive(kind), config(**options))
    assert_same(phi(module), phi(expected))
    assert_same(tensors(module), tensors(expected))
    assert module.adalfl.meta_steps == 12


@pytest.mark.parametrize("every", [1, 3])
def test_each_of_several_steps_on_a_batch_may_be_followed_by_a_meta_step(tmp_path: Any, every: int) -> None:
    module = fit(tmp_path, adaptive(TwiceABatch), config(meta_every=every))
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (24, 24 // every)


@pytest.mark.parametrize(
    ("kind", "chosen"), [(TwoOptimizers, 0), (TwoOptimizers, 1), (Adversarial, 1), (EverySecond, None)]
)
def test_whatever_else_steps_it_learns_as_by_a_double_backward(tmp_path: Any, kind: Any, chosen: int | None) -> None:
    found = []
    for way in ("forward", "reverse"):
        module = make(adaptive(kind), adalfl=config(optimizer=chosen, hypergradient=way))
        trainer(tmp_path, precision="64-true").fit(module, *loaders(shuffle=False, dtype=torch.float64))
        assert module.adalfl.meta_steps == module.adalfl.base_steps
        found.append(phi(module))
    for name, value in found[0].items():
        assert torch.equal(value, torch.zeros_like(value)) == (name == "linear.2.bias")  # which no slope depends on
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


class JudgedLater(Adversarial):
    """Its discriminator steps after the classifier, whose predictions do not depend on it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, y), (first, second) = batch, self.optimizers()
        second.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        second.step()
        first.zero_grad()
        self.manual_backward(F.softplus(self.discriminator(self(x).detach())).mean())
        first.step()


class Direct(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer, loss = self.optimizers(), self.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        if batch_idx % 2:
            optimizer.step()
        return loss


class Unrelated(Manual):
    def loss(self, batch: Any) -> Tensor:
        return self.model[0](batch[0]).square().mean()

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.model(batch[0]), batch[1]


class AutomaticTwo(Plain):
    configure_optimizers = TwoOptimizers.configure_optimizers


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Direct, {}, r"Call `self.manual_backward\(loss\)` in place of `loss.backward\(\)`"),
        (Unrelated, {}, "has stepped 1 times on losses that do not depend on the predictions"),
        (
            JudgedLater,
            {"optimizer": 0},
            r"of 2 steps of SGD none was taken .* Let `AdaLFLConfig\(optimizer=...\)` name",
        ),
        (TwoOptimizers, {}, r"returned 2\. Say which with `AdaLFLConfig\(optimizer=0\)`"),
        (TwoOptimizers, {"optimizer": 2}, "`optimizer` is 2 and `configure_optimizers` returned 2"),
        (AutomaticTwo, {}, "multiple optimizers is only supported with manual optimization"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(tmp_path: Any, kind: Any, options: Any, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(tmp_path, adaptive(kind), config(**options))


# A module that returns a loss, and a subclass with `automatic_optimization = False`.


class Scheduled(Plain):
    """With all that automatic optimization does around a step."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.calls: list[str] = []

    def configure_optimizers(self) -> Any:
        optimizer = Adam(self.parameters(), self.lr)
        schedules = [
            {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step", "frequency": 2},
            {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"},
        ]
        return [optimizer], schedules

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.calls.append(f"step {epoch} {batch_idx}")
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls.append(f"zero {type(optimizer).__name__}")

    def on_after_backward(self) -> None:
        self.calls.append("backward")


class ByClassAttribute(AdaLFLMixin, Scheduled):
    automatic_optimization = False


class ByConstructor(AdaLFLMixin, Scheduled):
    def __init__(self, adalfl: AdaLFLConfig) -> None:
        super().__init__(adalfl=adalfl)
        self.automatic_optimization = False


@pytest.mark.parametrize("kind", [ByClassAttribute, ByConstructor])
@pytest.mark.parametrize("options", [{}, {"own_loss": False, "meta_lr": 1e-4}, {"learn": "both"}], ids=str)
def test_the_mixin_takes_the_steps_of_automatic_optimization(tmp_path: Any, kind: Any, options: Any) -> None:
    expected = fit(tmp_path, adaptive(Scheduled), config(**options), max_epochs=3)
    module = fit(tmp_path, kind, config(**options), max_epochs=3)
    assert module.automatic_optimization is False
    assert_same(tensors(module), tensors(expected))
    assert_same(phi(module), phi(expected))
    assert module.calls == expected.calls
    assert module.trainer.global_step == expected.trainer.global_step == 18
    assert module.adalfl.meta_steps == 18
    rates = [m.trainer.optimizers[0].param_groups[0]["lr"] for m in (module, expected)]
    assert rates[0] == rates[1] < 0.01
    metrics = [m.trainer.callback_metrics for m in (module, expected)]
    assert metrics[0]["train_accuracy"] == metrics[1]["train_accuracy"]


def test_several_optimizers_step_on_a_loss_that_is_returned(tmp_path: Any) -> None:
    class Two(AdaLFLMixin, AutomaticTwo):
        automatic_optimization = False

    plain = fit(tmp_path, TwoOptimizers)
    watched = AdaLFLConfig("multiclass", learn="nothing", meta_every=1, optimizer=1)
    assert_same(tensors(fit(tmp_path, Two, watched)), tensors(plain))


def test_a_scheduler_that_waits_for_a_metric_is_refused_there(tmp_path: Any) -> None:
    class Plateau(AdaLFLMixin, Plain):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), self.lr)
            return [optimizer], [ReduceLROnPlateau(optimizer)]

    module = make(Plateau, adalfl=WATCHING)
    before = tensors(module)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau waits for a metric.*`on_validation_epoch_end`"):
        trainer(tmp_path).fit(module, *loaders())
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])
