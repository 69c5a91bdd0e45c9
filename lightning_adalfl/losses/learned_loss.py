"""What every learned loss is: a scalar over pairs (Eq. 3), which can be named, saved and loaded."""

from __future__ import annotations

import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_adalfl.checks import one_of
from lightning_adalfl.files import read_tensors, write_tensors
from lightning_adalfl.losses.output_gradient import AutogradGradient, OutputGradient, Pairs, in_chunks
from lightning_adalfl.losses.tasks import task_named

LossT = TypeVar("LossT", bound="LearnedLoss")
LOSS_KIND = "learned loss"
_VERSION = 2


class LearnedLoss(nn.Module, ABC):
    """A loss M_φ with parameters φ that scores pairs of target and prediction, output by output (Eq. 3).

    A representation of your own is a subclass with :meth:`pairwise`; pass an instance as ``AdaLFLConfig(loss=...)``.

    Args:
        task: How predictions and targets become pairs: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or
            ``"regression"``.
        reduction: Over the outputs of an instance, ``"mean"`` as in Eq. 3, or ``"sum"`` as the paper's prose has it;
            with C outputs they differ by the factor C, which acts as a learning rate. Over instances it is always the
            mean.

    Attributes:
        presets: What the configuration may name, each with what builds it for a task.

    Raises:
        ValueError: For an unknown task or reduction.
    """

    presets: ClassVar[Mapping[str, Callable[[str], LearnedLoss]]] = {}

    def __init__(self, task: str, reduction: str = "mean") -> None:
        super().__init__()
        self.pairing = task_named(task)
        self.task = task
        self.reduction = one_of("reduction", reduction, ("mean", "sum"))
        self.known: Any = None  # what `knots` keeps while φ stands still

    @abstractmethod
    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return ℓ_φ(y_i, f_i) element-wise.

        Args:
            prediction: Any shape: probabilities for classification, raw values for regression.
            target: The same shape.

        Returns:
            The loss of each pair, of the same shape.
        """

    def pair_gradient(self, prediction: Tensor, target: Tensor) -> OutputGradient:
        """Return ``∂ℓ_φ/∂f`` of each pair, with its derivative by φ; override it where there is a faster way."""
        return AutogradGradient(self.pairwise, self.phi(), prediction, target)

    def tells_apart(self, outputs: int) -> bool:
        """Return whether ℓ_φ differs between so many classes, dimension 1 of the pairs, or is one for all outputs."""
        return False

    def is_smooth(self) -> bool:
        """Return whether ℓ_φ is smooth in f over [0, 1], so that many pairs may be looked up between knots of it."""
        return False

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply ℓ_φ by a factor in place; with zero so that it can still learn.

        Raises:
            TypeError: If the representation does not say how.
        """
        raise TypeError(
            f"{type(self).__name__} cannot begin at zero; override `scale_`, or pass an instance as `loss`, "
            "which is used as it is."
        )

    def forward(self, predictions: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return M_φ(y, f), a scalar (Eq. 3), computed in the precision of φ, under autocast too.

        Args:
            predictions: Raw model output, as ``task`` demands.
            target: Targets, as ``task`` demands.
            weight: Weights or a mask of the shape of ``target``; the mean is over what they leave.

        Raises:
            ValueError: If predictions and target do not fit the task.
        """
        with without_autocast(predictions.device):
            # Checked before the cast, so that an integer prediction is refused and not converted.
            precision = self.dtype if predictions.is_floating_point() else predictions.dtype
            pairs = self.pairing.pairs(predictions.to(precision), target, weight)
            chunks = in_chunks(pairs.prediction, pairs.target, pairs.weight)
            # One sum at a time: small tensors that stay between large temporary ones would break up the memory.
            total = sum((self.pairwise(f, y) * part).sum() for f, y, part in chunks)
            return total / self.outputs(pairs.prediction)  # type: ignore[return-value]

    def outputs(self, prediction: Tensor) -> float:
        """Return what the sum over an instance's pairs is divided by."""
        if self.task == "multiclass":
            return prediction.shape[1] if self.reduction == "mean" else 1
        # The weights of other tasks average over all outputs already.
        return 1 if self.reduction == "mean" else prediction.shape[0] / prediction.numel()

    def take_units(self, center: Tensor, spread: Tensor, slope: Tensor) -> None:
        """Take in the units of a project, so that what is learned is the same in any; by default they are left.

        Args:
            center: The mean of the targets.
            spread: Their standard deviation.
            slope: The size of the user's gradient by the predictions of an instance.
        """

    def take_classes(self, held_out: Sequence[Tensor], all_reduce: Callable[[list[Tensor]], Any] | None) -> None:
        """Take in the classes of held-out (predictions, target) or (…, weight); by default they do not matter."""

    def known_pairs(self, pairs: Pairs) -> Tensor | float:
        """Return one for each pair of which the held-out data can say something, else zero; by default for all."""
        return 1.0

    def phi(self) -> dict[str, Tensor]:
        """Return φ: the parameters that learn, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the loss is computed: that of φ."""
        return next(self.parameters(), torch.empty(0)).dtype

    @classmethod
    def named(cls, name: str, task: str) -> LearnedLoss:
        """Return a preset of a representation that has been imported.

        Raises:
            ValueError: For an unknown name; it lists those that there are.
        """
        known: dict[str, Callable[[str], LearnedLoss]] = {}
        for subclass in _concrete(LearnedLoss):  # type: ignore[type-abstract]
            known.update(subclass.__dict__.get("presets", {}))
        return known[one_of("loss", name, known)](task)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the loss to a safetensors file: φ, with the class and its arguments in the header.

        The file appears whole or not at all, replacing an older one. What is saved is φ and nothing of the training.

        Args:
            path: The file, such as ``"loss.safetensors"``, or a URL that fsspec understands.

        Raises:
            TypeError: If a class of your own does not keep an argument of its constructor as an attribute of that name.
            ValueError: If φ is not finite.
        """
        _check_finite(self.state_dict(), f"cannot save the loss to {os.fspath(path)}")
        write_tensors(path, LOSS_KIND, _VERSION, self.describe(), self.state_dict())

    @classmethod
    def load(cls: type[LossT], path: str | os.PathLike[str]) -> LossT:
        """Return the loss that :meth:`save` wrote, bit for bit, on the CPU; nothing in the file is run.

        ``LearnedLoss.load`` reads every representation, a subclass only its own. It is a plain ``nn.Module``::

            loss = LearnedLoss.load("loss.safetensors").requires_grad_(False)
            loss(model(x), y).backward()

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated, corrupt, of another kind, from a newer version, or contradicts itself.
        """
        content, phi = read_tensors(path, LOSS_KIND, _VERSION)
        try:
            return cls.rebuild(content, phi)
        except ValueError as error:
            raise ValueError(f"cannot read {os.fspath(path)}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Return the class and the arguments that build it, as plain values.

        Raises:
            TypeError: If an argument of the constructor is not kept as an attribute, or JSON has no form for it.
        """
        options = {}
        for name in list(inspect.signature(type(self).__init__).parameters)[1:]:
            try:
                options[name] = json.loads(json.dumps(getattr(self, name)))
            except (AttributeError, TypeError) as error:
                raise TypeError(
                    f"{type(self).__name__} cannot be saved: its argument `{name}` cannot be read back from it "
                    f"({error}). Keep it as the attribute `{name}`, a plain value."
                ) from error
        return {"class": _path(type(self)), "options": options}

    @classmethod
    def rebuild(cls: type[LossT], description: Mapping[str, Any], phi: Mapping[str, Tensor]) -> LossT:
        """Return the loss that :meth:`describe` described, with φ.

        What the description asks for is built without memory first, and with memory only once it has the shapes of
        ``phi``; random states stay as they are.

        Raises:
            ValueError: If the class is unknown, or the options and φ do not fit it or each other.
        """
        name: Any = description.get("class")
        options: Any = description.get("options")
        known = {_path(subclass): subclass for subclass in _concrete(cls)}
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
                f"its options build a {name} whose {odd!r} has shape {wanted.get(odd)}, and its φ has "
                f"{found.get(odd)} there; save it again."
            )
        dtypes = {value.dtype for value in phi.values()}
        if len(dtypes) > 1 or not dtypes <= {torch.float64, torch.float32, torch.bfloat16, torch.float16}:
            raise ValueError(
                f"its φ has dtypes {sorted(map(str, dtypes))}, where one floating dtype is wanted; save it again."
            )
        _check_finite(phi, "its φ cannot be used")
        with torch.random.fork_rng(devices=[]):
            loss = known[name](**options)
        loss.load_state_dict(dict(phi), assign=True)
        return loss


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which nothing is cast; the meta device, on which costs are counted, casts nothing anyway."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device_type=device.type, enabled=False) if available else nullcontext()


def _concrete(base: type[LossT]) -> Iterator[type[LossT]]:
    if not inspect.isabstract(base):
        yield base
    for subclass in base.__subclasses__():
        yield from _concrete(subclass)


def _path(cls: type) -> str:
    """Return the name that tells a class apart from others of its bare name."""
    own = cls.__module__.startswith("lightning_adalfl.")
    return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"


def _check_finite(phi: Mapping[str, Tensor], what: str) -> None:
    for name, value in phi.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{what}: {name!r} is not finite, so the run that learned it diverged; take an earlier φ.")
