"""What is not supported, each with its remedy."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer

from lightning_adalfl.adapter.lightning_private import is_a
from lightning_adalfl.learning.meta_learner import MetaLearner

# Hooks of the mixin without which a part of it would be switched off in silence.
_NEEDED = """
training_step setup on_fit_start on_train_batch_end configure_gradient_clipping on_save_checkpoint on_load_checkpoint
"""


def check_overrides(cls: type, mixin: type) -> None:
    """Raise a ``TypeError`` if a method hides one of the mixin's without calling it."""
    for name in _NEEDED.split():
        owner = next(base for base in cls.__mro__ if name in base.__dict__)
        if getattr(cls, name) is getattr(mixin, name):
            continue
        code = getattr(inspect.unwrap(owner.__dict__[name]), "__code__", None)
        if code is None or not {"super", "AdaLFLMixin", "clip_gradients"}.isdisjoint(code.co_names):
            continue
        remedy = (
            "move it to a base class right of AdaLFLMixin, or call `super()` in it"
            if owner is cls
            else f"put AdaLFLMixin left of {owner.__name__}: class {cls.__name__}(AdaLFLMixin, {owner.__name__})"
        )
        raise TypeError(f"{owner.__name__}.{name} hides that of AdaLFLMixin in {cls.__name__}; {remedy}.")


def check_trainer(trainer: Any, module: Any) -> None:
    """Raise a ``ValueError`` unless a hypergradient can be computed under the Trainer's strategy."""
    strategy = trainer.strategy
    remedy = "Use `Trainer(strategy='ddp')`, or a module that fits one device."
    if is_a(strategy, "ModelParallelStrategy"):
        _check_sharded(strategy, module, remedy)
    elif not is_a(strategy, "SingleDeviceStrategy", "DDPStrategy") or is_a(strategy, "DeepSpeedStrategy"):
        raise ValueError(
            f"`strategy` is {type(strategy).__name__}, and the hypergradient needs every parameter whole on each "
            f"device, or sharded by `fully_shard` under ModelParallelStrategy. {remedy}"
        )


def _check_sharded(strategy: Any, module: Any, remedy: str) -> None:
    config, callbacks = module.adalfl.config, module.trainer.callbacks
    known = {
        f"hypergradient={config.hypergradient!r}": config.hypergradient == "finite_difference",
        f"learn={config.learn!r}": not config.learns_lr,
        "an offline phase": not any(is_a(callback, "AdaLFLInit") for callback in callbacks),
        "manual optimization": module.automatic_optimization,
        "tensor parallelism": strategy.device_mesh["tensor_parallel"].size() == 1,
    }
    refused = [name for name, is_right in known.items() if not is_right]
    if refused:
        raise ValueError(
            f"`strategy` is {type(strategy).__name__}, which works with `fully_shard`, "
            "`hypergradient='finite_difference'` and `learn='loss'` in automatic optimization without an offline "
            f"phase; got {', '.join(refused)}. {remedy}"
        )


def learner_of(module: Any, who: str) -> MetaLearner:
    """Return the learner of a module."""
    if not hasattr(module, "_adalfl_learner"):
        name = type(module).__name__
        raise TypeError(
            f"{who} needs a module with a learned loss; got {name}. Put AdaLFLMixin left of it: "
            f"class Ada{name}(AdaLFLMixin, {name})."
        )
    learner: MetaLearner = module._adalfl_learner()
    return learner


def base_optimizer(trainer: Any, learner: MetaLearner) -> Optimizer:
    """Return the optimizer whose steps are learned from."""
    optimizers, chosen = list(trainer.optimizers), learner.config.optimizer
    # Lightning puts one that does nothing in the place of none.
    if not optimizers or is_a(optimizers[0], "_MockOptimizer"):
        raise ValueError(
            "`configure_optimizers` returned no optimizer, and AdaLFL learns from the steps of one; return it."
        )
    if len(optimizers) > 1 and chosen is None:
        raise ValueError(
            f"AdaLFL learns from the steps of one optimizer, and `configure_optimizers` returned {len(optimizers)}. "
            "Say which with `AdaLFLConfig(optimizer=0)`."
        )
    if chosen is not None and chosen >= len(optimizers):
        raise ValueError(
            f"`optimizer` is {chosen} and `configure_optimizers` returned {len(optimizers)}; give an index below."
        )
    return optimizers[chosen or 0]
