"""Base steps and the held-out loss after them by plain autograd: what every way to the hypergradient is held against.

The whole step is unrolled, with a double backward through the model and the optimizer's own differentiable step; and it
is taken as plain training takes it, for central differences.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from lightning_adalfl.learning import BaseStep, Hypergradient, JacobianProduct, hypergradient
from lightning_adalfl.learning.base_step import BaseForward
from lightning_adalfl.learning.recorded_forward import RandomState, RecordedForward
from lightning_adalfl.losses import LearnedLoss, LossNetwork
from lightning_adalfl.losses.descent import Predicted
from lightning_adalfl.losses.training_objective import BentLoss, LearnedAlone, OwnLoss, TrainingObjective

METHODS = ("forward", "finite_difference", "reverse")
OBJECTIVES = ("bent", "cut", "alone", "own")
INPUTS, CLASSES = 6, 4
COUNTERS = ("step", "mu_product")
Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def vectors(generator: torch.Generator) -> Batch:
    x = torch.randn(7, INPUTS, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (7,), generator=generator)


def images(generator: torch.Generator) -> Batch:
    x = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (6,), generator=generator)


def sgd(model: nn.Module) -> Optimizer:
    return optim.SGD(model.parameters(), lr=0.3)


def momentum(model: nn.Module) -> Optimizer:
    return optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def adam(model: nn.Module) -> Optimizer:
    return optim.Adam(model.parameters(), lr=0.05, eps=1e-2, weight_decay=0.1)


def by_half(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return the parameters in two groups with learning rates of their own."""
    parameters = list(model.parameters())
    middle = len(parameters) // 2
    return [{"params": parameters[:middle], "lr": lr}, {"params": parameters[middle:], "lr": 0.3 * lr}]


# The larger ε keeps the step smooth where a gradient is small: without it Adam's first step is all but its sign.
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.3}),
    "maximize": (optim.SGD, {"lr": 0.3, "maximize": True}),
    "decay": (optim.SGD, {"lr": 0.3, "weight_decay": 0.1}),
    "momentum": (optim.SGD, {"lr": 0.3, "momentum": 0.9}),
    "dampening": (optim.SGD, {"lr": 0.3, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": (optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (optim.Adam, {"lr": 0.05, "eps": 1e-2}),
    "adam l2": (optim.Adam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "amsgrad": (optim.Adam, {"lr": 0.05, "eps": 1e-2, "amsgrad": True}),
    "adam maximize": (optim.Adam, {"lr": 0.05, "eps": 1e-2, "maximize": True}),
    "adamw": (optim.AdamW, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "adamw amsgrad": (optim.AdamW, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    "rmsprop": (optim.RMSprop, {"lr": 0.05, "eps": 1e-2}),
    "rmsprop centered": (
        optim.RMSprop,
        {"lr": 0.05, "eps": 1e-2, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
    ),
    "adagrad": (optim.Adagrad, {"lr": 0.05, "eps": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1}),
    "nadam": (optim.NAdam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "nadam decoupled": (optim.NAdam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (optim.RAdam, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "adadelta": (optim.Adadelta, {"lr": 0.5, "eps": 1e-2, "weight_decay": 0.1}),
    "adamax": (optim.Adamax, {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    "asgd": (optim.ASGD, {"lr": 0.05, "weight_decay": 0.1}),
}


def build(name: str, groups: int, model: nn.Module) -> Optimizer:
    kind, options = OPTIMIZERS[name]
    return kind(by_half(model, options["lr"]) if groups == 2 else model.parameters(), **options)


def cross_entropy(parameters: Sequence[Tensor], outputs: Sequence[Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], target)


def one_output(model: Callable[[Any], Any], x: Any) -> list[Tensor]:
    return [model(x)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖; an expected zero is an error, since it would prove nothing."""
    assert expected.norm() > 1e-7, f"the reference is as good as zero: {expected.norm()}"
    return float((actual - expected).norm() / expected.norm())


@dataclass
class Problem:
    """A base model after some warm-up steps, the batches of its next step(s), and a held-out batch, in float64.

    Attributes:
        model: Builds the base model f_θ.
        optimizer: Builds its optimizer.
        objective: What the step descends: the user's loss bent at its own length, ``"bent"``, or cut to it, ``"cut"``;
            the learned loss ``"alone"``; or the user's ``"own"``.
        draw: Draws a batch.
        own_loss: L_u of (θ, outputs, target).
        outputs: The outputs o of (model, x) that L_u is computed from.
        post: P, which makes the predictions of them.
        clip: Clips the gradients in place, and returns what the engine is told of it.
        factor: k, on the loss before its backward.
        warm: Plain training steps beforehand, so that the optimizer has a state.
        inner: S_inner.
        accumulate: Forward passes a step.
        twin: Builds the same model without what a double backward cannot pass.
    """

    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[nn.Module], Optimizer] = sgd
    objective: str = "cut"
    draw: Callable[[torch.Generator], Batch] = vectors
    own_loss: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor] = cross_entropy
    outputs: Callable[[Callable[[Any], Any], Any], list[Tensor]] = one_output
    post: Callable[[Sequence[Tensor]], Tensor] | None = None
    clip: Callable[[list[Tensor]], Any] = lambda parameters: None
    factor: float = 1.0
    warm: int = 0
    inner: int = 1
    accumulate: int = 1
    twin: Callable[[], nn.Module] | None = None

    @cached_property
    def loss(self) -> LearnedLoss:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            loss = LossNetwork("multiclass", hidden=(5, 4), sees_classes=True).double()
            nn.init.normal_(loss.label_embedding)
            nn.init.normal_(loss.output_embedding)
        if self.objective == "bent":  # against the user's slope, so that the sum is shorter
            loss.linear[-1].weight.data.mul_(-0.3)
        return loss

    @cached_property
    def batches(self) -> list[list[Batch]]:
        generator = torch.Generator().manual_seed(2)
        return [[self.draw(generator) for _ in range(self.accumulate)] for _ in range(self.inner)]

    @cached_property
    def meta_batch(self) -> Batch:
        return self.draw(torch.Generator().manual_seed(3))

    @cached_property
    def warmed(self) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = self.model().double()
        optimizer = self.optimizer(model)
        generator = torch.Generator().manual_seed(4)
        for _ in range(self.warm):
            optimizer.zero_grad()
            self.task_loss(*self.predicted(model, self.draw(generator))).backward()
            optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    def start(self) -> tuple[nn.Module, Optimizer]:
        """Return the warmed-up model and optimizer, copies that may be spoilt."""
        return copy.deepcopy(self.warmed)

    def started_twin(self) -> tuple[nn.Module, Optimizer]:
        """Return them as the reference takes them."""
        if self.twin is None:
            return self.start()
        model = self.twin().double()
        model.load_state_dict(self.warmed[0].state_dict())
        optimizer = self.optimizer(model)
        optimizer.load_state_dict(copy.deepcopy(self.warmed[1].state_dict()))
        return model, optimizer

    def task_loss(self, predictions: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(predictions, target)

    def from_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        return outputs[0] if self.post is None else self.post(outputs)

    def predicted(self, model: Callable[[Any], Any], batch: Batch) -> tuple[Tensor, Tensor]:
        return self.from_outputs(self.outputs(model, batch[0])), batch[1]

    # The reference.

    def gradient(self, model: Callable[[Any], Any], theta: Sequence[Tensor], batch: Batch, loss: LearnedLoss) -> Any:
        """Return the gradient by θ that one forward gives the step, as a function of θ and φ."""
        outputs, target = self.outputs(model, batch[0]), batch[1]
        own = self.own_loss(theta, outputs, target)
        tau = torch.autograd.grad(own, outputs, create_graph=True)
        m = self.applied(tau, outputs, target, loss)
        parts: list[Tensor] = [(applied - t) for applied, t in zip(m, tau)]
        starts: list[Tensor] = [own, *outputs]
        if self.objective == "alone":
            starts, parts = outputs, m
        else:
            parts.insert(0, torch.ones_like(own))
        return torch.autograd.grad(starts, theta, parts, create_graph=True, allow_unused=True)

    def applied(
        self, tau: Sequence[Tensor], outputs: Sequence[Tensor], target: Tensor, loss: LearnedLoss
    ) -> list[Tensor]:
        """Return m of each output."""
        if self.objective == "own":
            return list(tau)
        p = self.from_outputs(outputs).softmax(1)
        y = F.one_hot(target, p.shape[1]).movedim(-1, 1).to(p)
        learned = loss.pairwise(p, y).sum() / target.numel()  # over classes the sum, over instances the mean
        if self.objective == "alone":
            learned = learned / p.shape[1]
        rho = torch.autograd.grad(learned, list(outputs), create_graph=True)
        if self.objective == "alone":
            return list(rho)
        bent = [t + r for t, r in zip(tau, rho)]
        return [b * (t.norm() / b.norm() if b.norm() > t.norm() else 1.0) for t, b in zip(tau, bent)]

    def unrolled(self) -> Hypergradient:
        """Return the hypergradient by a double backward through all steps at once."""
        model, optimizer = self.started_twin()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        names = {id(p): name for name, p in model.named_parameters()}
        theta = [p.detach().clone().requires_grad_() for p in parameters]
        log_lr = torch.zeros(len(optimizer.param_groups), dtype=torch.float64, requires_grad=True)
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        torch.manual_seed(5)

        def at(values: Sequence[Tensor]) -> Callable[[Any], Any]:
            named = {names[id(p)]: value for p, value in zip(parameters, values)}
            return lambda x: functional_call(model, named, (x,))

        values: list[Tensor] = list(theta)
        for k, batches in enumerate(self.batches):
            found: list[Any] = [None] * len(values)
            for batch in batches:
                for i, part in enumerate(self.gradient(at(values), values, batch, self.loss)):
                    if part is not None:
                        part = part * self.factor / len(batches)
                        found[i] = part if found[i] is None else found[i] + part
            active = [i for i, g in enumerate(found) if g is not None]
            g = self._clipped([found[i] for i in active])
            moved = differentiable_step(optimizer, [parameters[i] for i in active], [values[i] for i in active], g)
            for i, new in zip(active, moved):
                step = new - values[i]
                if k == self.inner - 1:
                    step = log_lr[group_of[id(parameters[i])]].exp() * step
                values[i] = values[i] + step
        value = self.task_loss(*self.predicted(at(values), self.meta_batch))
        phi = dict(self.loss.named_parameters())
        by_phi = torch.autograd.grad(value, [*phi.values(), log_lr], allow_unused=True, materialize_grads=True)
        return Hypergradient(dict(zip(phi, by_phi)), by_phi[-1], value.detach())

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        holders = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for holder, g in zip(holders, gradients):
            holder.grad = g.detach().clone()
        told = self.clip(holders)  # type: ignore[arg-type]
        if told is None:
            return gradients
        if hasattr(told, "max_value"):
            return [g.clamp(-told.max_value, told.max_value) for g in gradients]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        return [g * (told.max_norm / (norm + 1e-6)).clamp(max=1.0) for g in gradients]

    def plain(self, loss: LearnedLoss | None = None, log_lr: Sequence[float] = ()) -> tuple[nn.Module, float, Tensor]:
        """Train as one would without the package; return the model, L_T, and the random state between the two.

        Args:
            loss: In place of :attr:`loss`.
            log_lr: Added to the logarithm of each group's learning rate in the last step.
        """
        model, optimizer = self.started_twin()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        torch.manual_seed(5)
        for k, batches in enumerate(self.batches):
            optimizer.zero_grad()
            for batch in batches:
                for p, g in zip(parameters, self.gradient(model, parameters, batch, loss or self.loss)):
                    if g is not None:
                        g = g.detach() * self.factor / len(batches)
                        p.grad = g if p.grad is None else p.grad + g
            self.clip(parameters)  # type: ignore[arg-type]
            if k == self.inner - 1:
                for group, shift in zip(optimizer.param_groups, log_lr):
                    group["lr"] = group["lr"] * math.exp(shift)
            optimizer.step()
        random_state, after = torch.get_rng_state(), copy.deepcopy(model)
        with torch.no_grad():
            return after, float(self.task_loss(*self.predicted(model, self.meta_batch))), random_state

    # The engine.

    @property
    def trained(self) -> TrainingObjective:
        if self.objective == "own":
            return OwnLoss()
        return LearnedAlone(self.loss) if self.objective == "alone" else BentLoss(self.loss)

    def recorded(self, method: str | JacobianProduct) -> tuple[nn.Module, list[BaseStep]]:
        """Take the step(s) through the engine, ready for ``hypergradient``."""
        model, optimizer = self.start()
        torch.manual_seed(5)
        steps = []
        for batches in self.batches:
            step = BaseStep(model, optimizer, lambda batch: self.predicted(model, batch), method)
            optimizer.zero_grad()
            for batch in batches:
                own: Any = partial(self._own_loss, step.parameters)
                if self.post is not None:
                    own = self.own_loss(step.parameters, self._observed(step, batch), batch[1])
                elif self.inner == 1:
                    own = own(*step.forward(batch))
                else:
                    step.forward(batch)
                (step.descend(self.trained, own) * (self.factor / len(batches))).backward()
            step.step(self.clip([p for p in step.parameters if p.grad is not None]))
            steps.append(step)
        return model, steps

    def _own_loss(self, theta: list[Tensor], predictions: Tensor, target: Tensor) -> Tensor:
        return self.own_loss(theta, [predictions], target)

    def _observed(self, step: BaseStep, batch: Batch) -> list[Tensor]:
        """Let the step take in a forward whose outputs are not the predictions."""
        random_state, buffers = RandomState.capture(step.device), step.model.buffers()
        with step.jvp.keeping(step.module) as kept:
            outputs = self.outputs(step.module, batch[0])

        def replay(using: Any) -> list[Tensor]:
            with using(kept):
                return self.outputs(step.module, batch[0])

        leaves = [o.detach().requires_grad_() for o in outputs]
        recorded = RecordedForward(replay, random_state, buffers, [o.detach() for o in outputs])
        predicted = Predicted(outputs, leaves, self.from_outputs(leaves), batch[1])
        step.forwards.append(BaseForward(recorded, predicted))
        return outputs

    def by_engine(self, method: str | JacobianProduct) -> Hypergradient:
        """Return the engine's hypergradient of the step(s)."""
        _, steps = self.recorded(method)
        return hypergradient(steps, self.task_loss, self.meta_batch, log_lr=True)

    # The comparison.

    def slopes_along(self, directions: Tensor, size: float = 1e-5) -> Tensor:
        """Return the central differences of L_T along each of ``directions`` in the space of φ."""
        phi = parameters_to_vector(self.loss.parameters()).detach()
        moved = copy.deepcopy(self.loss)

        def after(shift: Tensor) -> float:
            vector_to_parameters(phi + shift, moved.parameters())
            return self.plain(moved)[1]

        found = [(after(size * d) - after(-size * d)) / (2 * size) for d in directions]
        return torch.tensor(found, dtype=torch.float64)

    def slopes_by_log_lr(self, size: float = 1e-4) -> Tensor:
        """Return the central differences of L_T by each group's log α."""
        shifts = (size * torch.eye(len(self.warmed[1].param_groups), dtype=torch.float64)).tolist()
        ends = [(self.plain(log_lr=s)[1], self.plain(log_lr=[-x for x in s])[1]) for s in shifts]
        return torch.tensor([(up - down) / (2 * size) for up, down in ends], dtype=torch.float64)

    def check(
        self, methods: Sequence[str] = METHODS, unrolled: bool = True, differences: bool = True, lr: bool = True
    ) -> None:
        """Hold the ways to the hypergradient against the unrolled step, and that against central differences.

        Args:
            methods: The ways.
            unrolled: Whether the step can be unrolled; else the first way is held against central differences.
            differences: Whether a difference sees what a gradient sees.
            lr: Whether the step is proportional to the learning rate that its group has now.
        """
        results = {method: self.by_engine(method) for method in methods}
        reference, value = self.unrolled() if unrolled else results[methods[0]], self.plain()[1]
        for method, found in results.items():
            if self.objective != "own":
                error = relative_error(flat(found.loss), flat(reference.loss))
                assert error < (1e-4 if method == "finite_difference" else 1e-7), (method, error)
            torch.testing.assert_close(found.log_lr, reference.log_lr, rtol=1e-7, atol=1e-12)
            assert abs(float(found.task_loss) - value) < 1e-9
        assert abs(float(reference.task_loss) - value) < 1e-8  # some optimizers count in single precision
        if not differences:
            return
        assert not lr or relative_error(reference.log_lr, self.slopes_by_log_lr()) < 1e-5
        if self.objective != "own":
            generator = torch.Generator().manual_seed(6)
            directions = torch.randn(2, len(flat(reference.loss)), dtype=torch.float64, generator=generator)
            directions /= directions.norm(dim=1, keepdim=True)
            assert relative_error(directions @ flat(reference.loss), self.slopes_along(directions)) < 1e-5


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def differentiable_step(
    optimizer: Optimizer, parameters: Sequence[Tensor], values: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Return ``θ' = U(θ, s, g)`` of the optimizer's parameters at these values, by its own differentiable step."""
    if type(optimizer) is optim.SGD:  # by its formula, since torch detaches the first momentum buffer
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        return [_sgd_step(group_of[id(p)], optimizer.state[p], v, g) for p, v, g in zip(parameters, values, gradients)]
    place = {id(p): i for i, p in enumerate(parameters)}
    moved = [v.clone() for v in values]
    twin = copy.deepcopy(optimizer)
    twin.defaults["differentiable"] = True
    torch.set_default_dtype(torch.float64)  # for the optimizers' counters
    try:
        for group, original in zip(twin.param_groups, optimizer.param_groups):
            pairs = [
                (old, moved[place[id(p)]]) for old, p in zip(group["params"], original["params"]) if id(p) in place
            ]
            group.update(params=[new for _, new in pairs], differentiable=True, foreach=False)
            for old, new in pairs:
                state = twin.state.pop(old, {})
                twin.state[new] = {k: s.double() if k in COUNTERS else s for k, s in state.items()}
        for new, g in zip(moved, gradients):
            new.retain_grad()
            new.grad = g
        twin.step()
    finally:
        torch.set_default_dtype(torch.float32)
    return moved


def _sgd_step(group: dict[str, Any], state: dict[str, Any], value: Tensor, gradient: Tensor) -> Tensor:
    d = (-gradient if group["maximize"] else gradient) + group["weight_decay"] * value
    if group["momentum"]:
        known = state.get("momentum_buffer")
        buffer = d if known is None else group["momentum"] * known + (1 - group["dampening"]) * d
        d = d + group["momentum"] * buffer if group["nesterov"] else buffer
    return value - group["lr"] * d
