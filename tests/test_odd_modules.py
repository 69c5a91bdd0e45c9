"""Modules that are not the rule: each trains as the plain one does and is learned from, or is refused with a remedy."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from projects import (
    CLASSES,
    WATCHING,
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
from torch.utils.data import DataLoader, TensorDataset

from lightning_adalfl import AdaLFLConfig, AdaLFLInit
from lightning_adalfl.adapter.module_state import ModuleState
from lightning_adalfl.losses.training_objective import BentLoss


class Tied(Plain):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        encode, decode = nn.Linear(4, 4), nn.Linear(4, 4)
        decode.weight = encode.weight
        self.model = nn.Sequential(encode, nn.Tanh(), decode, nn.Linear(4, CLASSES))


class Unused(Plain):
    """A layer that the forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.spare = nn.Linear(4, 4)


class PartlyFrozen(Plain):
    """A backbone that is not trained, though the optimizer holds it."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.model[0].requires_grad_(False)


class Lazy(Plain):
    """Layers that take their shape from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(CLASSES))


class Complex(Plain):
    """Weights in the complex plane, as in signal processing; the logits are magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, CLASSES, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.model.weight.dtype)).abs()


class Scalar(Plain):
    """One weight of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale


class Parametrized(Plain):
    """A parametrized weight, which is computed anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, CLASSES))


class Recurrent(Plain):
    """A hidden state goes from batch to batch, in training and in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head, self.hidden = nn.GRU(1, 8, batch_first=True), nn.Linear(8, CLASSES), None

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.model(x.unsqueeze(-1), self.hidden)
        self.hidden = hidden.detach()
        return self.head(out[:, -1])


class LongMemory(Recurrent):
    """Two layers with dropout between; on a CPU torch computes them in one kernel, which has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.LSTM(1, 8, num_layers=2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.model(x.unsqueeze(-1), self.hidden)
        self.hidden = tuple(state.detach() for state in hidden)
        return self.head(out[:, -1])


class Made(Plain):
    """Makes its layers when the Trainer asks for them."""

    def __init__(self) -> None:
        super().__init__()
        del self.model

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class Grows(Plain):
    """Puts another layer in place between two epochs, whose weights the optimizer does not train."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.model[2] = nn.Linear(16, 16)


class OtherHead(Smooth):
    """Calls its parts one by one, and exchanges the last of them when the second epoch begins."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model[2](torch.tanh(self.model[0](x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.forward(batch[0]), batch[1])

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.model[2] = nn.Linear(8, CLASSES)
            self.optimizers().param_groups[0]["params"] = list(self.parameters())


def test_a_part_that_is_exchanged_is_seen_before_the_next_meta_step(tmp_path: Any, monkeypatch: Any) -> None:
    descend, shapes = BentLoss.descend, []

    def descended(self: BentLoss, own_loss: Tensor, predicted: Any) -> Any:
        shapes.append([tuple(output.shape) for output in predicted.outputs])
        return descend(self, own_loss, predicted)

    monkeypatch.setattr(BentLoss, "descend", descended)
    trainer(tmp_path).fit(make(adaptive(OtherHead), adalfl=config(meta_every=5)), *loaders())
    assert shapes[-6:] == [[(16, CLASSES)]] * 6


class Forces(Smooth):
    """The output is the gradient of an energy by the input."""

    def energy(self, x: Tensor) -> Tensor:
        return self.model(x).square().sum()

    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x), x, create_graph=True)
        return force[:, :CLASSES]


class ForcesOfOne(Forces):
    def energy(self, x: Tensor) -> Tensor:
        return self.model(x)[:, :1].sum()


KINDS = [Tied, Unused, PartlyFrozen, Complex, Scalar, Parametrized, Recurrent, LongMemory, Made, Grows]
LAZY = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


@LAZY
@pytest.mark.parametrize("kind", [*KINDS, Lazy, Forces])
def test_it_trains_as_the_plain_module_does(tmp_path: Any, kind: type[Plain]) -> None:
    plain = make(kind)
    trainer(tmp_path, inference_mode=False).fit(plain, *loaders())
    way = "reverse" if kind is Forces else "forward"
    module = make(adaptive(kind), adalfl=config(learn="nothing", hypergradient=way))
    trainer(tmp_path, inference_mode=False).fit(module, *loaders())
    assert_same(tensors(module), tensors(plain))
    assert module.adalfl.meta_steps == 12
    assert kind is not Recurrent or torch.equal(module.hidden, plain.hidden)


@pytest.mark.parametrize("way", ["forward", "finite_difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_learned_from_as_by_a_double_backward(tmp_path: Any, kind: type[Plain], way: str) -> None:
    learned = []
    for each in ("reverse", way):
        # As large, since what φ moves by in float32 is otherwise little more than rounding.
        options = config(hypergradient=each, meta_optimizer="SGD", meta_lr=1.0)
        module = make(adaptive(kind), adalfl=options)
        before = phi(module)
        callbacks = [] if kind is Made else [AdaLFLInit(steps=2, lr=1.0)]
        trainer(tmp_path, callbacks=callbacks).fit(module, *loaders())
        assert module.adalfl.meta_steps == 12
        learned.append({name: t - before[name] for name, t in phi(module).items()})
    for name, expected in learned[0].items():
        torch.testing.assert_close(learned[1][name], expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


# What the output is, and what the target.


def nll(predictions: Tensor, target: Tensor) -> Tensor:
    return F.gaussian_nll_loss(predictions[:, 0], target, predictions[:, 1].exp())


class MeanAndVariance(Smooth):
    """Two outputs for one target."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nll(self(batch[0]), batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(batch[0]), batch[1].float()


def test_outputs_of_another_shape_than_the_target_train_by_their_own_loss_and_say_so(tmp_path: Any) -> None:
    plain = make(MeanAndVariance)
    trainer(tmp_path).fit(plain, *loaders())
    module = make(adaptive(MeanAndVariance), adalfl=AdaLFLConfig("regression", task_loss=nll, meta_every=1))
    with pytest.warns(UserWarning, match="No shape is learned: .*return from `adalfl_predict` the output that"):
        trainer(tmp_path).fit(module, *loaders())
    assert_same(tensors(module), tensors(plain))
    # Without a task loss that knows what to make of them, they are refused; and the remedy.
    with pytest.raises(ValueError, match=r"`target` must have shape \(16, 3\)|one shape|shape of"):
        trainer(tmp_path).fit(make(adaptive(MeanAndVariance), adalfl=AdaLFLConfig("regression")), *loaders())

    class OfTheMean(adaptive(MeanAndVariance)):
        def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self(batch[0])[:, 0], batch[1].float()

    module = make(OfTheMean, adalfl=AdaLFLConfig("regression", meta_every=1))
    before = phi(module)
    trainer(tmp_path).fit(module, *loaders())
    assert any(not torch.equal(value, before[name]) for name, value in phi(module).items())


@pytest.mark.parametrize(
    ("task_loss", "message"),
    [
        (
            lambda f, y: F.cross_entropy(f, y, reduction="none"),
            r"must return a scalar mean; got torch.Size\(\[16",
        ),
        (lambda f, y: 1.0, "must return a scalar mean; got float"),
        (lambda f, y: (f.argmax(1) != y).float().mean(), "cannot be differentiated; leave out `argmax`"),
    ],
)
def test_a_task_loss_that_is_none_is_refused_before_the_first_step(tmp_path: Any, task_loss: Any, message: str) -> None:
    module = make(adaptive(Smooth), adalfl=config(task_loss=task_loss))
    before = tensors(module)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module, *loaders())
    assert_same(tensors(module), before)


def test_a_task_loss_with_buffers_changes_no_checkpoint(tmp_path: Any) -> None:
    module = make(adaptive(Smooth), adalfl=config(task_loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))))
    trainer(tmp_path).fit(module, *loaders())
    assert module.state_dict().keys() == make(Smooth).state_dict().keys()
    assert module.adalfl.meta_steps == 12


class Void(Smooth):
    """Some targets stand for none."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=-100)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def test_targets_that_stand_for_none_are_left_out_by_the_configuration_or_refused(tmp_path: Any) -> None:
    x, y = copy.deepcopy(points().tensors)
    y[::3] = -100
    train = DataLoader(TensorDataset(x, y), 16)
    plain = make(Void)
    trainer(tmp_path).fit(plain, train, train)
    with pytest.raises(ValueError, match=r"`target` must hold class indices.*or `ignore_index` for no class"):
        trainer(tmp_path).fit(make(adaptive(Void), adalfl=config()), train, train)
    watched = AdaLFLConfig("multiclass", learn="nothing", meta_every=1, ignore_index=-100)
    module = make(adaptive(Void), adalfl=watched)
    trainer(tmp_path).fit(module, train, train)
    assert_same(tensors(module), tensors(plain))
    module = make(adaptive(Void), adalfl=config(ignore_index=-100))
    trainer(tmp_path).fit(module, train, train)
    assert module.adalfl.meta_steps == 12
    assert all(value.isfinite().all() for value in phi(module).values())


class Phases(Complex):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(torch.complex64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).abs(), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


class DetachedOutput(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).detach()


class NoTensors(Smooth):
    def adalfl_predict(self, batch: Any) -> Any:
        return "logits"


class NamesOnly(Smooth):
    def adalfl_predict(self, batch: Any) -> Any:
        return "a", "b"


class Scaled(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x if scale is None else x * scale)


class TwoParts(Smooth):
    """A backbone and a head that the step calls with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = nn.Linear(4, 8), Scaled(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.model(x), torch.ones(8)), y)

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.head(self.model(batch[0])), batch[1]


class OtherPartsLater(Smooth):
    """Predicts in another way each time."""

    calls: ClassVar[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        self.calls.append(0)
        found = self.model(batch[0]) if len(self.calls) % 2 else batch[0][:, :CLASSES] * 1.0
        return found, batch[1]


class ChangedAfterwards(Smooth):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        shifted = x + 1.0
        loss = F.cross_entropy(self.model(shifted), y)
        shifted.zero_()
        return loss * 1.0

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.model(batch[0] + 1.0), batch[1]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            TwoParts,
            ValueError,
            "calls Scaled with 1 tensors and `training_step` with 2, .*call it in the same way in both",
        ),
        (OtherPartsLater, ValueError, "calls other modules when it is run again on the same batch"),
        (ChangedAfterwards, ValueError, "changes an input of Sequential in place after the call.*Change a copy"),
        (Phases, ValueError, "must be floating point; got torch.complex64"),
        (NoTensors, TypeError, r"must return tensors \(predictions, target\) or .*; got str"),
        (NamesOnly, TypeError, r"got \['str', 'str'\]. Override it in AdaNamesOnly"),
        # Lightning's own, or torch's, as for the plain module.
        (DetachedOutput, RuntimeError, "does not require grad"),
    ],
)
def test_predictions_that_cannot_be_learned_from_are_refused(
    tmp_path: Any, kind: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path).fit(make(adaptive(kind), adalfl=config()), *loaders())


@pytest.mark.parametrize("kind", [Forces, ForcesOfOne])
def test_a_gradient_inside_the_forward_is_refused_in_forward_mode_and_both_remedies_agree(
    tmp_path: Any, kind: Any
) -> None:
    t = trainer(tmp_path, inference_mode=False)
    module = make(adaptive(kind), adalfl=AdaLFLConfig("multiclass"))
    before = tensors(module)
    with pytest.raises(
        RuntimeError, match="choose `hypergradient='reverse'`, a second backward, or 'finite_difference'"
    ):
        t.fit(module, *loaders())
    assert_same(tensors(module), before)  # before the first step, though the first meta step is the tenth
    learned = []
    for way in ("reverse", "finite_difference"):
        module = make(adaptive(kind), adalfl=config(hypergradient=way, meta_optimizer="SGD", meta_lr=1.0))
        trainer(tmp_path, inference_mode=False).fit(module, *loaders())
        learned.append(phi(module))
    for name, expected in learned[0].items():
        torch.testing.assert_close(learned[1][name], expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


class Reversed(torch.autograd.Function):
    """Turns the gradient round, as domain-adversarial training does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Adversarial(Smooth):
    def forward(self, x: Tensor) -> Tensor:
        z = self.model[:2](x)
        return torch.cat([self.model[2](z)[:, :2], self.model[2](Reversed.apply(z))[:, 2:]], dim=1)


def test_a_reversed_gradient_is_refused_and_the_message_says_what_is_exact(tmp_path: Any) -> None:
    """A finite difference would be wrong there, and is not recommended; a double backward is right."""
    module = make(adaptive(Adversarial), adalfl=AdaLFLConfig("multiclass"))
    before = tensors(module)
    with pytest.raises(RuntimeError, match="hypergradient='reverse'") as refused:
        trainer(tmp_path).fit(module, *loaders())
    assert_same(tensors(module), before)
    assert "finite_difference" not in str(refused.value)
    plain = make(Adversarial)
    trainer(tmp_path).fit(plain, *loaders())
    watching = AdaLFLConfig("multiclass", learn="nothing", meta_every=1, hypergradient="reverse")
    module = make(adaptive(Adversarial), adalfl=watching)
    trainer(tmp_path).fit(module, *loaders())
    assert_same(tensors(module), tensors(plain))
    module = make(adaptive(Adversarial), adalfl=config(hypergradient="reverse"))
    trainer(tmp_path).fit(module, *loaders())
    assert module.adalfl.meta_steps == 12


class Probabilities(Plain):
    """A binary classifier whose forward ends in a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy(self(batch[0]), (batch[1] > 0).float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(batch[0]), (batch[1] > 0).float()


def test_a_model_that_ends_in_a_sigmoid_trains_as_well_as_the_plain_one(tmp_path: Any) -> None:
    ends = []
    for kind, given in (
        (Probabilities, {}),
        (adaptive(Probabilities), {"adalfl": AdaLFLConfig("binary", meta_every=1)}),
    ):
        module = make(kind, **given)
        trainer(tmp_path, max_epochs=20).fit(module, *loaders())
        x, y = points(400, 5).tensors
        ends.append(float(F.binary_cross_entropy(module(x), (y > 0).float()).detach()))
    assert ends[1] < 1.3 * ends[0]


class ScaledLater(Smooth):
    """Changes its logits in place, though not in the first steps."""

    is_in_place = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        if self.global_step > 1:
            logits = logits.mul_(0.5) if self.is_in_place else logits * 0.5
        return F.cross_entropy(logits, y)


class ScaledLaterElsewhere(ScaledLater):
    is_in_place = False


def test_logits_that_are_changed_in_place_later_on_are_learned_from_as_if_not(tmp_path: Any) -> None:
    """But for the first of these steps, of which nothing is learned."""
    found = []
    for kind in (ScaledLater, ScaledLaterElsewhere):
        module = make(adaptive(kind), adalfl=replace(WATCHING, meta_batch_size=32))  # all of the held-out rows
        trainer(tmp_path, max_epochs=1).fit(module, *loaders(shuffle=False))
        found.append((module.adalfl.last_step.influence[0], tensors(module), module.adalfl.meta_steps))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])
    assert (found[0][2], found[1][2]) == (5, 6)
    module = make(adaptive(ScaledLater), adalfl=config())
    trainer(tmp_path, max_epochs=4).fit(module, *loaders(shuffle=False))
    assert module.adalfl.meta_steps == 23


class Shared(Smooth):
    """Validates with its training step."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss


def test_a_training_step_may_be_called_outside_training(tmp_path: Any) -> None:
    plain, module = make(Shared), make(adaptive(Shared), adalfl=config())
    batch = next(iter(loaders(shuffle=False)[0]))
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        assert torch.equal(module.training_step(batch, 0), plain.training_step(batch, 0))
    found, expected = (trainer(tmp_path).validate(one, loaders()[1]) for one in (module, plain))
    assert found == expected


def test_under_fabric_the_mixin_is_refused() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    module = make(adaptive(Smooth), adalfl=config())
    model = fabric.setup(module, _reapply_compile=False)
    with pytest.raises(ValueError, match="use MetaLearner in the loop there"):
        model.training_step(next(iter(loaders()[0])), 0)


class Counts(Smooth):
    """Logs and counts in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        self.seen += len(x)
        self.log("logit", out.detach().mean(), on_step=False, on_epoch=True)
        return out

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


@pytest.mark.parametrize("offline", [False, True])
def test_what_the_forward_logs_and_counts_is_of_training_alone(offline: bool, tmp_path: Any) -> None:
    plain, module = make(Counts), make(adaptive(Counts), adalfl=config(meta_every=1))
    watcher = trainer(tmp_path, max_epochs=2)
    watcher.fit(plain, *loaders(shuffle=False))
    fitting = trainer(tmp_path, max_epochs=2, callbacks=[AdaLFLInit(steps=2)] if offline else [])
    fitting.fit(module, *loaders(shuffle=False))
    assert module.seen == plain.seen == 2 * 96
    watching = make(adaptive(Counts), adalfl=AdaLFLConfig("multiclass", learn="nothing", meta_every=1))
    fitting = trainer(tmp_path, max_epochs=2)
    fitting.fit(watching, *loaders(shuffle=False))
    assert fitting.logged_metrics["logit"] == watcher.logged_metrics["logit"]


@pytest.mark.parametrize(("size", "expected"), [(10, 0.0), (2_000_000, 1.0)])
def test_a_tensor_that_is_large_is_data_and_not_copied(size: int, expected: float) -> None:
    module = nn.Module()
    module.seen = torch.zeros(size)
    state = ModuleState([module])
    before = state.capture()
    module.seen += 1
    state.restore(before)
    assert module.seen[0] == expected
