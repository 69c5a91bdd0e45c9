"""The submodule ``adalfl`` of a user's module: φ, the learned rate, and the meta optimizer that moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_adalfl.adapter.checkpoint_entry import check_entry
from lightning_adalfl.adapter.gain_horizon import GainHorizon
from lightning_adalfl.adapter.safeguard import Safeguard, safeguard_meta_steps
from lightning_adalfl.config import AdaLFLConfig
from lightning_adalfl.hypergradient import Hypergradient
from lightning_adalfl.hypergradient.slope_choice import loss_slope
from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.bounded import BoundedLoss
from lightning_adalfl.losses.representations import build_loss
from lightning_adalfl.losses.task_losses import TaskLoss, default_task_loss

if TYPE_CHECKING:
    from lightning_adalfl.adapter.online_run import OnlineRun


class MetaLearner(nn.Module):
    """What is meta-learned, and how.

    Args:
        config: The hyper-parameters.

    Attributes:
        loss: The learned loss M_φ; ``None`` if the learning rate alone is learned.
        safeguard: What watches over it, if anything does.
        gain_horizon: The earlier base steps that the gain is judged by.
        log_gain: γ of the :class:`~lightning_adalfl.losses.bounded.BoundedLoss`, if there are bounds.
        log_lr_scale: s, where the base optimizer steps with α·exp(s); learned for ``learn="lr"`` and ``"both"``.
        base_steps: Base steps taken.
        meta_steps: Meta steps taken online.
        skipped_base_steps: Base steps left out because the learned loss made their gradient not finite.
        skipped_meta_steps: Meta steps left out because the hypergradient was not finite.
        initialised: Whether φ needs no offline phase, since one has run or φ was given.
        task_loss_alone: Whether a replay has reached the step from which the task loss trained.
        run: What lives for the length of one fit.
        resumed: Where the fit that a checkpoint was written by stood, until the next one has taken it over.
    """

    log_gain: nn.Parameter
    _bounded: BoundedLoss | None

    def __init__(self, config: AdaLFLConfig) -> None:
        super().__init__()
        self.config = config
        self.task_loss: TaskLoss = config.task_loss or default_task_loss(config.task)  # type: ignore[assignment]
        self.loss: LearnedLoss | None = build_loss(config) if config.learns_loss else None
        if config.learns_lr:
            self.log_lr_scale = nn.Parameter(torch.zeros(()))
        # Not registered as a submodule: that would put φ into the state_dict twice.
        self.__dict__["_bounded"] = self._bounds()
        if self._bounded is not None:
            self.log_gain = self._bounded.log_gain
        self.safeguard = Safeguard(safeguard_meta_steps(config)) if config.safeguard else None
        self.gain_horizon = GainHorizon(config)
        self.base_steps = 0
        self.meta_steps = 0
        self.skipped_base_steps = 0
        self.skipped_meta_steps = 0
        self.initialised = config.initial_loss is not None
        self.task_loss_alone = False
        self.run: OnlineRun | None = None
        self.resumed: dict[str, Any] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimizer_state: dict[str, Any] | None = None
        # A checkpoint of the plain module has no φ; it loads as it is, and φ keeps its values.
        self.register_load_state_dict_pre_hook(_fill_missing)

    def objective(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Return what the base step descends: M_φ, whose backward leaves φ alone, or the task loss."""
        if self.loss is None or self.fell_back:
            return self.task_loss(predictions, target)
        if self._bounded is None and not self.config.online:
            # A fixed loss trains as it does in a loop of one's own, to the bit.
            phi = {name: p.detach() for name, p in self.loss.named_parameters()}
            return torch.func.functional_call(self.loss, phi, (predictions, target))
        return loss_slope(self.trained, predictions, target).at(predictions)

    @property
    def fell_back(self) -> bool:
        """Whether the task loss has taken over for good."""
        return self.task_loss_alone or (self.safeguard is not None and self.safeguard.level > 1)

    @property
    def trained(self) -> nn.Module:
        """What trains the base model: the learned loss, within its bounds if it has any."""
        trained = self.loss if self._bounded is None else self._bounded
        if trained is None:
            raise RuntimeError("with `learn='lr'` there is no learned loss.")
        return trained

    def _bounds(self) -> BoundedLoss | None:
        config = self.config
        if self.loss is None or config.max_gain is None:
            return None
        bounded = BoundedLoss(self.loss, self.task_loss, config.max_gain, config.min_cosine)
        if config.learns_lr:
            bounded.log_gain.requires_grad_(False)  # the learning rate takes its part
        return bounded

    @property
    def lr_scale(self) -> float:
        """exp(s), the factor on the base optimizer's learning rates."""
        return float(self.log_lr_scale.detach().exp()) if self.config.learns_lr and not self.fell_back else 1.0

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The newest values of the scalars that are logged, by their names; for callbacks, which see them each step."""
        return {} if self.run is None else self.run.logged

    def start(self, lr: float | None = None) -> None:
        """Make a fresh meta optimizer, with ``lr`` or the rates of training, and any state from a checkpoint."""
        groups: list[dict[str, Any]] = []
        if self._has_gain:
            groups.append({"params": [self.log_gain], "lr": self.gain_horizon.lr})
        if self.loss is not None:
            groups.append({"params": list(self.loss.parameters()), "lr": lr or self.config.meta_lr})
        if self.config.learns_lr:
            groups.append({"params": [self.log_lr_scale], "lr": lr or self.config.lr_meta_lr})
        self._optimizer = getattr(torch.optim, self.config.meta_optimizer)(groups)
        if self._optimizer_state is not None:
            self._optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None

    def stop(self, forget: bool = False) -> None:
        """Drop the run and the meta optimizer, whose state is kept for a later fit unless it is to ``forget``."""
        self.run = None
        if self._optimizer is not None and not forget:
            self._optimizer_state = self._optimizer.state_dict()
        self._optimizer = None

    @property
    def gain_due(self) -> bool:
        """Whether the gain learns from the base step now under way."""
        return self.learns_gain and self.gain_horizon.due(self.base_steps + 1)

    @property
    def learns_gain(self) -> bool:
        """Whether the gain still learns in training; once the safeguard has tripped it stays at one."""
        tripped = self.safeguard is not None and self.safeguard.level > 0
        return self.config.online and self._has_gain and not tripped

    def step(self, gradient: Hypergradient, learn_gain: bool = False) -> Tensor:
        """Take a meta step (Eq. 8); leave it out if the hypergradient or the task loss is not finite.

        Args:
            gradient: Of the last base step; its ``along`` is that of the gain through earlier ones.
            learn_gain: Whether the gain takes part.

        Returns:
            The hypergradient's Euclidean norm.
        """
        if self._optimizer is None:
            raise RuntimeError("the meta optimizer has not been started; call `start` first.")
        gradients = list(gradient.loss)
        if self.config.learns_lr:
            gradients.append(gradient.log_lr.sum().to(self.log_lr_scale.dtype))
        norm = torch.stack([g.float().norm() for g in gradients]).norm()
        if learn_gain:
            gradients[0] = self.gain_horizon.gradient(gradients[0], gradient, self.base_steps + 1)
        if not torch.isfinite(norm + gradient.task_loss + gradients[0].sum().to(norm)):
            self._skip(
                f"the hypergradient is not finite, or the task loss on the meta batch, which is "
                f"{float(gradient.task_loss):.4g}. Look for such values in the data or for an empty batch, lower the "
                "base learning rate, or clip the gradient."
            )
            return norm
        before = [p.detach().clone() for p in self.learned_parameters()]
        for parameter, g in zip(self.learned_parameters(), gradients):
            parameter.grad = g
        if self._has_gain and not learn_gain:
            self.log_gain.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._bounded is not None:
            self._bounded.clamp_gain()
        learned: list[Tensor] = [*self.learned_parameters()]
        if not torch.isfinite(torch.stack(torch._foreach_norm(learned))).all():
            with torch.no_grad():
                torch._foreach_copy_(learned, before)
            self._optimizer.state.clear()
            self._skip(
                "the meta optimizer made the learned loss not finite. It is as it was before, and the optimizer begins "
                "anew; lower `meta_lr` if it happens again."
            )
            return norm
        self.meta_steps += 1
        return norm

    def _skip(self, reason: str) -> None:
        self.skipped_meta_steps += 1
        if self.skipped_meta_steps == 1:
            rank_zero_warn(
                f"A meta step at base step {self.base_steps} was left out, since {reason} Further ones are counted in "
                "`adalfl/skipped_meta_steps`."
            )

    def guard(self, task_loss: Tensor, norm: Tensor) -> None:
        """Let the safeguard judge the meta step that was just taken."""
        if self.safeguard is None:
            return
        reason = self.safeguard.observe(float(task_loss), float(norm), self.learned_parameters())
        if reason is None:
            return
        if self.safeguard.level == 1:
            self._return_to_best()
            rank_zero_warn(
                f"At base step {self.base_steps}, {reason}. Training goes on with the learned loss as it was at its "
                "best; if this happens again, with the task loss alone. `adalfl/safeguard` counts it; "
                "`AdaLFLConfig(safeguard=False)` turns it off."
            )
        else:
            rank_zero_info(f"At base step {self.base_steps}, {reason}. From here on the task loss trains the model.")

    @torch.no_grad()
    def _return_to_best(self) -> None:
        best = self.safeguard.best_values if self.safeguard is not None else None
        parameters = self.learned_parameters()
        for parameter, value in zip(parameters, best or parameters):
            # Without a good window behind it, there is nothing to return to but what is finite.
            parameter.copy_(torch.nan_to_num(value))
        if self._has_gain:
            self.log_gain.zero_()
            self.gain_horizon.clear()
        self.start()

    def learned_parameters(self) -> list[nn.Parameter]:
        """Return φ, with the gain and s where they are learned, in the order of a hypergradient."""
        parameters = [] if self.loss is None else list(self.loss.parameters())
        parameters = [self.log_gain, *parameters] if self._has_gain else parameters
        return [*parameters, self.log_lr_scale] if self.config.learns_lr else parameters

    @property
    def _has_gain(self) -> bool:
        return self._bounded is not None and self._bounded.log_gain.requires_grad

    def progress(self) -> dict[str, Any]:
        """Return counters and the meta optimizer's state, in plain containers."""
        state = self._optimizer_state if self._optimizer is None else self._optimizer.state_dict()
        return {
            "base_steps": self.base_steps,
            "meta_steps": self.meta_steps,
            "skipped_base_steps": self.skipped_base_steps,
            "skipped_meta_steps": self.skipped_meta_steps,
            "initialised": self.initialised,
            "meta_optimizer": state,
            "safeguard": None if self.safeguard is None else self.safeguard.state_dict(),
            "gain_horizon": self.gain_horizon.state_dict(),
        }

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put φ into the checkpoint's ``state_dict``, which is about to be loaded, and take over the progress."""
        saved = checkpoint.get("adalfl")
        self.run = None
        if saved is None:
            return
        check_entry(saved)
        checkpoint["state_dict"].update({f"adalfl.{name}": value for name, value in saved["state_dict"].items()})
        self.load_progress(saved["progress"])
        self.resumed = saved

    def load_progress(self, progress: dict[str, Any]) -> None:
        """Take over what :meth:`progress` returned."""
        self.base_steps = progress["base_steps"]
        self.meta_steps = progress["meta_steps"]
        self.skipped_base_steps = progress["skipped_base_steps"]
        self.skipped_meta_steps = progress["skipped_meta_steps"]
        self.initialised = progress["initialised"]
        self._optimizer_state = progress["meta_optimizer"]
        self.gain_horizon.load_state_dict(progress["gain_horizon"])
        if self.safeguard is not None and progress["safeguard"] is not None:
            self.safeguard.load_state_dict(progress["safeguard"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MetaLearner:
        def at_least_single(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # Meta steps of the size of η vanish in half precision.
            return tensor.to(result.device) if result.dtype in (torch.half, torch.bfloat16) else result

        return super()._apply(at_least_single, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module, as weight averaging makes one, has no part in the fit that is under way.
        return {**self.__dict__, "run": None}


def _fill_missing(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + name: value for name, value in module.state_dict().items()})
