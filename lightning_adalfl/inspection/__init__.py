"""What came of it: the shape of a learned loss, its history, figures and words; no trainer is needed."""

from lightning_adalfl.inspection.doctor import diagnose
from lightning_adalfl.inspection.figures import plot_heatmap, plot_history, plot_images, plot_influence
from lightning_adalfl.inspection.history import LossHistory, read
from lightning_adalfl.inspection.influence import InfluenceTable
from lightning_adalfl.inspection.loss_shape import LossPath, LossShape, loss_shape
from lightning_adalfl.inspection.report import LossReport, report

__all__ = [
    "InfluenceTable",
    "LossHistory",
    "LossPath",
    "LossReport",
    "LossShape",
    "diagnose",
    "loss_shape",
    "plot_heatmap",
    "plot_history",
    "plot_images",
    "plot_influence",
    "read",
    "report",
]
