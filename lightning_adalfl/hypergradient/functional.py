"""Run a model's prediction at other parameters than its own, without touching it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Predict = Callable[[Any], tuple[Tensor, Tensor]]


class _Predictor(nn.Module):
    """Gives ``functional_call``, which redirects ``forward`` alone, a forward that is the model's prediction."""

    def __init__(self, model: nn.Module, predict: Predict) -> None:
        super().__init__()
        self.model = model
        self.predict = predict

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.predict(batch)


class FunctionalModel:
    """A model's prediction as a function of parameters θ and buffers.

    Args:
        model: The base model f.
        parameters: The parameters θ that vary, in the order in which values are given.
        predict: ``predict(batch) -> (predictions, target)``, a function of ``model``.

    Raises:
        ValueError: If one of ``parameters`` is not a parameter of ``model``.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], predict: Predict) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        missing = [tuple(p.shape) for p in parameters if id(p) not in names]
        if missing:
            raise ValueError(
                f"`optimizer` holds parameters that `model` does not own, of shapes {missing}; "
                "build it from `model.parameters()`."
            )
        self._names = [f"model.{names[id(parameter)]}" for parameter in parameters]
        self._predictor = _Predictor(model, predict)

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers, such as BatchNorm's running statistics, under the names that a call takes."""
        # Looked up afresh, since a module may have put another tensor in place.
        return dict(self._predictor.named_buffers())

    def copied_buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers as they are now."""
        return {name: buffer.detach().clone() for name, buffer in self.buffers().items()}

    def __call__(
        self, batch: Any, buffers: Mapping[str, Tensor], values: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict on ``batch``.

        Args:
            batch: What ``predict`` takes.
            buffers: The buffers to use; they are copied, so that neither they nor the model's own are updated.
            values: Values of θ by their index; parameters not named keep the model's own.
        """
        replaced = {name: buffer.clone() for name, buffer in buffers.items()}
        replaced.update({self._names[index]: value for index, value in (values or {}).items()})
        # Compiled parts know neither dual tensors nor swapped parameters: here they run as the Python that they were.
        with torch.compiler.set_stance("force_eager"):
            return functional_call(self._predictor, replaced, (batch,))
