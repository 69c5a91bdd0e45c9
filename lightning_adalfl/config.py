"""Every hyper-parameter of the method in one place."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adalfl.arguments import positive_number, whole_number
from lightning_adalfl.losses.activations import ACTIVATIONS
from lightning_adalfl.losses.base import LearnedLoss
from lightning_adalfl.losses.network import WEIGHT_INITS
from lightning_adalfl.losses.pairing import check_task
from lightning_adalfl.losses.representations import representation_of

Method = Literal["forward", "finite_difference", "reverse"]
Representation = Literal[
    "network",
    "ml3",
    "taylor_cubic",
    "taylor_quadratic",
    "taylor_cubic_target_powers",
    "taylor_quadratic_target_powers",
]
Learn = Literal["loss", "lr", "both"]
MetaData = Literal["val", "train"]


def check_method(method: str) -> None:
    """Raise a ``ValueError`` unless ``method`` names a way to compute the hypergradient."""
    _check_choice("hypergradient", method, get_args(Method))


@dataclass(frozen=True)
class AdaLFLConfig:
    """The hyper-parameters of AdaLFL; checks itself.

    Attributes:
        task: How predictions and targets become pairs, and the default task loss: ``"multiclass"``, ``"binary"``,
            ``"multilabel"`` or ``"regression"``.
        task_loss: The meta-objective L_T, ``task_loss(predictions, target) -> scalar``, or its import path such as
            ``"torch.nn.functional.l1_loss"``. By default cross-entropy, or the mean squared error for regression.
        representation: ``"network"`` (section 2.2), ``"ml3"`` (ReLU and Softplus), or a Taylor polynomial:
            ``"taylor_cubic"``, ``"taylor_quadratic"``, and both with ``"_target_powers"`` behind; see
            :class:`TaylorLoss`.
        output_activation: Of ``"network"``, or ``None``.
        bias: Whether ``"network"`` has biases.
        weight_init: Of ``"network"``: ``"kaiming_normal"`` or ``"xavier_uniform"``.
        reduction: Over the outputs: ``"mean"`` (Eq. 3) or ``"sum"``.
        residual: Whether ``"network"`` is added to the task's handcrafted loss and begins at zero, so that training
            starts from the handcrafted loss; ``False`` as in the paper.
        initial_loss: A file of :meth:`LearnedLoss.save`. φ begins with it, in place of a random draw and an offline
            phase; with ``online=False`` it is the fixed loss of this model. The six fields above are as in the file.
        meta_lr: η, the learning rate of φ online.
        lr_meta_lr: The learning rate of log α, for ``learn="lr"`` and ``"both"``.
        meta_optimizer: A class of ``torch.optim`` by its name.
        meta_every: A meta step after every this many base steps.
        meta_data: Where meta batches come from: ``"val"``, the validation data, or ``"train"``.
        meta_batch_size: Instances in a meta batch; by default the batch size of the loader that they come from.
        base_fraction: The part of the base batch that the Jacobian-vector product is taken on, chosen at random.
        hypergradient: ``"forward"`` (exact, forward-mode AD), ``"finite_difference"`` (cheapest, approximate; no AD
            needed) or ``"reverse"`` (exact, a double backward through the model; the reference).
        max_gain: The slope of the learned loss is normalised to that of the task loss, times a learned gain in
            [1, ``max_gain``]; see :class:`~lightning_adalfl.losses.bounded.BoundedLoss`. ``None``, as in the paper,
            takes the slope as it is, and ``min_cosine``, ``gain_lr`` and ``gain_horizon`` have no part.
        min_cosine: In (0, 1): where the angle between the two slopes has a smaller cosine, it is brought back to that.
        gain_lr: The learning rate of the logarithm of the gain, for each base step. The gain takes a step after every
            tenth base step, or with every meta step where these are rarer, with as many times this rate, up to 0.2.
        gain_horizon: The base steps through which the effect of the gain on held-out data is followed; 1 for the last
            one alone.
        safeguard: Whether training goes back to the last good φ, and then to the task loss, when the task loss on meta
            batches no longer falls or the hypergradient is not finite; see
            :class:`~lightning_adalfl.adapter.safeguard.Safeguard`.
        safeguard_window: The base steps over which the task loss on meta batches is averaged for this; where
            ``meta_every`` leaves fewer than ten meta steps in them, over ten.
        learn: ``"loss"``, ``"lr"`` (the learning rate alone: MetaLR, Algorithms 3 and 4) or ``"both"``.
        online: Whether φ goes on learning in training (Algorithm 2); ``False`` after an offline phase is ML³.

    Raises:
        ValueError: For a value out of range or an unknown name.
        TypeError: For a value of the wrong type.
    """

    task: str
    task_loss: Callable[[Tensor, Tensor], Tensor] | str | None = None
    representation: str = "network"
    output_activation: str | None = None
    bias: bool = False
    weight_init: str = "kaiming_normal"
    reduction: str = "mean"
    residual: bool = True
    initial_loss: str | None = None
    meta_lr: float = 1e-4
    lr_meta_lr: float = 1e-3
    meta_optimizer: str = "Adam"
    meta_every: int = 1
    meta_data: str = "val"
    meta_batch_size: int | None = None
    base_fraction: float = 1.0
    hypergradient: str = "forward"
    max_gain: float | None = 10.0
    min_cosine: float = 0.95
    gain_lr: float = 1e-2
    gain_horizon: int = 100
    safeguard: bool = True
    safeguard_window: int = 50
    learn: str = "loss"
    online: bool = True

    def __post_init__(self) -> None:
        check_task(self.task)
        _check_choice("representation", self.representation, get_args(Representation))
        _check_choice("reduction", self.reduction, ("mean", "sum"))
        _check_choice("weight_init", self.weight_init, WEIGHT_INITS)
        if self.output_activation is not None:
            _check_choice("output_activation", self.output_activation, ACTIVATIONS)
        _check_choice("learn", self.learn, get_args(Learn))
        _check_choice("meta_data", self.meta_data, get_args(MetaData))
        check_method(self.hypergradient)
        positive_number("meta_lr", self.meta_lr)
        positive_number("lr_meta_lr", self.lr_meta_lr)
        whole_number("meta_every", self.meta_every)
        if self.meta_batch_size is not None:
            whole_number("meta_batch_size", self.meta_batch_size)
        positive_number("base_fraction", self.base_fraction)
        if self.base_fraction > 1:
            raise ValueError(f"`base_fraction` must lie in (0, 1], a part of the batch; got {self.base_fraction}.")
        if self.base_fraction < 1 and self.hypergradient == "reverse":
            raise ValueError(
                f"`base_fraction` must be 1 with `hypergradient='reverse'`, which differentiates whole batches; got "
                f"{self.base_fraction}. Choose 'forward' or 'finite_difference'."
            )
        positive_number("gain_lr", self.gain_lr)
        whole_number("gain_horizon", self.gain_horizon)
        positive_number("min_cosine", self.min_cosine)
        if self.min_cosine >= 1:
            raise ValueError(f"`min_cosine` must lie in (0, 1), such as 0.95; got {self.min_cosine}.")
        if self.max_gain is not None:
            positive_number("max_gain", self.max_gain)
            if self.max_gain <= 1:
                raise ValueError(f"`max_gain` must be more than 1, or None for no bounds; got {self.max_gain}.")
        whole_number("safeguard_window", self.safeguard_window)
        for name in ("bias", "online", "residual", "safeguard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False; got {getattr(self, name)!r}.")
        optimizer = getattr(torch.optim, str(self.meta_optimizer), None)
        if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer) and optimizer is not Optimizer):
            raise ValueError(
                f"`meta_optimizer` must name a class of torch.optim, such as 'Adam'; got {self.meta_optimizer!r}."
            )
        if isinstance(self.task_loss, str):
            object.__setattr__(self, "task_loss", _imported(self.task_loss))
        elif self.task_loss is not None and not callable(self.task_loss):
            raise TypeError(f"`task_loss` must be callable, an import path, or None; got {self.task_loss!r}.")
        if self.initial_loss is not None:
            self._take_over_structure()

    def _take_over_structure(self) -> None:
        """Give the fields that describe the loss the values that they have in ``initial_loss``."""
        if not isinstance(self.initial_loss, (str, os.PathLike)):
            raise TypeError(f"`initial_loss` must be the path of a saved loss, or None; got {self.initial_loss!r}.")
        path = os.fspath(self.initial_loss)
        if not self.learns_loss:
            raise ValueError(f"`initial_loss` {path!r} has no use with `learn='lr'`, which trains with the task loss.")
        try:
            loss = LearnedLoss.load(path)
            structure = representation_of(loss)
        except (OSError, ValueError) as error:
            raise ValueError(f"`initial_loss` {path!r} cannot be used: {error}.") from error
        if loss.task != self.task:
            raise ValueError(
                f"`initial_loss` {path!r} is for task {loss.task!r} and `task` is {self.task!r}: its predictions are "
                "of another kind. Give a loss that was learned on the same kind of task."
            )
        object.__setattr__(self, "initial_loss", path)
        for name in ("representation", "output_activation", "bias", "weight_init", "reduction", "residual"):
            given, found = getattr(self, name), structure.get(name, _DEFAULTS[name])
            if given not in (found, _DEFAULTS[name]):
                raise ValueError(f"`{name}` is {found!r} in `initial_loss` {path!r}; got {given!r}. Leave it out.")
            object.__setattr__(self, name, found)

    @classmethod
    def paper(cls, task: str, **changes: Any) -> AdaLFLConfig:
        """Return the paper's own recipe: the network alone, no bounds, no safeguard, η = 1e-5.

        To be used with ``AdaLFLInit.paper()``.

        Args:
            task: As above.
            **changes: Fields that are to differ.
        """
        recipe = {"residual": False, "max_gain": None, "safeguard": False, "meta_lr": 1e-5}
        return cls(task, **{**recipe, **changes})

    @property
    def learns_loss(self) -> bool:
        """Whether φ is learned."""
        return self.learn != "lr"

    @property
    def learns_lr(self) -> bool:
        """Whether the base learning rate is learned."""
        return self.learn != "loss"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for a checkpoint, a YAML file or a logger.

        A ``task_loss`` becomes its import path; one that has none (a lambda, a local function) is left out and must be
        given again where the dictionary is read.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if callable(self.task_loss):
            values["task_loss"] = _import_path(self.task_loss)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaLFLConfig:
        """Build a configuration from what :meth:`to_dict` returned.

        Raises:
            ValueError: For a key that is no field.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"`adalfl` has unknown fields {unknown}; known are {sorted(known)}.")
        return cls(**values)


_DEFAULTS = {field.name: field.default for field in fields(AdaLFLConfig)}


def _check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _imported(path: str) -> Callable[[Tensor, Tensor], Tensor]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`task_loss` {path!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise ValueError(
            f"`task_loss` must be the import path of a function, such as 'torch.nn.functional.l1_loss'; got {path!r}."
        )
    return found


def _import_path(function: Callable[..., Any]) -> str | None:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    try:
        found = getattr(importlib.import_module(module), name, None) if module and name.isidentifier() else None
    except ImportError:
        found = None
    return f"{module}.{name}" if found is function else None
