"""What else finds wrong targets: AUM, forgetting, TracIn, cleanlab, and a network of the trusted rows alone.

AUM (Pleiss et al., 2020), forgetting (Toneva et al., 2019) and TracIn (Pruthi et al., 2020) look at the same run as the
logger. cleanlab (Northcutt et al., 2021) needs predictions for rows that a network has not seen: five more networks,
each trained without a fifth of the rows, and stopped at its best epoch by the trusted rows. All scores are high where a
target is suspicious.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from cleanlab.regression.rank import get_label_quality_scores as quality_of_values
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

Criterion = Callable[[Tensor, Tensor], Tensor]
Scores = dict[str, NDArray[np.floating[Any]]]
CHECKPOINTS, FOLDS, BATCH = 6, 5, 64


class Epochs(L.Callback):
    """Keeps what a run predicted for its training rows after each epoch, and some of its parameters."""

    def __init__(self, train: TensorDataset, epochs: int) -> None:
        self.x, self.outputs, self.checkpoints = train.tensors[0], [], []
        self.kept = {round((k + 1) * epochs / CHECKPOINTS) - 1 for k in range(CHECKPOINTS)}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look."""
        self.outputs.append(predicted(pl_module.model, self.x))
        if trainer.current_epoch in self.kept:
            self.checkpoints.append({k: p.detach().clone() for k, p in pl_module.model.named_parameters()})


@torch.no_grad()
def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Return predictions in evaluation mode."""
    was_training = model.training
    found = torch.cat([model.eval()(part) for part in x.split(1000)])
    model.train(was_training)
    return found


def fitted(
    model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, lr: float, epochs: int, trusted: TensorDataset
) -> nn.Module:
    """Train a copy of a network, begun anew, and return it as of its best epoch by the loss on the trusted rows."""
    model, best = copy.deepcopy(model), (torch.inf, {})
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
        loss = criterion(predicted(model, trusted.tensors[0]), trusted.tensors[1]).item()
        if loss < best[0]:
            best = (loss, copy.deepcopy(model.state_dict()))
    model.load_state_dict(best[1])
    return model


def of_the_run(seen: Epochs, y: Tensor) -> Scores:
    """Return AUM and forgetting counts; those of a row that was never learned are the highest."""
    outputs = torch.stack(seen.outputs)
    own = outputs.gather(2, y.expand(len(outputs), -1).unsqueeze(2)).squeeze(2)
    other = outputs.scatter(2, y.expand(len(outputs), -1).unsqueeze(2), -torch.inf).amax(2)
    right = own > other
    forgotten = (right[:-1] & ~right[1:]).sum(0).float()
    forgotten[~right.any(0)] = len(outputs)
    return {"AUM": -(own - other).mean(0).numpy(), "forgetting": forgotten.numpy()}


def tracin(
    seen: Epochs, model: nn.Module, criterion: Criterion, train: TensorDataset, trusted: TensorDataset
) -> Scores:
    """Return TracIn on the trusted rows and of each row on itself, over all parameters.

    The rate is left out: it is the same at each checkpoint.
    """

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    def loss_of_all(parameters: dict[str, Tensor]) -> Tensor:
        return criterion(functional_call(model, parameters, (trusted.tensors[0],)), trusted.tensors[1])

    model, each = copy.deepcopy(model).eval(), vmap(grad(loss), in_dims=(None, 0, 0))
    against, itself = torch.zeros(len(train)), torch.zeros(len(train))
    for parameters in seen.checkpoints:
        of_trusted = grad(loss_of_all)(parameters)
        for rows in torch.arange(len(train)).split(250):
            of_rows = each(parameters, *(t[rows] for t in train.tensors))
            against[rows] -= sum((g.flatten(1) @ of_trusted[k].flatten()) for k, g in of_rows.items())
            itself[rows] += sum(g.flatten(1).square().sum(1) for g in of_rows.values())
    return {"TracIn, trusted rows": against.numpy(), "TracIn, itself": itself.numpy()}


def cross_validated(
    model: nn.Module, criterion: Criterion, train: TensorDataset, lr: float, epochs: int, trusted: TensorDataset
) -> Tensor:
    """Return predictions for each row by a network that has not seen it."""
    x, y = train.tensors
    fold = torch.randperm(len(y)) % FOLDS
    outputs = torch.empty(0)
    for k in range(FOLDS):
        kept = fold != k
        found = predicted(fitted(model, criterion, x[kept], y[kept], lr, epochs, trusted), x[~kept])
        outputs = found.new_zeros(len(y), *found.shape[1:]) if not len(outputs) else outputs
        outputs[~kept] = found
    return outputs


def others(
    seen: Epochs, model: nn.Module, criterion: Criterion, train: TensorDataset, trusted: TensorDataset, lr: float
) -> tuple[Scores, NDArray[np.bool_] | None]:
    """Return the scores of all, and which rows confident learning picks."""
    epochs, y = len(seen.outputs), train.tensors[1]
    scores = tracin(seen, model, criterion, train, trusted)
    alone = predicted(fitted(model, criterion, *trusted.tensors, lr, epochs, trusted), train.tensors[0])
    outputs = cross_validated(model, criterion, train, lr, epochs, trusted)
    if y.is_floating_point():
        targets, values = y.flatten().numpy(), outputs.flatten().numpy()
        scores["trusted rows alone"] = (alone - y).abs().flatten().numpy()
        for method, name in (("residual", "cleanlab, residual"), ("outre", "cleanlab, outre")):
            scores[name] = -quality_of_values(targets, values, method=method)
        return scores, None
    labels, odds = y.numpy(), outputs.double().softmax(1).numpy()
    scores |= of_the_run(seen, y)
    scores["trusted rows alone"] = -alone.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1).numpy()
    for method, name in (
        ("self_confidence", "cleanlab, self-confidence"),
        ("normalized_margin", "cleanlab, normalized margin"),
    ):
        scores[name] = -get_label_quality_scores(labels, odds, method=method)
    return scores, find_label_issues(labels, odds, filter_by="confident_learning", n_jobs=1)
