"""The figures show what the shapes hold, whatever the loss, on a light background."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor, nn

from lightning_adalfl import LearnedLoss, LossHistory, LossNetwork
from lightning_adalfl.inspection import loss_shape, plot_heatmap, plot_history


class ScaledSquare(LearnedLoss):
    """ℓ(y, f) = scale · (f - y - shift)² + 3."""

    def __init__(self, task: str, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__(task)
        self.scale = nn.Parameter(torch.tensor(scale))
        self.shift = shift

    def pairwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * (prediction - target - self.shift) ** 2 + 3


def shapes(task: str = "binary", count: int = 5, is_added: bool = False) -> list:
    return [loss_shape(ScaledSquare(task, 1.0 + i), 10 * i, is_added=is_added) for i in range(count)]


def history_of(loss: LossNetwork, count: int, is_added: bool = True) -> LossHistory:
    """Return a history in which φ walks away from where it began, embeddings included."""
    history = LossHistory(10, is_added=is_added)
    for i in range(count):
        history.append(10 * i, loss)
        with torch.no_grad():
            for name, p in loss.named_parameters():
                p[:4] += 0.1 * torch.randn_like(p[:4]) if "embedding" in name else 0.05 * torch.randn_like(p[:4])
    return history


def curves(axes: Axes) -> list[np.ndarray]:
    return [segment[:, 1] for segment in axes.collections[0].get_segments()]


def dashed(axes: Axes) -> np.ndarray:
    return np.asarray(axes.lines[-1].get_ydata())


def test_every_snapshot_is_shown_from_its_value_at_the_right_prediction() -> None:
    figure = plot_history(shapes())
    top_one, top_zero, slope_one, slope_zero, bar = figure.axes
    f = np.linspace(0, 1, 101).clip(1e-3, 1 - 1e-3)
    for i in range(5):
        np.testing.assert_allclose(curves(top_one)[i], (1 + i) * ((f - 1) ** 2), atol=1e-5)
        np.testing.assert_allclose(curves(top_zero)[i], (1 + i) * f**2, atol=1e-5)
        np.testing.assert_allclose(curves(slope_one)[i], 2 * (1 + i) * (f - 1) * f * (1 - f), atol=1e-5)
        np.testing.assert_allclose(curves(slope_zero)[i], 2 * (1 + i) * f * f * (1 - f), atol=1e-5)
    assert list(top_one.collections[0].get_array()) == [0, 10, 20, 30, 40]
    assert bar.get_ylabel() == "base step"
    assert (top_one.get_title(), slope_one.get_xlabel()) == ("target 1", "predicted probability")
    assert figure.get_suptitle() == "The learned loss alone, at base step 40"


def test_a_loss_alone_is_beside_the_handcrafted_one_times_what_fits_best() -> None:
    figure = plot_history([loss_shape(ScaledSquare("regression", 6.0))])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["newest", "squared error × 6"]
    for axes in figure.axes[:6]:
        np.testing.assert_allclose(dashed(axes), axes.lines[-2].get_ydata(), atol=1e-4)


def test_a_loss_that_is_added_is_as_long_as_a_step_with_it() -> None:
    big = shapes(is_added=True, count=9)[-1]
    figure = plot_history([big])
    assert big.shortening < 1
    for axes, path in zip(figure.axes[2:4], big.paths, strict=True):
        np.testing.assert_allclose(curves(axes)[0], path.slope * big.shortening)
        np.testing.assert_allclose(dashed(axes), path.own_slope)
    (legend,) = figure.legends
    assert "never longer than with binary cross-entropy alone" in legend.get_title().get_text()
    assert legend.get_texts()[-1].get_text() == "binary cross-entropy alone"
    assert figure.get_suptitle() == "Binary cross-entropy plus what is learned, at base step 80"


def test_at_the_start_it_is_the_handcrafted_loss() -> None:
    loss = LossNetwork("multiclass", sees_classes=True)
    loss.scale_(0.0)
    figure = plot_history(history_of(loss, 1))
    assert len(figure.axes) == 3
    for axes in figure.axes[:2]:
        np.testing.assert_array_equal(curves(axes)[0], dashed(axes))


def test_pairs_of_classes_are_thin_lines_of_the_newest() -> None:
    figure = plot_history(history_of(LossNetwork("multiclass", sees_classes=True), 3))
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "the rest on one other class",
        "the rest shared by the others",
    ]
    for axes, lines in zip(figure.axes[:4], (12, 4, 12, 4), strict=True):
        thin = [line.get_ydata() for line in axes.lines[1:-2]]
        assert len(thin) == lines
        np.testing.assert_allclose(np.mean(thin, axis=0), curves(axes)[-1], atol=1e-6)
    assert "pairs of classes, newest" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("scale", [0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_flat_inverted_and_non_finite_losses_are_still_drawn(task: str, scale: float) -> None:
    shape = loss_shape(ScaledSquare(task, scale))
    for figure in [plot_history([shape])] + ([plot_heatmap(shape)] if task == "regression" else []):
        figure.savefig(io.BytesIO())
        assert all(np.isfinite(axes.get_ylim()).all() for axes in figure.axes)


@pytest.mark.parametrize("task", ["multiclass", "binary", "regression"])
@pytest.mark.parametrize("is_added", [True, False])
def test_no_text_leaves_the_figure_or_meets_another(task: str, is_added: bool) -> None:
    figure = plot_history(history_of(LossNetwork(task, sees_classes=task == "multiclass"), 12, is_added))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [figure._suptitle, *figure.legends[0].get_texts(), figure.legends[0].get_title()]
    texts += [axes.title for axes in figure.axes]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            place = tick.label1.get_position()[0 if axis.axis_name == "x" else 1]
            texts += [label for label in (tick.label1, tick.label2) if label.get_visible() and low <= place <= high]
        texts.append(axis.label)
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert len(boxes) > 20
    for i, box in enumerate(boxes):
        assert figure.bbox.padded(0.5).containsx(box.x0)
        assert figure.bbox.padded(0.5).containsx(box.x1)
        assert figure.bbox.padded(0.5).containsy(box.y0)
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_the_heat_map_marks_where_the_loss_is_lowest() -> None:
    figure = plot_heatmap(loss_shape(ScaledSquare("regression", shift=0.21), 30))
    axes, bar = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    lowest = lines["lowest loss"]
    np.testing.assert_allclose(lowest.get_xdata() - lowest.get_ydata(), 0.21, atol=1e-4)
    right = lines["right prediction, f = y"]
    np.testing.assert_array_equal(right.get_xdata(), right.get_ydata())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction f", "target y")
    assert "base step 30" in figure.get_suptitle()
    assert bar.get_ylabel() == "loss, less its value at f = y"


def test_figures_that_cannot_be_drawn_are_refused() -> None:
    for nothing in ([], LossHistory()):
        with pytest.raises(ValueError, match="the history is empty; append a snapshot before drawing it"):
            plot_history(nothing)
    with pytest.raises(ValueError, match="a heat map is for task 'regression'; got 'multiclass'"):
        plot_heatmap(loss_shape(LossNetwork("multiclass")))


def test_titles_can_be_replaced_and_neither_pyplot_nor_a_dark_style_has_a_part() -> None:
    (shape,) = shapes("regression", 1)
    with plt.style.context("dark_background"):
        figures = [plot_history([shape], title="mine"), plot_heatmap(shape, title="mine")]
    for figure in figures:
        assert figure.get_suptitle() == "mine"
        assert figure.get_facecolor() == (1, 1, 1, 1)
        assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)
        assert figure._suptitle.get_color() == "black"
    assert plt.get_fignums() == []
