"""Manual optimization: the module's own steps, or the steps of a module that returns a loss, taken here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_adalfl.adapter.lightning_private import loss_of
from lightning_adalfl.adapter.online import OnlineRun
from lightning_adalfl.adapter.user_step import depends
from lightning_adalfl.learning.torch_private import version


class ManualRun(OnlineRun):
    """One fit of a module whose ``automatic_optimization`` is ``False``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._is_own: bool | None = None  # whether the module steps by itself, once that is known
        self._backwards = self._backwards_stepped = 0

    def run_manual(self, step: Callable[[], Any], batch: Any) -> tuple[Any, Tensor | None]:
        """Run a training step of manual optimization; return its output, and a loss that it leaves to be descended."""
        way, before = self._begin(), self._own_work() if self._is_own is None else None
        is_plain = self.learner.config.meta_every is None and self._is_checked and self.learner.objective.is_zero
        with self.at_rate, nullcontext() if is_plain else self._observer.observing(batch, way):
            output = step()
        loss = loss_of(output)
        has_loss = isinstance(loss, Tensor) and loss.requires_grad
        if self._is_own is None:
            works = self._own_work() != before
            self._is_own = works if works or has_loss else None
        return output, None if self._is_own or not has_loss else loss

    def end(self) -> None:
        """Let go of what a training step left."""
        self._observer.end()

    def backward(self, loss: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Go backward from the user's loss in manual optimization; from one of the predictions, bent."""
        self._backwards += 1
        step = self.base_step
        if step.forwards and not any(p.grad is not None and p.grad.any() for p in step.parameters):
            step.keep(None)
        found = self._observer.found(is_certain=False) if self._observer.has_calls else None
        if found is None or not depends(loss, found[0].outputs):
            backward(loss)
            return
        backward(self._descent(loss, found).loss)
        # A second forward on this batch must not be taken for the first.
        self._observer.forget(self._way)

    def _check_descended(self) -> None:
        is_direct, self._backwards_stepped = self._backwards == self._backwards_stepped, self._backwards
        name = type(self.module).__name__
        if is_direct:
            raise ValueError(
                f"{name}.training_step has gone backward by itself, where its loss cannot be learned from. Call "
                "`self.manual_backward(loss)` in place of `loss.backward()`."
            )
        if self.learner.is_due and not self._is_checked:
            raise ValueError(
                f"{name}.training_step has stepped {self.learner.base_steps + 1} times on losses that do not depend on "
                "the predictions of `adalfl_predict`, so that nothing can be learned from them. Return those that the "
                "loss is computed from, or say which optimizer learns from them with `AdaLFLConfig(optimizer=...)`."
            )

    def _own_work(self) -> tuple[Any, ...]:
        """Return what a training step changes that goes backward or steps by itself."""
        gradients = [p.grad for p in self.base_step.parameters if p.grad is not None]
        return self._backwards, self.learner.base_steps, [(id(g), version(g)) for g in gradients]


class ManualOptimization:
    """The hooks of a module whose ``automatic_optimization`` is ``False``."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Go backward from a loss; where it depends on the predictions, its slope is bent on the way."""
        backward = super().manual_backward  # type: ignore[misc]
        run = self._adalfl_run  # type: ignore[attr-defined]
        if not isinstance(run, ManualRun):
            return backward(loss, *args, **kwargs)
        return run.backward(loss, lambda descended: backward(descended, *args, **kwargs))

    def _adalfl_take_step(self, loss: Tensor, batch_idx: int) -> None:
        """Do with a loss what automatic optimization does."""
        module: Any = self
        trainer, given = module.trainer, module.optimizers()
        optimizers = given if isinstance(given, list) else [given]
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            raise ValueError(
                "ReduceLROnPlateau waits for a metric, and in manual optimization Lightning keeps no name of one. Step "
                "it in `on_validation_epoch_end`, leaving it out of `configure_optimizers`, or leave "
                "`automatic_optimization` as it is."
            )

        def closure() -> Tensor:
            for optimizer in trainer.optimizers:
                for callback in trainer.callbacks:
                    callback.on_before_zero_grad(trainer, module, optimizer)
                module.on_before_zero_grad(optimizer)
                module.optimizer_zero_grad(trainer.current_epoch, batch_idx, optimizer)
            module.manual_backward(loss)
            return loss

        self._adalfl_takes_step = True
        try:
            for i, optimizer in enumerate(optimizers):
                module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, closure if i == 0 else lambda: loss)
        finally:
            self._adalfl_takes_step = False
        for config in trainer.lr_scheduler_configs:
            is_step = config.interval == "step"
            count = 1 + (batch_idx if is_step else trainer.current_epoch)
            if (is_step or trainer.is_last_batch) and count % config.frequency == 0:
                module.lr_scheduler_step(config.scheduler, None)
