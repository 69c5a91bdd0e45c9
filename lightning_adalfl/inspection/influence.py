"""Which training targets hurt: a table of all instances, and one score that held-out targets have calibrated."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_adalfl.files import PathLike, atomic_write, read_tensors, within, write_tensors
from lightning_adalfl.inspection.target_scores import SCORES

INFLUENCE_FILE = "influence.safetensors"
COLUMNS = ("seen", "influence", *SCORES)
_KIND, _VERSION = "influence", 1

Values = NDArray[np.floating[Any]]


class InfluenceTable:
    """What is known of each training instance: 24 bytes.

    There is how often it was ``seen`` by a meta step, and over these times the mean ``influence``, ``agreement``,
    ``loss``, ``margin`` and ``misclassified``. Influence is ``τ_i · h_i`` in units of its mean size in the batch, so
    that early and late steps count alike: positive hurts the held-out loss. For the others see
    :func:`~lightning_adalfl.inspection.target_scores.target_scores`.

    :meth:`score` makes one number of them. Some held-out instances were scored with their own targets, which are right,
    and with others, which are wrong. A logistic regression learns from both how agreement, loss and margin tell them
    apart, and is then asked about the training targets. It learns from agreement alone where the losses of these differ
    less than half as much as of held-out targets of which as many are wrong: the network knows them by heart, or has
    learned a wrong rule. Without held-out instances the score is the agreement.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``.
        sums: Over the times that each instance was seen, (N, 6), in the order of ``COLUMNS``.
        probes: The same of R held-out instances with their own and with K other targets, without influence,
            (R, 1 + K, 5).
        probe_weights: What each other target weighs, (R, K).

    Example::

        table = InfluenceTable.load("lightning_logs/version_0/influence.safetensors")
        suspects = table.ranking()[:50]
        kept = np.flatnonzero(table.label_quality() >= 0.5)
    """

    def __init__(self, task: str, sums: Tensor, probes: Tensor, probe_weights: Tensor) -> None:
        self.task, self.sums, self.probes, self.probe_weights = task, sums, probes, probe_weights

    def __len__(self) -> int:
        return len(self.sums)

    def mean(self, name: str) -> Values:
        """Return one of ``COLUMNS``, (N,): NaN where an instance was never seen or there is no such score."""
        if name == "seen":
            return self.sums[:, 0].double().numpy()
        return _means(self.sums)[:, COLUMNS.index(name) - 1]

    def score(self) -> Values:
        """Return how likely each target is to be wrong, (N,): log odds, or the agreement; NaN for the unseen."""
        odds, share = self._odds
        return odds if share is None else odds + np.log(share / (1 - share))

    def label_quality(self) -> Values:
        """Return the probability that each target is right, (N,), and 1 for the unseen; low is suspicious.

        It is what cleanlab calls ``label_quality``. Below 0.5 more speaks against a target than for it. Without
        held-out instances it is ``(1 - agreement) / 2``.
        """
        odds, share = self._odds
        quality = (1 - odds) / 2 if share is None else _sigmoid(-odds - np.log(share / (1 - share)))
        return np.where(np.isnan(quality), 1.0, quality)

    def ranking(self) -> NDArray[np.integer[Any]]:
        """Return the instances that were seen, the most suspicious target first."""
        score = self.score()
        return np.argsort(-score, kind="stable")[: int((~np.isnan(score)).sum())]

    def by(self, keys: Sequence[Hashable] | NDArray[Any]) -> dict[Hashable, dict[str, float]]:
        """Return how many instances each annotator, source or class has, their summed influence and mean quality.

        Args:
            keys: Whose each instance is, one for each.

        Raises:
            ValueError: If there are not as many keys as instances.
        """
        if len(keys) != len(self):
            raise ValueError(f"`keys` must hold one for each of {len(self)} instances; got {len(keys)}.")
        places: dict[Hashable, int] = {}
        place = [places.setdefault(key, len(places)) for key in (keys.tolist() if hasattr(keys, "tolist") else keys)]
        influence, quality = np.nan_to_num(self.mean("influence")), self.label_quality()
        counts, sums, qualities = (np.bincount(place, values).tolist() for values in (None, influence, quality))
        return {
            name: {"instances": count, "influence": total, "label_quality": of_all / count}
            for name, count, total, of_all in zip(places, counts, sums, qualities)
        }

    def columns(self) -> dict[str, Values]:
        """Return all that there is of every instance, by name."""
        found = {"score": self.score(), "label_quality": self.label_quality()}
        found |= {name: self.mean(name) for name in COLUMNS}
        return {name: values for name, values in found.items() if not np.isnan(values).all()}

    def to_pandas(self) -> Any:
        """Return a data frame with a row for each instance; it needs pandas."""
        return importlib.import_module("pandas").DataFrame(self.columns()).rename_axis("index")

    def to_csv(self, path: PathLike) -> None:
        """Write a row for each instance, in their order."""
        columns = {"index": np.arange(len(self)), **self.columns()}
        formats = ["%d", *["%.6g"] * (len(columns) - 1)]
        with atomic_write(path) as file:
            np.savetxt(file, np.stack([*columns.values()], 1), formats, ",", header=",".join(columns), comments="")

    def save(self, path: PathLike) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {"sums": self.sums, "probes": self.probes, "probe_weights": self.probe_weights}
        write_tensors(path, _KIND, _VERSION, {"task": self.task}, tensors)

    @classmethod
    def load(cls, path: PathLike) -> InfluenceTable:
        """Read what :meth:`save` wrote.

        Args:
            path: The file, or the folder that it is in.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, corrupt, of another kind, or from a newer version.
        """
        content, tensors = read_tensors(within(path, INFLUENCE_FILE), _KIND, _VERSION)
        return cls(content["task"], **tensors)

    @functools.cached_property  # a table of a run that has ended is asked for it many times
    def _odds(self) -> tuple[Values, float | None]:
        """Return the log odds that a target is wrong if half of all are, and the share of wrong ones; or agreement.

        The share is the one at which the mean probability of a wrong target equals it (Saerens et al., 2002).
        """
        found, probes = self._features(_means(self.sums)[:, 1:]), self._features(_means(self.probes))
        right, wrong, counts = probes[:, 0], probes[:, 1:].reshape(-1, probes.shape[2]), self.probe_weights.numpy()
        seen, is_right, is_wrong = (~np.isnan(rows).any(1) for rows in (found, right, wrong))
        counts, right, wrong = counts.reshape(-1)[is_wrong], right[is_right], wrong[is_wrong]
        if len(right) < 2 or counts.sum() <= 0 or seen.sum() < 2:
            return self.mean("agreement"), None
        centre, spread = found[seen].mean(0), found[seen].std(0).clip(1e-12)
        x, found = (np.concatenate([right, wrong]) - centre) / spread, (found - centre) / spread
        y = np.repeat([0.0, 1.0], [len(right), len(wrong)])
        counts = np.append(np.ones(len(right)), counts * len(right) / counts.sum())
        odds, share = _regressed(x, y, counts, found)
        # Losses of training targets that are known by heart, or by a wrong rule, differ less than those held out would.
        if np.cov(x[:, 1], aweights=counts * np.where(y > 0, share, 1 - share)) > 2**2:
            odds, share = _regressed(x[:, :1], y, counts, found[:, :1])
        return odds, share

    def _features(self, means: Values) -> Values:
        """Return agreement, loss and margin; for regression the size of the error in place of the last two."""
        if self.task == "regression":
            return np.stack([means[..., 0], np.sqrt(means[..., 1])], -1)
        return means[..., :3]


def _means(sums: Tensor) -> Values:
    """Return sums over the number of times, which comes first, (..., C - 1); NaN where that is zero."""
    return (sums[..., 1:] / sums[..., :1].masked_fill(sums[..., :1] == 0, torch.nan)).double().numpy()


def _sigmoid(x: Values) -> Values:
    return 1 / (1 + np.exp(-x.clip(-500, 500)))


def _regressed(x: Values, y: Values, counts: Values, asked: Values) -> tuple[Values, float]:
    """Return log odds as if half were wrong, by Newton's method with a small penalty, and the share that is wrong."""
    x, asked = (np.concatenate([rows, np.ones((len(rows), 1))], 1) for rows in (x, asked))
    penalty, w, share = np.diag([*np.ones(x.shape[1] - 1), 1e-6]), np.zeros(x.shape[1]), 0.5
    for _ in range(50):
        p = _sigmoid((x @ w).clip(-30, 30))
        curvature = (x * (counts * p * (1 - p))[:, None]).T @ x + penalty
        w = w - np.linalg.solve(curvature, x.T @ (counts * (p - y)) + penalty @ w).clip(-2, 2)
    for _ in range(100):
        share = float(np.nanmean(_sigmoid(asked @ w + np.log(share / (1 - share)))).clip(1e-3, 1 - 1e-3))
    return asked @ w, share
