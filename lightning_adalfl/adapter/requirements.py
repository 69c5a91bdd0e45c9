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


def check_optimizers(optimizers: list[Optimizer]) -> Optimizer:
    """Return the one base optimizer; raise if there are more or none."""
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"AdaLFL needs exactly one base optimizer from `configure_optimizers`, whose step it differentiates; got "
            f"{len(optimizers)}. Parameter groups of one optimizer may have their own learning rates."
        )
    return optimizers[0]


def check_excluded(learner: nn.Module, optimizer: Optimizer) -> None:
    """Raise if the base optimizer holds a parameter of the learned loss."""
    learned = {id(p) for p in learner.parameters()}
    if any(id(p) in learned for group in optimizer.param_groups for p in group["params"]):
        raise MisconfigurationException(
            "the base optimizer holds parameters of `self.adalfl`, which the meta optimizer moves; build it in "
            "`configure_optimizers` from `self.parameters()` (they are left out there) or from your own submodules."
        )


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
