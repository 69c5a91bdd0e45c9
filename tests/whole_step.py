"""Base steps and the task loss after them as plain training computes them: what every engine is measured against."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from lightning_adalfl.hypergradient import BaseStep, Hypergradient, hypergradient
from lightning_adalfl.losses import LearnedLoss, LossNetwork

METHODS = ("forward", "finite_difference", "reverse")
INPUTS, CLASSES = 6, 4
Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def vectors(generator: torch.Generator) -> Batch:
    x = torch.randn(7, INPUTS, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (7,), generator=generator)


def images(generator: torch.Generator) -> Batch:
    x = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (6,), generator=generator)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3)


def no_clipping(parameters: list[nn.Parameter]) -> None:
    return None


@dataclass
class WholeStep:
    """A base model after some warm-up steps, the batches of its next step(s), and a meta batch.

    Attributes:
        model: Builds the base model f_θ.
        optimizer: Builds its optimizer.
        draw: Draws a batch.
        warm: Plain training steps beforehand, so that the optimizer has a state.
        inner: S_inner.
        accumulate: Forward passes a step.
        clip: Clips the gradients in place, and returns what the engine is told of it.
        task_loss: L_T.
    """

    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[nn.Module], Optimizer] = sgd
    draw: Callable[[torch.Generator], Batch] = vectors
    warm: int = 0
    inner: int = 1
    accumulate: int = 1
    clip: Callable[[list[nn.Parameter]], Any] = no_clipping
    task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    predict: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] = lambda model, batch: (model(batch[0]), batch[1])

    @cached_property
    def loss(self) -> LearnedLoss:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return LossNetwork("multiclass", hidden=(5, 4)).double()

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
        model = self.model()
        optimizer = self.optimizer(model)
        generator = torch.Generator().manual_seed(4)
        for _ in range(self.warm):
            optimizer.zero_grad()
            self.task_loss(*self.predict(model, self.draw(generator))).backward()
            optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    def start(self) -> tuple[nn.Module, Optimizer]:
        """Return the warmed-up model and optimizer, copies that may be spoilt."""
        return copy.deepcopy(self.warmed)

    def plain(self, loss: LearnedLoss | None = None, log_lr: Sequence[float] = ()) -> tuple[nn.Module, float, Tensor]:
        """Train as one would without an engine.

        Args:
            loss: In place of :attr:`loss`.
            log_lr: Added to the logarithm of each group's learning rate in the last step.

        Returns:
            The model after the step(s), L_T on the meta batch, and the random state between the two.
        """
        model, optimizer = self.start()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.manual_seed(5)
        for k, batches in enumerate(self.batches):
            optimizer.zero_grad()
            for batch in batches:
                ((loss or self.loss)(*self.predict(model, batch)) / len(batches)).backward()
            self.clip(parameters)
            if k == self.inner - 1:
                for group, shift in zip(optimizer.param_groups, log_lr):
                    group["lr"] = group["lr"] * math.exp(shift)
            optimizer.step()
        random_state = torch.get_rng_state()
        after = copy.deepcopy(model)
        with torch.no_grad():
            return after, float(self.task_loss(*self.predict(model, self.meta_batch))), random_state

    def recorded(self, method: str, **options: Any) -> tuple[nn.Module, list[BaseStep]]:
        """Take the same step(s) through the engine, ready for ``hypergradient``."""
        model, optimizer = self.start()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.manual_seed(5)
        steps = []
        for batches in self.batches:
            step = BaseStep(
                model, optimizer, lambda batch: self.predict(model, batch), method, chained=self.inner > 1, **options
            )
            optimizer.zero_grad()
            for batch in batches:
                (self.loss(*step.forward(batch)) / len(batches)).backward()
            step.step(self.clip(parameters))
            steps.append(step)
        return model, steps

    def by_engine(self, method: str, epsilon: float = 1e-6) -> Hypergradient:
        """Return the engine's hypergradient of the step(s)."""
        _, steps = self.recorded(method)
        return hypergradient(steps, self.loss, self.task_loss, self.meta_batch, epsilon=epsilon)

    def slopes_along(self, directions: Tensor, size: float = 1e-5) -> Tensor:
        """Return the central differences of L_T along each of ``directions`` in the space of φ."""
        phi = parameters_to_vector(self.loss.parameters()).detach()
        moved = copy.deepcopy(self.loss)

        def after(shift: Tensor) -> float:
            vector_to_parameters(phi + shift, moved.parameters())
            return self.plain(moved)[1]

        return torch.tensor(
            [(after(size * d) - after(-size * d)) / (2 * size) for d in directions], dtype=torch.float64
        )

    def slopes_by_log_lr(self, size: float = 1e-4) -> Tensor:
        """Return the central differences of L_T by each group's log α."""
        count = len(self.warmed[1].param_groups)
        shifts = (size * torch.eye(count, dtype=torch.float64)).tolist()
        return torch.tensor(
            [(self.plain(log_lr=s)[1] - self.plain(log_lr=[-x for x in s])[1]) / (2 * size) for s in shifts],
            dtype=torch.float64,
        )

    def check(self, methods: Sequence[str] = METHODS, central: float = 1e-5, lr: bool = True) -> None:
        """Compare the methods with the last of them, and that one with central differences.

        Args:
            methods: By which to compute the hypergradient.
            central: The relative error allowed against central differences; between exact methods it is 1e-7.
            lr: Whether the step is proportional to the learning rate that its group has now.
        """
        results = {method: self.by_engine(method) for method in methods}
        reference = results[methods[-1]]
        flat = {method: torch.cat([g.flatten() for g in result.loss]) for method, result in results.items()}
        for method in methods[:-1]:
            tolerance = 1e-4 if method == "finite_difference" else 1e-7
            assert relative_error(flat[method], flat[methods[-1]]) < tolerance, method
            torch.testing.assert_close(results[method].log_lr, reference.log_lr, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(results[method].task_loss, reference.task_loss, rtol=1e-9, atol=0)
        directions = torch.randn(
            3, len(flat[methods[-1]]), dtype=torch.float64, generator=torch.Generator().manual_seed(6)
        )
        directions /= directions.norm(dim=1, keepdim=True)
        assert relative_error(directions @ flat[methods[-1]], self.slopes_along(directions)) < central
        assert not lr or relative_error(reference.log_lr, self.slopes_by_log_lr()) < central
        assert abs(float(reference.task_loss) - self.plain()[1]) < 1e-9


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖; an expected zero is an error, since it would prove nothing."""
    assert expected.norm() > 1e-7, f"the reference is as good as zero: {expected.norm()}"
    return float((actual - expected).norm() / expected.norm())


def by_half(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return the parameters in two groups with learning rates of their own."""
    parameters = list(model.parameters())
    middle = len(parameters) // 2
    return [{"params": parameters[:middle], "lr": lr}, {"params": parameters[middle:], "lr": 0.3 * lr}]
