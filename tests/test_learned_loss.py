"""Learned losses: the paper's formulas, Eq. 3, presets, and files that other processes read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl import AdaLFLConfig, MetaLearner, files
from lightning_adalfl.losses import LearnedLoss, LossNetwork, SmoothLeakyReLU, TaylorLoss
from lightning_adalfl.losses.descent import LearnedGradient, Predicted
from lightning_adalfl.losses.network import EMBEDDING, MAX_CLASSES
from lightning_adalfl.losses.tasks import task_named

LOSSES: dict[str, Callable[..., LearnedLoss]] = {
    "network": LossNetwork,
    "classes": lambda task, **options: LossNetwork(task, sees_classes=task == "multiclass", **options),
    "errors": lambda task, **options: LossNetwork(task, sees_error=task == "regression", **options),
    "ml3": lambda task: LearnedLoss.named("ml3", task),
    "biased": lambda task, **options: LossNetwork(task, bias=True, output_activation="smooth_leaky_relu", **options),
    "taylor": TaylorLoss,
}
BATCHES: dict[str, tuple[Tensor, Tensor]] = {
    "multiclass": (torch.linspace(-2, 2, 24).view(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])),
    "segmentation": (torch.linspace(-2, 2, 48).view(2, 4, 3, 2), torch.arange(12).view(2, 3, 2) % 4),
    "binary": (torch.linspace(-2, 2, 6), torch.tensor([0, 1, 1, 0, 1, 0])),
    "multilabel": (torch.linspace(-2, 2, 12).view(4, 3), torch.arange(12).view(4, 3) % 2),
    "regression": (torch.linspace(-2, 2, 12).view(4, 3), torch.linspace(1, -1, 12).view(4, 3)),
}


def task_of(batch: str) -> str:
    return "multiclass" if batch == "segmentation" else batch


def eq_4(x: Tensor, gamma: float = 0.01, beta: float = 10.0) -> Tensor:
    return (1 - gamma) * torch.log(1 + torch.exp(beta * x)) / beta + gamma * x


def eq_25(x: Tensor, gamma: float, beta: float) -> Tensor:
    """The derivative, written with exponentials as the paper has it."""
    return (torch.exp(beta * x) + gamma) / (torch.exp(beta * x) + 1)


@pytest.mark.parametrize(("gamma", "beta"), [(0.01, 10.0), (0.0, 1.0), (0.3, 4.0)])
def test_the_activation_is_that_of_the_paper(gamma: float, beta: float) -> None:
    x = torch.linspace(-5, 5, 401, dtype=torch.float64, requires_grad=True)
    activation = SmoothLeakyReLU(gamma, beta)
    y = activation(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    # torch's softplus is the identity above 20 / β, where the logarithm differs by exp(-20) / β.
    torch.testing.assert_close(y, eq_4(x, gamma, beta), rtol=0, atol=1e-8)
    torch.testing.assert_close(slope, eq_25(x, gamma, beta), rtol=0, atol=1e-8)
    torch.testing.assert_close(activation.slope(x), eq_25(x, gamma, beta), rtol=0, atol=1e-12)
    value_and_slope = (eq_4(x, gamma, beta), eq_25(x, gamma, beta))
    torch.testing.assert_close(activation.with_slope(x.detach()), value_and_slope, rtol=0, atol=1e-12)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(activation.curvature(activation.slope(x)), curvature, rtol=0, atol=1e-7)


def test_the_activation_by_default() -> None:
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(SmoothLeakyReLU()(x), eq_4(x), rtol=0, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(SmoothLeakyReLU()(x), eq_4(x), rtol=0, atol=1e-12)
    far = torch.linspace(-1e4, 1e4, 1001)
    assert SmoothLeakyReLU()(far).isfinite().all()
    assert all(part.isfinite().all() for part in SmoothLeakyReLU().with_slope(far))
    assert SmoothLeakyReLU().slope(far).aminmax() == (pytest.approx(0.01), pytest.approx(1.0))
    assert repr(SmoothLeakyReLU(0.2, 3.0)) == "SmoothLeakyReLU(gamma=0.2, beta=3.0)"


@pytest.mark.parametrize("representation", LOSSES)
@pytest.mark.parametrize("batch", BATCHES)
def test_one_call_equals_a_loop_over_instances_and_outputs(representation: str, batch: str) -> None:
    """Eq. 3 spelled out: each output scored by itself, averaged over outputs and then over instances."""
    predictions, target = (t.double() if t.is_floating_point() else t for t in BATCHES[batch])
    loss = LOSSES[representation](task_of(batch)).double()
    pairs = task_named(task_of(batch)).pairs(predictions, target)
    if getattr(loss, "sees_classes", False):  # one output by itself has no class
        nn.init.zeros_(loss._codes)
    flat = zip(pairs.prediction.flatten().split(1), pairs.target.flatten().split(1))
    values = [loss.pairwise(f, y).item() for f, y in flat]
    assert loss(predictions, target).item() == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert abs(sum(values)) > 1e-6


@pytest.mark.parametrize(
    ("batch", "outputs"), [("multiclass", 4), ("segmentation", 4), ("binary", 1), ("regression", 3)]
)
def test_sum_differs_from_mean_by_the_number_of_outputs(batch: str, outputs: int) -> None:
    mean, summed = LossNetwork(task_of(batch)), LossNetwork(task_of(batch), reduction="sum")
    summed.load_state_dict(mean.state_dict())
    torch.testing.assert_close(summed(*BATCHES[batch]), outputs * mean(*BATCHES[batch]))


def test_the_network_is_that_of_the_paper() -> None:
    loss = LossNetwork("multiclass")
    assert [tuple(p.shape) for p in loss.parameters()] == [(40, 2), (40, 40), (1, 40)]
    f, y = torch.rand(9).double(), torch.rand(9).double()
    w0, w1, w2 = (p.detach() for p in loss.double().parameters())
    expected = eq_4(eq_4(torch.stack((y, f), dim=1) @ w0.T) @ w1.T) @ w2.T
    torch.testing.assert_close(loss.pairwise(f, y), expected.squeeze(1), rtol=1e-6, atol=1e-8)


def test_the_network_scores_the_pair_of_target_and_prediction() -> None:
    """The input order (y, f) is part of what a stored φ means."""
    loss = LossNetwork("regression", hidden=(1,), activation="relu", bias=True)
    with torch.no_grad():
        loss.linear[0].weight.copy_(torch.tensor([[2.0, -3.0]]))
        loss.linear[0].bias.fill_(0.5)
        loss.linear[1].weight.fill_(5.0)
        loss.linear[1].bias.fill_(-1.0)
    prediction, target = torch.tensor([-1.0, 0.5]), torch.tensor([0.5, 2.0])
    torch.testing.assert_close(loss.pairwise(prediction, target), 5 * F.relu(2 * target - 3 * prediction + 0.5) - 1)


def test_a_network_that_sees_classes_puts_their_embeddings_beside_the_pair() -> None:
    loss = LossNetwork("multiclass", hidden=(3,), sees_classes=True)
    assert (loss.label_embedding.shape, loss.output_embedding.shape) == ((MAX_CLASSES, EMBEDDING),) * 2
    nn.init.normal_(loss.label_embedding)
    nn.init.normal_(loss.output_embedding)
    f, labels = torch.rand(5, 4), torch.tensor([0, 3, 1, 2, 3])
    y = F.one_hot(labels, 4).float()
    of_labels, of_outputs = loss.embeddings(4)
    for n, c in torch.cartesian_prod(torch.arange(5), torch.arange(4)).tolist():
        seen = torch.cat([y[n, c : c + 1], f[n, c : c + 1], of_labels[labels[n]], of_outputs[c]])
        expected = loss.linear[1](loss.between(loss.linear[0](seen)))
        torch.testing.assert_close(loss.pairwise(f, y)[n, c], expected.squeeze())
    assert loss.tells_apart(MAX_CLASSES)
    assert not loss.tells_apart(MAX_CLASSES + 1)
    assert loss.pairwise(torch.rand(2, 101), torch.zeros(2, 101)).shape == (2, 101)


def test_before_anything_is_learned_classes_have_codes_that_tell_them_apart() -> None:
    losses = [LossNetwork("multiclass", sees_classes=True) for _ in range(2)]
    fresh, other = (torch.cat(loss.embeddings(MAX_CLASSES), dim=1).detach() for loss in losses)
    assert torch.equal(fresh, other)
    assert fresh.square().mean().sqrt() == pytest.approx(0.3, rel=0.05)
    assert torch.pdist(fresh[:, :EMBEDDING]).min() > 0.02
    assert torch.pdist(fresh[:, EMBEDDING:]).min() > 0.02
    moved = LossNetwork("multiclass", sees_classes=True)
    nn.init.ones_(moved.label_embedding)
    torch.testing.assert_close(moved.embeddings(3)[0], 1 + fresh[:3, :EMBEDDING])


def test_a_network_that_sees_errors_puts_two_of_them_beside_the_pair() -> None:
    loss = LossNetwork("regression", hidden=(3,), bias=True, sees_error=True)
    f, y = torch.randn(7), torch.randn(7)
    seen = torch.stack((y, f, (f - y).abs(), (f - y) ** 2), dim=1)
    torch.testing.assert_close(loss.pairwise(f, y), loss.linear[1](loss.between(loss.linear[0](seen))).squeeze(1))


def test_presets() -> None:
    ml3 = LearnedLoss.named("ml3", "multiclass")
    assert (ml3.activation, ml3.output_activation, ml3.weight_init) == ("relu", "softplus", "xavier_uniform")
    assert ml3(*BATCHES["multiclass"]) > 0
    paper, default = LearnedLoss.named("paper", "binary"), LearnedLoss.named("network", "multiclass")
    assert (paper.weight_init, paper.sees_classes, default.sees_classes) == ("xavier_uniform", False, True)
    assert not LearnedLoss.named("network", "binary").sees_classes
    assert [LearnedLoss.named("network", task).sees_error for task in ("binary", "regression")] == [False, True]
    taylor = LearnedLoss.named("taylor_quadratic_target_powers", "regression")
    assert (taylor.order, taylor.form) == ("quadratic", "target_powers")
    with pytest.raises(
        ValueError, match=r"`loss` must be one of 'network', 'paper', 'ml3', 'taylor_cubic', .*; got 'x'"
    ):
        LearnedLoss.named("x", "binary")


def test_initial_weights_have_their_distribution() -> None:
    """Kaiming: deviation sqrt(2 / fan_in); Xavier: uniform within sqrt(6 / (fan_in + fan_out)); zero biases."""
    kaiming = LossNetwork("binary", hidden=(200, 200), bias=True)
    assert kaiming.linear[1].weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.05)
    assert (kaiming.linear[1].bias == 0).all()
    xavier = LossNetwork("binary", hidden=(200, 200), weight_init="xavier_uniform").linear[1].weight
    assert xavier.abs().max().item() == pytest.approx((6 / 400) ** 0.5, rel=0.01)
    draws = torch.stack([TaylorLoss("binary").coefficients.detach() for _ in range(200)])
    assert draws.std().item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("representation", LOSSES)
def test_a_fresh_draw_changes_all_of_phi_and_a_start_at_zero_has_no_slope(representation: str) -> None:
    loss = LOSSES[representation]("multiclass")
    torch.manual_seed(1)
    loss.reset_parameters()
    drawn = [p.clone() for p in loss.parameters()]
    for p in loss.parameters():
        nn.init.constant_(p, 7.0)
    torch.manual_seed(1)
    loss.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(drawn, loss.parameters()))
    loss.scale_(0.0)
    f, y = torch.rand(6, 4), F.one_hot(torch.arange(6) % 4, 4).float()
    gradient = loss.pair_gradient(f, y)
    assert (gradient.value == 0).all()
    assert sum(float(g.abs().sum()) for g in gradient.vjp(f).values()) > 0  # from where it can learn


def polynomial(order: str, form: str, c: list[float], f: float, y: float) -> float:
    """The published forms, written out."""
    a, b, c_a, c_b = (y, f, c[0], c[1]) if form == "prediction_powers" else (f, y, c[0], c[1])
    value = c[2] * (b - c_b) + 1 / 2 * c[3] * (b - c_b) ** 2 + c[5] * (a - c_a) * (b - c_b)
    if order == "cubic":
        value += 1 / 6 * c[4] * (b - c_b) ** 3 + 1 / 2 * c[6] * (a - c_a) * (b - c_b) ** 2
        value += 1 / 2 * c[7] * (a - c_a) ** 2 * (b - (c_b if form == "prediction_powers" else c_a))
    return value


@pytest.mark.parametrize("order", ["quadratic", "cubic"])
@pytest.mark.parametrize("form", ["prediction_powers", "target_powers"])
def test_the_taylor_polynomial_is_the_published_one(order: str, form: str) -> None:
    loss = TaylorLoss("regression", order, form).double()
    with torch.no_grad():
        loss.coefficients.copy_(torch.tensor([0.3, -0.7, 1.1, -1.3, 1.7, 1.9, -2.3, 2.9]))
    f, y = torch.tensor([[0.4, -1.5, 2.0], [1.2, 0.2, -0.3]], dtype=torch.float64)
    coefficients = loss.coefficients.tolist()
    expected = [polynomial(order, form, coefficients, a, b) for a, b in zip(f.tolist(), y.tolist())]
    torch.testing.assert_close(loss.pairwise(f, y).tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("representation", LOSSES)
def test_computed_in_the_precision_of_phi_under_autocast_too(representation: str) -> None:
    predictions, target = BATCHES["multiclass"]
    loss, half = LOSSES[representation]("multiclass"), predictions.bfloat16().requires_grad_()
    expected = loss(half.float(), target)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.autograd.grad(value, half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            LossNetwork,
            {"task": "ranking"},
            "`task` must be one of 'multiclass', 'binary', 'multilabel', 'regression'; got",
        ),
        (LossNetwork, {"reduction": "none"}, "`reduction` must be one of 'mean', 'sum'; got 'none'"),
        (LossNetwork, {"hidden": ()}, "`hidden` must name at least one positive layer width, such as (40, 40); got ()"),
        (LossNetwork, {"hidden": (40, 0)}, "such as (40, 40); got (40, 0)"),
        (LossNetwork, {"hidden": 40}, "such as (40, 40); got 40"),
        (
            LossNetwork,
            {"activation": "tanh"},
            "`activation` must be one of 'smooth_leaky_relu', 'relu', 'softplus'; got",
        ),
        (LossNetwork, {"activation": None}, "`activation` must be one of"),
        (LossNetwork, {"output_activation": "tanh"}, "`output_activation` must be one of"),
        (LossNetwork, {"weight_init": "zeros"}, "`weight_init` must be one of 'kaiming_normal', 'xavier_uniform'; got"),
        (LossNetwork, {"bias": 1}, "`bias` must be True or False; got 1"),
        (
            LossNetwork,
            {"sees_classes": True},
            "`sees_classes` is for task 'multiclass', where an instance has a class; g",
        ),
        (LossNetwork, {"sees_error": True}, "`sees_error` is for task 'regression', where targets are values; g"),
        (TaylorLoss, {"order": "quartic"}, "`order` must be one of 'quadratic', 'cubic'; got 'quartic'"),
        (TaylorLoss, {"form": "both"}, "`form` must be one of 'target_powers', 'prediction_powers'; got 'both'"),
        (SmoothLeakyReLU, {"gamma": -0.1}, "`gamma` must lie in [0, 1), the slope of the leak; got -0.1"),
        (SmoothLeakyReLU, {"gamma": 1.0}, "`gamma` must lie in [0, 1), the slope of the leak; got 1.0"),
        (SmoothLeakyReLU, {"gamma": float("nan")}, "`gamma` must be finite; got nan"),
        (SmoothLeakyReLU, {"beta": 0.0}, "`beta` must be positive; got 0.0"),
        (SmoothLeakyReLU, {"beta": "10"}, "`beta` must be a number; got '10'"),
    ],
)
def test_refusals(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        kind(**options) if kind is SmoothLeakyReLU else kind(**{"task": "binary", **options})


def test_what_a_loss_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"`predictions` must be floating point .*; got torch.int64"):
        LossNetwork("regression")(torch.arange(3), torch.zeros(3))
    with pytest.raises(TypeError, match="Scaled cannot begin at zero; override `scale_`, or pass an instance"):
        Scaled("binary").scale_(0.0)


# Files.


class Scaled(LearnedLoss):
    """A representation of a user's own."""

    def __init__(self, task: str, power: int = 2) -> None:
        super().__init__(task)
        self.power = power
        self.scale = nn.Parameter(torch.rand(()))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * (prediction - target) ** self.power


class Forgetful(Scaled):
    def __init__(self, task: str, exponent: int = 2) -> None:
        super().__init__(task, exponent)


class Elsewhere:
    class Scaled(Scaled):
        """Another class of the same bare name."""


SAVED: dict[str, Callable[[], LearnedLoss]] = {
    "network": lambda: LossNetwork("multiclass", sees_classes=True),
    "every option": lambda: LossNetwork(
        "regression", (3, 7, 2), "relu", "softplus", bias=True, weight_init="xavier_uniform", reduction="sum"
    ),
    "taylor": lambda: TaylorLoss("binary", "quadratic", "target_powers", "sum"),
    "a user's": lambda: Scaled("regression", power=4),
    "a namesake": lambda: Elsewhere.Scaled("regression", power=3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "loss.safetensors"


def forge(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> None:
    """Write the file at ``path`` again with other header entries or tensors."""
    data = path.read_bytes()
    header = json.loads(
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["lightning_adalfl"]
    )
    tensors = safetensors.torch.load(data) if tensors is None else tensors
    header = {**header, "crc32": files._checksum(tensors), **changes}
    path.write_bytes(safetensors.torch.save(tensors, {"lightning_adalfl": json.dumps(header)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", SAVED)
def test_the_round_trip_is_bitwise(kind: str, dtype: torch.dtype, path: Path) -> None:
    """Two classes of one bare name are told apart."""
    loss = SAVED[kind]().to(dtype)
    loss.save(path)
    random_state = torch.get_rng_state()
    loaded = LearnedLoss.load(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (type(loaded), repr(loaded), vars(loaded).keys()) == (type(loss), repr(loss), vars(loss).keys())
    public = [name for name in vars(loss) if not name.startswith("_") and name != "pairing"]
    assert all(getattr(loaded, name) == getattr(loss, name) for name in public)
    expected = dict(loss.named_parameters())
    assert [name for name, _ in loaded.named_parameters()] == list(expected)
    for name, phi in loaded.named_parameters():
        assert (phi.dtype, phi.requires_grad) == (dtype, True)
        assert torch.equal(phi, expected[name])
    again = path.with_name("again.safetensors")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_a_class_loads_its_own_alone_and_knows_what_it_forgets(path: Path) -> None:
    TaylorLoss("binary").save(path)
    assert isinstance(TaylorLoss.load(path), TaylorLoss)
    with pytest.raises(ValueError, match=r"class 'TaylorLoss', and known here are \['LossNetwork'.*\]; load it as"):
        LossNetwork.load(path)
    path.unlink()
    with pytest.raises(TypeError, match=r"`exponent` cannot be read back .* Keep it as the attribute `exponent`"):
        Forgetful("regression").save(path)
    loss = TaylorLoss("binary")
    with torch.no_grad():
        loss.coefficients[3] = float("nan")
    with pytest.raises(ValueError, match=r"cannot save the loss to .*loss.safetensors: 'coefficients' is not finite"):
        loss.save(path)
    assert not path.exists()


WIDE = {"hidden": [2**20, 2**20], "task": "binary"}  # four terabytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "loss history"}, "it holds 'loss history' and not a 'learned loss'"),
        ({"version": 3}, "its format version 3 is newer than 2, .* upgrade lightning_adalfl"),
        ({"version": "1"}, "its format version '1' is no positive number"),
        ({"class": "TheirLoss"}, "class 'TheirLoss', and known here are .* import the module"),
        ({"class": 7}, "loss of class 7"),
        ({"options": None}, "its options None build no LossNetwork"),
        ({"options": {"task": "ranking"}}, "build no LossNetwork .`task` must be one of"),
        ({"options": {"task": "binary", "evil": 1}}, "build no LossNetwork .*'evil'"),
        ({"options": {"task": "binary", "hidden": [10**30]}}, "build no LossNetwork .*Overflow"),
        # Refused for its shapes, before it is built.
        ({"options": WIDE}, r"whose 'linear.0.weight' has shape \(1048576, 2\), and its φ has \(40, 2\)"),
        ({"options": {"task": "binary", "bias": True}}, r"whose 'linear.0.bias' has shape \(40,\), and its φ has None"),
    ],
)
def test_headers_that_do_not_fit(changes: dict[str, Any], message: str, path: Path) -> None:
    LossNetwork("binary").save(path)
    forge(path, **changes)
    with pytest.raises(ValueError, match=f"cannot read .*loss.safetensors: .*{message}"):
        LearnedLoss.load(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(7), r"whose 'coefficients' has shape \(8,\), and its φ has \(7,\) there"),
        (torch.zeros(8, dtype=torch.int64), "dtypes .'torch.int64'., where one floating dtype is wanted"),
        (torch.full((8,), float("inf")), "its φ cannot be used: 'coefficients' is not finite"),
    ],
)
def test_phi_that_does_not_fit(value: Tensor, message: str, path: Path) -> None:
    TaylorLoss("binary").save(path)
    forge(path, {"coefficients": value})
    with pytest.raises(ValueError, match=f"cannot read .*loss.safetensors: .*{message}"):
        LearnedLoss.load(path)


def test_phi_of_two_precisions_does_not_fit() -> None:
    loss = LossNetwork("binary")
    phi = {**loss.state_dict(), "linear.0.weight": torch.zeros(40, 2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"dtypes .'torch.float32', 'torch.float64'., where one floating dtype is wa"):
        LearnedLoss.rebuild(loss.describe(), phi)


def test_on_the_meta_device_it_has_a_shape() -> None:
    loss = LossNetwork("binary").to("meta")
    assert loss(torch.zeros(3, device="meta"), torch.zeros(3, device="meta")).shape == ()


PLAIN = """
import sys, torch
from lightning_adalfl.losses import LearnedLoss
loss = LearnedLoss.load(sys.argv[1]).requires_grad_(False)
torch.manual_seed(0)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
x = torch.randn(64, 2)
y = (x[:, 0] > 0).long()
for _ in range(200):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
assert all(p.grad is None for p in loss.parameters())
print(float((model(x).argmax(1) == y).float().mean()))
"""


def test_a_loaded_loss_trains_in_a_plain_loop_in_another_process(path: Path) -> None:
    loss = TaylorLoss("multiclass")  # (f - y)² up to a constant
    with torch.no_grad():
        loss.coefficients.copy_(torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, -2.0, 0.0, 0.0]))
    loss.save(path)
    done = subprocess.run([sys.executable, "-c", PLAIN, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.95


class Fixed(LearnedLoss):
    """No φ at all."""

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target) ** 2


class LogLoss(LearnedLoss):
    """Steep towards zero, as a loss of one's own may be."""

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.weight = nn.Parameter(torch.tensor(0.5))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return -self.weight * target * (prediction + 1e-7).log()


def test_a_loss_without_parameters_is_one(tmp_path: Path) -> None:
    predictions, target = BATCHES["multiclass"]
    loss = Fixed("multiclass")
    expected = (predictions.softmax(1) - F.one_hot(target, 4)).square().mean()
    torch.testing.assert_close(loss(predictions, target), expected)
    loss.save(tmp_path / "fixed.safetensors")
    assert isinstance(LearnedLoss.load(tmp_path / "fixed.safetensors"), Fixed)


@pytest.mark.parametrize("kind", [LogLoss, LOSSES["ml3"], LossNetwork, TaylorLoss])
def test_the_slope_of_many_pairs_is_that_of_autograd(kind: Callable[..., LearnedLoss]) -> None:
    """A loss that is not smooth is not looked up between knots, however many the pairs."""
    torch.manual_seed(0)
    loss, target = kind("multiclass"), torch.randint(10, (400,))
    predictions = (3 * torch.randn(400, 10)).requires_grad_()
    found = LearnedGradient(loss, Predicted.direct(predictions, target), by_outputs=True)
    value = loss(predictions, target)
    (expected,) = torch.autograd.grad(value, predictions, retain_graph=True)
    torch.testing.assert_close(found.value, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.loss(), value.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_loss_in_half_precision_is_loaded_as_it_was(half: torch.dtype, tmp_path: Path) -> None:
    predictions, target = BATCHES["multiclass"]
    loss = LossNetwork("multiclass", sees_classes=True).to(half)
    loss.save(tmp_path / "half.safetensors")
    again = LearnedLoss.load(tmp_path / "half.safetensors")
    assert torch.equal(again(predictions, target), loss(predictions, target))


@pytest.mark.parametrize("name", ["network", "ml3", "taylor_cubic"])
def test_a_preset_is_never_drawn_in_half_precision(name: str) -> None:
    """The default precision is half where a module is built for such a run."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        learner = MetaLearner(AdaLFLConfig("multiclass", loss=name, learn="both"))
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for tensor in [*learner.loss.state_dict().values(), learner.rate.log_scale]} == {torch.float32}
