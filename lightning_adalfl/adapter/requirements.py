"""What a Trainer and a module must be like for AdaLFL to be right; everything else is refused here, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise unless the Trainer's strategy keeps whole parameters on every device."""
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            f"AdaLFL does not work with {type(strategy).__name__}: the hypergradient needs every parameter whole on "
            "each device. Use one device or `Trainer(strategy='ddp')`."
        )


def check_module(module: pl.LightningModule) -> None:
    """Raise unless the module trains in automatic optimization and its training step takes a batch."""
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(module).__name__} sets `automatic_optimization = False`. AdaLFL learns one loss for one base "
            "optimizer, which Lightning steps; modules that step several optimizers themselves, such as GANs, have no "
            "single base step to differentiate. Remove manual optimization, or apply AdaLFL to one part of the model."
        )


def base_optimizer(trainer: pl.Trainer, learner: nn.Module) -> Optimizer:
    """Return the one base optimizer, without the parameters of the learned loss.

    They come into it where it is built outside ``configure_optimizers``, as LightningCLI builds it.

    Raises:
        MisconfigurationException: If there are several optimizers or none, or a parameter group for the learned loss.
    """
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            "AdaLFL needs exactly one base optimizer from `configure_optimizers`, whose step it differentiates; got "
            f"{len(trainer.optimizers)}. Parameter groups of one optimizer may have their own learning rates."
        )
    (optimizer,) = trainer.optimizers
    learned = {id(p) for p in learner.parameters()}
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) not in learned]
        if group["params"] and not kept:
            raise MisconfigurationException(
                "the base optimizer has a group of parameters of `self.adalfl` alone, which the meta optimizer moves; "
                "build it in `configure_optimizers` from `self.parameters()` (they are left out there) or from your "
                "own submodules."
            )
        group["params"] = kept
    return optimizer


def warn_of_trained_on_metrics(callbacks: list[Callback]) -> None:
    """Warn once if a callback monitors a validation metric, which the meta-objective trains on."""
    names = {str(getattr(callback, "monitor", None) or "") for callback in callbacks}
    monitored = sorted(name for name in names if "val" in name)
    if monitored:
        rank_zero_warn(
            f"Callbacks monitor {monitored}, and with `meta_data='val'` the learned loss is trained on the validation "
            "data, so these metrics are optimistic. Hold out other data for them, or set `meta_data='train'`."
        )


def checked_predict(module: Any) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Return the module's ``adalfl_predict``, which raises unless it gives two tensors."""

    def predict(batch: Any) -> tuple[Tensor, Tensor]:
        result = module.adalfl_predict(batch)
        if isinstance(result, (tuple, list)) and len(result) == 2 and all(isinstance(item, Tensor) for item in result):
            predictions, target = result
            return predictions, target
        kinds = [type(item).__name__ for item in result] if isinstance(result, (tuple, list)) else type(result).__name__
        raise MisconfigurationException(
            f"`adalfl_predict` must return two tensors (predictions, target); got {kinds}. Override it in "
            f"{type(module).__name__} to pick them from the model's output."
        )

    return predict


def accepts(function: Any, name: str, position: int) -> bool:
    """Return whether ``function`` takes an argument of that name, or that many positional ones."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return any(p.name == name or p.kind is p.VAR_POSITIONAL for p in parameters) or len(positional) >= position
