"""The Lightning adapter: put left of a LightningModule, it trains it with a loss that learns.

Lightning itself takes the base step, in automatic optimization: the hypergradient needs no graph through that step,
only what went into it and came out of it. So everything that Lightning does around a step (clipping, accumulation,
schedulers, scaling, the module's own hooks) happens as it does without this class, and the meta step follows in
``optimizer_step``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_adalfl.adapter.checkpointing import restore, save
from lightning_adalfl.adapter.forward_memo import ForwardMemo
from lightning_adalfl.adapter.meta_batches import private_meta_loader
from lightning_adalfl.adapter.meta_learner import MetaLearner
from lightning_adalfl.adapter.offline_phase import draw_parameters
from lightning_adalfl.adapter.online_run import OnlineRun
from lightning_adalfl.adapter.requirements import accepts, check_module, check_strategy, warn_of_trained_on_metrics
from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.hypergradient import ClipByNorm, ClipByValue


class AdaLFLMixin(pl.LightningModule):
    """Trains a LightningModule with an adaptive learned loss (Algorithm 2).

    Put it left of the module::

        class AdaClassifier(AdaLFLMixin, LitClassifier):
            pass

        model = AdaClassifier(lr=0.01, adalfl=AdaLFLConfig(task="multiclass"))

    The base step descends the learned loss on what ``adalfl_predict`` returns, with the module's own optimizer. The
    module's ``training_step`` still runs on each batch, without gradients, for what it logs; where it calls the module
    or one of its direct children on the batch, it is answered with the predictions of the base step. It may return
    ``None`` to skip a batch.

    Args:
        *args: Of the module.
        adalfl: The hyper-parameters, or the dictionary of them that a checkpoint holds.
        **kwargs: Of the module.

    Attributes:
        adalfl: The :class:`~lightning_adalfl.adapter.meta_learner.MetaLearner`: the learned loss and its counters.

    Raises:
        TypeError: If ``adalfl`` is not given, or where a subclass is defined whose own ``training_step`` would hide
            this one's.
    """

    def __init__(self, *args: Any, adalfl: AdaLFLConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = AdaLFLConfig.from_dict(adalfl) if isinstance(adalfl, Mapping) else adalfl
        if not isinstance(config, AdaLFLConfig):
            raise TypeError(
                f"`adalfl` must be an AdaLFLConfig, such as AdaLFLConfig(task='multiclass'); got {adalfl!r}."
            )
        self.adalfl = MetaLearner(config)
        # Plain values, so that the checkpoint loads with `weights_only=True`.
        self.save_hyperparameters({"adalfl": config.to_dict()}, logger=self._log_hyperparams)
        # φ has no part in the base backward, which DDP would report; `on_fit_start` keeps it equal over processes.
        names = [f"adalfl.{name}" for name, _ in self.adalfl.named_parameters()]
        ignored = getattr(self, "_ddp_params_and_buffers_to_ignore", [])
        self._ddp_params_and_buffers_to_ignore = [*ignored, *names]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.training_step is not AdaLFLMixin.training_step:
            owner = next(base for base in cls.__mro__ if "training_step" in base.__dict__)
            remedy = (
                "move it to a base class right of AdaLFLMixin"
                if owner is cls
                else f"put AdaLFLMixin left of {owner.__name__}: class {cls.__name__}(AdaLFLMixin, {owner.__name__})"
            )
            raise TypeError(f"{owner.__name__}.training_step hides that of AdaLFLMixin in {cls.__name__}; {remedy}.")

    # What a user may override.

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return ``(predictions, target)`` of a batch; by default ``self(x), y`` of ``x, y = batch``.

        Predictions are raw: logits, or values. It is called on training and on meta batches, on the latter again and
        again, so it must not log or count.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise MisconfigurationException(
                f"a batch is {type(batch).__name__} and not a pair (x, y); override `adalfl_predict(batch)` in "
                f"{type(self).__name__} to return (predictions, target) from it."
            )
        x, y = batch
        return self(x), y

    def adalfl_meta_dataloader(self) -> Any:
        """Return the loader of meta batches; by default a shuffling one over the data that ``meta_data`` names."""
        return private_meta_loader(self.trainer, self.adalfl.config)

    def adalfl_reset_parameters(self) -> None:
        """Draw the base parameters afresh, for the offline phase; by default ``reset_parameters`` of every submodule.

        Parameters that no submodule draws keep their initial values.
        """
        draw_parameters(self, self.adalfl)

    # What Lightning calls.

    def setup(self, stage: str) -> None:
        """Refuse what cannot be right, before anything is spent on it."""
        super().setup(stage)
        if stage == "fit":
            check_module(self)
            check_strategy(self.trainer)

    def configure_optimizers(self) -> Any:
        """Return the module's own optimizers; φ is out of sight of ``self.parameters()`` meanwhile."""
        learner = self._modules.pop("adalfl")
        try:
            optimizers = super().configure_optimizers()
        finally:
            self._modules["adalfl"] = learner
        if optimizers is None:
            raise MisconfigurationException(
                "`configure_optimizers` returned no optimizer, and AdaLFL learns from the steps of one; return it."
            )
        return optimizers

    def on_fit_start(self) -> None:
        """Make the meta optimizer and the meta batches, or take them over from a checkpoint."""
        super().on_fit_start()
        if self.adalfl.config.meta_data == "val" and self.adalfl.config.online:
            warn_of_trained_on_metrics(self.trainer.callbacks)  # type: ignore[attr-defined]
        self._adalfl_run()

    def _adalfl_run(self) -> OnlineRun:
        # Made on demand as well: a learning-rate finder trains before `on_fit_start`.
        if self.adalfl.run is None:
            self.adalfl.run = OnlineRun(self, self.adalfl)
            restore(self, self.adalfl)
        return self.adalfl.run

    # The compiler would trace into the meta step, which makes and drops graphs of its own.
    @torch.compiler.disable
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return M_φ of the batch for Lightning to descend, after the module's own step has logged what it logs."""
        run = self._adalfl_run()
        memo = ForwardMemo(self)
        with memo.recording():
            predictions, target = run.predict(batch)
        output = self._module_step(memo, batch, batch_idx)
        if output is None:
            run.skip()
            return None
        return {**output, "loss": run.objective(predictions, target)}

    def _module_step(self, memo: ForwardMemo, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Run the module's own training step without gradients; ``None`` if it skips the batch."""
        step = super().training_step
        if getattr(step, "__func__", step) is pl.LightningModule.training_step:
            return {}
        if "dataloader_iter" in inspect.signature(step).parameters:
            raise MisconfigurationException(
                "a `training_step` that takes `dataloader_iter` has no batch to learn from; take `batch`."
            )
        with torch.no_grad(), memo.answering():
            output = step(batch, batch_idx) if accepts(step, "batch_idx", 2) else step(batch)
        if output is None:
            return None
        return dict(output) if isinstance(output, Mapping) else {}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the module does, then keep what the step is about to change: this is the last call before it."""
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._adalfl_run().before_step()

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and note how, so that the hypergradient passes through it."""
        value = gradient_clip_val if gradient_clip_val is not None else self.trainer.gradient_clip_val
        algorithm = gradient_clip_algorithm or self.trainer.gradient_clip_algorithm or "norm"
        run = self._adalfl_run()
        if value and run.due:
            if str(getattr(algorithm, "value", algorithm)).lower() == "value":
                run.transform = ClipByValue(float(value))
            else:
                run.transform = ClipByNorm(float(value), run.gradient_norm())
        super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take the base step as the module does, then its meta step (Algorithm 2, lines 5 to 8)."""
        run = self._adalfl_run()
        with run.learned_rate():
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        run.after_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the scalars under ``adalfl/``: at the first step, an epoch's last, and where the loggers take them."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        run, trainer = self.adalfl.run, self.trainer
        if run is None or trainer.barebones:
            return
        # Logging costs as much as a small model's step, and the loggers drop what comes in between.
        is_end = self.adalfl.base_steps <= 1 or trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if is_end or trainer._logger_connector.should_update_logs:
            self.log_dict(self.adalfl.scalars, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep φ and the meta-learning's state under a key of their own: the rest is the plain module's checkpoint."""
        super().on_save_checkpoint(checkpoint)
        save(self, self.adalfl, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over φ and the meta-learning's state; from a plain module's checkpoint, φ stays as it is."""
        super().on_load_checkpoint(checkpoint)
        self.adalfl.load_checkpoint(checkpoint)

    def teardown(self, stage: str) -> None:
        """Drop what belongs to this fit alone; φ and the meta optimizer's state stay."""
        super().teardown(stage)
        if stage == "fit":
            self.adalfl.stop()
