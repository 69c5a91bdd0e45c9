"""A loss that is the task loss trains as if the library were not there: to the bit, random numbers included."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from projects import INERT, Ada, Plain, assert_same, base_tensors, config, learned_tensors, loaders, make, trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, AdaLFLMixin


class ConvNet(Plain):
    """A residual block, with BatchNorm and dropout."""

    optimizer: type[Optimizer] = SGD

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.model = nn.Conv2d(1, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x.view(-1, 1, 2, 2))
        return self.head((x + self.block(x)).flatten(1))

    def configure_optimizers(self) -> Any:
        decayed = {"params": self.head.parameters(), "weight_decay": 1e-2, "lr": self.lr / 2}
        others = [*self.model.parameters(), *self.block.parameters()]
        return self.optimizer([{"params": others}, decayed], lr=self.lr)


class AdaConvNet(AdaLFLMixin, ConvNet):
    pass


class RandomNumbers(Callback):
    """Keeps what every generator would draw next, at the end of each batch."""

    def __init__(self) -> None:
        self.drawn: list[tuple[bytes, float, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self.drawn.append((torch.rand(3).numpy().tobytes(), random.random(), np.random.rand()))
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])


def run(
    tmp_path: Any, module: Any, *callbacks: Callback, **options: Any
) -> tuple[Any, RandomNumbers, dict[str, Tensor]]:
    numbers = RandomNumbers()
    t = trainer(tmp_path, callbacks=[numbers, *callbacks], **options)
    t.fit(module, *loaders())
    return module, numbers, t.callback_metrics


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW, RMSprop])
def test_with_the_task_loss_for_a_loss_the_run_is_that_of_the_plain_module(tmp_path: Any, optimizer: Any) -> None:
    for kind in (ConvNet, AdaConvNet):
        kind.optimizer = optimizer
    plain, plain_numbers, plain_metrics = run(tmp_path, make(ConvNet))
    adaptive, numbers, metrics = run(tmp_path, make(AdaConvNet, adalfl=INERT))
    assert_same(base_tensors(plain), base_tensors(adaptive))
    assert numbers.drawn == plain_numbers.drawn
    assert {name: metrics[name] for name in plain_metrics} == plain_metrics
    assert plain.block[1].num_batches_tracked == adaptive.block[1].num_batches_tracked == 12
    groups = [t.trainer.optimizers[0].param_groups for t in (plain, adaptive)]
    assert [[len(g["params"]) for g in group] for group in groups] == [[6, 2], [6, 2]]


def test_meta_steps_draw_nothing_from_the_generators_of_the_run_and_count_no_batch(tmp_path: Any) -> None:
    plain, plain_numbers, _ = run(tmp_path, make(Plain))
    adaptive, numbers, _ = run(tmp_path, make(Ada, adalfl=config()))
    assert adaptive.adalfl.meta_steps == 12
    assert numbers.drawn == plain_numbers.drawn
    assert plain.model[1].num_batches_tracked == adaptive.model[1].num_batches_tracked == 12


def test_the_users_optimizer_holds_the_parameters_of_the_plain_module(tmp_path: Any) -> None:
    plain, _, _ = run(tmp_path, make(Plain))
    adaptive, _, _ = run(tmp_path, make(Ada, adalfl=config()))
    held = [t.trainer.optimizers[0].param_groups for t in (plain, adaptive)]
    assert [p.shape for g in held[0] for p in g["params"]] == [p.shape for g in held[1] for p in g["params"]]
    learned = {id(p) for p in adaptive.adalfl.parameters()}
    assert learned.isdisjoint(id(p) for g in held[1] for p in g["params"])


@pytest.mark.parametrize("learn", ["loss", "lr", "both"])
@pytest.mark.parametrize("init", [{"reset": "fresh"}, {"reset": "initial", "inner_steps": 2}, {"imitation_steps": 3}])
def test_the_offline_phase_leaves_the_run_as_if_it_had_not_run(tmp_path: Any, learn: str, init: dict[str, Any]) -> None:
    class Forget(Callback):
        """Throws the learned loss away, so that the rest must not know of it."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert pl_module.adalfl.initialised
            moved = {name: t for name, t in learned_tensors(pl_module).items() if not torch.equal(t, start[name])}
            assert moved
            pl_module.load_state_dict(start, strict=False)

    options = AdaLFLConfig(task="multiclass", learn=learn, online=False)
    module = make(Ada, adalfl=options)
    start = learned_tensors(module)
    without, numbers_without, _ = run(tmp_path, module)
    with_it, numbers, _ = run(tmp_path, make(Ada, adalfl=options), AdaLFLInit(steps=3, lr=1e-2, **init), Forget())
    assert_same(base_tensors(without), base_tensors(with_it))
    assert_same(learned_tensors(without), learned_tensors(with_it))
    assert numbers.drawn == numbers_without.drawn
    states = [t.trainer.optimizers[0].state_dict() for t in (without, with_it)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_metrics_of_the_training_step_are_counted_once(tmp_path: Any) -> None:
    class Counting(Plain):
        def on_train_epoch_end(self) -> None:
            counted.append(int(self.accuracy.tp.sum() + self.accuracy.fn.sum()))

    class AdaCounting(AdaLFLMixin, Counting):
        pass

    counted: list[int] = []
    for options in ({}, {"accumulate_grad_batches": 2}):
        _, _, expected = run(tmp_path, make(Counting), **options)
        _, _, metrics = run(tmp_path, make(AdaCounting, adalfl=INERT), **options)
        assert metrics["train_accuracy"] == expected["train_accuracy"]
    assert counted == [96] * 8


def test_a_second_forward_in_the_training_step_moves_no_statistics(tmp_path: Any) -> None:
    class Noisy(Plain):
        """Looks at its batch twice, the second time with noise."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            self.log("noisy_loss", F.cross_entropy(self.model(x + 1), y))
            return super().training_step(batch, batch_idx)

    class AdaNoisy(AdaLFLMixin, Noisy):
        pass

    once, _, _ = run(tmp_path, make(Ada, adalfl=INERT), max_epochs=1)
    twice, _, metrics = run(tmp_path, make(AdaNoisy, adalfl=INERT), max_epochs=1)
    assert metrics["noisy_loss"] > 0
    assert twice.model[1].num_batches_tracked == once.model[1].num_batches_tracked
