"""The shapes of a learned loss as data, as a file and as a picture."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import zipfile
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor, nn

from lightning_adalfl.atomic_file import atomic_write
from lightning_adalfl.loss_shape import LossShape, evaluate_loss_shape
from lightning_adalfl.losses import LossNetwork
from lightning_adalfl.plotting import plot_loss_heatmap, plot_loss_shapes
from lightning_adalfl.snapshots import LossShapeHistory


class ScaledSquare(nn.Module):
    """ℓ(y, f) = scale · (f - y)² + 3, whose slope is 2 · scale · (f - y)."""

    def __init__(self, task: str, scale: float = 1.0) -> None:
        super().__init__()
        self.task = task
        self.scale = nn.Parameter(torch.tensor(scale))

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * (prediction - target) ** 2 + 3


def make_history(task: str = "multiclass", count: int = 5, max_snapshots: int = 64) -> LossShapeHistory:
    history = LossShapeHistory(max_snapshots)
    for i in range(count):
        history.append(evaluate_loss_shape(ScaledSquare(task, 1.0 + i), 10 * i))
    return history


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_classification_shape_is_the_loss_and_its_slope_over_probabilities(task: str) -> None:
    shape = evaluate_loss_shape(ScaledSquare(task, 2.0), 7, resolution=11)

    grid = torch.linspace(0, 1, 11).clamp(1e-3, 1 - 1e-3)
    error = grid - torch.tensor([[1.0], [0.0]])
    assert (shape.task, shape.step) == (task, 7)
    torch.testing.assert_close(shape.grid, grid)
    torch.testing.assert_close(shape.loss, 2 * error**2 + 3)
    torch.testing.assert_close(shape.slope, 4 * error)
    assert shape.heat_loss is None


def test_regression_shape_is_over_errors_and_has_a_grid_of_pairs() -> None:
    shape = evaluate_loss_shape(
        ScaledSquare("regression", 2.0), 0, resolution=21, targets=(-1.0, 0.5, 4.0), error_range=3.0
    )

    error = torch.linspace(-3, 3, 21)
    torch.testing.assert_close(shape.grid, error)
    torch.testing.assert_close(shape.loss, (2 * error**2 + 3).expand(3, -1))
    torch.testing.assert_close(shape.slope, (4 * error).expand(3, -1))
    assert (shape.heat_targets[0], shape.heat_targets[-1]) == (-2.5, 5.5)
    assert (shape.heat_predictions[0], shape.heat_predictions[-1]) == (-4.0, 7.0)
    torch.testing.assert_close(shape.heat_loss, 2 * (shape.heat_predictions - shape.heat_targets[:, None]) ** 2 + 3)


def test_slope_of_a_real_loss_network_agrees_with_central_differences() -> None:
    loss = LossNetwork("multiclass").double()
    shape = evaluate_loss_shape(loss, 0, resolution=9)

    f, y, h = shape.grid.double().expand(2, -1), shape.targets.double()[:, None].expand(-1, 9), 1e-5
    central = (loss.pairwise(f + h, y) - loss.pairwise(f - h, y)) / (2 * h)
    torch.testing.assert_close(shape.slope, central.float(), rtol=1e-4, atol=1e-5)


def test_looking_leaves_no_gradient_and_works_in_inference_mode_and_under_autocast() -> None:
    loss = LossNetwork("regression")
    state = torch.get_rng_state()
    expected = evaluate_loss_shape(loss, 0)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        seen = evaluate_loss_shape(loss, 0)

    assert torch.equal(seen.loss, expected.loss)
    assert torch.equal(seen.slope, expected.slope)
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_ignores_its_prediction_has_no_slope() -> None:
    class Constant(ScaledSquare):
        def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
            return torch.ones_like(target)

    assert not evaluate_loss_shape(Constant("binary"), 0).slope.any()


def test_a_loss_that_cannot_be_looked_at_is_refused() -> None:
    class Summed(ScaledSquare):
        def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
            return super().pairwise(prediction, target).sum()

    with pytest.raises(ValueError, match=r"loss\.task='ranking' is unknown"):
        evaluate_loss_shape(ScaledSquare("ranking"), 0)
    with pytest.raises(ValueError, match="must return one value for each pair"):
        evaluate_loss_shape(Summed("binary"), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "ranking"}, "task='ranking' is unknown"),
        ({"step": -1}, "step=-1 is negative"),
        ({"targets": torch.zeros(2, 1)}, r"targets of shape \(2, 1\)"),
        ({"grid": torch.zeros(1)}, "do not span a snapshot"),
        ({"loss": torch.zeros(2, 3)}, r"loss has shape \(2, 3\)"),
        ({"slope": torch.zeros(1, 101)}, r"slope has shape \(1, 101\)"),
        ({"heat_targets": torch.zeros(2)}, "belong together"),
        (
            {"heat_targets": torch.zeros(2), "heat_predictions": torch.zeros(3), "heat_loss": torch.zeros(3, 2)},
            r"heat_loss has shape \(3, 2\)",
        ),
    ],
)
def test_a_shape_whose_parts_do_not_fit_is_refused(change: dict, message: str) -> None:
    shape = make_history()[0]
    with pytest.raises(ValueError, match=message):
        replace(shape, **change)


@pytest.mark.parametrize("max_snapshots", [2, 3, 8, 64])
def test_thinning_keeps_first_and_last_evenly_spaced_and_bounded(max_snapshots: int) -> None:
    shape = make_history()[0]
    history = LossShapeHistory(max_snapshots)
    for step in range(0, 5000, 10):
        history.append(replace(shape, step=step))
        assert len(history) <= max_snapshots
        assert history.steps[0] == 0
        assert history.steps[-1] == step
        gaps = np.diff(history.steps)
        # all gaps but the newest are one number, and no gap is larger
        assert set(gaps[:-1]) <= {gaps.max(initial=0)}
    assert len(history) >= max_snapshots // 2


def test_history_refuses_what_does_not_continue_it() -> None:
    history = make_history(count=2)
    with pytest.raises(ValueError, match="step=10 is not after the last snapshot's step 10"):
        history.append(replace(history[0], step=10))
    with pytest.raises(ValueError, match="another task or grid"):
        history.append(evaluate_loss_shape(ScaledSquare("multiclass"), 20, resolution=5))
    with pytest.raises(ValueError, match="another task or grid"):
        history.append(evaluate_loss_shape(ScaledSquare("regression"), 20))
    with pytest.raises(ValueError, match="`max_snapshots` must be a whole number, 2 or more"):
        LossShapeHistory(1)
    assert history.steps == [0, 10]


def assert_same_history(a: LossShapeHistory, b: LossShapeHistory) -> None:
    assert a.steps == b.steps
    for one, other in zip(a, b, strict=True):
        assert one.task == other.task
        for name in ("targets", "grid", "loss", "slope", "heat_targets", "heat_predictions", "heat_loss"):
            x, y = getattr(one, name), getattr(other, name)
            assert (x is None and y is None) or torch.equal(x, y), name


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_file_and_state_round_trip_bitwise_and_go_on_thinning_alike(task: str, tmp_path) -> None:
    history = make_history(task, count=13, max_snapshots=6)
    history.save(tmp_path / "new folder" / "shape.npz")
    from_file = LossShapeHistory.load(tmp_path / "new folder" / "shape.npz")
    torch.save(history.state_dict(), tmp_path / "state.pt")
    from_state = LossShapeHistory(6)
    from_state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    for step in (500, 510, 520):
        for each in (history, from_file, from_state):
            each.append(evaluate_loss_shape(ScaledSquare(task), step))
        assert_same_history(from_file, history)
        assert_same_history(from_state, history)
    assert [file.name for file in (tmp_path / "new folder").iterdir()] == ["shape.npz"]


def test_an_empty_history_has_a_state_but_no_file(tmp_path) -> None:
    restored = make_history()
    restored.load_state_dict(LossShapeHistory().state_dict())
    assert len(restored) == 0
    with pytest.raises(ValueError, match="the history is empty; append"):
        LossShapeHistory().save(tmp_path / "shape.npz")


def test_a_longer_history_is_thinned_to_the_bound_of_its_reader() -> None:
    reader = LossShapeHistory(4)
    reader.load_state_dict(make_history(count=40).state_dict())
    assert len(reader) <= 4
    assert (reader.steps[0], reader.steps[-1]) == (0, 390)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "shape.npz"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def written(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_every_truncated_file_is_refused_by_name(task: str, tmp_path) -> None:
    path = tmp_path / "shape.npz"
    make_history(task).save(path)
    data = path.read_bytes()
    for end in (0, 1, 30, *range(100, len(data), max(1, len(data) // 50)), len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"cannot read .*shape\.npz: it is truncated, corrupt.*restore it"):
            LossShapeHistory.load(path)


def test_a_file_with_a_flipped_bit_is_read_right_or_refused_by_name(tmp_path) -> None:
    path = tmp_path / "shape.npz"
    history = make_history(count=2)
    history.save(path)
    data = path.read_bytes()
    refused = []
    for position in np.random.default_rng(0).integers(0, 8 * len(data), 150):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            # a flip in what the archive says about itself (a date, say) changes nothing that is read
            assert_same_history(LossShapeHistory.load(path), history)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(message.startswith(f"cannot read {path}: ") for message in refused)


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"step,loss\n0,1\n", "truncated, corrupt or no npz file"),
        (written(weights=np.zeros(3)), "holds no history of loss shapes"),
        (written(version=np.asarray(2)), "format version 2 is newer than 1.*upgrade lightning_adalfl"),
        (written(version=np.asarray("1")), "holds no history"),
        (written(version=np.asarray(1), steps=np.zeros(2)), "entries do not fit together"),
        (
            written(
                version=np.asarray(1),
                steps=np.arange(2),
                indices=np.arange(3),
                stride=np.asarray(1),
                count=np.asarray(3),
                task=np.asarray("binary"),
                targets=np.zeros(2),
                grid=np.zeros(4),
                loss=np.zeros((2, 2, 4)),
                slope=np.zeros((2, 2, 4)),
            ),
            "steps do not fit together",
        ),
        (
            written(version=np.asarray(1), max_snapshots=np.asarray(1)),
            "`max_snapshots` must be a whole number, 2 or more",
        ),
        (written(version=np.asarray([Payload()], dtype=object)), "truncated, corrupt or no npz file"),
    ],
    ids=["text", "alien", "newer", "version as text", "missing", "uneven", "bound", "pickle"],
)
def test_files_of_another_kind_are_refused_by_name_and_nothing_in_them_runs(data, message, tmp_path, capsys) -> None:
    path = tmp_path / "shape.npz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"cannot read .*{path.name}: .*{message}"):
        LossShapeHistory.load(path)
    assert "code ran" not in capsys.readouterr().out


def test_files_that_would_fill_the_memory_are_refused(tmp_path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("loss.npy", "w") as member:
        for _ in range(17):
            member.write(bytes(1 << 24))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="unpacks to more than any history holds"):
        LossShapeHistory.load(path)

    with open(path, "wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(ValueError, match=r"bomb\.npz: it is too large"):
        LossShapeHistory.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        LossShapeHistory.load(tmp_path / "nowhere.npz")


def curves(axes) -> list[np.ndarray]:
    return axes.collections[0].get_segments()


def test_figure_shows_every_snapshot_from_its_value_at_the_correct_prediction() -> None:
    history = make_history(count=5)
    figure = plot_loss_shapes(history)
    (top_one, top_zero, slope_one, slope_zero), bar = figure.axes[:4], figure.axes[4]

    for i, shape in enumerate(history):
        scale = 1.0 + i
        grid = shape.grid.numpy()
        np.testing.assert_allclose(curves(top_one)[i][:, 1], scale * (grid - 1) ** 2, atol=1e-5)
        np.testing.assert_allclose(curves(top_zero)[i][:, 1], scale * grid**2, atol=1e-5)
        np.testing.assert_allclose(curves(slope_one)[i][:, 1], 2 * scale * (grid - 1), atol=1e-5)
        np.testing.assert_allclose(curves(slope_zero)[i][:, 1], 2 * scale * grid, atol=1e-5)
    assert list(top_one.collections[0].get_array()) == history.steps
    assert bar.get_ylabel() == "base step"
    assert "less its value" in top_one.get_ylabel()
    assert slope_one.get_xlabel() == "predicted probability f"
    assert "base step 40" in figure.get_suptitle()


def test_handcrafted_loss_is_scaled_to_the_newest_curves_by_the_factor_in_the_legend() -> None:
    # ℓ = 6 (f - y)² is exactly 6 times the squared error
    history = LossShapeHistory()
    history.append(evaluate_loss_shape(ScaledSquare("regression", 6.0), 0))
    figure = plot_loss_shapes(history)
    assert len(figure.axes) == 7
    for axes in figure.axes[:3]:
        assert axes.get_legend_handles_labels()[1] == ["newest", "handcrafted: $(f-y)^2$ × 6"]
        newest, dashed = axes.lines[-2:]
        np.testing.assert_allclose(dashed.get_ydata(), newest.get_ydata(), atol=1e-5)
    assert figure.axes[3].get_xlabel() == "error f − y"


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_handcrafted_loss_of_classification_is_the_cross_entropy_and_its_slope(task: str) -> None:
    figure = plot_loss_shapes(make_history(task, count=1))
    factor = float(figure.axes[0].lines[-1].get_label().rsplit("× ", 1)[1])
    f = figure.axes[0].lines[-1].get_xdata()[1:-1]
    # Of several classes, an output whose target is 0 is seen through the softmax alone.
    other = (0 * f, 0 * f) if task == "multiclass" else (-np.log(1 - f), 1 / (1 - f))
    for axes, expected in zip(figure.axes, (-np.log(f), other[0], -1 / f, other[1]), strict=False):
        np.testing.assert_allclose(axes.lines[-1].get_ydata()[1:-1], factor * expected, rtol=5e-3)


@pytest.mark.parametrize("scale", [0.0, -2.0, math.nan, math.inf])
@pytest.mark.parametrize("task", ["binary", "regression"])
def test_flat_inverted_and_non_finite_losses_are_still_drawn(task: str, scale: float) -> None:
    history = LossShapeHistory()
    history.append(evaluate_loss_shape(ScaledSquare(task, scale), 0))
    figures = [plot_loss_shapes(history)]
    if task == "regression":
        figures.append(plot_loss_heatmap(history[0]))
    for figure in figures:
        figure.savefig(io.BytesIO())
        assert all(np.isfinite(axes.get_ylim()).all() for axes in figure.axes)


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_no_text_leaves_the_figure_or_meets_another(task: str) -> None:
    figure = plot_loss_shapes(make_history(task, count=20))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [figure._suptitle.get_window_extent(renderer)]
    for axes in figure.axes:
        boxes += [axes.title.get_window_extent(renderer)] if axes.get_title() else []
        for axis in (axes.xaxis, axes.yaxis):
            # the two rows share their x axis, so only the lower one shows tick labels
            labels = [axis.label] + [tick.label1 for tick in axis.get_major_ticks() if tick.label1.get_visible()]
            labels += [tick.label2 for tick in axis.get_major_ticks() if tick.label2.get_visible()]
            low, high = sorted(axis.get_view_interval())
            shown = [t for t in labels if t.get_text() and (t is axis.label or low <= _place(t, axis) <= high)]
            boxes += [text.get_window_extent(renderer) for text in shown]
    assert len(boxes) > 20
    for i, box in enumerate(boxes):
        assert figure.bbox.padded(0.5).containsx(box.x0)
        assert figure.bbox.padded(0.5).containsx(box.x1)
        assert not any(box.overlaps(other) for other in boxes[:i])


def _place(label, axis) -> float:
    return label.get_position()[0 if axis.axis_name == "x" else 1]


def test_heatmap_marks_where_the_learned_loss_is_lowest() -> None:
    class Biased(ScaledSquare):
        def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
            return (prediction - target - 0.21) ** 2

    figure = plot_loss_heatmap(evaluate_loss_shape(Biased("regression"), 30))
    axes, bar = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    lowest = lines["lowest learned loss"]
    np.testing.assert_allclose(lowest.get_xdata() - lowest.get_ydata(), 0.21, atol=1e-4)
    correct = lines["correct prediction, f = y"]
    np.testing.assert_array_equal(correct.get_xdata(), correct.get_ydata())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction f", "target y")
    assert "base step 30" in axes.get_title()
    assert r"\ell_\phi" in bar.get_ylabel()


def test_figures_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match="the history is empty"):
        plot_loss_shapes([])
    with pytest.raises(ValueError, match=r"task='multiclass' has no .* grid; a heat map is for regression"):
        plot_loss_heatmap(make_history()[0])


def test_titles_can_be_replaced_and_pyplot_knows_of_no_figure() -> None:
    history = make_history("regression")
    assert plot_loss_shapes(history, title="mine").get_suptitle() == "mine"
    assert plot_loss_heatmap(history[0], title="mine").axes[0].get_title() == "mine"
    assert plt.get_fignums() == []


def test_a_saved_file_becomes_a_picture_without_a_trainer(tmp_path) -> None:
    make_history().save(tmp_path / "loss_shape.npz")
    code = (
        "from lightning_adalfl.plotting import plot_loss_shapes\n"
        "from lightning_adalfl.snapshots import LossShapeHistory\n"
        "plot_loss_shapes(LossShapeHistory.load('loss_shape.npz')).savefig('loss_shape.png')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "loss_shape.png").read_bytes().startswith(b"\x89PNG")


def test_shapes_are_frozen() -> None:
    shape: LossShape = make_history()[0]
    with pytest.raises(AttributeError, match="cannot assign"):
        shape.step = 3


def shape_with(task: str, loss: torch.Tensor, grid: torch.Tensor) -> LossShape:
    (slope,) = torch.gradient(loss, spacing=(grid,))
    return LossShape(task, 0, torch.ones(1), grid, loss[None], slope[None])


def test_flatness_is_the_part_of_the_grid_that_hardly_pulls() -> None:
    grid = torch.linspace(0, 1, 101)
    assert shape_with("multiclass", 1 - grid, grid).flatness == 0
    half = shape_with("multiclass", (0.5 - grid).clamp_min(0), grid)
    assert float(half.flatness) == pytest.approx(0.5, abs=0.02)
    assert shape_with("multiclass", torch.zeros(101), grid).flatness == 1


def test_turn_up_is_the_rise_towards_a_certain_prediction() -> None:
    grid = torch.linspace(0, 1, 101)
    assert shape_with("binary", 1 - grid, grid).turn_up == 0
    assert float(shape_with("binary", (grid - 0.5).square(), grid).turn_up) == pytest.approx(1)
