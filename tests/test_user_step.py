"""The user's step, once, as it is: training equals the plain module's to the bit, and what was observed is exact."""

from __future__ import annotations

import random
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from projects import adaptive, assert_same, make, tensors, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_adalfl import AdaLFLConfig, AdaLFLMixin

CLASSES, FEATURES = 3, 6


class Base(L.LightningModule):
    """What the modules of this file share."""

    task = "multiclass"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    @staticmethod
    def data(size: int = 80) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(size, FEATURES, generator=generator)
        return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


class WeightedAndSmoothed(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y, weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)


class Focal(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(self(x), y, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


class Penalised(Base):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        penalty = sum(p.square().sum() for p in self.parameters())
        return {"loss": F.cross_entropy(logits, y) + 1e-3 * penalty - 0.1 * entropy, "entropy": entropy.detach()}


class DropoutAndBatchNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, CLASSES)
        )


class DictOfNets(DropoutAndBatchNorm):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({"a": self.net, "b": nn.Linear(FEATURES, CLASSES)})
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.nets["a"](x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.nets["a"](x), y)


class BackboneAndHead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(FEATURES, 12), nn.Sequential(nn.Dropout(0.2), nn.Linear(12, CLASSES))
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.backbone(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(F.relu(self.backbone(x))), y)


class GrandchildCalled(DropoutAndBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[4](self.net[3](self.net[2](self.net[1](self.net[0](x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.forward(x), y)


class SoftTargets(Base):
    @staticmethod
    def data(size: int = 80) -> TensorDataset:
        x, y = Base.data(size).tensors
        return TensorDataset(x, F.one_hot(y, CLASSES).float() * 0.8 + 0.2 / CLASSES)


class Stateful(Base):
    """A GRU that keeps its state in the module, and a counter and a list beside it."""

    task = "regression"

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.GRU(1, 5, batch_first=True), nn.Linear(5, 1)
        self.hidden: Tensor | None = None
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.net(x.unsqueeze(-1), self.hidden)
        self.hidden = hidden.detach()
        self.calls += 1
        self.seen.append(float(x[0, 0]))
        return self.head(out[:, -1]) * (1 + 0.01 * self.calls)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    @staticmethod
    def data(size: int = 80) -> TensorDataset:
        x, _ = Base.data(size).tensors
        return TensorDataset(x, x.sum(1, keepdim=True))


class OwnGenerator(Base):
    """Noise from a generator of the module's own, and from NumPy's and Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator).to(x) * float(np.random.rand()) * random.random()
        return self.net(x + 0.1 * noise)


class TeacherAndStudent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(FEATURES, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            wanted = self.teacher(x).softmax(1)
            self(x)
        logits = self(x)
        return F.cross_entropy(logits, y) + F.kl_div(logits.log_softmax(1), wanted, reduction="batchmean")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class GradientPenalty(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x.requires_grad_()
        logits = self(x)
        (slope,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        return F.cross_entropy(logits, y) + 0.1 * slope.square().mean()


class Measured(Base):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = self.criterion(logits, y)
        self.accuracy(logits.detach(), y)
        self.log_dict({"loss": loss, "accuracy": self.accuracy})
        return loss


class DividedInPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        logits /= 2.0
        return logits


class MaskedLogits(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x), torch.full((len(x), 1), float("-inf"), dtype=x.dtype)], dim=1)


class CheckpointedInside(DropoutAndBatchNorm):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[:2](x)
        return self.net[4](checkpoint(self.net[2:4], hidden, use_reentrant=self.reentrant))


class CheckpointedInsideNot(CheckpointedInside):
    reentrant = False


class CheckpointedAround(DropoutAndBatchNorm):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(checkpoint(self, x, use_reentrant=False), y)


class CheckpointedLoss(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return checkpoint(F.cross_entropy, self(x), y, use_reentrant=True)


class Scripted(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.jit.script(self.net)


class Pruned(Base):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.prune.l1_unstructured(self.net[0], "weight", 0.3)


class TransposedOutput(Base):
    """Predictions that are made anew from the output."""

    task = "regression"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        return F.mse_loss(out[:, 0], y) + 0.01 * out[:, 1].square().mean()

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        x, y = batch
        return self(x)[:, 0], y

    @staticmethod
    def data(size: int = 80) -> TensorDataset:
        x, _ = Base.data(size).tensors
        return TensorDataset(x, x.sum(1))


@dataclass
class Output:
    logits: Tensor
    loss: Tensor
    hidden: Tensor


class LossInside(Base):
    """A loss that is computed inside the model, and an output that is a dataclass."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        hidden = torch.tanh(self.net[0](x))
        logits = self.net[2](hidden)
        loss = F.cross_entropy(logits, labels) if labels is not None else logits.sum()
        return Output(logits, loss, hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self(x, labels=y).loss

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        x, y = batch
        return self(x).logits, y


class AuxiliaryHead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.net[0](x))
        return {"main": self.net[2](hidden), "auxiliary": self.auxiliary(hidden)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        return F.cross_entropy(out["main"], y) + 0.3 * F.cross_entropy(out["auxiliary"], y)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self(batch[0])["main"], batch[1]


class VAE(Base):
    """The noise is drawn in the step, between encoder and decoder."""

    task = "regression"

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(FEATURES, 6), nn.Linear(3, FEATURES)
        del self.net

    def reconstructed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(z), mean, log_variance

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        output, mean, log_variance = self.reconstructed(x)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return F.mse_loss(output, x) + 0.1 * divergence

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self.reconstructed(batch[0])[0], batch[0]


class Pops(Base):
    """A batch that the step takes apart."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = batch.pop("y")
        return F.cross_entropy(self(batch["x"]), y)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self(batch["x"]), batch["y"]

    @staticmethod
    def data(size: int = 80) -> Any:
        return [{"x": x, "y": y} for x, y in Base.data(size)]


class CalledTwice(Base):
    """The loss is that of the second call, and the first is for the logs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.log("first", F.cross_entropy(self(x), y))
        return F.cross_entropy(self(x), y)


class Mixup(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        share, order = float(torch.rand(())), torch.randperm(len(x))
        logits = self(share * x + (1 - share) * x[order])
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])


class Normalised(Base):
    def normalise(self, x: Tensor) -> Tensor:
        return (x - 0.3) / 2.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(self.normalise(x)), y)


class Noisy(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y)


class ChangedInPlace(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x.sub_(0.3).div_(2.0)
        return F.cross_entropy(self(x), y)


class TargetChanged(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        y[::7] = 0
        return F.cross_entropy(self(x), y)


AT_ONCE = [
    CalledTwice,
    Base,
    WeightedAndSmoothed,
    Focal,
    Penalised,
    DropoutAndBatchNorm,
    DictOfNets,
    BackboneAndHead,
    GrandchildCalled,
    SoftTargets,
    Stateful,
    OwnGenerator,
    TeacherAndStudent,
    GradientPenalty,
    Measured,
    DividedInPlace,
    MaskedLogits,
    CheckpointedInside,
    CheckpointedInsideNot,
    CheckpointedAround,
    CheckpointedLoss,
    Pruned,
]
WITH_OVERRIDE = [TransposedOutput, LossInside, AuxiliaryHead, VAE, Pops]
REFUSED = [Mixup, Normalised, Noisy, ChangedInPlace, TargetChanged]


class Watch(L.Callback):
    """Keeps the losses that callbacks see."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].clone() if outputs else torch.zeros(()))


def fit(tmp_path: Any, kind: Any, steps: int = 50, **options: Any) -> tuple[Any, list[Tensor], Tensor]:
    """Train; return the module, the losses that were seen, and torch's random state afterwards."""
    arguments = {"adalfl": options.pop("adalfl")} if "adalfl" in options else {}
    module, watch = make(kind, **arguments), Watch()
    random.seed(3)
    np.random.seed(3)
    fitted = trainer(tmp_path, max_epochs=-1, max_steps=steps, callbacks=[watch], **options)
    torch.manual_seed(3)
    fitted.fit(module, DataLoader(module.data(), 8, shuffle=True), DataLoader(module.data(24), 8))
    return module, watch.losses, torch.get_rng_state()


def check_equal(tmp_path: Any, kind: Any, ada: Any = None, **options: Any) -> None:
    """Compare a module with its subclass, which observes and differentiates each step and learns nothing."""
    watching = AdaLFLConfig(kind.task, learn="nothing", meta_every=1)
    plain, losses, state = fit(tmp_path, kind, **options)
    module, same, same_state = fit(tmp_path, ada or adaptive(kind), adalfl=watching, **options)
    assert_same(tensors(module), tensors(plain))
    assert len(losses) == len(same) > 0
    assert all(torch.equal(a, b) for a, b in zip(losses, same))
    assert torch.equal(state, same_state)
    assert module.adalfl.meta_steps == module.adalfl.base_steps > 0
    if isinstance(plain, Stateful):
        assert torch.equal(plain.hidden, module.hidden)
        assert (plain.calls, plain.seen) == (module.calls, module.seen)


@pytest.mark.parametrize("kind", [*AT_ONCE, *WITH_OVERRIDE])
def test_training_is_the_plain_modules_to_the_bit(tmp_path: Any, kind: Any) -> None:
    check_equal(tmp_path, kind)


def test_training_with_a_scripted_part_is_the_plain_modules_until_the_first_meta_step(tmp_path: Any) -> None:
    # Each run of a script changes how it is optimised, and with that the last digits.
    fit(tmp_path, Scripted)
    plain, _, _ = fit(tmp_path, Scripted)
    module, _, _ = fit(tmp_path, adaptive(Scripted), adalfl=AdaLFLConfig("multiclass", meta_every=51))
    assert_same(tensors(module), tensors(plain))


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"detect_anomaly": True},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ],
    ids=str,
)
def test_training_is_the_plain_modules_to_the_bit_under_the_trainers_options(tmp_path: Any, options: Any) -> None:
    check_equal(tmp_path, DropoutAndBatchNorm, **options)


class WithAdamW(DropoutAndBatchNorm):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_training_with_adamw_and_a_schedule_is_the_plain_modules(tmp_path: Any) -> None:
    check_equal(tmp_path, WithAdamW)


def following(kind: Any, lines: str) -> Any:
    """Return the subclass with the method that a refusal asks for."""
    space: dict[str, Any] = {}
    exec(textwrap.dedent(lines), {"torch": torch}, space)
    return type(f"Ada{kind.__name__}", (AdaLFLMixin, kind), space)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_step_that_predicts_otherwise_is_refused_before_the_first_step(tmp_path: Any, kind: Any) -> None:
    module = make(adaptive(kind), adalfl=AdaLFLConfig("multiclass"))
    before = tensors(module)
    with pytest.raises(ValueError, match=r"def adalfl_predict\(self, batch\)") as refused:
        trainer(tmp_path).fit(module, DataLoader(kind.data(), 8), DataLoader(kind.data(24), 8))
    assert_same(tensors(module), before)
    # The method in the message, word for word; what is not random is prepared as its comment says.
    method = re.search(r"\n( +def adalfl_predict.*)", str(refused.value), re.DOTALL)
    assert method is not None
    prepared = {Normalised: "x = self.normalise(x)", ChangedInPlace: "x = (x - 0.3) / 2.0"}.get(kind, "pass")
    lines = re.sub(r"# prepare [xy] .*", prepared, method[1])
    check_equal(tmp_path, kind, ada=following(kind, lines))


def test_mixup_with_a_probability_is_refused_when_it_first_mixes(tmp_path: Any) -> None:
    class Sometimes(Mixup):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (
                super().training_step(batch, batch_idx) if self.global_step == 3 else Base.training_step(self, batch, 0)
            )

    with pytest.raises(ValueError, match="changes what it predicts from"):
        fit(tmp_path, adaptive(Sometimes), adalfl=AdaLFLConfig("multiclass", meta_every=1))


class ReentrantAround(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(checkpoint(self, x.requires_grad_(), use_reentrant=True), y)


class LooseParameter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x) * self.scale, y)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self.net(batch[0]) * self.scale, batch[1]


class Functional(Base):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, FEATURES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(F.linear(batch[0], self.weight), batch[1])


class ManifoldMixup(BackboneAndHead):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = F.relu(self.backbone(x))
        return F.cross_entropy(self.head(0.7 * hidden + 0.3 * hidden.flip(0)), y)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self(batch[0]), batch[1]

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class OtherModules(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(FEATURES, CLASSES)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self.other(batch[0]), batch[1]


class Detached(Base):
    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self(batch[0]).detach(), batch[1]


class ClassesPredicted(Base):
    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self(batch[0]).argmax(1), batch[1]


class UnrelatedLoss(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(FEATURES, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.other(batch[0])
        return super().training_step(batch, batch_idx)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self.other(batch[0]), batch[1]


class ChangedAfterwards(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x.clone().detach()), y)
        shifted = x + 1.0
        loss = loss + F.cross_entropy(self.net(shifted), y)
        with torch.no_grad():
            shifted.zero_()
        return loss

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        return self.net(batch[0] + 1.0), batch[1]


class NoPair(Base):
    @staticmethod
    def data(size: int = 80) -> TensorDataset:
        x, y = Base.data(size).tensors
        return TensorDataset(x, y, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


class OneResult(Base):
    def adalfl_predict(self, batch: Any) -> Any:
        return self(batch[0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ReentrantAround, "use_reentrant=False"),
        (LooseParameter, "Move it into a submodule or the forward"),
        (Functional, "predicts without calling a module"),
        (OtherModules, "do not come from what|outside of any module"),
        (Detached, "do not detach or round"),
        (ClassesPredicted, "must be floating point"),
        (UnrelatedLoss, "does not depend on the predictions"),
        (NoPair, r"not a pair \(x, y\); override `adalfl_predict"),
        (OneResult, "must return tensors"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(tmp_path: Any, kind: Any, message: str) -> None:
    config = AdaLFLConfig("multiclass", meta_every=1)
    with pytest.raises((ValueError, TypeError), match=message):
        fit(tmp_path, adaptive(kind), adalfl=config)


def test_manifold_mixup_trains_as_it_is_and_is_refused_where_it_would_be_differentiated(tmp_path: Any) -> None:
    class Predicts(ManifoldMixup):
        def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
            return self.head(F.relu(self.backbone(batch[0]))), batch[1]

    with pytest.raises(ValueError, match="gives another result when it is run again"):
        fit(tmp_path, adaptive(Predicts), adalfl=AdaLFLConfig("multiclass", meta_every=1))
    plain, _, _ = fit(tmp_path, Predicts)
    module, _, _ = fit(tmp_path, adaptive(Predicts), adalfl=AdaLFLConfig("multiclass", meta_every=None))
    assert_same(tensors(module), tensors(plain))


# What was observed, evaluated again.


class Reference(L.Callback):
    """Compares h of the observed forward with a double backward through the user's very graph."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        step = module._adalfl_run.base_step
        if not step.forwards:
            return
        forward, parameters = step.forwards[-1], step.parameters
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        outputs = forward.predicted.outputs
        vectors = [torch.zeros_like(o).requires_grad_() for o in outputs]
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                outputs, parameters, vectors, create_graph=True, allow_unused=True, materialize_grads=True
            )
            known = [(g, u) for g, u in zip(pulled, direction) if g.requires_grad]
            expected = torch.autograd.grad([g for g, _ in known], vectors, [u for _, u in known])
        before = random.getstate(), torch.get_rng_state(), tensors(module)
        with trainer.precision_plugin.train_step_context():
            values = dict(enumerate(p.detach().clone() for p in parameters))
            found = step.jvp(step.model, forward.recorded, values, direction)
        assert before[0] == random.getstate()
        assert torch.equal(before[1], torch.get_rng_state())
        assert_same(tensors(module), before[2])
        difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected)) ** 0.5
        size = sum(float(b.square().sum()) for b in expected) ** 0.5
        assert size > 0
        self.errors.append(difference / size)


# Whose graph does not allow a second backward, which is what they are compared with.
NO_SECOND_BACKWARD = {CheckpointedInside, CheckpointedLoss}


@pytest.mark.parametrize(
    "kind", [k for k in [*AT_ONCE, *WITH_OVERRIDE] if k not in NO_SECOND_BACKWARD and k is not MaskedLogits]
)
@pytest.mark.parametrize("way", ["forward", "finite_difference", "reverse"])
def test_the_observed_forward_is_evaluated_again_exactly(tmp_path: Any, kind: Any, way: str) -> None:
    class Retained(kind):
        def backward(self, loss: Tensor) -> None:
            loss.backward(retain_graph=True)

    reference = Reference()
    module = make(
        adaptive(Retained), adalfl=AdaLFLConfig(kind.task, learn="nothing", meta_every=1, hypergradient=way)
    ).double()
    fitted = trainer(tmp_path, max_epochs=-1, max_steps=4, callbacks=[reference], precision="64-true")
    data = kind.data()
    fitted.fit(module, DataLoader(data, 8, shuffle=True), DataLoader(kind.data(24), 8))
    assert len(reference.errors) == 4
    assert max(reference.errors) < (1e-5 if way == "finite_difference" else 1e-12)


def test_reentrant_checkpoints_and_scripted_parts_agree_with_the_same_model_without(tmp_path: Any) -> None:
    def phi(kind: Any) -> dict[str, Tensor]:
        config = AdaLFLConfig("multiclass", meta_every=1, meta_lr=1e-2)
        module, _, _ = fit(tmp_path, adaptive(kind), steps=6, adalfl=config)
        return {name: p.detach() for name, p in module.adalfl.learned.items()}

    expected = phi(CheckpointedInsideNot)
    for name, value in phi(CheckpointedInside).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    expected = phi(Base)
    for kind in (Scripted, CheckpointedLoss):
        for name, value in phi(kind).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiled")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's, of the plain step
@pytest.mark.parametrize("how", ["submodule", "in place", "loss"])
def test_training_with_a_compiled_part_is_the_plain_modules(tmp_path: Any, how: str) -> None:
    class Compiled(Base):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = F.cross_entropy
            if how == "submodule":
                self.net = torch.compile(self.net, backend="aot_eager")
            elif how == "in place":
                self.net.compile(backend="aot_eager")
            else:
                self.criterion = torch.compile(F.cross_entropy, backend="aot_eager")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return self.criterion(self(x), y)

    check_equal(tmp_path, Compiled, steps=10)


def test_a_batch_that_is_skipped_leaves_no_trace(tmp_path: Any) -> None:
    class Skips(DropoutAndBatchNorm):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == 1 else loss

    watching = AdaLFLConfig("multiclass", learn="nothing", meta_every=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        plain, _, _ = fit(tmp_path, Skips, steps=9)
        module, _, _ = fit(tmp_path, adaptive(Skips), steps=9, adalfl=watching)
    assert_same(tensors(module), tensors(plain))
