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
        # A tensor may be a parameter of several modules; each module is named once, under whatever names it has.
        names: dict[int, list[str]] = {}
        for path, module in model.named_modules(prefix="model"):
            for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
                names.setdefault(id(parameter), []).append(name)
        missing = [tuple(p.shape) for p in parameters if id(p) not in names]
        if missing:
            raise ValueError(
                f"`optimizer` holds parameters that `model` does not own, of shapes {missing}; "
                "build it from `model.parameters()`."
            )
        self._names = [names[id(parameter)] for parameter in parameters]
        varying = {id(parameter) for parameter in parameters}
        self._others = [p for p in model.parameters() if id(p) not in varying]
        self._other_names = [names[id(p)] for p in self._others]
        self._predictor = _Predictor(model, predict)

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers, such as BatchNorm's running statistics, under the names that a call takes."""
        # Looked up afresh, since a module may have put another tensor in place.
        modules = self._predictor.named_modules()
        return {name: b for path, module in modules for name, b in module.named_buffers(path, False, False)}

    def copied_buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers as they are now."""
        return _clones(self.buffers())

    def __call__(
        self, batch: Any, buffers: Mapping[str, Tensor], values: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict on ``batch``.

        Args:
            batch: What ``predict`` takes.
            buffers: The buffers to use; they are copied, so that neither they nor the model's own are updated.
            values: Values of θ by their index; parameters not named keep the model's own.
        """
        replaced = _clones(buffers)
        if values is not None:
            # A derivative along θ alone: what else might ask for a gradient is to build no graph.
            named = [(self._names[index], value) for index, value in values.items()]
            named += [(names, p.detach()) for names, p in zip(self._other_names, self._others) if p.requires_grad]
            replaced.update((name, value) for names, value in named for name in names)
        # Compiled parts know neither dual tensors nor swapped parameters: here they run as the Python that they were.
        with torch.compiler.set_stance("force_eager"):
            # Tied weights are named above already; torch would look for them again in each call.
            return functional_call(self._predictor, replaced, (batch,), tie_weights=False)


def _clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies; what is one tensor under several names stays one."""
    copies = {id(tensor): tensor for tensor in tensors.values()}
    copies = {key: tensor.detach().clone() for key, tensor in copies.items()}
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}
