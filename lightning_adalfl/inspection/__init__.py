"""What a learned loss says: its strength, its shape and a closed form, in words and in a figure, without a trainer."""

from lightning_adalfl.inspection.figure import plot_inspection
from lightning_adalfl.inspection.report import LossReport, inspect_shape
from lightning_adalfl.inspection.sources import Source, read_source
from lightning_adalfl.inspection.words import in_words

__all__ = ["LossReport", "Source", "in_words", "inspect_shape", "plot_inspection", "read_source"]
