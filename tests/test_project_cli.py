"""The command line: configurations in YAML, options on top of them, and the checkpoint of such a run."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import cli
import pytest
import torch
import yaml

from lightning_adalfl import AdaLFLConfig

# Of jsonargparse about how Lightning calls it.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CONFIGS = Path(cli.__file__).parent / "configs"
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def short(tmp_path: Path, name: str) -> str:
    """Return the path of a configuration like that of the examples, but for a few steps."""
    values = yaml.safe_load((CONFIGS / name).read_text())
    values["trainer"] |= {"max_steps": 6, "default_root_dir": str(tmp_path)}
    for callback in values["trainer"]["callbacks"]:
        if callback["class_path"].endswith("ModelCheckpoint"):
            callback["init_args"]["every_n_train_steps"] = 3
    path = tmp_path / name
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture(autouse=True)
def no_trace_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.setattr(cli, "load_task", functools.cache(cli.load_task))


def run(*arguments: str) -> Any:
    sys.argv = ["cli.py", *arguments, *QUIET]
    return cli.main()


# Of Lightning, where a run goes on in a new version of its folder.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_from_yaml_then_test_and_load_the_checkpoint(tmp_path: Path) -> None:
    config = short(tmp_path, "mnist5k.yaml")
    options = ["--model.adalfl.meta_every=2", "--model.adalfl.task_loss=torch.nn.functional.cross_entropy"]
    options += ["--trainer.callbacks+=lightning_adalfl.AdaLFLInit", "--trainer.callbacks.steps=2"]
    fitted = run("fit", "--config", config, *options)
    learner = fitted.model.adalfl
    assert (learner.base_steps, learner.meta_steps, learner.initialised) == (6, 3, True)
    assert learner.config == AdaLFLConfig("multiclass", meta_every=2, task_loss=torch.nn.functional.cross_entropy)
    held = {id(p) for group in fitted.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in fitted.model.model.parameters()}
    assert fitted.trainer.lr_scheduler_configs[0].scheduler.step_size == 20
    (log,) = (tmp_path / "lightning_logs").iterdir()
    saved = yaml.safe_load((log / "config.yaml").read_text())
    assert saved["model"]["adalfl"]["meta_every"] == 2
    checkpoints = sorted((log / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["epoch=0-step=3.ckpt", "epoch=0-step=6.ckpt"]

    loaded = cli.AdaClassifier.load_from_checkpoint(checkpoints[-1], weights_only=True)
    assert loaded.adalfl.config == learner.config
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, fitted.model.state_dict()[name]), name

    tested = run("test", "--config", config, "--ckpt_path", str(checkpoints[-1]), "--trainer.limit_test_batches=1")
    assert 0 <= tested.trainer.callback_metrics["test_error"] <= 1


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_every_configuration_of_the_examples_prints_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", str(CONFIGS / name), "--print_config")
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load((CONFIGS / name).read_text())
    assert printed["model"]["adalfl"].items() >= given["model"]["adalfl"].items()
    assert AdaLFLConfig.from_dict(printed["model"]["adalfl"]) == AdaLFLConfig(**given["model"]["adalfl"])
    assert len(printed["trainer"]["callbacks"]) == len(given["trainer"]["callbacks"])


def test_the_paper_s_recipe_is_the_configuration_of_that_name() -> None:
    given = yaml.safe_load((CONFIGS / "mnist5k_paper.yaml").read_text())
    assert AdaLFLConfig(**given["model"]["adalfl"]) == AdaLFLConfig.paper("multiclass")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.adalfl.meta_every=0", "`meta_every` must be a whole number, 1 or more; got 0"),
        ("--model.adalfl.representation=cubic", "`representation` must be one of 'network'"),
        ("--model.adalfl.meta_rate=1", r"`adalfl` has unknown fields \['meta_rate'\]"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("fit", "--config", short(tmp_path, "mnist5k.yaml"), option)
