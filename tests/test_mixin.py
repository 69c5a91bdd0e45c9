"""What the mixin asks of a module, and what it says where it does not get it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from projects import INERT, Ada, Plain, assert_same, base_tensors, config, loaders, make, trainer
from torch import Tensor, nn

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin
from lightning_adalfl.adapter.requirements import base_optimizer
from lightning_adalfl.hypergradient.shadow_optimizer import OptimizerError


def fit(tmp_path: Any, module: Any, **options: Any) -> Any:
    trainer(tmp_path, **options).fit(module, *loaders())
    return module


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
        self.sizes = [*getattr(self, "sizes", []), outputs["size"]]
        assert outputs["loss"] > 0


class HasHooks(Plain):
    """Uses the hooks of a step for what users use them for."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls = [*getattr(self, "calls", []), "zero"]

    def on_after_backward(self) -> None:
        self.calls.append("backward")
        self.model[0].weight.grad.mul_(0.5)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append("step")
        self.log("norm", self.model[0].weight.grad.norm())

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor) -> None:
        (2 * loss).backward()


PARENTS = [OneArgument, AnyArguments, CallsTheModel, ReturnsMore, HasHooks]


@pytest.mark.parametrize("parent", PARENTS)
def test_modules_of_every_style_train_as_they_do_by_themselves(tmp_path: Any, parent: Any) -> None:
    kind = type(f"Ada{parent.__name__}", (AdaLFLMixin, parent), {})
    plain = fit(tmp_path, make(parent))
    metrics = plain.trainer.callback_metrics
    inert = fit(tmp_path, make(kind, adalfl=INERT))
    assert_same(base_tensors(inert), plain.state_dict())
    assert {name: inert.trainer.callback_metrics[name] for name in metrics} == metrics
    for name in ("sizes", "calls"):
        assert getattr(inert, name, None) == getattr(plain, name, None)
    module = fit(tmp_path, make(kind, adalfl=config()))
    assert module.adalfl.meta_steps == 12


def test_the_training_step_is_answered_from_memory(tmp_path: Any) -> None:
    calls = []

    class Counted(Ada):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.model[0].register_forward_hook(self.note)

        def note(self, *_: Any) -> None:
            if self.training:
                calls.append(torch.is_grad_enabled())

    fit(tmp_path, make(Counted, adalfl=INERT))
    assert calls == [True] * 12


def test_it_logs_four_scalars_beside_the_users_own(tmp_path: Any) -> None:
    names = {"learned_loss", "task_loss", "meta_grad_norm", "implied_lr"}
    module = fit(tmp_path, make(Ada, adalfl=config()))
    metrics = module.trainer.callback_metrics
    assert {f"adalfl/{name}" for name in names} | {"train_loss", "train_accuracy", "val_loss"} <= metrics.keys()
    assert all(torch.isfinite(value) for value in metrics.values())
    both = fit(tmp_path, make(Ada, adalfl=config(learn="both")))
    assert both.trainer.callback_metrics["adalfl/lr_scale"] == pytest.approx(both.adalfl.lr_scale)


def test_meta_every_counts_base_steps(tmp_path: Any) -> None:
    module = fit(tmp_path, make(Ada, adalfl=config(meta_every=5)))
    assert (module.adalfl.base_steps, module.adalfl.meta_steps) == (12, 2)


def test_a_module_that_only_predicts_needs_no_training_step(tmp_path: Any) -> None:
    class Bare(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class AdaBare(AdaLFLMixin, Bare):
        pass

    module = make(AdaBare, adalfl=config(meta_data="train"))
    trainer(tmp_path).fit(module, loaders()[0])
    assert module.adalfl.meta_steps == 12


def test_the_configuration_must_be_given() -> None:
    with pytest.raises(TypeError, match="adalfl"):
        Ada()
    with pytest.raises(TypeError, match=r"`adalfl` must be an AdaLFLConfig, such as .*; got 'multiclass'"):
        Ada(adalfl="multiclass")
    assert Ada(adalfl={"task": "multiclass", "meta_every": 2}).adalfl.config == AdaLFLConfig("multiclass", meta_every=2)
    with pytest.raises(ValueError, match=r"`adalfl` has unknown fields \['meta_rate'\]"):
        Ada(adalfl={"task": "multiclass", "meta_rate": 1})


def test_a_training_step_in_its_way_is_refused_where_the_class_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Wrong.training_step hides that of AdaLFLMixin in Wrong; move it to a base"):

        class Wrong(AdaLFLMixin, Plain):
            def training_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.raises(TypeError, match=r"put AdaLFLMixin left of Plain: class Turned\(AdaLFLMixin, Plain\)"):

        class Turned(Plain, AdaLFLMixin):
            pass


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Plain):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.model[0].parameters(), 0.1), torch.optim.SGD(self.model[4].parameters(), 0.1)]


class OfLBFGS(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class OwnGroup(Plain):
    def configure_optimizers(self) -> Any:
        learned = {"params": list(self.learned.parameters()), "lr": 1.0}
        return torch.optim.SGD([{"params": list(self.model.parameters())}, learned], 0.1)


class Fetches(Plain):
    def training_step(self, dataloader_iter: Any) -> None: ...


@pytest.mark.parametrize(
    ("parent", "error", "message"),
    [
        (Manual, MisconfigurationException, "sets `automatic_optimization = False`.*such as GANs.*no single base step"),
        (OfLBFGS, OptimizerError, "`optimizer` is LBFGS, whose step evaluates the loss several times"),
        (Fetches, MisconfigurationException, "takes `dataloader_iter` has no batch to learn from; take `batch`"),
    ],
)
def test_modules_that_cannot_learn_are_refused(tmp_path: Any, parent: Any, error: Any, message: str) -> None:
    kind = type(f"Ada{parent.__name__}", (AdaLFLMixin, parent), {})
    with pytest.raises(error, match=message):
        fit(tmp_path, make(kind, adalfl=config()))


def test_several_optimizers_are_refused(tmp_path: Any) -> None:
    class AdaTwo(AdaLFLMixin, TwoOptimizers):
        pass

    module = make(AdaTwo, adalfl=config())
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        fit(tmp_path, module)
    several = SimpleNamespace(optimizers=module.configure_optimizers())
    with pytest.raises(MisconfigurationException, match=r"exactly one base optimizer .*; got 2"):
        base_optimizer(several, module.adalfl)


def test_no_optimizer_is_refused(tmp_path: Any) -> None:
    class Still(Plain):
        def configure_optimizers(self) -> None:
            return None

    class AdaStill(AdaLFLMixin, Still):
        pass

    with pytest.raises(MisconfigurationException, match="`configure_optimizers` returned no optimizer"):
        fit(tmp_path, make(AdaStill, adalfl=config()))


def test_the_learned_loss_is_left_out_of_an_optimizer_of_everything(tmp_path: Any) -> None:
    class Outside(Ada):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.model.parameters(), *self.learned], 0.1, momentum=0.9)

    module = make(Outside, adalfl=INERT)
    module.learned = list(module.adalfl.parameters())
    fit(tmp_path, module)
    assert_same(base_tensors(module), base_tensors(fit(tmp_path, make(Plain))))
    assert module.adalfl.lr_scale == 1.0


def test_a_group_of_the_learned_loss_alone_is_refused(tmp_path: Any) -> None:
    class AdaGroup(AdaLFLMixin, OwnGroup):
        pass

    module = make(AdaGroup, adalfl=config())
    object.__setattr__(module, "learned", module.adalfl)
    with pytest.raises(MisconfigurationException, match=r"has a group of parameters of `self.adalfl` alone"):
        fit(tmp_path, module)


def test_an_optimizer_of_parameters_that_the_module_does_not_own_is_refused(tmp_path: Any) -> None:
    class Foreign(Ada):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)

    with pytest.raises(ValueError, match="`optimizer` holds parameters that `model` does not own"):
        fit(tmp_path, make(Foreign, adalfl=config()))
