"""Who learns: a loop of ten lines, its state, what is refused, and the learned rate over its horizon."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_adalfl import (
    AdaLFLConfig,
    BaseStep,
    JacobianProduct,
    LearnedLoss,
    LossNetwork,
    MetaLearner,
    hypergradient,
)
from lightning_adalfl.learning.hypergradient import Hypergradient
from lightning_adalfl.learning.learned_rate import LearnedRate
from lightning_adalfl.losses.descent import Predicted
from lightning_adalfl.losses.training_objective import BentLoss, LearnedAlone, OwnLoss

Batch = tuple[Tensor, Tensor]


def batches(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 4, generator=generator)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def mlp(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def stepped(learner: MetaLearner, model: nn.Module, batch: Batch, own_loss: Any = F.cross_entropy) -> BaseStep:
    """Take one base step, and leave it recorded."""
    step = learner.new_base_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step.descend(learner.objective, own_loss(*step.forward(batch))).backward()
    step.step()
    return step


def run(learner: MetaLearner, steps: int, model: nn.Module | None = None, own_loss: Any = F.cross_entropy) -> nn.Module:
    """Train in the loop of the class's own documentation."""
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train = itertools.islice(batches(1), learner.base_steps, learner.base_steps + steps)
    held_out = itertools.islice(batches(2), learner.meta_steps, None)
    step = learner.new_base_step(model, optimizer)
    for batch in train:
        predictions, target = step.forward(batch)
        optimizer.zero_grad()
        step.descend(learner.objective, own_loss(predictions, target)).backward()
        step.step()
        learner.end_base_step(step, held_out)
    return model


def phi(learner: MetaLearner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learner.learned.items()}


def plain(value: Any) -> Any:
    """Return nested containers with lists in place of tensors."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return (
        value.tolist() if isinstance(value, Tensor) else [plain(v) for v in value] if isinstance(value, list) else value
    )


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def config(**options: Any) -> AdaLFLConfig:
    return AdaLFLConfig(**{"task": "multiclass", "meta_every": 3, "meta_lr": 1e-2, **options})


# A loop of one's own.


@pytest.mark.parametrize("every", [1, 3])
def test_phi_moves_as_often_as_base_steps_have_passed(every: int) -> None:
    learner, model, moves = MetaLearner(config(meta_every=every)), mlp(), []
    learner._optimizer.register_step_post_hook(lambda *_: moves.append(1))
    counts = [len(moves) for _ in range(7) if run(learner, 1, model)]
    assert counts == [k // every * every for k in range(1, 8)]
    assert (learner.base_steps, learner.meta_steps) == (7, 7 // every)


def test_every_move_is_along_the_gradient_at_the_phi_of_that_move() -> None:
    """Three moves of Adam at one φ after another, with the same predictions and h."""
    learner = MetaLearner(config())
    run(learner, 2)
    twin, (batch, meta_batch) = copy.deepcopy(learner), itertools.islice(batches(5), 2)
    learner.meta_step(stepped(learner, mlp(), batch), meta_batch)
    step = stepped(twin, mlp(), batch)
    twin.objective.take_units([forward.descent for forward in step.forwards], None)
    found = hypergradient(step, twin.task_loss, meta_batch)
    adam = torch.optim.Adam(twin.loss.parameters(), lr=1e-2, eps=1e-15)
    for _ in range(3):
        for name, gradient in found.at_present().items():
            twin.learned[name].grad = gradient
        adam.step()
    assert same(phi(learner), phi(twin))
    torch.testing.assert_close(learner.last_step.influence, found.influence)


def test_it_begins_as_the_users_own_training_and_learns() -> None:
    """To the bit until the first meta step; after it the slope is bent."""
    own = run(MetaLearner(config(learn="nothing")), 5).state_dict()
    assert same(run(MetaLearner(config(meta_every=None)), 5).state_dict(), own)
    assert same(run(MetaLearner(config(meta_every=5)), 5).state_dict(), own)
    assert not same(run(MetaLearner(config(meta_every=4)), 5).state_dict(), own)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_project_in_other_units_is_the_same_project(weighted: bool) -> None:
    """Targets in other units, and a loss with a factor: the same predictions, in these units, to float tolerance."""

    def trained(unit: float, origin: float, factor: float) -> Tensor:
        torch.manual_seed(0)
        x = torch.randn(64, 3, dtype=torch.float64)
        right = x[:, :1].sin()
        y = right + (torch.rand_like(right) < 0.3) * 3
        weight = [torch.rand_like(y).round()] if weighted else []
        model = nn.Linear(3, 1).double()
        learner = MetaLearner(AdaLFLConfig("regression", meta_every=2, meta_lr=1e-2))
        learner.loss.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / factor)  # whose steps are the same in any units
        step = learner.new_base_step(model, optimizer, lambda batch: (origin + unit * model(batch[0]), *batch[1:]))
        for _ in range(12):
            f, target, *w = step.forward((x, origin + unit * y, *weight))
            squares = (f - target).square() / unit**2
            loss = factor * (F.mse_loss(f, target) / unit**2 if not w else (squares * w[0]).sum() / w[0].sum())
            optimizer.zero_grad()
            step.descend(learner.objective, loss).backward()
            step.step()
            learner.end_base_step(step, itertools.repeat((x, origin + unit * right)))
        return model(x).detach()

    plain = trained(1.0, 0.0, 1.0)
    for unit, origin, factor in ((100.0, 0.0, 1.0), (1.0, 50.0, 1.0), (0.01, -3.0, 7.0)):
        torch.testing.assert_close(trained(unit, origin, factor), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own_loss", [True, False])
@pytest.mark.parametrize("learn", ["loss", "lr", "both", "nothing"])
def test_what_is_learned_and_logged(learn: str, own_loss: bool) -> None:
    learns_loss, learns_rate = learn in ("loss", "both"), learn in ("lr", "both")
    own_loss = own_loss or not learns_loss
    learner = MetaLearner(config(learn=learn, own_loss=own_loss))
    assert type(learner.objective) is (OwnLoss if not learns_loss else BentLoss if own_loss else LearnedAlone)
    before = phi(learner)
    run(learner, 3)
    after, moved = phi(learner), ["linear.2.weight"] * learns_loss + ["log_lr_scale"] * learns_rate
    assert all(not torch.equal(after[name], before[name]) for name in moved)
    assert ("log_lr_scale" in after) == learns_rate == (learner.lr_scale != 1.0)
    names = {"task_loss"}
    for more, is_there in (
        ({"meta_grad_norm", "skipped_meta_steps"}, learn != "nothing"),
        ({"learned_loss"}, learns_loss),
        ({"implied_lr"}, learns_loss or learns_rate),
        ({"evidence"}, learn != "lr" and own_loss),
        ({"consensus"}, learns_loss and own_loss),
        ({"lr_scale"}, learns_rate),
    ):
        names |= more if is_there else set()
    assert set(learner.scalars) == {f"adalfl/{name}" for name in names}
    assert all(torch.isfinite(value) for value in learner.scalars.values())


def test_making_a_learner_draws_no_random_number_of_others_and_changes_no_default() -> None:
    def drawn() -> tuple[Any, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(())), torch.get_default_dtype()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    learner = MetaLearner(config())
    assert drawn() == expected
    # An optimizer that is stepped as a shadow: its counters are of double precision, and the process' default is not.
    model = mlp()
    step = learner.new_base_step(model, torch.optim.NAdam(model.parameters()))
    step.descend(learner.objective, F.cross_entropy(*step.forward(next(batches(1))))).backward()
    step.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_default_dtype", lambda dtype: pytest.fail("changes the process' default"))
        learner.meta_step(step, next(batches(2)))


def test_the_function_does_not_hide_the_package() -> None:
    import lightning_adalfl.learning.shadow_optimizer as shadow_optimizer

    assert shadow_optimizer.ShadowOptimizer.__module__ == "lightning_adalfl.learning.shadow_optimizer"
    assert callable(hypergradient)


# What is given.


def test_a_loss_that_is_given_is_used_as_it_is_and_not_shared(tmp_path: Path) -> None:
    given = LossNetwork("multiclass", hidden=(5,))
    given.save(tmp_path / "loss.safetensors")
    expected = {name: value.clone() for name, value in given.state_dict().items()}
    for loss in (given, tmp_path / "loss.safetensors"):
        learner, other = (MetaLearner(config(loss=loss)) for _ in range(2))
        assert same(dict(learner.loss.state_dict()), expected)
        assert learner.is_initialised == (loss is not given)
        run(learner, 3)
        assert not same(dict(learner.loss.state_dict()), expected)
        assert same(dict(other.loss.state_dict()), expected)
        assert same(given.state_dict(), expected)


class Forgetful(LearnedLoss):
    def __init__(self, task: str, width: int = 3) -> None:
        super().__init__(task)
        self.weight = nn.Parameter(torch.ones(width))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square() * self.weight.sum()


def test_losses_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`loss` must be one of 'network', .*; got 'x'"):
        MetaLearner(config(loss="x"))
    with pytest.raises(ValueError, match="it is a folder; name the file"):
        MetaLearner(config(loss=tmp_path))
    with pytest.raises(ValueError, match=r"`loss` '.*none.safetensors' cannot be used: cannot read .* no such file"):
        MetaLearner(config(loss=tmp_path / "none.safetensors"))
    LossNetwork("binary").save(tmp_path / "binary.safetensors")
    with pytest.raises(ValueError, match=r"`loss` '.*' is for task 'binary' and `task` is 'multiclass': its pred"):
        MetaLearner(config(loss=tmp_path / "binary.safetensors"))
    # Before the first base step, and not at the first checkpoint.
    with pytest.raises(TypeError, match=r"Forgetful cannot be saved: its argument `width` cannot be read back"):
        MetaLearner(config(loss=Forgetful("multiclass")))


class Margin(LearnedLoss):
    """A contributor's representation: what it learns is how much a wrong pair weighs."""

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.logit = nn.Parameter(torch.zeros(()))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.logit.exp() * (prediction - target).abs().square()


class Central(JacobianProduct):
    """A contributor's way to h."""

    is_exact = False
    calls = 0

    def __call__(self, model: Any, forward: Any, before: Any, direction: Any) -> list[Tensor]:
        Central.calls += 1
        with torch.no_grad():
            up, down = (
                model.at(forward, {i: p + size * u for (i, p), u in zip(before.items(), direction)}, self.using)
                for size in (1e-2, -1e-2)
            )
        return [(a - b) / 2e-2 for a, b in zip(up, down)]


@pytest.mark.parametrize("own_loss", [True, False])
def test_a_contributors_loss_and_way(own_loss: bool) -> None:
    learner = MetaLearner(config(loss=Margin("multiclass"), hypergradient=Central(), own_loss=own_loss))
    exact = MetaLearner(config(loss=Margin("multiclass"), own_loss=own_loss))
    for one in (learner, exact):
        run(one, 9)
    assert Central.calls > 0
    assert learner.loss.logit != 0
    torch.testing.assert_close(learner.loss.logit, exact.loss.logit, rtol=1e-2, atol=1e-4)
    again = MetaLearner.from_state({**learner.state_dict(), "config": exact.config.to_dict()})
    assert same(phi(again), phi(learner))


@pytest.mark.parametrize("part", ["linear.0.weight", "linear.1.weight", "label_embedding"])
def test_freezing_a_part_of_phi_moves_the_rest_by_name(part: str) -> None:
    """In the first meta step, whose gradients are of the same shapes."""
    given = LossNetwork("multiclass", hidden=(6, 6), sees_classes=True)
    whole = MetaLearner(config(loss=given))
    dict(given.named_parameters())[part].requires_grad_(False)
    learner = MetaLearner(config(loss=given))
    for one in (whole, learner):
        one.meta_step(stepped(one, mlp(), next(batches(1))), next(batches(2)))
    assert learner.learned.keys() == whole.learned.keys() - {part}
    assert torch.equal(learner.loss.state_dict()[part], given.state_dict()[part])
    for name, value in learner.learned.items():
        torch.testing.assert_close(value, whole.learned[name])
        assert not torch.equal(value, given.state_dict()[name])


def test_a_part_of_phi_that_is_frozen_later_stays_and_the_rest_learns_on() -> None:
    learner = MetaLearner(config())
    run(learner, 6)
    frozen = learner.loss.linear[1].weight.requires_grad_(False).detach().clone()
    before = phi(learner)
    run(learner, 6)
    assert torch.equal(learner.loss.linear[1].weight, frozen)
    assert all(not torch.equal(phi(learner)[f"linear.{k}.weight"], before[f"linear.{k}.weight"]) for k in (0, 2))


# The task loss.


@pytest.mark.parametrize(
    ("task_loss", "message"),
    [
        (
            lambda f, y: F.cross_entropy(f, y, reduction="none"),
            r"must return a scalar mean; got torch.Size\(\[16",
        ),
        (lambda f, y: 0.5, "must return a scalar mean; got float"),
        (lambda f, y: (f.argmax(1) == y).float().mean(), "`task_loss` cannot be differentiated; leave out `argmax`"),
        (lambda f, y: F.cross_entropy(f.detach(), y), "`task_loss` cannot be differentiated"),
        (
            lambda f, y: F.cross_entropy(f, y, reduction="sum"),
            r"must return a mean; got \S+, and \S+ for the batch twice. Divide the sum",
        ),
    ],
)
def test_a_task_loss_that_cannot_be_used_is_refused_at_the_first_forward(task_loss: Any, message: str) -> None:
    learner, model = MetaLearner(config(task_loss=task_loss)), mlp()
    with pytest.raises(ValueError, match=message):
        run(learner, 1, model)
    assert same(model.state_dict(), mlp().state_dict())


@pytest.mark.parametrize("target", [torch.tensor([0, 1, 3]), torch.zeros(4, dtype=torch.long), torch.zeros(3)])
def test_targets_that_do_not_fit_are_refused_at_the_first_forward(target: Tensor) -> None:
    for own_loss in (True, False):
        step = MetaLearner(config(own_loss=own_loss)).new_base_step(model := mlp(), torch.optim.SGD(model.parameters()))
        with pytest.raises(ValueError, match="`target` must"):
            step.forward((torch.randn(3, 4), target))


def gaussian(predictions: Tensor, target: Tensor) -> Tensor:
    mean, log_variance = predictions.unbind(1)
    return F.gaussian_nll_loss(mean, target.float(), log_variance.exp())


def test_a_loss_of_two_outputs_and_one_target_trains_on_with_a_warning() -> None:
    """A Gaussian's mean and variance make no pair with a target; the user's own task loss knows what they are."""
    learner = MetaLearner(config(task="regression", task_loss=gaussian))
    with pytest.warns(UserWarning, match=r"No shape is learned: `target` must have the shape .*Training goes on"):
        model = run(learner, 6, mlp(2), gaussian)
    assert type(learner.objective) is OwnLoss
    assert learner.meta_steps == 2
    plain = run(MetaLearner(config(task="regression", task_loss=gaussian, learn="nothing")), 6, mlp(2), gaussian)
    assert same(model.state_dict(), plain.state_dict())
    for options in ({"task_loss": "bounded"}, {"own_loss": False}):
        with pytest.raises(ValueError, match="`target` must have the shape of `predictions`"):
            run(MetaLearner(config(**{"task": "regression", "task_loss": gaussian, **options})), 1, mlp(2), gaussian)


def test_weights_reach_the_task_loss() -> None:
    seen: list[int] = []

    def weighted(predictions: Tensor, target: Tensor, *weight: Tensor) -> Tensor:
        seen.append(len(weight))
        return F.cross_entropy(predictions, target)

    for weight in ([], [torch.ones(16)]):
        learner, (x, y) = MetaLearner(config(task_loss=weighted)), next(batches(1))
        learner.check(Predicted.direct(mlp()(x), y, *weight))
    assert seen == [0, 0, 1]  # without weights the batch is tried twice over, too


# What is not finite, and what is counted.


@pytest.mark.parametrize("options", [{}, {"learn": "both"}, {"meta_optimizer": "SGD"}])
@pytest.mark.parametrize("after", [0, 6])
def test_a_hypergradient_that_is_not_finite_changes_nothing_and_is_counted(options: dict[str, Any], after: int) -> None:
    """Neither φ nor moments nor their counters, in the first meta step and later; and the next one moves on."""
    learner = MetaLearner(config(**options))
    run(learner, after)
    before, moments = phi(learner), copy.deepcopy(learner._optimizer.state_dict()["state"])
    x, y = next(batches(1))
    learner.meta_step(stepped(learner, mlp(), (x, y)), (x * torch.nan, y))
    assert same(phi(learner), before)
    now = learner._optimizer.state_dict()["state"]
    zeros = {p: {k: torch.zeros_like(v) for k, v in s.items() if isinstance(v, Tensor)} for p, s in now.items()}
    for p, state in now.items():
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        torch.testing.assert_close(tensors, moments.get(p, zeros[p]), rtol=0, atol=0)
    assert int(learner.scalars["adalfl/skipped_meta_steps"]) == int(learner.skipped) == 1
    with pytest.warns(UserWarning, match=r"A meta step before base step \d was left out, since the hypergra"):
        learner.warn_of_skipped()
    learner.warn_of_skipped()  # once
    learner.meta_step(stepped(learner, mlp(), (x, y)), (x, y))
    assert not same(phi(learner), before)
    assert all(torch.isfinite(value).all() for value in phi(learner).values())
    assert int(learner.skipped) == 1


def test_a_task_loss_that_is_not_finite_counts_though_its_gradient_is() -> None:
    def task_loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y) + torch.nan

    learner = MetaLearner(config(task_loss=task_loss))
    before = phi(learner)
    run(learner, 3)
    assert (same(phi(learner), before), int(learner.skipped)) == (True, 1)


def test_a_move_that_phi_does_not_survive_is_taken_back() -> None:
    learner = MetaLearner(config(meta_optimizer="SGD", meta_lr=1e38))
    before = phi(learner)
    run(learner, 3)
    assert (same(phi(learner), before), int(learner.skipped)) == (True, 1)


@pytest.mark.parametrize("learn", ["loss", "lr", "both"])
def test_units_are_taken_once_and_what_has_no_shape_stays_the_users_own(learn: str) -> None:
    learner = MetaLearner(config(learn=learn, lr_meta_lr=0.1))
    run(learner, 3)
    unit = None if learner.loss is None else learner.loss.unit.clone()
    run(learner, 3)
    assert unit is None or torch.equal(learner.loss.unit, unit)
    assert learner.objective.is_zero == (learn == "lr")
    assert learner.last_step.direction is None
    if learn == "lr":
        assert float(learner.scalars["adalfl/implied_lr"]) == pytest.approx(0.1 * learner.lr_scale)
        assert learner.lr_scale != 1


def test_ignored_targets_have_no_part_in_anything() -> None:
    learner = MetaLearner(config(ignore_index=-100, own_loss=False))
    x, y = next(batches(1))
    y = torch.where(torch.arange(16) < 8, y, -100)
    first, second = x, torch.where(torch.arange(16).unsqueeze(1) < 8, x, x * 5)
    results = []
    for inputs in (first, second):
        one = copy.deepcopy(learner)
        one.meta_step(stepped(one, mlp(), (inputs, y), lambda f, y: F.cross_entropy(f, y)), (inputs, y))
        results.append((phi(one), one.scalars))
    for name in results[0][0]:
        torch.testing.assert_close(results[0][0][name], results[1][0][name])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_a_meta_step_needs_an_iterator_and_none_is_due_without_an_interval() -> None:
    learner, loader = MetaLearner(config(meta_every=1)), [next(batches(2))]
    with pytest.raises(TypeError, match=r"`meta_batches` must be an iterator, as `itertools.cycle\(loader\)` is"):
        learner.end_base_step(stepped(learner, mlp(), next(batches(1))), loader)
    learner = MetaLearner(config(meta_every=None))
    learner.end_base_step(stepped(learner, mlp(), next(batches(1))))
    assert (learner.base_steps, learner.meta_steps, learner.is_due) == (1, 0, False)


# State.


@pytest.mark.parametrize(
    "options", [{}, {"learn": "both"}, {"learn": "lr"}, {"own_loss": False}, {"loss": "taylor_cubic"}]
)
@pytest.mark.parametrize("how", ["state", "from_state", "deepcopy", "pickle"])
def test_it_goes_on_from_its_state_to_the_bit(options: dict[str, Any], how: str) -> None:
    """In the middle of an interval; and the learner that it was taken from has no part in it."""
    learner = MetaLearner(config(**options))
    model = run(learner, 13)
    copied = copy.deepcopy(model)
    if how == "deepcopy":
        other = copy.deepcopy(learner)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(learner))
    else:
        state = pickle.loads(pickle.dumps(learner.state_dict()))
        other = MetaLearner.from_state(state) if how == "from_state" else MetaLearner(config(**options))
        if how == "state":
            torch.rand(3)
            other.load_state_dict(state)
    assert other.config == learner.config
    kept = phi(other)
    run(learner, 8, model)
    assert same(phi(other), kept)
    run(other, 8, copied)
    assert same(phi(other), phi(learner))
    assert same(copied.state_dict(), model.state_dict())
    assert (other.base_steps, other.meta_steps) == (21, 7)
    assert plain(other.state_dict()) == plain(learner.state_dict())


def test_a_copy_has_no_part_in_the_step_under_way() -> None:
    learner = MetaLearner(config())
    run(learner, 3)
    assert learner.last_step is not None
    assert (copy.deepcopy(learner).last_step, copy.deepcopy(learner).scalars) == (None, {})


def test_an_offline_phase_counts_no_base_steps_and_its_state_is_whole() -> None:
    """One move a meta step; and the training after it begins with fresh moments, and a full first interval."""
    learner, moves = MetaLearner(config()), []
    learner.start(lr=0.5)
    learner.consensus.mean = torch.tensor(0.5)
    learner._optimizer.register_step_post_hook(lambda *_: moves.append(1))
    assert [group["lr"] for group in learner._optimizer.param_groups] == [0.5]
    for k, (batch, meta_batch) in enumerate(zip(batches(1), itertools.islice(batches(2), 3))):
        learner.meta_step([stepped(learner, mlp(), batch)], meta_batch)
        assert len(moves) == k + 1
        assert same(phi(MetaLearner.from_state(learner.state_dict())), phi(learner))
    learner.finish_offline()
    assert (learner.is_initialised, learner.meta_steps, learner.scalars) == (True, 0, {})
    assert float(learner.consensus.mean) == 0
    assert (learner._optimizer.state, learner._optimizer.param_groups[0]["lr"]) == ({}, 1e-2)
    learner._optimizer.register_step_post_hook(lambda *_: moves.append(1))
    run(learner, 3)
    assert len(moves) == 6


def test_phi_is_set_by_name() -> None:
    learner, given = MetaLearner(config()), LossNetwork("multiclass", bias=True, sees_classes=True)
    learner.set_phi(given.state_dict())
    assert same(dict(learner.loss.state_dict()), dict(given.state_dict()))
    assert not same(run(learner, 1).state_dict(), run(MetaLearner(config(learn="nothing")), 1).state_dict())
    with pytest.raises(ValueError, match="there is no learned loss to set: `learn` is neither 'loss' nor 'both'"):
        MetaLearner(config(learn="lr")).set_phi({})


def test_it_follows_the_model_with_all_that_it_has_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """φ, the rate, a task loss that is a module, and the moments; the meta optimizer goes on holding them."""
    learner = MetaLearner(config(learn="both", task_loss=nn.CrossEntropyLoss(torch.ones(3))))
    run(learner, 3)
    before, held = plain(learner.state_dict()["meta_optimizer"]), [id(p) for p in learner.learned.values()]
    moved: list[Any] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append((self, device)))
    model = mlp()
    learner.new_base_step(model, torch.optim.SGD(model.parameters()))
    assert moved == [(learner.loss, torch.device("cpu")), (learner.config.task_loss, torch.device("cpu"))]
    assert plain(learner.state_dict()["meta_optimizer"]) == before
    assert [id(p) for group in learner._optimizer.param_groups for p in group["params"]] == held
    assert learner.to("cpu") is learner


def test_what_is_logged_is_of_the_device_that_it_was_learned_on() -> None:
    learner = MetaLearner(config())
    run(learner, 3)
    learner.to("meta")
    assert learner.scalars["adalfl/learned_loss"].device.type == "cpu"


# The learned rate.


def test_earlier_steps_are_those_since_an_average_that_forgets() -> None:
    rate, parameters = LearnedRate(40), [torch.zeros(3), torch.zeros(2, 2)]
    assert rate.along(parameters) is None
    path = [[torch.full_like(p, value) for p in parameters] for value in (1.0, 5.0, -7.0)]
    for step, values in zip((10, 20, 30), path):
        rate.add(values, step)
    rate.add([p + 100.0 for p in parameters], 35)  # between two tenth base steps
    average = 0.75 * (0.75 * 1.0 + 0.25 * 5.0) + 0.25 * -7.0
    for moved in rate.along([p + 2.0 for p in parameters]) or []:
        torch.testing.assert_close(moved, torch.full_like(moved, 2.0 - average))
    torch.testing.assert_close(path[0][0], torch.ones(3))  # what it was given is left alone
    last_alone, since_the_last = LearnedRate(1), LearnedRate(10)
    for one in (last_alone, since_the_last):
        one.add([torch.zeros(2)], 10)
        one.add([torch.ones(2)], 20)
    assert last_alone.along([torch.ones(2)]) is None
    torch.testing.assert_close(since_the_last.along([torch.full((2,), 4.0)]), [torch.full((2,), 3.0)])


def test_it_begins_anew_with_parameters_that_are_unfrozen_later() -> None:
    rate, parameters = LearnedRate(100), [torch.ones(2)]
    rate.add(parameters, 10)
    parameters.append(torch.ones(3))
    assert rate.along(parameters) is None
    rate.add(parameters, 20)
    assert [float(e.sum()) for e in rate.along(parameters) or []] == [0.0, 0.0]


def test_what_is_saved_of_the_rate_stays_as_it_was() -> None:
    first, second = LearnedRate(100), LearnedRate(100)
    first.add([torch.ones(2), torch.ones(2, dtype=torch.complex64)], 10)
    saved = first.state_dict()
    second.load_state_dict(saved)
    for rate in (first, second):
        rate.add([torch.zeros(2), torch.zeros(2, dtype=torch.complex64)], 20)
    torch.testing.assert_close(saved["average"][0], torch.ones(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict())


def test_its_gradient_is_that_of_the_last_step_and_of_those_before() -> None:
    rate, value = LearnedRate(100), torch.zeros(())
    by_group = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert float(rate.gradient(Hypergradient({}, by_group, value))) == 0.75
    assert float(rate.gradient(Hypergradient({}, by_group, value, along=torch.tensor(2.0)))) == 2.75
    assert rate.gradient(Hypergradient({}, None, value, along=torch.tensor(2.0))).dtype == torch.float32


@pytest.mark.parametrize("lr", [1e-3, 30.0])
def test_a_rate_that_is_too_low_rises_and_one_too_high_falls(lr: float) -> None:
    """In a loop of one's own, whose optimizer steps with the learned rate and keeps its own."""
    torch.manual_seed(1)
    learner, model = MetaLearner(config(learn="lr", lr_meta_lr=0.02)), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step, held_out, rates = learner.new_base_step(model, optimizer), batches(2), []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    for batch in itertools.islice(batches(1), 120):
        optimizer.zero_grad()
        step.descend(learner.objective, F.cross_entropy(*step.forward(batch))).backward()
        step.step()
        learner.end_base_step(step, held_out)
    assert (learner.lr_scale > 1.5) if lr < 1 else (learner.lr_scale < 0.67)
    assert rates[0] == lr
    assert rates[-1] == pytest.approx(lr * learner.lr_scale, rel=0.2)
    assert optimizer.param_groups[0]["lr"] == lr


def test_a_rate_that_is_set_during_a_step_stays() -> None:
    """As a closure may set one."""
    rate, optimizer = LearnedRate(1), torch.optim.SGD([torch.zeros(1)], lr=0.1)
    rate.log_scale.data.fill_(1.0)
    for given in (None, 0.3):
        with rate.applied_to(optimizer):
            scaled = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = given or scaled
        assert scaled == pytest.approx(0.1 * rate.scale)
        assert optimizer.param_groups[0]["lr"] == (given or 0.1)


# What a loop of one's own may get wrong.


def test_a_loss_of_another_forward_is_refused() -> None:
    learner, model, batch = MetaLearner(config()), mlp(), next(batches(1))
    step = learner.new_base_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    _, target = step.forward(batch)
    step.descend(learner.objective, F.cross_entropy(model(batch[0]), target)).backward()
    with pytest.raises(ValueError, match=r"does not depend on the predictions .*`BaseStep.forward`.* compute it from"):
        step.step()


def test_parameters_that_the_step_does_not_know_are_refused() -> None:
    learner, model, batch = MetaLearner(config()), mlp(), next(batches(1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = learner.new_base_step(model, optimizer)
    for _ in range(2):
        step.descend(learner.objective, F.cross_entropy(*step.forward(batch))).backward()
        if learner.base_steps:
            break
        step.step()
        learner.end_base_step(step, batches(2))
        model[0].requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"unfrozen, or a group added\. Make a new one, by `MetaLearner.new_base_step`"
    ):
        step.step()
    again = learner.new_base_step(model, optimizer)
    again.descend(learner.objective, F.cross_entropy(*again.forward(batch))).backward()
    again.step()


def test_where_nothing_is_learned_the_loop_is_the_plain_one_with_dropout_too() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    plain = model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x, y in itertools.islice(batches(1), 5):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    found = model()
    run(MetaLearner(AdaLFLConfig("multiclass", learn="nothing", meta_every=1)), 5, found)
    assert same(found.state_dict(), plain.state_dict())


def test_a_task_loss_may_have_one_element() -> None:
    first = MetaLearner(config(task_loss=lambda f, y: F.cross_entropy(f, y).reshape(1)))
    second = MetaLearner(config(task_loss=F.cross_entropy))
    for learner in (first, second):
        run(learner, 4)
    assert same(phi(first), phi(second))


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"loss": "paper"}, {"loss": "ml3"}, "φ does not fit `loss='paper'`: it is of .*relu"),
        ({"loss": "taylor_cubic"}, {"loss": "taylor_cubic_target_powers"}, "φ does not fit `loss='taylor_cubic'`"),
        ({}, {"meta_optimizer": "SGD"}, "`meta_optimizer='SGD'` and this learner has `meta_optimizer='Adam'`; give"),
    ],
)
def test_a_state_of_another_kind_is_refused_though_its_shapes_fit(
    ours: dict[str, Any], theirs: dict[str, Any], message: str
) -> None:
    learner = MetaLearner(AdaLFLConfig.paper("multiclass", **ours))
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(ValueError, match=message):
        learner.load_state_dict(MetaLearner(AdaLFLConfig.paper("multiclass", **theirs)).state_dict())
    assert same(learner.state_dict()["phi"], before["phi"])


def test_a_learner_that_goes_on_has_the_rates_of_its_own_configuration() -> None:
    learner, again = MetaLearner(config(learn="both")), MetaLearner(config(learn="both", meta_lr=0.5))
    run(learner, 4)
    again.load_state_dict(learner.state_dict())
    assert [group["lr"] for group in again._optimizer.param_groups] == [0.5, again.config.lr_meta_lr]
    learner.start(0.25)  # as in an offline phase, which goes on at its own rate
    same_again = MetaLearner(config(learn="both"))
    same_again.load_state_dict(learner.state_dict())
    assert [group["lr"] for group in same_again._optimizer.param_groups] == [0.25, 0.25]


def test_what_is_frozen_of_phi_is_frozen_in_a_learner_made_from_its_state() -> None:
    given = LossNetwork("multiclass", hidden=(6, 6), bias=True)
    given.linear[0].requires_grad_(False)
    learner = MetaLearner(config(loss=given))
    run(learner, 3)
    again = MetaLearner.from_state(learner.state_dict())
    assert again.learned.keys() == learner.learned.keys()
    assert same(phi(again), phi(learner))


def test_a_meta_optimizer_that_cannot_move_phi_is_named() -> None:
    with pytest.raises(ValueError, match="`meta_optimizer='Muon'` cannot move this learned loss or rate"):
        MetaLearner(config(meta_optimizer="Muon"))
    run(MetaLearner(config(meta_optimizer="Adafactor")), 3)


def test_logits_that_a_mask_makes_infinite_are_learned_from_by_differences_too() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.tensor([False, False, False, True]), -torch.inf)

    found = []
    for way in ("forward", "finite_difference"):
        torch.manual_seed(0)
        learner = MetaLearner(config(hypergradient=way))
        run(learner, 4, Masked(4, 4))
        assert int(learner.skipped) == 0
        found.append(learner.scalars["adalfl/meta_grad_norm"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=0.0)
