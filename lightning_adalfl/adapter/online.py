"""One fit: around the base step that Lightning takes, then the meta step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adalfl.adapter.lightning_private import loss_of
from lightning_adalfl.adapter.meta_batches import MASKS, EndlessBatches, derived_seed, transferred_meta_batch
from lightning_adalfl.adapter.plugins import GradientPath, LossScale, broadcast, mean_over_processes, own_scale
from lightning_adalfl.adapter.user_step import Found, StepObserver
from lightning_adalfl.learning.base_step import BaseForward, Descent
from lightning_adalfl.learning.hypergradient import Watch
from lightning_adalfl.learning.jvp import JacobianProduct
from lightning_adalfl.learning.meta_learner import MetaLearner
from lightning_adalfl.learning.recorded_forward import Predict, RandomState, RandomStream


class OnlineRun:
    """Algorithm 2 over one fit. Hooks of the optimizer itself bracket its steps, whoever calls them.

    Args:
        module: The user's module, with its trainer.
        learner: Its learner.
        optimizer: The one whose steps are learned from.
        predict: ``adalfl_predict``, checked.
        says_how: Whether that is the user's own.
        meta_loader: Makes the loader of held-out batches.

    Attributes:
        watch: What a callback wants to be called at each meta step; ``None`` for nothing.
        instances: The indices of the instances of the coming batch, if a callback wants them.
        at_rate: While the optimizer steps, what puts its own rate back; closed too where the step fails.
    """

    def __init__(
        self,
        module: Any,
        learner: MetaLearner,
        optimizer: Optimizer,
        predict: Predict,
        says_how: bool,
        meta_loader: Callable[[], Any],
    ) -> None:
        self.module = module
        self.trainer = module.trainer
        self.learner = learner
        self.optimizer = optimizer
        self._predict = predict
        self._says_how = says_how
        self._refresh()
        # The order of the data must be one over processes; the dropout masks need not.
        self.seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**31))
        self.batches = EndlessBatches(meta_loader, self.seed)
        seed = derived_seed(MASKS, self.seed, self.trainer.global_rank)
        self.stream = RandomStream(RandomState.seeded(seed, module.device))
        self._scale = LossScale(self.trainer)
        self._reduce = mean_over_processes(self.trainer)
        self.watch: Watch | None = None
        self.instances: Any = None
        self.at_rate = ExitStack()
        self._others: list[tuple[Tensor, Tensor]] = []
        self._unrecorded: list[Descent] = []
        self._is_checked = self._is_evaluated = False
        broadcast(learner, self.trainer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self.base_step.clear()
        self._release()
        self._observer.end()

    def _release(self) -> None:
        # Its hooks hang on the graph, and the graph on it, which no garbage collector sees through.
        for descent in self._unrecorded:
            descent.release()
        self._unrecorded = []

    def _refresh(self) -> None:
        """Make what looks into the module: its parts, and what the optimizer trains of them."""
        self.base_step = self.learner.new_base_step(self.module, self.optimizer, self._predict)
        self.gradient = GradientPath(self.base_step)
        device, buffers = self.base_step.device, self.base_step.model.buffers
        self._observer = StepObserver(self.module, self._predict, self._says_how, device, buffers)
        self._structure = self._structure_now()

    def _structure_now(self) -> list[tuple[int, ...]]:
        parts = [
            (id(part), hash(name), id(p)) for part in self.module.modules() for name, p in part._parameters.items()
        ]
        trained = [(id(p),) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        return [*parts, *trained]

    def _refresh_if_changed(self) -> None:
        # A callback may have unfrozen layers, which the optimizer trains from now on, or pruned weights.
        is_used = self.learner.is_due or not self.learner.objective.is_zero
        if is_used and not self.base_step.forwards and self._structure_now() != self._structure:
            self._refresh()

    # In the training step.

    def run(self, step: Callable[[], Any], batch: Any) -> tuple[Any, Descent | None]:
        """Run the user's training step; return its output, and what is descended in place of its loss, if anything.

        Args:
            step: Runs it on ``batch``.
            batch: What it is given.
        """
        way = self._begin()
        if self._is_checked and way is None and self.learner.objective.is_zero:
            return step(), None
        with self._observer.observing(batch, way):
            output = step()
        loss = loss_of(output)
        descent = None
        if isinstance(loss, Tensor) and loss.requires_grad and not self._observer.is_spoilt:  # or it skips the batch
            descent = self._descent(loss, self._observer.found(loss))  # type: ignore[arg-type]
        self._observer.end()
        return output, descent

    def _begin(self) -> JacobianProduct | None:
        """Make ready for a training step; return the way in which its forward will be evaluated again, if it will."""
        self._release()
        step = self.base_step
        # Of a step that ended in an error, nothing is left to go backward from; nor where gradients were cleared.
        if step.forwards:
            step.keep(None if all(p.grad is None for p in step.parameters) else True)
        self._refresh_if_changed()
        torch.clear_autocast_cache()
        return self._way

    @property
    def _way(self) -> JacobianProduct | None:
        is_first = not self._is_evaluated and self.learner.config.meta_every is not None
        return self.base_step.jvp if self.learner.is_due or is_first else None

    def _descent(self, loss: Tensor, found: Found) -> Descent:
        predicted, recorded = found
        if not self._is_checked:
            self.learner.check(predicted)
            self._is_checked = True
        descent = self.learner.objective.descend(loss, predicted)
        if recorded is None:
            self._unrecorded.append(descent)
        else:
            self.base_step.forwards.append(BaseForward(recorded, predicted, descent, instances=self.instances))
            own = {id(p) for p in self.base_step.parameters}
            others = [p for o in self.trainer.optimizers for g in o.param_groups for p in g["params"]]
            self._others = [(p, p.detach().clone()) for p in others if id(p) not in own and p.requires_grad]
        return descent

    # Around the optimizer's step.

    def check_evaluation(self) -> None:
        """Evaluate a forward before the first step is taken, so that what cannot be evaluated is refused there."""
        step = self.base_step
        if self._is_evaluated or not step.forwards:
            return
        self._is_evaluated = True
        with self.stream.drawing():
            self.batches.open()
        gradients = step.gradients()
        if not gradients:
            return
        values = {i: step.parameters[i].detach() for i in gradients}
        context = self.trainer.precision_plugin.train_step_context()
        with context, self._observer.state_kept(), self._others_put_back():
            step.jvp.check(step.model, step.forwards[-1].recorded, values)
            step.jvp(step.model, step.forwards[-1].recorded, values, list(gradients.values()))

    def zero_grad(self) -> None:
        """Forget the forwards whose gradients are about to be cleared."""
        self.base_step.keep(False)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.at_rate.enter_context(self.base_step.at_rate(optimizer))
        if self.learner.is_due:
            self._refresh_if_changed()
            self.base_step.before_step()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.at_rate.close()
        step, learner = self.base_step, self.learner
        if all(p.grad is None for p in step.parameters):
            step.clear()
            return
        self._check_descended()
        if learner.is_due and step.forwards:
            step.loss_scale = own_scale(self.trainer)
            step.after_step(self.gradient, self.gradient.passed[-1][1] if self.gradient.passed else None)
            if step.is_recorded:
                self._meta_step()
        # Once a batch may be left out; for ever, nothing would be learned.
        if learner.is_due and not learner.meta_steps and learner.base_steps >= 2 * (learner.config.meta_every or 0):
            raise ValueError(
                f"of {learner.base_steps} steps of {type(optimizer).__name__} none was taken on a loss of the "
                "predictions of `adalfl_predict`, so that nothing can be learned from them. Let "
                "`AdaLFLConfig(optimizer=...)` name the optimizer of the parameters that they depend on."
            )
        self._others = []
        step.clear()
        self.gradient = GradientPath(step)
        learner.count_base_step(step.parameters)
        # In manual optimization a step may be followed by another on the same batch.
        self._observer.expect(self._way)

    def _check_descended(self) -> None:
        """Raise unless the gradient of a step came from a loss that was descended; in automatic optimization it did."""

    def _meta_step(self) -> None:
        learner = self.learner
        with self.stream.drawing(), self.trainer.precision_plugin.train_step_context():
            batch = transferred_meta_batch(self.module, next(self.batches), learner.config)
            with self._observer.state_kept(), self._others_put_back():
                learner.meta_step(self.base_step, batch, all_reduce=self._reduce, scale=self._scale, watch=self.watch)

    @contextmanager
    def _others_put_back(self) -> Iterator[None]:
        """Let the parameters of other optimizers, which may have stepped since, be those of the forward."""
        now = [p.data for p, _ in self._others]
        for p, before in self._others:
            p.data = before
        try:
            yield
        finally:
            for (p, _), value in zip(self._others, now):
                p.data = value

    def state_dict(self) -> dict[str, Any]:
        """Return where the meta batches and their random stream are."""
        return {
            "meta_batches": self.batches.state_dict(),
            "random_state": self.stream.state.to_plain(),
            "loss_scale": self._scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        with self.stream.drawing():
            self.batches.load_state_dict(state["meta_batches"])
        self.stream = RandomStream(RandomState.from_plain(state["random_state"], self.module.device))
        self._scale.load_state_dict(state["loss_scale"])
