"""What a learned loss says is what it is: numbers against losses whose answer is known, and the command line."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from projects import Ada, config, loaders, make, trainer
from torch import Tensor, nn

from lightning_adalfl import (
    AdaLFLInit,
    LearnedLoss,
    LossNetwork,
    LossShapeLogger,
    LossTrajectory,
    TaylorLoss,
    TrajectoryRecorder,
)
from lightning_adalfl.__main__ import main
from lightning_adalfl.inspection import LossReport, in_words, inspect_shape, plot_inspection, read_source
from lightning_adalfl.loss_shape import evaluate_loss_shape
from lightning_adalfl.losses.safe_file import write_safe_file

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]
TASKS = ("multiclass", "binary", "multilabel", "regression")


class Formula(LearnedLoss):
    """ℓ(y, f) from a function."""

    def __init__(self, task: str, function: Any, reduction: str = "mean") -> None:
        super().__init__(task, reduction)
        self.function = function
        self.unused = nn.Parameter(torch.zeros(()))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.function(prediction, target) + 0 * self.unused


def report_of(loss: LearnedLoss, classes: int = 10) -> LossReport:
    return inspect_shape(evaluate_loss_shape(loss, 7), classes=classes, reduction=loss.reduction)


def smoothed(ε: float, classes: int) -> Any:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return -(y * (1 - ε) + ε / classes) * f.clamp_min(1e-9).log()

    return loss


def smoothed_binary(ε: float) -> Any:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        target = y * (1 - ε) + ε / 2
        return -target * f.clamp_min(1e-9).log() - (1 - target) * (1 - f).clamp_min(1e-9).log()

    return loss


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_handcrafted_loss_is_seen_as_itself(task: str, reduction: str) -> None:
    report = report_of(LossNetwork(task, reduction=reduction, residual=True), classes=4)
    # Eq. 3 averages over the C outputs, of which the cross-entropy has one term.
    assert report.strength == pytest.approx(0.25 if (task, reduction) == ("multiclass", "mean") else 1.0, rel=1e-4)
    assert report.alignment == pytest.approx(1.0, abs=1e-6)
    assert report.flatness == 0
    assert all(item.away == item.flat == () and item.turn is None for item in report.paths)
    for item in report.paths:
        np.testing.assert_allclose(item.path.rate, report.strength, rtol=1e-3)
    form = report.closed_forms[0]
    expected = 1.0 if task != "regression" else None
    assert form.handcrafted == (None if expected is None else pytest.approx(expected, abs=1e-4))
    assert form.max_error < 1e-3


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_rate_is_that_of_the_gradients_by_the_logits(classes: int) -> None:
    """Against ⟨m, τ⟩ / ⟨τ, τ⟩ by autograd, at logits that give the true class probability p and the others the rest."""
    loss = LossNetwork("multiclass")
    (item,) = report_of(loss, classes).paths
    for p in (0.1, 0.5, 0.9):
        logits = torch.full((1, classes), float(np.log((1 - p) / (classes - 1)))).requires_grad_()
        with torch.no_grad():
            logits[0, 0] = float(np.log(p))
        target = torch.tensor([0])
        (m,) = torch.autograd.grad(loss(logits, target), logits)
        (τ,) = torch.autograd.grad(nn.functional.cross_entropy(logits, target), logits)
        rate = float((m * τ).sum() / τ.square().sum())
        assert np.interp(p, item.path.x, item.path.rate) == pytest.approx(rate, rel=2e-2, abs=1e-3)


def test_a_slope_that_the_softmax_takes_no_notice_of_changes_nothing() -> None:
    plain, tilted = (
        report_of(Formula("multiclass", lambda f, y, a=a: (f - y) ** 2 + a * f)).paths[0].path.rate for a in (0, 50)
    )
    np.testing.assert_allclose(tilted, plain, atol=1e-4)


def test_a_factor_is_strength_and_nothing_else() -> None:
    report = report_of(Formula("regression", lambda f, y: 3.5 * (f - y) ** 2))
    assert report.strength == pytest.approx(3.5, rel=1e-5)
    assert report.alignment == pytest.approx(1.0)
    for form in report.closed_forms:
        assert form.coefficients == pytest.approx((0, 0, 3.5), abs=1e-4)
        assert form.max_error < 1e-5
    assert "is that loss but for strength" in in_words(report)


@pytest.mark.parametrize("ε", [0.1, 0.3])
def test_label_smoothing_is_recognised(ε: float) -> None:
    (item,) = report_of(Formula("multiclass", smoothed(ε, 5), "sum"), classes=5).paths
    assert item.turn == pytest.approx(1 - ε + ε / 5, abs=0.015)
    assert item.smoothing == pytest.approx(ε, abs=0.02)
    for item, turn in zip(report_of(Formula("binary", smoothed_binary(ε))).paths, (1 - ε / 2, ε / 2), strict=True):
        assert item.turn == pytest.approx(turn, abs=0.015)
        assert item.smoothing == pytest.approx(ε, abs=0.03)
    words = in_words(report_of(Formula("binary", smoothed_binary(0.3))))
    assert "For target 0 it turns up at the confident end, beyond 0.15: label smoothing (section 5.7)" in words


def test_a_flat_region_is_found() -> None:
    report = report_of(Formula("binary", lambda f, y: (0.6 - (1 - (f - y).abs())).clamp_min(0) ** 2))
    for item, flat in zip(report.paths, ((0.6, 0.99), (0.01, 0.4)), strict=True):
        ((low, high),) = item.flat
        assert (low, high) == pytest.approx(flat, abs=0.06)
        assert item.away == ()
    assert 0.35 < report.flatness < 0.5
    assert "Flat regions (section 5.6). 4" in in_words(report)


def test_a_loss_that_has_flattened_altogether() -> None:
    report = report_of(Formula("regression", lambda f, y: 0 * f * y))
    assert (report.strength, report.alignment, report.flatness) == (0, 0, 1)
    faint = report_of(Formula("regression", lambda f, y: 0.01 * (f - y) ** 2))
    assert faint.flatness == 0
    assert "the loss has flattened, which stops training early (section 5.6)" in in_words(faint)


def test_a_minimum_off_the_target_is_found() -> None:
    report = report_of(Formula("regression", lambda f, y: (f - y - 0.2) ** 2))
    for item in report.paths:
        assert item.turn == pytest.approx(0.2, abs=0.011)
        ((low, high),) = item.away
        assert (low, high) == pytest.approx((0.02, 0.18), abs=0.021)
    assert "it is lowest at an error of 0.2, and so pulls predictions off the target" in in_words(report)


def test_a_loss_that_pulls_away_everywhere() -> None:
    report = report_of(Formula("binary", lambda f, y: -((f - y) ** 2)))
    assert report.strength < 0
    assert all(item.turn is None and len(item.away) == 1 for item in report.paths)
    assert "on the whole it drives predictions away from the targets" in in_words(report)


@pytest.mark.parametrize("order", ["quadratic", "cubic"])
def test_the_closed_form_of_a_polynomial_is_that_polynomial(order: str) -> None:
    loss = TaylorLoss("binary", order)
    with torch.no_grad():
        loss.coefficients.copy_(torch.tensor([0.2, 0.1, -0.7, 1.3, 2.0, -1.1, 0.4, 0.6]))
    f = np.linspace(0, 1, 11)
    for form in report_of(loss).closed_forms:
        assert form.handcrafted is None
        assert form.rms_error < 0.01
        fitted = np.polynomial.polynomial.polyval(f - form.centre, form.coefficients)
        with torch.no_grad():
            values = loss.pairwise(torch.tensor(f).float(), torch.full((11,), form.target)).numpy()
        assert np.abs(fitted - values).max() < 0.05 * np.ptp(values)


def test_the_gain_is_told() -> None:
    words = in_words(report_of(LossNetwork("binary", residual=True)), gain=2.5)
    assert "within bounds, where the strength is the learned gain, 2.5" in words


def test_a_diverged_loss_and_too_few_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="the loss is not finite on its grid, so the run diverged"):
        report_of(Formula("binary", lambda f, y: f * float("nan")))
    with pytest.raises(ValueError, match="`classes` must be 2 or more; got 1"):
        report_of(LossNetwork("multiclass"), classes=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with what a short run leaves, and the module."""
    folder = tmp_path_factory.mktemp("version_0")
    module = make(Ada, adalfl=config())
    callbacks = [AdaLFLInit(steps=2), LossShapeLogger(every_n_steps=4), TrajectoryRecorder(4)]
    fit = trainer(folder, callbacks=callbacks)
    fit.fit(module, *loaders())
    fit.save_checkpoint(folder / "last.ckpt")
    module.adalfl.loss.save(folder / "loss.safetensors")
    return folder, module


@pytest.mark.parametrize("name", ["", "loss_shape.npz", "loss_trajectory.safetensors", "last.ckpt", "loss.safetensors"])
def test_every_source_gives_the_same_loss(name: str, run: tuple[Path, Any]) -> None:
    folder, module = run
    random_state = torch.get_rng_state()
    source = read_source(folder / name)
    assert torch.equal(torch.get_rng_state(), random_state)
    gain = 1.0 if name == "loss.safetensors" else module.adalfl.log_gain.exp().item()
    expected = evaluate_loss_shape(module.adalfl.loss, 12)
    torch.testing.assert_close(source.shapes[-1].loss, expected.loss * gain)
    torch.testing.assert_close(source.shapes[-1].slope, expected.slope * gain)
    assert source.shapes[-1].step == (0 if name == "loss.safetensors" else 12)
    has_gain = name in ("loss_trajectory.safetensors", "last.ckpt")
    assert source.gain == (pytest.approx(module.adalfl.log_gain.exp().item()) if has_gain else None)


@pytest.mark.parametrize("name", ["", "loss_trajectory.safetensors", "last.ckpt", "loss.safetensors"])
def test_the_command_draws_and_describes(
    name: str, run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    assert main(["inspect", str(folder / name), "--classes", "3", "--output", str(tmp_path / "new" / "a.png")]) == 0
    text = capsys.readouterr().out
    for part in ("for 3 classes", "Strength", "Shape.", "Flat regions", "Non-monotone", "Closed form", "target 1: ℓ ≈"):
        assert part in text
    assert f"Figure: {tmp_path / 'new' / 'a.png'}" in text
    pictures = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert pictures == (["a.png", "a_evolution.png"] if name in ("", "loss_trajectory.safetensors") else ["a.png"])
    for picture in pictures:
        pixels = matplotlib.image.imread(tmp_path / "new" / picture)
        assert min(pixels.shape[:2]) > 400
        assert pixels.std() > 0.05


@pytest.mark.parametrize("task", TASKS)
def test_the_figure_of_every_task(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LossNetwork(task).save(tmp_path / "loss.safetensors")
    assert main(["inspect", str(tmp_path / "loss.safetensors"), "--targets", "0", "2", "--error-range", "3"]) == 0
    assert (tmp_path / "inspection.png").stat().st_size > 10_000
    figure = plot_inspection(report_of(LossNetwork(task)), title="mine")
    assert len(figure.axes) == 2 * {"multiclass": 1, "regression": 3}.get(task, 2)
    assert figure.get_suptitle() == "mine"
    if task == "regression":
        assert "-3     -1.5" in capsys.readouterr().out


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    TaylorLoss("binary").save(tmp_path / "loss.safetensors")
    command = [sys.executable, "-m", "lightning_adalfl", "inspect", str(tmp_path / "loss.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a TaylorLoss of 8 numbers" in done.stdout


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


def hostile(path: Path) -> None:
    torch.save({"adalfl": Bomb()}, path)


def only_a_rate(path: Path) -> None:
    module = make(Ada, adalfl=config(learn="lr"))
    runner = trainer(path.parent, max_steps=1)
    runner.fit(module, *loaders())
    runner.save_checkpoint(path)


def unknown_field(path: Path) -> None:
    torch.save(
        {
            "adalfl": {"state_dict": {}, "progress": {"base_steps": 3}},
            "hyper_parameters": {"adalfl": {"task": "binary", "from_the_future": 1}},
        },
        path,
    )


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("no.safetensors", lambda path: None, "no.safetensors: there is no such file or folder; check the path"),
        ("a.txt", lambda path: path.write_text("x"), "a.txt: give a .safetensors file, a checkpoint"),
        ("a.npz", lambda path: path.write_bytes(b"PK"), "a.npz: it is truncated, corrupt or no npz file"),
        ("a.safetensors", lambda path: path.write_bytes(b"x" * 99), "a.safetensors: it is truncated, corrupt"),
        (
            "b.safetensors",
            lambda path: write_safe_file(path, "recipe", 1, {}, {}),
            "it holds 'recipe', which has nothing",
        ),
        ("a.ckpt", lambda path: path.write_bytes(b"x" * 99), "a.ckpt: it is truncated, corrupt, or holds more than"),
        ("b.ckpt", hostile, "b.ckpt: it is truncated, corrupt, or holds more than tensors and plain values"),
        ("c.ckpt", lambda path: path.write_bytes(pickle.dumps(Bomb())), "c.ckpt: it is truncated, corrupt, or holds"),
        (
            "d.ckpt",
            lambda path: torch.save({"state_dict": {}}, path),
            "d.ckpt: it has no learned loss; give a checkpoint",
        ),
        ("e.ckpt", only_a_rate, "e.ckpt: only the learning rate was learned"),
        ("f.ckpt", unknown_field, "f.ckpt: `adalfl` has unknown fields"),
        (
            "empty",
            lambda path: path.mkdir(),
            "holds neither loss_shape.npz nor loss_trajectory.safetensors; train with",
        ),
    ],
)
def test_what_cannot_be_read_is_a_clear_error(
    name: str, write: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / name)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / name)]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.out == ""
    assert not (tmp_path / "inspection.png").exists()


def test_the_folder_above_names_those_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trajectory = LossTrajectory()
    trajectory.append(0, TaylorLoss("binary"))
    trajectory.save(tmp_path / "run" / "version_3" / "loss_trajectory.safetensors")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "version_3 has one; give that folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["draw", "x"], ["inspect", "x", "--classes", "many"]])
def test_a_wrong_command_line_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m lightning_adalfl" in capsys.readouterr().err
