"""AdaLFLConfig checks itself, and survives a checkpoint, a YAML file and a logger."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_adalfl import AdaLFLConfig
from lightning_adalfl.adapter.meta_learner import MetaLearner


def own_loss(predictions: Tensor, target: Tensor) -> Tensor:
    return (predictions - target).abs().mean()


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("task", "ranking", ValueError, "`task` must be one of .*; got 'ranking'"),
        ("representation", "cubic", ValueError, "`representation` must be one of 'network', .*; got 'cubic'"),
        ("output_activation", "tanh", ValueError, None),
        ("weight_init", "zeros", ValueError, None),
        ("reduction", "max", ValueError, "`reduction` must be one of 'mean', 'sum'; got 'max'"),
        ("learn", "all", ValueError, "`learn` must be one of 'loss', 'lr', 'both'; got 'all'"),
        ("meta_data", "test", ValueError, "`meta_data` must be one of 'val', 'train'; got 'test'"),
        ("hypergradient", "implicit", ValueError, "`hypergradient` must be one of .*; got 'implicit'"),
        ("meta_lr", 0.0, ValueError, "`meta_lr` must be positive; got 0.0"),
        ("meta_lr", "1e-5", TypeError, "`meta_lr` must be a number; got '1e-5'"),
        ("lr_meta_lr", float("inf"), ValueError, "`lr_meta_lr` must be finite; got inf"),
        ("gain_lr", -1.0, ValueError, "`gain_lr` must be positive; got -1.0"),
        ("gain_horizon", 0, ValueError, "`gain_horizon` must be a whole number, 1 or more; got 0"),
        ("meta_every", 0, ValueError, "`meta_every` must be a whole number, 1 or more; got 0"),
        ("meta_every", 1.5, TypeError, "`meta_every` must be a whole number, 1 or more; got 1.5"),
        ("meta_batch_size", 0, ValueError, "`meta_batch_size` must be a whole number, 1 or more; got 0"),
        ("safeguard_window", True, TypeError, "`safeguard_window` must be a whole number, 1 or more; got True"),
        ("base_fraction", 1.5, ValueError, r"`base_fraction` must lie in \(0, 1\], a part of the batch; got 1.5"),
        ("min_cosine", 1.0, ValueError, r"`min_cosine` must lie in \(0, 1\).*; got 1.0"),
        ("max_gain", 1.0, ValueError, "`max_gain` must be more than 1, or None for no bounds; got 1.0"),
        ("online", 1, TypeError, "`online` must be True or False; got 1"),
        ("bias", "no", TypeError, "`bias` must be True or False; got 'no'"),
        ("residual", None, TypeError, "`residual` must be True or False; got None"),
        ("safeguard", 0, TypeError, "`safeguard` must be True or False; got 0"),
        ("meta_optimizer", "Adamm", ValueError, "`meta_optimizer` must name a class of torch.optim, .*; got 'Adamm'"),
        ("meta_optimizer", "lr_scheduler", ValueError, "`meta_optimizer` must name a class of torch.optim"),
        ("task_loss", 3, TypeError, "`task_loss` must be callable, an import path, or None; got 3"),
        ("task_loss", "no.such.loss", ValueError, "`task_loss` 'no.such.loss' cannot be imported: No module"),
        ("task_loss", "torch.nn.functional.no_loss", ValueError, "cannot be imported: module .* has no attribute"),
        ("task_loss", "cross_entropy", ValueError, "`task_loss` must be the import path of a function, such as"),
        ("initial_loss", 3, TypeError, "`initial_loss` must be the path of a saved loss, or None; got 3"),
        ("initial_loss", "none.safetensors", ValueError, "`initial_loss` 'none.safetensors' cannot be used"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(field: str, value: Any, error: Any, message: Any) -> None:
    # What the representation alone can judge, it judges when it is built.
    with pytest.raises(error, match=message or f"`{field}` must be one of .*; got '{value}'"):
        MetaLearner(AdaLFLConfig(**{"task": "multiclass", field: value}))


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError, match="meta_lr"):
        AdaLFLConfig("binary").meta_lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("task_loss", [None, torch.nn.functional.l1_loss, own_loss, "torch.nn.functional.l1_loss"])
def test_it_survives_being_written_as_yaml(task_loss: Any) -> None:
    config = AdaLFLConfig("regression", task_loss=task_loss, meta_every=3, learn="both", max_gain=None)
    values = config.to_dict()
    assert values.keys() == {field.name for field in fields(AdaLFLConfig)}
    assert AdaLFLConfig.from_dict(yaml.safe_load(yaml.safe_dump(values))) == config


def test_a_task_loss_without_an_import_path_must_be_given_again() -> None:
    def local(predictions: Tensor, target: Tensor) -> Tensor:
        return own_loss(predictions, target)

    for function in (local, lambda predictions, target: own_loss(predictions, target)):
        config = AdaLFLConfig("regression", task_loss=function)
        assert config.task_loss is function
        assert config.to_dict()["task_loss"] is None


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"`adalfl` has unknown fields \['eta'\]; known are \['base_fraction'"):
        AdaLFLConfig.from_dict({"task": "binary", "eta": 1e-5})


@pytest.mark.parametrize(("learn", "loss", "rate"), [("loss", True, False), ("lr", False, True), ("both", True, True)])
def test_what_is_learned(learn: str, loss: bool, rate: bool) -> None:
    config = AdaLFLConfig("multiclass", learn=learn)
    assert (config.learns_loss, config.learns_lr) == (loss, rate)


def test_the_recipe_of_the_paper_has_its_values_and_takes_changes() -> None:
    paper = AdaLFLConfig.paper("multiclass", meta_every=2)
    assert (paper.meta_lr, paper.meta_optimizer, paper.max_gain, paper.residual) == (1e-5, "Adam", None, False)
    assert (paper.representation, paper.reduction, paper.meta_data, paper.meta_every) == ("network", "mean", "val", 2)
