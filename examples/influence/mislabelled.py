"""What MNIST and Fashion-MNIST themselves have mislabelled: the 30 most suspicious of 60,000 training images each.

python mislabelled.py --mnist data/MNIST/raw    # five minutes on a CPU; needs dataset-fashion-mnist as well

A small convolutional network trains for four epochs with its own loss; the test sets are the trusted rows. The picture
goes to mislabelled.png, the row numbers to mislabelled.txt.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset
from wrong_targets import FASHION, AdaNetwork, convolutional, fit, read_images

from lightning_adalfl import AdaLFLConfig, InfluenceLogger

SHOWN, COLUMNS = 30, 10
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def worst(folder: Path) -> tuple[Any, Any, Any, Any]:
    """Return the row numbers of the most suspicious images, these, their labels and what the network predicts."""
    torch.manual_seed(0)
    train, held_out = (TensorDataset(*read_images(folder, part)) for part in ("train", "t10k"))
    logger, config = InfluenceLogger(), AdaLFLConfig("multiclass", learn="nothing", meta_every=1)
    module = AdaNetwork(convolutional(), F.cross_entropy, 1e-3, adalfl=config)
    fit(module, train, held_out, 4, "mislabelled", logger, batch=128)
    rows = logger.table.ranking()[:SHOWN]
    x, y = (t[torch.from_numpy(rows.copy())] for t in train.tensors)
    with torch.no_grad():
        return rows, x.squeeze(1).numpy(), y.numpy(), module.eval()(x).argmax(1).numpy()


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, default=Path("data/MNIST/raw"), help="with the four gzipped idx files")
    parser.add_argument("--fashion", type=Path, default=FASHION)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*many workers")
    warnings.filterwarnings("ignore", ".*no `validation_step`")
    figure = Figure(figsize=(COLUMNS * 1.15, 2 * SHOWN / COLUMNS * 1.45 + 0.7), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    said = []
    for part, (name, folder) in zip(parts, (("MNIST", options.mnist), ("Fashion-MNIST", options.fashion))):
        rows, images, labels, predictions = worst(folder)
        words = np.array(CLOTHES if name == "Fashion-MNIST" else [str(i) for i in range(10)])
        part.suptitle(f"{name}: its label / what the network says", fontsize=11)
        for axes, image, label, said_by in zip(
            part.subplots(SHOWN // COLUMNS, COLUMNS).flat, images, words[labels], words[predictions]
        ):
            axes.imshow(image, cmap="gray_r")
            axes.set_axis_off()
            axes.set_title(f"{label} /\n{said_by}" if len(label + said_by) > 2 else f"{label} / {said_by}", fontsize=8)
        said.append(f"{name}: {' '.join(map(str, rows))}")
    figure.savefig("mislabelled.png")
    Path("mislabelled.txt").write_text("\n".join(said) + "\n")


if __name__ == "__main__":
    main()
