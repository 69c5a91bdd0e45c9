"""A saved loss is the loss of another model or data set, by configuration and from the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from projects import Ada, AdaSmooth, assert_same, base_tensors, config, learned_tensors, loaders, make, points, trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, LearnedLoss, LossNetwork, TaylorLoss

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    loss = LossNetwork("multiclass", bias=True, reduction="sum", residual=True)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss.save(tmp_path / "loss.safetensors")
    return tmp_path / "loss.safetensors"


def phi_of(path: Path) -> dict[str, Tensor]:
    return {f"adalfl.loss.{name}": value for name, value in LearnedLoss.load(path).state_dict().items()}


def test_a_saved_loss_is_the_fixed_loss_of_another_model(saved: Path, tmp_path: Path) -> None:
    """Training with it in Lightning is plain training in a loop of one's own with the loaded loss, bit for bit."""
    settings = config(initial_loss=str(saved), online=False, max_gain=None)
    module = make(AdaSmooth, adalfl=settings)
    assert_same(learned_tensors(module), phi_of(saved))
    trainer(tmp_path, max_epochs=2).fit(module, *loaders(shuffle=False))
    assert_same(learned_tensors(module), phi_of(saved))
    assert module.adalfl.meta_steps == 0
    assert module.adalfl.base_steps == 12

    loss = LearnedLoss.load(saved).requires_grad_(False)
    plain = make(AdaSmooth, adalfl=settings).model
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for x, y in DataLoader(points(), 16):
            optimizer.zero_grad()
            loss(plain(x), y).backward()
            optimizer.step()
    assert_same(base_tensors(module), {f"model.{name}": value for name, value in plain.state_dict().items()})


def test_online_learning_goes_on_from_a_saved_loss(saved: Path, tmp_path: Path) -> None:
    module = make(Ada, adalfl=config(initial_loss=str(saved)))
    trainer(tmp_path, max_epochs=1).fit(module, *loaders())
    assert module.adalfl.meta_steps == 6
    assert any(not torch.equal(value, learned_tensors(module)[name]) for name, value in phi_of(saved).items())


def test_the_offline_phase_does_not_run_over_a_given_loss(saved: Path, tmp_path: Path) -> None:
    module = make(Ada, adalfl=config(initial_loss=str(saved), online=False))
    before = learned_tensors(module)
    trainer(tmp_path, max_epochs=1, callbacks=[AdaLFLInit(steps=3)]).fit(module, *loaders())
    assert_same(learned_tensors(module), before)
    assert all(torch.equal(before[name], value) for name, value in phi_of(saved).items())


@pytest.mark.parametrize("online", [True, False])
def test_the_checkpoint_needs_the_file_no_more(online: bool, saved: Path, tmp_path: Path) -> None:
    module = make(Ada, adalfl=config(initial_loss=str(saved), online=online))
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module, *loaders())
    fit.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    saved.unlink()
    assert module.hparams["adalfl"]["initial_loss"] == str(saved)  # where φ came from stays in the log
    again = Ada.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same(learned_tensors(again), learned_tensors(module))
    assert again.adalfl.config == replace(module.adalfl.config, initial_loss=None)
    assert again.adalfl.loss.reduction == "sum"


LOSSES: dict[str, tuple[Callable[[], LearnedLoss], dict[str, Any]]] = {
    "network": (
        lambda: LossNetwork("binary", output_activation="softplus", weight_init="xavier_uniform"),
        {"representation": "network", "output_activation": "softplus", "weight_init": "xavier_uniform"},
    ),
    "ml3": (lambda: LossNetwork.ml3("binary", "sum"), {"representation": "ml3", "reduction": "sum"}),
    **{
        name: (lambda order=order, form=form: TaylorLoss("binary", order, form), {"representation": name})
        for name, order, form in (
            ("taylor_cubic", "cubic", "prediction_powers"),
            ("taylor_quadratic", "quadratic", "prediction_powers"),
            ("taylor_cubic_target_powers", "cubic", "target_powers"),
            ("taylor_quadratic_target_powers", "quadratic", "target_powers"),
        )
    },
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_configuration_takes_the_structure_of_the_file(kind: str, tmp_path: Path) -> None:
    """So that a configuration without the file builds the same structure: what a checkpoint relies on."""
    make_loss, fields = LOSSES[kind]
    make_loss().save(tmp_path / "loss.safetensors")
    random_state = torch.get_rng_state()
    found = AdaLFLConfig("binary", initial_loss=tmp_path / "loss.safetensors")  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert found == AdaLFLConfig("binary", initial_loss=str(tmp_path / "loss.safetensors"), **fields)
    assert AdaLFLConfig.from_dict(found.to_dict()) == found
    assert replace(found, meta_lr=0.5).representation == found.representation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_loss": "no.safetensors"}, r"`initial_loss` 'no.safetensors' cannot be used: .* is no such file"),
        ({"task": "binary"}, r"is for task 'multiclass' and `task` is 'binary': .* Give a loss that was learned"),
        ({"learn": "lr"}, "has no use with `learn='lr'`"),
        ({"representation": "ml3"}, r"`representation` is 'network' in `initial_loss` .*; got 'ml3'. Leave it out"),
        ({"output_activation": "relu"}, r"`output_activation` is None in `initial_loss` .*; got 'relu'. Leave it out"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_at_once(options: dict[str, Any], message: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLFLConfig(**{"task": "multiclass", "initial_loss": str(saved), **options})


def test_a_path_is_no_number() -> None:
    with pytest.raises(TypeError, match="`initial_loss` must be the path of a saved loss, or None; got 3"):
        AdaLFLConfig("binary", initial_loss=3)  # type: ignore[arg-type]


def test_a_broken_file_is_refused_at_once(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"`initial_loss` .* cannot be used: cannot read .* truncated"):
        AdaLFLConfig("multiclass", initial_loss=str(saved))


@pytest.mark.parametrize(
    "loss",
    [
        LossNetwork("binary", hidden=(3,)),
        LossNetwork("binary", activation="softplus"),
        LossNetwork("binary", activation="relu"),
    ],
)
def test_a_structure_that_no_configuration_has(loss: LossNetwork, tmp_path: Path) -> None:
    loss.save(tmp_path / "loss.safetensors")
    with pytest.raises(ValueError, match=r"no `representation` has the structure .* in a loop of your own"):
        AdaLFLConfig("binary", initial_loss=str(tmp_path / "loss.safetensors"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls jsonargparse
def test_transfer_from_the_command_line(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("task=multiclass", f"initial_loss={saved}", "online=false")
    monkeypatch.setattr(
        "sys.argv", ["train.py", "--seed_everything=1", *(f"--model.adalfl.{option}" for option in options)]
    )
    cli = LightningCLI(Ada, run=False, save_config_callback=None)
    assert cli.model.adalfl.config.reduction == "sum"
    assert all(torch.equal(learned_tensors(cli.model)[name], value) for name, value in phi_of(saved).items())
