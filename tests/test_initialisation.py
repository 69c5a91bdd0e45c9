"""AdaLFLInit runs the offline phase once, before training, and checks what it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from projects import (
    UNBOUNDED,
    Ada,
    AdaSmooth,
    Plain,
    assert_same,
    base_tensors,
    config,
    learned_tensors,
    loaders,
    make,
    trainer,
)
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLInit
from lightning_adalfl.adapter.imitation import mismatch


def initialise(tmp_path: Any, module: Any, *callbacks: Any, **options: Any) -> Any:
    """Run the offline phase and one base step that learns nothing."""
    t = trainer(tmp_path, max_steps=1, callbacks=list(callbacks), **options)
    t.fit(module, *loaders())
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "`steps` must be a whole number, 0 or more; got -1"),
        ({"steps": 2.5}, "`steps` must be a whole number, 0 or more; got 2.5"),
        ({"inner_steps": 0}, "`inner_steps` must be a whole number, 1 or more; got 0"),
        ({"imitation_steps": True}, "`imitation_steps` must be a whole number, 0 or more; got True"),
        ({"save_every": 0}, "`save_every` must be a whole number, 1 or more; got 0"),
        ({"lr": 0}, "`lr` must be positive; got 0"),
        ({"lr": float("nan")}, "`lr` must be finite; got nan"),
        ({"lr": "1e-3"}, "`lr` must be a number; got '1e-3'"),
        ({"reset": "never"}, "`reset` must be 'fresh' or 'initial'; got 'never'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        AdaLFLInit(**arguments)


def test_a_module_without_a_learned_loss_is_refused(tmp_path: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"got Plain. Put AdaLFLMixin left of it: class AdaPlain\("):
        initialise(tmp_path, make(Plain), AdaLFLInit(steps=1))


def test_the_recipe_of_the_paper() -> None:
    assert (AdaLFLInit.paper().steps, AdaLFLInit.paper().lr, AdaLFLInit.paper(steps=3).steps) == (2500, 1e-3, 3)


def test_no_steps_leave_the_loss_as_it_was_drawn(tmp_path: Any) -> None:
    module = make(Ada, adalfl=config(online=False))
    start = learned_tensors(module)
    initialise(tmp_path, module, AdaLFLInit(steps=0))
    assert_same(learned_tensors(module), start)
    assert module.adalfl.initialised


@pytest.mark.parametrize("reset", ["fresh", "initial"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_equal_seeds_learn_equal_losses_and_others_do_not(tmp_path: Any, reset: str, inner_steps: int) -> None:
    def learned(seed: int) -> dict[str, torch.Tensor]:
        module = make(Ada, adalfl=config(online=False))
        torch.manual_seed(seed)
        return learned_tensors(initialise(tmp_path, module, AdaLFLInit(4, 1e-2, inner_steps, reset)))

    first = learned(3)
    assert_same(first, learned(3))
    assert any(not torch.equal(value, first[name]) for name, value in learned(4).items())


def test_it_leaves_the_gain_alone(tmp_path: Any) -> None:
    """What is best for a first step from a fresh draw is too much for a training whose rate is right."""
    module = make(Ada, adalfl=config(online=False))
    start = learned_tensors(module)
    initialise(tmp_path, module, AdaLFLInit(steps=5, lr=1e-2))
    moved = {name for name, value in learned_tensors(module).items() if not torch.equal(value, start[name])}
    assert moved
    assert "log_gain" not in moved
    assert float(module.adalfl.log_gain.detach()) == 0


def test_what_it_learns_makes_single_steps_from_fresh_parameters_better(tmp_path: Any) -> None:
    """Its own meta-objective falls: the task loss after one step from a fresh draw."""
    module = make(AdaSmooth, lr=0.1, adalfl=config(online=False, **UNBOUNDED))
    losses: list[float] = []
    step = module.adalfl.step
    module.adalfl.step = lambda gradient: (losses.append(float(gradient.task_loss)), step(gradient))[1]
    initialise(tmp_path, module, AdaLFLInit(steps=100, lr=3e-2))
    assert len(losses) == 100
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])


def test_imitation_makes_the_slope_that_of_the_task_loss(tmp_path: Any) -> None:
    def error(steps: int) -> float:
        module = make(Ada, adalfl=config(online=False, **UNBOUNDED))
        initialise(tmp_path, module, AdaLFLInit(steps=0, imitation_steps=steps))
        predictions, target = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
        return mismatch(module.adalfl.loss, module.adalfl.task_loss, predictions, target).item()

    assert error(300) < 0.2 < error(0)


def test_it_steps_at_the_rates_of_the_base_optimizer_and_trains_what_that_trains(tmp_path: Any) -> None:
    class HeadOnly(Ada):
        def configure_optimizers(self) -> Any:
            self.model[0].requires_grad_(False)
            return SGD(self.model.parameters(), lr=0.5)

    module = make(HeadOnly, adalfl=config(online=False))
    moved: list[list[bool]] = []
    step = module.adalfl.step
    start = [module.model[i].weight.detach().clone() for i in (0, 4)]

    def watched(gradient: Any) -> Any:
        moved.append([not torch.equal(module.model[i].weight, value) for i, value in zip((0, 4), start)])
        return step(gradient)

    module.adalfl.step = watched
    initialise(tmp_path, module, AdaLFLInit(steps=2, reset="initial"))
    assert moved == [[False, True], [False, True]]


def test_a_reset_of_the_users_own_is_called_before_each_step(tmp_path: Any) -> None:
    calls = []

    class Own(Ada):
        def adalfl_reset_parameters(self) -> None:
            calls.append(torch.rand(1).item())
            super().adalfl_reset_parameters()

    module = make(Own, adalfl=config(online=False))
    before = base_tensors(module)
    initialise(tmp_path, module, AdaLFLInit(steps=3), limit_train_batches=0)
    assert len(set(calls)) == 3
    assert_same(base_tensors(module), before)


def test_base_batches_may_come_from_elsewhere(tmp_path: Any) -> None:
    module = make(Ada, adalfl=config(online=False))
    elsewhere = DataLoader([(torch.full((4,), 7.0), 0)] * 8, 4)
    seen: list[float] = []
    predict = module.adalfl_predict
    module.adalfl_predict = lambda batch: (seen.append(float(batch[0].max())), predict(batch))[1]
    initialise(tmp_path, module, AdaLFLInit(steps=2, train_dataloader=elsewhere))
    # Each is seen again where the hypergradient goes back to it, beside two meta batches and the step of the run.
    assert seen.count(7.0) == 4
    assert len(seen) == 7
