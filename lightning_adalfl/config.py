"""Every hyper-parameter of the method in one place."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_adalfl.checks import one_of, positive_number, whole_number
from lightning_adalfl.losses.learned_loss import LearnedLoss
from lightning_adalfl.losses.tasks import task_named

LEARN = ("loss", "lr", "both", "nothing")
TASK_LOSSES = ("bounded", "handcrafted")
WAYS = ("forward", "finite_difference", "reverse")


@dataclass(frozen=True)
class AdaLFLConfig:
    """The hyper-parameters of AdaLFL; checks itself, and reads no file.

    Attributes:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``: how predictions and targets become
            pairs. Always to be given.
        task_loss: The meta-objective L_T: ``"bounded"``, for classification a generalised cross-entropy, which few
            confident mistakes cannot rule, and for regression the mean squared error; ``"handcrafted"``, the
            cross-entropy or mean squared error; or ``task_loss(predictions, target) -> scalar``, a mean over instances,
            or its import path. Set it where you care about something else.
        ignore_index: The class index that stands for "no target". Set it where your criterion has one.
        loss: What is learned: ``"network"``, or another preset's name (``"paper"``, ``"ml3"``, ``"taylor_cubic"``,
            ...); the file of a learned loss; or a :class:`LearnedLoss`. Set it to go on with what another run has
            learned; a preset begins without effect.
        own_loss: Whether your own loss is descended, with its slope bent by the learned one; ``False`` descends the
            learned loss alone, as the paper does, which may diverge.
        learn: ``"loss"``, the shape alone; ``"lr"``, the learning rate alone (MetaLR); ``"both"``; or ``"nothing"``, to
            watch influence. Set it to ``"both"`` where you have not tuned the rate.
        meta_lr: η, the learning rate of φ, for each base step. Lower it where the end of training is behind its best.
        lr_meta_lr: The learning rate of the logarithm of α, for each base step.
        meta_optimizer: A class of ``torch.optim`` by its name; rarely to be changed.
        meta_every: A meta step after every this many base steps, which moves φ as many times. 1 costs 2.7 times
            ordinary training by arithmetic, 10 costs 1.2; small models cost more. ``None`` for no meta step: a fixed
            loss, or ML³ after an offline phase.
        meta_data: The held-out data of the meta-objective: ``"val"``, ``"train"``, the index of one of several
            validation loaders, or a loader. Set it where the validation data have another use.
        meta_batch_size: Instances in a meta batch; by default as many as in a training batch, or in a batch of the
            loader that ``meta_data`` is. A loader with a sampler of its own has to have that size itself.
        hypergradient: ``"forward"`` (exact), ``"finite_difference"`` (a little cheaper, and approximate),
            ``"reverse"`` (exact; a double backward), or a :class:`JacobianProduct`. Set it where an error says so.
        optimizer: Which of several optimizers takes the base step, by its index. Set it where there are several.

    Raises:
        ValueError: For a value out of range or an unknown name.
        TypeError: For a value of the wrong type.
    """

    task: str
    task_loss: Callable[..., Tensor] | str = "bounded"
    ignore_index: int | None = None
    loss: str | os.PathLike[str] | LearnedLoss = "network"
    own_loss: bool = True
    learn: str = "loss"
    meta_lr: float = 1e-3
    lr_meta_lr: float = 1e-3
    meta_optimizer: str = "Adam"
    meta_every: int | None = 10
    meta_data: Any = "val"
    meta_batch_size: int | None = None
    hypergradient: Any = "forward"
    optimizer: int | None = None

    def __post_init__(self) -> None:
        if self.ignore_index is not None:
            whole_number("ignore_index", self.ignore_index, -(2**63))
        task_named(self.task, self.ignore_index)
        if not isinstance(self.own_loss, bool):
            raise TypeError(f"`own_loss` must be True or False; got {self.own_loss!r}.")
        one_of("learn", self.learn, LEARN)
        if self.learn in ("lr", "nothing") and (self.loss != "network" or not self.own_loss):
            raise ValueError(
                f"`loss` and `own_loss` have no use with `learn={self.learn!r}`, which trains with your own loss; "
                f"got loss={self.loss!r}, own_loss={self.own_loss}. Leave them out, or choose `learn='loss'`."
            )
        self._check_loss()
        for name in ("meta_lr", "lr_meta_lr"):
            object.__setattr__(self, name, positive_number(name, getattr(self, name)))
        for name, least in (("meta_every", 1), ("meta_batch_size", 1), ("optimizer", 0)):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least)
        optimizer = getattr(torch.optim, str(self.meta_optimizer), None)
        is_one = isinstance(optimizer, type) and issubclass(optimizer, Optimizer) and optimizer is not Optimizer
        if not is_one or optimizer in (torch.optim.LBFGS, torch.optim.SparseAdam):
            raise ValueError(
                "`meta_optimizer` must name a class of torch.optim that steps by a dense gradient alone, such as "
                f"'Adam'; got {self.meta_optimizer!r}."
            )
        if isinstance(self.meta_data, str):
            one_of("meta_data", self.meta_data, ("val", "train"))
        elif self.meta_data is None or (isinstance(self.meta_data, int) and self.meta_data < 0):
            raise ValueError(f"`meta_data` must be 'val', 'train', an index from 0 or a loader; got {self.meta_data}.")
        elif isinstance(self.meta_data, (list, tuple)) and any(isinstance(x, DataLoader) for x in self.meta_data):
            raise ValueError(
                f"`meta_data` must be one loader; got a sequence of {len(self.meta_data)}. Give one of them."
            )
        if isinstance(self.hypergradient, str):
            one_of("hypergradient", self.hypergradient, WAYS)
        elif isinstance(self.hypergradient, type) or not callable(self.hypergradient):
            raise TypeError(
                f"`hypergradient` must be one of {WAYS} or an instance of JacobianProduct; got {self.hypergradient!r}."
            )
        if isinstance(self.task_loss, str) and self.task_loss not in TASK_LOSSES:
            object.__setattr__(self, "task_loss", _imported(self.task_loss))
        elif not isinstance(self.task_loss, str) and not callable(self.task_loss):
            raise TypeError(
                f"`task_loss` must be one of {TASK_LOSSES}, callable, or an import path; got {self.task_loss!r}."
            )

    def _check_loss(self) -> None:
        if isinstance(self.loss, LearnedLoss):
            if self.loss.task != self.task:
                raise ValueError(
                    f"`loss` is for task {self.loss.task!r} and `task` is {self.task!r}: its predictions are of "
                    "another kind. Give a loss of the same kind of task."
                )
        elif isinstance(self.loss, os.PathLike):
            object.__setattr__(self, "loss", os.fspath(self.loss))
        elif not isinstance(self.loss, str):
            raise TypeError(f"`loss` must be a preset's name, a file, or a LearnedLoss; got {self.loss!r}.")

    @classmethod
    def paper(cls, task: str, **changes: Any) -> AdaLFLConfig:
        """Return the paper's own recipe: the network alone, a meta step after each base step, η = 1e-5.

        To be used with ``AdaLFLInit.paper()``.

        Args:
            task: As above.
            **changes: Fields that are to differ.
        """
        learn = changes.get("learn", "loss")
        recipe: dict[str, Any] = {"meta_lr": 1e-5, "meta_every": 1, "task_loss": "handcrafted"}
        if learn in ("loss", "both"):
            recipe.update(loss="paper", own_loss=False)
        return cls(task, **{**recipe, **changes})

    @property
    def learns_loss(self) -> bool:
        """Whether there is a learned loss."""
        return self.learn in ("loss", "both")

    @property
    def learns_lr(self) -> bool:
        """Whether the base learning rate is learned."""
        return self.learn in ("lr", "both")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for a checkpoint, a YAML file or a logger.

        A function or class becomes its import path. What has none (a lambda, a loader, a learned loss) becomes
        ``{"given": ...}``, which :meth:`from_dict` refuses by name: it must be given again there.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if callable(self.task_loss):
            values["task_loss"] = _import_path(self.task_loss) or {"given": _in_words(self.task_loss)}
        if isinstance(self.loss, LearnedLoss):
            values["loss"] = {"given": type(self.loss).__name__}
        if not isinstance(self.meta_data, (str, int)):
            values["meta_data"] = {"given": _in_words(self.meta_data)}
        if not isinstance(self.hypergradient, str):
            values["hypergradient"] = {"given": type(self.hypergradient).__name__}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaLFLConfig:
        """Build a configuration from what :meth:`to_dict` returned.

        Raises:
            ValueError: For a key that is no field, or an object that a dictionary cannot hold.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"`adalfl` has unknown fields {unknown}; known are {sorted(known)}.")
        for name, value in values.items():
            if isinstance(value, Mapping):
                raise ValueError(
                    f"`{name}` was {value.get('given')}, an object that cannot be read back; give the configuration "
                    f"again: adalfl=AdaLFLConfig(..., {name}=...)."
                )
        return cls(**values)


def _imported(path: str) -> Callable[..., Tensor]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`task_loss` {path!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise ValueError(
            f"`task_loss` must be one of {TASK_LOSSES}, or the import path of a function, such as "
            f"'torch.nn.functional.l1_loss'; got {path!r}."
        )
    return found


def _import_path(function: Callable[..., Any]) -> str | None:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    try:
        found = getattr(importlib.import_module(module), name, None) if module and name.isidentifier() else None
    except ImportError:
        found = None
    return f"{module}.{name}" if found is function else None


def _in_words(value: object) -> str:
    return getattr(value, "__qualname__", None) or type(value).__name__
