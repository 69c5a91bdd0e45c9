"""AdaLFLConfig checks itself, and survives a checkpoint, a YAML file and a logger."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLConfig, LossNetwork
from lightning_adalfl.checks import finite_number, one_of, positive_number, whole_number
from lightning_adalfl.learning import FiniteDifference


def own_task_loss(predictions: Tensor, target: Tensor) -> Tensor:
    return (predictions - target).abs().mean()


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("task", "ranking", ValueError, r"`task` must be one of .*; got 'ranking'"),
        ("task_loss", 3, TypeError, r"`task_loss` must be one of .*, callable, or an import path; got 3"),
        ("task_loss", "no.such.loss", ValueError, "`task_loss` 'no.such.loss' cannot be imported: No module"),
        ("task_loss", "torch.nn.functional.no_loss", ValueError, r"cannot be imported: module .* has no attribute"),
        ("task_loss", "cross_entropy", ValueError, r"`task_loss` must be one of .*, or the import path of a function"),
        ("task_loss", "torch.pi", ValueError, r"`task_loss` must be one of .*, or the import path of a function"),
        ("ignore_index", "0", TypeError, r"`ignore_index` must be a whole number, -\d+ or more; got '0'"),
        ("loss", 3, TypeError, "`loss` must be a preset's name, a file, or a LearnedLoss; got 3"),
        ("loss", LossNetwork("binary"), ValueError, "`loss` is for task 'binary' and `task` is 'multiclass': its pre"),
        ("own_loss", 1, TypeError, "`own_loss` must be True or False; got 1"),
        ("learn", "all", ValueError, "`learn` must be one of 'loss', 'lr', 'both', 'nothing'; got 'all'"),
        ("meta_lr", 0.0, ValueError, r"`meta_lr` must be positive; got 0.0"),
        ("meta_lr", "1e-5", TypeError, "`meta_lr` must be a number; got '1e-5'"),
        ("lr_meta_lr", float("inf"), ValueError, "`lr_meta_lr` must be finite; got inf"),
        ("meta_optimizer", "Adamm", ValueError, r"`meta_optimizer` must name a class of torch.optim .*; got 'Adamm'"),
        ("meta_optimizer", "LBFGS", ValueError, r"`meta_optimizer` .* steps by a dense gradient alone.*; got 'LBFGS'"),
        ("meta_optimizer", "SparseAdam", ValueError, r"`meta_optimizer` .*; got 'SparseAdam'"),
        ("meta_optimizer", "lr_scheduler", ValueError, r"`meta_optimizer` must name a class of torch.optim"),
        ("meta_optimizer", "Optimizer", ValueError, r"`meta_optimizer` must name a class of torch.optim"),
        ("meta_every", 0, ValueError, "`meta_every` must be a whole number, 1 or more; got 0"),
        ("meta_every", 1.5, TypeError, r"`meta_every` must be a whole number, 1 or more; got 1.5"),
        ("meta_batch_size", 0, ValueError, "`meta_batch_size` must be a whole number, 1 or more; got 0"),
        ("optimizer", -1, ValueError, "`optimizer` must be a whole number, 0 or more; got -1"),
        ("meta_data", "test", ValueError, "`meta_data` must be one of 'val', 'train'; got 'test'"),
        ("meta_data", [DataLoader([0])], ValueError, "`meta_data` must be one loader; got a sequence of 1"),
        ("meta_data", -1, ValueError, "`meta_data` must be 'val', 'train', an index from 0 or a loader; got -1"),
        ("meta_data", None, ValueError, "an index from 0 or a loader; got None"),
        ("hypergradient", "implicit", ValueError, r"`hypergradient` must be one of .*; got 'implicit'"),
        ("hypergradient", 3, TypeError, r"`hypergradient` must be one of .* or an instance of JacobianProduct; got 3"),
        ("hypergradient", FiniteDifference, TypeError, "or an instance of JacobianProduct; got <class"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(field: str, value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        AdaLFLConfig(**{"task": "multiclass", field: value})


@pytest.mark.parametrize("learn", ["lr", "nothing"])
@pytest.mark.parametrize("options", [{"loss": "paper"}, {"own_loss": False}])
def test_what_has_no_use_is_refused(learn: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`loss` and `own_loss` have no use with `learn='{learn}'`, .*; got loss="):
        AdaLFLConfig("binary", learn=learn, **options)
    with pytest.raises(ValueError, match=r"`ignore_index` is for task 'multiclass', .* got 0 for 'binary'"):
        AdaLFLConfig("binary", ignore_index=0)


def test_it_has_at_most_14_fields_and_cannot_be_changed() -> None:
    assert len(fields(AdaLFLConfig)) <= 14
    for field in fields(AdaLFLConfig):
        assert f"        {field.name}: " in (AdaLFLConfig.__doc__ or ""), f"`{field.name}` is not explained"
    with pytest.raises(FrozenInstanceError, match="meta_lr"):
        AdaLFLConfig("binary").meta_lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "task_loss", ["bounded", torch.nn.functional.l1_loss, own_task_loss, "torch.nn.functional.l1_loss"]
)
def test_it_survives_being_written_as_yaml(task_loss: Any) -> None:
    config = AdaLFLConfig("regression", task_loss=task_loss, meta_every=3, learn="both", loss=Path("a/b.safetensors"))
    values = config.to_dict()
    assert values.keys() == {field.name for field in fields(AdaLFLConfig)}
    assert AdaLFLConfig.from_dict(yaml.safe_load(yaml.safe_dump(values))) == config
    assert config.loss == "a/b.safetensors"


def test_objects_must_be_given_again_by_name() -> None:
    def local(predictions: Tensor, target: Tensor) -> Tensor:
        return own_task_loss(predictions, target)

    given: dict[str, Any] = {
        "task_loss": local, "loss": LossNetwork("regression"), "meta_data": [1, 2], "hypergradient": FiniteDifference()
    }  # fmt: skip
    for name, value in {**given, "task_loss": lambda f, y: own_task_loss(f, y)}.items():
        config = AdaLFLConfig("regression", **{name: value})
        assert getattr(config, name) is value
        values = yaml.safe_load(yaml.safe_dump(config.to_dict()))
        with pytest.raises(ValueError, match=rf"`{name}` was \S+, an object that cannot be read back; give the conf"):
            AdaLFLConfig.from_dict(values)
        assert AdaLFLConfig.from_dict({**values, name: value}) == config
    assert AdaLFLConfig("regression", **given).to_dict()["loss"] == {"given": "LossNetwork"}
    with pytest.raises(ValueError, match=r"`adalfl` has unknown fields \['eta'\]; known are \['hypergradient'"):
        AdaLFLConfig.from_dict({"task": "binary", "eta": 1e-5})


@pytest.mark.parametrize(
    ("learn", "loss", "rate"),
    [("loss", True, False), ("lr", False, True), ("both", True, True), ("nothing", False, False)],
)
def test_what_is_learned(learn: str, loss: bool, rate: bool) -> None:
    config = AdaLFLConfig("multiclass", learn=learn)
    assert (config.learns_loss, config.learns_lr) == (loss, rate)
    recipe = AdaLFLConfig.paper("multiclass", learn=learn)
    assert recipe.own_loss == (not loss)


def test_the_recipe_of_the_paper_has_its_values_and_takes_changes() -> None:
    paper = AdaLFLConfig.paper("multiclass", meta_every=2)
    expected = AdaLFLConfig("multiclass", task_loss="handcrafted", loss="paper", own_loss=False, meta_lr=1e-5)
    assert paper == replace(expected, meta_every=2)
    assert (paper.meta_optimizer, paper.meta_data, paper.learn) == ("Adam", "val", "loss")
    assert AdaLFLConfig.paper("binary").meta_every == 1


def test_checks_return_what_is_right() -> None:
    assert (whole_number("n", 3), whole_number("n", 0, 0)) == (3, 0)
    assert (finite_number("x", -2), positive_number("x", 0.5), one_of("c", "a", ("a", "b"))) == (-2, 0.5, "a")
    for check in (whole_number, finite_number, positive_number):
        with pytest.raises(TypeError, match=r"`x` must be a (whole )?number.*; got True"):
            check("x", True)
    with pytest.raises(ValueError, match="`x` must be finite; got nan"):
        positive_number("x", float("nan"))
    with pytest.raises(ValueError, match="`c` must be one of 'a', 'b'; got None"):
        one_of("c", None, ("a", "b"))


def test_a_rate_of_numpys_is_kept_as_pythons() -> None:
    """Else it would stand in a checkpoint that `weights_only` does not read."""
    config = AdaLFLConfig("multiclass", meta_lr=np.logspace(-4, -2, 3)[1], lr_meta_lr=np.float64(0.1))
    assert type(config.meta_lr) is float
    assert type(config.lr_meta_lr) is float
