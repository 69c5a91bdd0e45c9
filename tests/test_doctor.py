"""``python -m lightning_adalfl doctor``: what it says of runs that went well, and of runs that did not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from projects import Ada, config, loaders, make, trainer

from lightning_adalfl import AdaLFLConfig, LossHistory, LossNetwork, LossShapeLogger
from lightning_adalfl.__main__ import main
from lightning_adalfl.inspection import diagnose


def train(folder: Path, logger: Any = False, callbacks: tuple[Any, ...] = (), **options: Any) -> Path:
    """Train for twelve steps; return the checkpoint, where Lightning would have put it."""
    torch.manual_seed(0)
    fit = trainer(folder, logger=logger, callbacks=list(callbacks), log_every_n_steps=1)
    fit.fit(make(Ada, adalfl=config(**options)), *loaders())
    path = folder / "checkpoints" / "last.ckpt"
    fit.save_checkpoint(path, weights_only=False)
    return path


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_run_is_described_from_its_folder_and_from_its_checkpoint(
    kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(tmp_path, kind(tmp_path, name="", version=""), (LossShapeLogger(every_n_steps=4),), meta_every=1)
    said = []
    for given in (tmp_path, path):
        assert main(["doctor", str(given)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    for part in (
        f"{path}: at base step 12, after 12 meta steps, with task='multiclass', learn='loss', meta_every=1",
        "The learned loss φ has moved.",
        "  adalfl/evidence: ",
        "  adalfl/implied_lr: 0.1 to ",
        "  adalfl/skipped_meta_steps: 0 to 0\n",
        "From step 0 to 12 φ has gone 0.",
        "Strength (section 5.5). A step goes",
        "Flat regions",
        "Turning regions",
        "What to do:\n- Hardly any shape is learned yet.",
    ):
        assert part in said[0], part


def test_a_checkpoint_may_have_any_name_and_may_be_sharded(tmp_path: Path) -> None:
    path = train(tmp_path)
    other = path.with_name("model.pt")
    path.rename(other)
    assert "Turning regions" in diagnose(other)
    path.mkdir()
    other.rename(path / "meta.pt")  # beside it are the shards of the parameters
    for given in (path, tmp_path):
        assert "Turning regions" in diagnose(given)


def test_the_users_own_table_does_not_hide_the_scalars(tmp_path: Path) -> None:
    train(tmp_path, TensorBoardLogger(tmp_path, name="", version=""))
    (tmp_path / "metrics.csv").write_text("accuracy\n1\n")
    assert "adalfl/evidence: " in diagnose(tmp_path)


def test_how_far_phi_has_gone_leaves_out_the_units(tmp_path: Path) -> None:
    loss, history = LossNetwork("regression", bias=True), LossHistory()
    history.append(0, loss)
    loss.take_units(torch.tensor(300.0), torch.tensor(100.0), torch.tensor(50.0))
    history.append(10, loss)
    history.save(tmp_path / "loss_history.safetensors")
    assert "From step 0 to 10 φ has gone 0 times its first length." in diagnose(tmp_path)


def test_the_shape_is_of_the_newest_file(tmp_path: Path) -> None:
    """A checkpoint is kept where a metric was best, long before the end of the history."""
    path = train(tmp_path, callbacks=(LossShapeLogger(every_n_steps=4),), meta_every=1)
    early = path.with_name("best.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    phi = checkpoint["adalfl"]["learner"]["phi"]
    phi.update({name: torch.zeros_like(value) for name, value in phi.items() if name.startswith("linear")})
    path.unlink()
    torch.save(checkpoint, early)
    os.utime(early, (0, 0))
    assert diagnose(tmp_path).partition("Strength")[2] != diagnose(early).partition("Strength")[2]


def test_a_run_without_meta_steps_says_so(tmp_path: Path) -> None:
    text = diagnose(train(tmp_path, meta_every=100))
    assert "The learned loss φ has not moved." in text
    assert "- No meta step was taken: train for more than `meta_every` steps" in text


def test_meta_steps_that_were_left_out_are_named_once(tmp_path: Path) -> None:
    path = train(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    learner = checkpoint["adalfl"]["learner"]
    learner["skipped_meta_steps"] = learner["meta_steps"]
    torch.save(checkpoint, path)
    (tmp_path / "metrics.csv").write_text("adalfl/skipped_meta_steps,step\n0,0\n7,9\n")
    text = diagnose(path)
    assert "of the meta steps were left out, since a number was not finite." in text
    assert "The learned loss φ has not moved." in text
    assert text.count("- Look for NaN in the trusted batches") == 1


def test_a_run_that_learns_no_loss_has_no_shape(tmp_path: Path) -> None:
    text = diagnose(train(tmp_path, learn="nothing", meta_every=1))
    assert "learn='nothing'" in text
    assert "φ" not in text
    assert "Strength" not in text


def test_classes_without_trusted_rows_are_named(tmp_path: Path) -> None:
    path = train(tmp_path, meta_every=1)
    said = "- No trusted row was of class 2: add some, or nothing is learned of it."
    assert said not in diagnose(path)
    state = torch.load(path, weights_only=True)
    state["adalfl"]["learner"]["phi"]["held_out_classes"][2] = 0.0
    torch.save(state, path)
    assert said in diagnose(path)


def test_a_loss_that_trains_alone_needs_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    fit = trainer(tmp_path)
    fit.fit(make(Ada, adalfl=AdaLFLConfig.paper("multiclass")), *loaders())
    path = tmp_path / "a.ckpt"
    fit.save_checkpoint(path, weights_only=False)
    assert main(["doctor", str(path)]) == 1
    assert "error: `classes` is needed" in capsys.readouterr().err
    assert main(["doctor", str(path), "--classes", "3"]) == 0
    assert "the implied learning rate is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "values", "advice"),
    [
        ("implied_lr", [0.1, 0.1, 0.001], "- Steps have become short."),
        ("implied_lr", [0.1, 0.1, 0.05], "- Nothing: no sign of trouble."),
        ("task_loss", [*[0.5] * 9, 0.2, *[0.9] * 10], "- The trusted loss rose; its lowest was 0.2."),
        ("task_loss", [0.9, *[0.2] * 10], "- Nothing: no sign of trouble."),
        ("meta_grad_norm", [0.0, 0.0], "- The trusted loss does not depend on what a step moves"),
        ("skipped_meta_steps", [0.0, 3.0], "- Look for NaN in the trusted batches"),
        ("evidence", [1.0, -1.0, -1.0, 1.0], "below zero in 50%"),
    ],
)
def test_scalars_alone_give_advice(name: str, values: list[float], advice: str, tmp_path: Path) -> None:
    rows = "".join(f"{value},{step},\n" for step, value in enumerate(values))
    (tmp_path / "metrics.csv").write_text(f"adalfl/{name},step,train_loss\n{rows},99,0.5\n")
    assert advice in diagnose(tmp_path)


def test_a_run_below_the_folder_is_named(tmp_path: Path) -> None:
    run = tmp_path / "lightning_logs" / "version_3"
    run.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"give a log folder such as {run}."):
        diagnose(tmp_path)


def test_what_cannot_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"x" * 99)
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    for row in ("adalfl/evidence,step\nmuch,0\n", "adalfl/evidence\n1,2,3\n"):
        (tmp_path / str(len(row))).mkdir()
        (tmp_path / str(len(row)) / "metrics.csv").write_text(row)
        assert main(["doctor", str(tmp_path / str(len(row)))]) == 1
        assert "metrics.csv: it is damaged" in capsys.readouterr().err
    for name, message in (
        ("none", "there is no such file or folder; check the path."),
        ("empty", "it holds no checkpoint, no loss_history.safetensors and no scalars under adalfl/"),
        ("a.ckpt", "it is truncated, corrupt"),
        ("plain.ckpt", "it has no learned loss; give a checkpoint of a module with AdaLFLMixin."),
    ):
        assert main(["doctor", str(tmp_path / name)]) == 1
        output = capsys.readouterr()
        assert output.err.startswith(f"error: cannot read {tmp_path / name}: {message}"), output.err
        assert output.out == ""


@pytest.mark.parametrize("command", ["inspect", "influence", "doctor"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"example: python -m lightning_adalfl {command} lightning_logs/version_0" in capsys.readouterr().out
