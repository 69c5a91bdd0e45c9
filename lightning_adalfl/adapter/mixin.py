"""Lightning's hooks; put left of a LightningModule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_adalfl.adapter import checkpoint as checkpoints
from lightning_adalfl.adapter.checkpoint import PlainHyperparameters, config_from, give_signature, plain_super
from lightning_adalfl.adapter.lightning_private import (
    is_own,
    package_of,
    returns_from_processes,
    step_arguments,
    wants_logs,
)
from lightning_adalfl.adapter.manual import ManualOptimization, ManualRun
from lightning_adalfl.adapter.meta_batches import meta_loader
from lightning_adalfl.adapter.offline import draw_parameters
from lightning_adalfl.adapter.online import OnlineRun
from lightning_adalfl.adapter.plugins import NotedClipping
from lightning_adalfl.adapter.refusals import base_optimizer, check_overrides, check_trainer
from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.learning.meta_learner import MetaLearner

_KEY = "_adalfl"


class AdaLFLMixin(PlainHyperparameters, ManualOptimization, NotedClipping):
    """Trains a LightningModule with a loss that learns (Algorithm 2).

    Put it left of the module::

        class AdaClassifier(AdaLFLMixin, LitClassifier):
            pass

        model = AdaClassifier(lr=0.01, adalfl=AdaLFLConfig(task="multiclass"))

    The module's own ``training_step`` runs as it is, and its own loss is what begins to be descended; see
    :class:`~lightning_adalfl.losses.training_objective.BentLoss` for what a meta step changes. What is learned is no
    part of the module: its parameters, ``state_dict`` and hooks are those of the plain one.

    Args:
        *args: Of the module.
        adalfl: The hyper-parameters. They may be left out where a checkpoint is loaded, which has them.
        **kwargs: Of the module.

    Attributes:
        adalfl: The :class:`~lightning_adalfl.learning.meta_learner.MetaLearner`: the learned loss and its counters.

    Raises:
        TypeError: If ``adalfl`` is of another type, or where a subclass is defined that is no LightningModule, or whose
            own method would hide one of this class.
    """

    if TYPE_CHECKING:  # torch.jit reads the annotations that a class has
        trainer: Any
        adalfl: MetaLearner | None
        _adalfl_run: OnlineRun | None
        _adalfl_processes: list[dict[str, Any]] | None
        _adalfl_offline: Any
    _adalfl_run = None
    _adalfl_processes = None
    _adalfl_offline = None
    _adalfl_comes_back = False

    def __init__(self, *args: Any, adalfl: AdaLFLConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        config = config_from(adalfl)
        plain_super(AdaLFLMixin, self).__init__(*args, **kwargs)  # type: ignore[misc]
        with torch.device("cpu"):  # the module may be built on a device without data, or whose numbers would be drawn
            self.adalfl = None if config is None else MetaLearner(config)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if package_of(cls) is None:
            raise TypeError(
                f"{cls.__name__} is no LightningModule; put AdaLFLMixin left of yours: "
                f"class {cls.__name__}(AdaLFLMixin, YourModule)."
            )
        check_overrides(cls, AdaLFLMixin)
        give_signature(cls, AdaLFLMixin)

    # What a user may override.

    def adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        """Return ``(predictions, target)`` of a batch, or ``(predictions, target, weight)``; by default ``self(x), y``.

        Predictions are raw: logits, or values. The weight, or mask, has the shape of the target. On a training batch it
        is answered with what the training step has computed; on held-out batches it is what predicts, so that it must
        not log or count. The hooks of this class may stand in the module itself or in the subclass.
        """
        own = getattr(super(), "adalfl_predict", None)
        if own is not None:
            return own(batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"a batch is {type(batch).__name__} and not a pair (x, y); override `adalfl_predict(batch)` in "
                f"{type(self).__name__} to return (predictions, target) from it."
            )
        x, y = batch
        return self(x), y  # type: ignore[operator]

    def adalfl_meta_dataloader(self) -> Any:
        """Return the loader of meta batches; by default one over the data that ``meta_data`` names."""
        own = getattr(super(), "adalfl_meta_dataloader", None)
        if own is not None:
            return own()
        return meta_loader(self._trainer, self._adalfl_learner().config)  # type: ignore[attr-defined]

    def adalfl_reset_parameters(self) -> None:
        """Draw the base parameters afresh, for the offline phase; by default ``reset_parameters`` of every submodule.

        Parameters that no submodule draws keep their initial values.
        """
        own = getattr(super(), "adalfl_reset_parameters", None)
        if own is not None:
            return own()
        draw_parameters(self)  # type: ignore[arg-type]

    # What Lightning calls, in its order.

    def setup(self, stage: str | None = None) -> None:
        """Begin a fit afresh, and refuse what cannot be right before anything is spent on it."""
        super().setup(stage)  # type: ignore[misc]
        if stage == "fit":
            self._adalfl_close()
            self._adalfl_processes = None
            self._adalfl_learner()
            check_trainer(self.trainer, self)

    def on_fit_start(self) -> None:
        """Run the offline phase, where a callback asks for one."""
        super().on_fit_start()  # type: ignore[misc]
        learner, trainer = self._adalfl_learner(), self.trainer
        learner.to(self.device)  # type: ignore[attr-defined]
        names = {str(getattr(callback, "monitor", None) or "") for callback in trainer.callbacks}
        watched = sorted(name for name in names if "val" in name)
        if learner.config.meta_data == "val" and learner.config.meta_every is not None and watched:
            rank_zero_warn(
                f"Callbacks monitor {watched}, and with `meta_data='val'` the learned loss is trained on the "
                "validation data, so these metrics are optimistic. Hold out other data for them."
            )
        phase, self._adalfl_offline = self._adalfl_offline, None
        if phase is not None:
            phase()
        if any(p.requires_grad for g in base_optimizer(trainer, learner).param_groups for p in g["params"]):
            # Random states of a resumed run are put back before the loaders draw their order.
            self._adalfl_online()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """See that the run is that of this fit, before its optimizer steps."""
        self._adalfl_online()
        return super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]

    # The compiler would trace into the meta step, which makes and drops graphs of its own.
    @torch.compiler.disable
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run the module's own training step; its loss is returned, or what is descended in place of it."""
        own = super().training_step  # type: ignore[misc]
        if is_own(own):
            return own(batch, batch_idx)
        arguments = step_arguments(own, batch, batch_idx)
        if self._fabric is not None:  # type: ignore[attr-defined]
            raise ValueError(
                "Fabric calls none of the hooks that AdaLFLMixin needs; use MetaLearner in the loop there."
            )
        if self._trainer is None or not self._trainer.training:  # type: ignore[attr-defined]
            return own(*arguments)  # as a `validation_step` of the module's may call it
        run = self._adalfl_online()
        if isinstance(run, ManualRun):
            output, loss = run.run_manual(lambda: own(*arguments), batch)
            if loss is not None:
                self._adalfl_take_step(loss, batch_idx)
            run.end()
            return output
        output, descent = run.run(lambda: own(*arguments), batch)
        if descent is None:
            return output
        return {**output, "loss": descent.loss} if isinstance(output, Mapping) else descent.loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients, and forget the forwards that they came from."""
        self._adalfl_online().zero_grad()
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)  # type: ignore[misc]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the scalars under ``adalfl/``: at the first step, an epoch's last, and where the loggers take them."""
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]
        learner, trainer = self._adalfl_learner(), self.trainer
        if trainer.barebones:
            return
        # Logging costs as much as a small model's step, and the loggers drop what comes in between.
        is_end = learner.base_steps <= 1 or trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if is_end or wants_logs(trainer):
            with warnings.catch_warnings():
                if trainer.global_rank:
                    warnings.simplefilter("ignore")
                learner.warn_of_skipped()
            self.log_dict(learner.scalars, batch_size=1)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is learned under a key of its own: the rest is the plain module's checkpoint."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self.adalfl is not None:
            checkpoints.save(self, self.adalfl, self._adalfl_run, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what is learned; from a plain module's checkpoint, φ stays as it is."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if self.adalfl is None:
            self.adalfl = checkpoints.learner_of(checkpoint)
            return
        self._adalfl_processes = checkpoints.load(self.adalfl, checkpoint)
        if self._adalfl_run is not None:
            # A tuner puts back what it has moved; the random numbers of the run go on.
            self._adalfl_processes = [{**process, "global": None} for process in self._adalfl_processes or ()]
            self._adalfl_close()

    def teardown(self, stage: str) -> None:
        """Let go of what belongs to this fit alone."""
        super().teardown(stage)  # type: ignore[misc]
        if stage == "fit" and self.adalfl is not None:
            self._adalfl_close()
            self.adalfl.to("cpu")
            # A process that was started for this fit gives back its `state_dict` alone.
            self._adalfl_comes_back = returns_from_processes(self.trainer)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the plain module's; at the end of a fit in another process, with what is learned beside it."""
        state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if self._adalfl_comes_back and self.adalfl is not None:
            state[_KEY] = self.adalfl.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the plain module's; what is learned is taken over where it stands beside it."""
        if _KEY in state_dict and self.adalfl is not None:
            self.adalfl.load_state_dict(state_dict[_KEY])
            state_dict = {name: value for name, value in state_dict.items() if name != _KEY}
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    # Of this library.

    def _adalfl_learner(self) -> MetaLearner:
        if self.adalfl is None:
            raise ValueError(
                f"{type(self).__name__} has no configuration to learn with; give one: {type(self).__name__}(..., "
                "adalfl=AdaLFLConfig(task='multiclass')), or `--model.adalfl.task=multiclass` on the command line."
            )
        return self.adalfl

    def _adalfl_predict(self, batch: Any) -> tuple[Tensor, ...]:
        result = self.adalfl_predict(batch)
        is_sequence = isinstance(result, (tuple, list))
        if is_sequence and len(result) in (2, 3) and all(isinstance(item, Tensor) for item in result):
            return tuple(result)
        kinds = [type(item).__name__ for item in result] if is_sequence else type(result).__name__
        raise TypeError(
            f"`adalfl_predict` must return tensors (predictions, target) or (predictions, target, weight); got "
            f"{kinds}. Override it in {type(self).__name__} to pick them from the model's output."
        )

    def _adalfl_online(self) -> OnlineRun:
        """Return the run of this fit, made on demand: a learning-rate finder trains before `on_fit_start`."""
        run, trainer = self._adalfl_run, self.trainer
        if run is not None and run.trainer is trainer and run.optimizer in trainer.optimizers:
            return run
        self._adalfl_close()
        learner = self._adalfl_learner()
        optimizer = base_optimizer(trainer, learner)
        owners = [base for base in type(self).__mro__ if "adalfl_predict" in base.__dict__]
        kind = OnlineRun if self.automatic_optimization else ManualRun  # type: ignore[attr-defined]
        run = kind(self, learner, optimizer, self._adalfl_predict, len(owners) > 1, self.adalfl_meta_dataloader)
        self._adalfl_run = run
        processes, self._adalfl_processes = self._adalfl_processes, None
        checkpoints.resume(self, run, processes)
        return run

    def _adalfl_close(self) -> None:
        run, self._adalfl_run = self._adalfl_run, None
        if run is not None:
            run.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module, as weight averaging makes one, has no part in the fit that is under way.
        return {**super().__getstate__(), "_adalfl_run": None, "_adalfl_offline": None}  # type: ignore[dict-item]
