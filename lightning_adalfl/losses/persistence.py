"""A learned loss in a file, and back: which class, which options, which φ."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_adalfl.losses.safe_file import read_safe_file, write_safe_file

if TYPE_CHECKING:
    from lightning_adalfl.losses.base import LearnedLoss

LossT = TypeVar("LossT", bound="LearnedLoss")
LOSS_KIND = "learned loss"
_VERSION = 1


def save_loss(loss: LearnedLoss, path: str | os.PathLike[str]) -> None:
    """Write ``loss``; see :meth:`LearnedLoss.save`."""
    phi = loss.state_dict()
    _check_finite(phi, f"cannot save the loss to {os.fspath(path)}")
    write_safe_file(path, LOSS_KIND, _VERSION, describe(loss), phi)


def load_loss(base: type[LossT], path: str | os.PathLike[str]) -> LossT:
    """Read a loss of class ``base`` or a subclass; see :meth:`LearnedLoss.load`."""
    content, phi = read_safe_file(path, LOSS_KIND, _VERSION)
    try:
        return rebuild(base, content, phi)
    except ValueError as error:
        raise ValueError(f"cannot read {os.fspath(path)}: {error}") from error


def describe(loss: LearnedLoss) -> dict[str, Any]:
    """Return the class of ``loss`` and the arguments that build it, as plain values.

    Raises:
        TypeError: If an argument of the constructor is not kept as an attribute, or JSON has no form for it.
    """
    options = {}
    for name in list(inspect.signature(type(loss).__init__).parameters)[1:]:
        try:
            options[name] = json.loads(json.dumps(getattr(loss, name)))
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"{type(loss).__name__} cannot be saved: its argument `{name}` cannot be read back from it ({error}). "
                f"Keep it as the attribute `{name}`, a plain value."
            ) from error
    return {"class": type(loss).__name__, "options": options}


def rebuild(base: type[LossT], description: Mapping[str, Any], phi: Mapping[str, Tensor]) -> LossT:
    """Return the loss that :func:`describe` described, with φ.

    What the description asks for is built without memory first, and with memory only once it has the shapes of ``phi``;
    random states stay as they are.

    Raises:
        ValueError: If the class is unknown, or the options and φ do not fit it or each other.
    """
    name: Any = description.get("class")
    options: Any = description.get("options")
    known = {cls.__name__: cls for cls in _concrete(base)}
    if name not in known:
        raise ValueError(
            f"it holds a loss of class {name!r}, and known here are {sorted(known)}; load it as `LearnedLoss`, and "
            "import the module of a class of your own first."
        )
    try:
        with torch.device("meta"):
            wanted = {key: tuple(value.shape) for key, value in known[name](**options).state_dict().items()}
    except Exception as error:  # a constructor may raise anything for options that are not its own
        reason = str(error).partition("\n")[0]
        raise ValueError(f"its options {str(options)[:200]} build no {name} ({reason}); save it again.") from error
    found = {key: tuple(value.shape) for key, value in phi.items()}
    if wanted != found:
        odd = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))[0]
        raise ValueError(
            f"its options build a {name} whose {odd!r} has shape {wanted.get(odd)}, and its φ has {found.get(odd)} "
            "there; save it again."
        )
    dtypes = {value.dtype for value in phi.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float64, torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f"its φ has dtypes {sorted(map(str, dtypes))}, where one floating dtype is wanted; save it again."
        )
    _check_finite(phi, "its φ cannot be used")
    with torch.random.fork_rng(devices=[]):
        loss = known[name](**options)
    loss.load_state_dict(dict(phi), assign=True)
    return loss


def _concrete(base: type[LossT]) -> Iterator[type[LossT]]:
    if not inspect.isabstract(base):
        yield base
    for subclass in base.__subclasses__():
        yield from _concrete(subclass)


def _check_finite(phi: Mapping[str, Tensor], what: str) -> None:
    for name, value in phi.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{what}: {name!r} is not finite, so the run that learned it diverged; take an earlier φ.")
