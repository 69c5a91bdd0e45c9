"""Figures of a table of influence; no trainer, no pyplot state, and a light background."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from lightning_adalfl.inspection.influence import InfluenceTable, Values

_COLUMNS = 10  # of a grid of images


def plot_influence(table: InfluenceTable) -> Figure:
    """Draw how many instances have which label quality, and which influence.

    Args:
        table: Of which at least one instance was seen.
    """
    seen = table.mean("seen") > 0
    quality, influence = table.label_quality()[seen], table.mean("influence")[seen]
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        left.hist(quality, np.linspace(0, 1, 41), color="tab:blue")
        left.axvline(0.5, color="tab:red", ls="--", lw=1)
        left.set(xlabel="label quality: how likely the target is right", ylabel="instances", yscale="log", xlim=(0, 1))
        left.set_title(f"{(quality < 0.5).sum():,} of {seen.sum():,} seen instances below 0.5", fontsize=10)
        bound = max(float(np.quantile(np.abs(influence), 0.995)), 1e-12)
        right.hist(influence.clip(-bound, bound), 41, color="tab:blue")
        right.axvline(0, color="0.3", lw=1)
        right.set(xlabel="mean influence; right of 0 it hurts the held-out loss", ylabel="instances", yscale="log")
        right.set_title(f"{(influence > 0).sum():,} hurt", fontsize=10)
    return figure


def plot_images(images: Values, captions: Sequence[str], quality: Values) -> Figure:
    """Draw the images with the worst targets above those with the best.

    Args:
        images: As many of the worst as of the best, the worst first, (N, 1 or 3, H, W); each has its own scale.
        captions: Target and prediction of each.
        quality: The label quality of each.
    """
    half = len(images) // 2
    rows = -(-half // _COLUMNS)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(_COLUMNS * 1.05, 2 * rows * 1.45 + 0.7), dpi=120, layout="constrained")
        parts: Any = figure.subfigures(2, 1)
        for part, first, words in zip(parts, (0, half), ("most suspicious", "most trusted")):
            part.suptitle(f"{words}: target / prediction, label quality", fontsize=10)
            for i, axes in enumerate(part.subplots(rows, _COLUMNS, squeeze=False).flat):
                axes.set_axis_off()
                if i < half:
                    image = images[first + i].transpose(1, 2, 0)
                    low, high = image.min(), image.max()
                    axes.imshow((image - low) / max(high - low, 1e-12), cmap="gray")
                    axes.set_title(f"{captions[first + i]}\n{quality[first + i]:.3f}", fontsize=8)
    return figure
