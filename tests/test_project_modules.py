"""Modules that are not the rule: each trains as the plain one does, or is refused with what to do about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from projects import CLASSES, INERT, Plain, assert_same, base_tensors, config, learned_tensors, loaders, make, trainer
from torch import Tensor, nn

from lightning_adalfl import AdaLFLInit, AdaLFLMixin, BaseStep, LossNetwork, hypergradient


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
        return self.model(x.to(torch.complex64)).abs()


class Scalar(Plain):
    """One weight of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale


class Weighted(Plain):
    """A parametrized weight, which is computed anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, CLASSES))


def with_learned_loss(kind: type[Plain]) -> type[Any]:
    return type(f"Ada{kind.__name__}", (AdaLFLMixin, kind), {})


KINDS = [Tied, Unused, PartlyFrozen, Lazy, Complex, Scalar, Weighted]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", KINDS)
def test_an_inert_loss_trains_it_as_plain_training_does(tmp_path: Any, kind: type[Plain]) -> None:
    plain = make(kind)
    trainer(tmp_path).fit(plain, *loaders())
    module = make(with_learned_loss(kind), adalfl=INERT)
    trainer(tmp_path).fit(module, *loaders())
    assert_same(base_tensors(module), plain.state_dict())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("method", ["forward", "finite_difference"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Lazy])
def test_the_loss_learns_on_it_as_by_unrolling(tmp_path: Any, kind: type[Plain], method: str) -> None:
    learned = []
    for engine in ("reverse", method):
        # As large, since what φ moves by in float32 is otherwise little more than rounding.
        options = config(hypergradient=engine, meta_optimizer="SGD", meta_lr=1.0, gain_lr=0.1)
        module = make(with_learned_loss(kind), adalfl=options)
        before = learned_tensors(module)
        trainer(tmp_path, callbacks=[AdaLFLInit(steps=2, lr=1.0)]).fit(module, *loaders())
        assert module.adalfl.meta_steps == 12
        learned.append({name: t - before[name] for name, t in learned_tensors(module).items()})
    for name, expected in learned[0].items():
        torch.testing.assert_close(learned[1][name], expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_learn_online_and_are_refused_offline_until_they_have_a_shape(tmp_path: Any) -> None:
    module = make(with_learned_loss(Lazy), adalfl=config())
    with pytest.raises(MisconfigurationException, match=r"lazy layers have no shape.*model.0.weight.* on a batch"):
        trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, *loaders())
    trainer(tmp_path).fit(module, *loaders())
    assert module.adalfl.meta_steps == 12
    module = make(with_learned_loss(Lazy), adalfl=config())
    module(torch.zeros(1, 4))
    trainer(tmp_path, callbacks=[AdaLFLInit(steps=2)]).fit(module, *loaders())
    assert module.adalfl.meta_steps == 12


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("method", ["forward", "finite_difference"])
def test_complex_weights_under_other_optimizers(optimizer: Any, method: str) -> None:
    class Magnitudes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, CLASSES, dtype=torch.complex128)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(torch.complex128)).abs()

    found = []
    for engine in ("reverse", method):
        torch.manual_seed(0)
        model, loss = Magnitudes(), LossNetwork("multiclass").double()
        step = BaseStep(model, optimizer(model.parameters(), lr=0.1), method=engine)
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(CLASSES, (8,))
        loss(*step.forward((x, y))).backward()
        step.step()
        gradient = hypergradient(step, loss, F.cross_entropy, (x.flip(0), y))
        found.append([torch.cat([g.flatten() for g in gradient.loss]), gradient.log_lr])
    for expected, actual in zip(*found):
        assert expected.norm() > 0
        assert (actual - expected).norm() / expected.norm() < (1e-9 if method == "forward" else 1e-4)


def test_a_sparse_gradient_is_refused_before_a_step_is_lost(tmp_path: Any) -> None:
    class Words(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)
            self.model = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(self.table(x[:, 0].abs().long().clamp(max=9)))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = make(with_learned_loss(Words), adalfl=config())
    before = base_tensors(module)
    with pytest.raises((ValueError, MisconfigurationException), match="`sparse=False`"):
        trainer(tmp_path, num_sanity_val_steps=0).fit(module, *loaders())
    assert_same({k: v for k, v in base_tensors(module).items()}, before)


def test_a_module_that_trains_nothing_is_refused(tmp_path: Any) -> None:
    class Frozen(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.model.requires_grad_(False)

    module = make(with_learned_loss(Frozen), adalfl=config())
    with pytest.raises((ValueError, MisconfigurationException), match="no parameter that requires a gradient"):
        trainer(tmp_path).fit(module, *loaders())


def test_a_module_without_an_optimizer_is_refused(tmp_path: Any) -> None:
    class Formula(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Identity()

        def configure_optimizers(self) -> Any:
            return None

    module = make(with_learned_loss(Formula), adalfl=config())
    with pytest.raises(MisconfigurationException, match="`configure_optimizers` returned no optimizer"):
        trainer(tmp_path).fit(module, *loaders())


def test_predictions_that_no_parameter_reaches_are_refused(tmp_path: Any) -> None:
    class Detached(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).detach()

    with pytest.raises(MisconfigurationException, match=r"`adalfl_predict` must be real.* detached from the graph"):
        trainer(tmp_path).fit(make(with_learned_loss(Detached), adalfl=config()), *loaders())


def test_complex_predictions_are_refused(tmp_path: Any) -> None:
    class Phases(Complex):
        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.to(torch.complex64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x).abs(), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(MisconfigurationException, match=r"must be real.*got torch.complex64"):
        trainer(tmp_path).fit(make(with_learned_loss(Phases), adalfl=config()), *loaders())
