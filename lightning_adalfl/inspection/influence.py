"""Which training targets hurt: scores of every instance, one that is calibrated on held-out ones, and their file."""

from __future__ import annotations

import csv
import io
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_adalfl.checks import whole_number
from lightning_adalfl.files import PathLike, atomic_write, read_tensors, write_tensors
from lightning_adalfl.inspection.target_scores import SCORES

INFLUENCE_KIND = "influence"
INFLUENCE_FILE = "influence.safetensors"
COLUMNS = ("seen", "influence", *SCORES)
_VERSION = 1
_LEAST_SHARE = 1e-3  # of wrong targets that is thought possible

Values = NDArray[np.floating[Any]]


class InfluenceTable:
    """Sums of scores over the times that each training instance was seen, 24 bytes an instance.

    Of each instance there is how often it was ``seen``, and over these times the mean ``influence``, ``agreement``,
    ``loss``, ``margin`` and ``misclassified``. Influence is ``τ_i · h_i``, in units of its mean size in the batch, so
    that early and late steps count alike; for the others see
    :func:`~lightning_adalfl.inspection.target_scores.target_scores`. Positive influence hurts the held-out loss.

    :meth:`score` makes one number of them. Held-out targets are right, and others in their place are wrong: a logistic
    regression learns from both how agreement, loss and margin tell them apart, and is then asked about the training
    targets. Where there are none, it is the agreement alone.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``.
        size: Instances; the table grows where it is needed.

    Attributes:
        sums: (N, 6), in the order of ``COLUMNS``.
        probes: Sums of the held-out instances' scores with their own and with K other targets, (R, 1 + K, 5).
        probe_weights: Sums of what each other target weighs, (R, K).

    Example::

        table = InfluenceTable.load("lightning_logs/version_0/influence.safetensors")
        suspects = table.ranking()[:50]
        kept = np.flatnonzero(table.label_quality() >= 0.5)
    """

    def __init__(self, task: str, size: int = 0) -> None:
        self.task = task
        self.sums = torch.zeros(whole_number("size", size, 0), len(COLUMNS))
        self.probes, self.probe_weights = torch.zeros(0, 1, len(SCORES) + 1), torch.zeros(0, 0)

    def __len__(self) -> int:
        return len(self.sums)

    def add(self, index: Tensor, influence: Tensor, scores: Tensor) -> None:
        """Add what has been found of a batch.

        Args:
            index: Of each instance in the training data, (B,).
            influence: (B,).
            scores: (B, 4).
        """
        rows = torch.cat([torch.ones_like(scores[:, :1]), influence.unsqueeze(1).to(scores), scores], 1).cpu().float()
        index = index.cpu().long()
        rows[~torch.isfinite(rows[:, :4]).all(1)] = 0.0  # a step without a finite derivative says nothing
        if len(index):
            self.sums = _grown(self.sums, int(index.max()) + 1)
        self.sums.index_add_(0, index, rows)

    def add_probes(self, first: int, scores: Tensor, weights: Tensor) -> None:
        """Add what has been found of held-out instances.

        Args:
            first: Place of the first of them; they follow one another.
            scores: With their own and with K other targets, (B, 1 + K, 4).
            weights: Of the other targets, (B, K).
        """
        scores, weights = scores.cpu().float(), weights.cpu().float()
        if not len(self.probes):
            self.probes = torch.zeros(0, scores.shape[1], scores.shape[2] + 1)
            self.probe_weights = torch.zeros(0, weights.shape[1])
        last = first + len(scores)
        self.probes, self.probe_weights = _grown(self.probes, last), _grown(self.probe_weights, last)
        self.probes[first:last] += torch.cat([torch.ones_like(scores[..., :1]), scores], 2)
        self.probe_weights[first:last] += weights

    def mean(self, name: str) -> Values:
        """Return a score of every instance, (N,), NaN where it was never seen or there is no such score.

        Args:
            name: ``"seen"``, which is a number of times, or another of ``COLUMNS``.
        """
        if name == "seen":
            return _plain(self.sums[:, 0])
        return _plain(self.sums[:, COLUMNS.index(name)] / self.sums[:, 0].masked_fill(self.sums[:, 0] == 0, torch.nan))

    def score(self) -> Values:
        """Return how likely each target is to be wrong, (N,): log odds, or the agreement; NaN for the unseen."""
        odds, share = self._odds()
        return odds if share is None else odds + np.log(share / (1 - share))

    def label_quality(self) -> Values:
        """Return the probability that each target is right, (N,), and 1 for the unseen; low is suspicious.

        Below 0.5 more speaks against a target than for it. It is what cleanlab calls ``label_quality``. Without
        held-out instances it is ``(1 - agreement) / 2``.
        """
        odds, share = self._odds()
        quality = (1 - odds) / 2 if share is None else 1 / (1 + np.exp(odds + np.log(share / (1 - share))))
        return np.where(np.isnan(quality), 1.0, quality)

    def ranking(self) -> NDArray[np.integer[Any]]:
        """Return the instances that were seen, the most suspicious target first."""
        score = self.score()
        seen = np.flatnonzero(~np.isnan(score))
        return seen[np.argsort(-score[seen], kind="stable")]

    def by(self, keys: Sequence[Hashable] | NDArray[Any]) -> dict[Hashable, dict[str, float]]:
        """Return the instances, the mean influence and the mean quality of each annotator, source or class.

        Args:
            keys: Whose each instance is, one for each.

        Raises:
            ValueError: If there are not as many keys as instances.
        """
        if len(keys) != len(self):
            raise ValueError(f"`keys` must hold one for each of {len(self)} instances; got {len(keys)}.")
        names, place = np.unique(np.asarray(keys), return_inverse=True)
        influence, quality, found = self.mean("influence"), self.label_quality(), {}
        for i, name in enumerate(names.tolist()):
            mine = np.flatnonzero((place == i) & ~np.isnan(influence))
            means = (float(values[mine].mean()) if len(mine) else np.nan for values in (influence, quality))
            found[name] = dict(zip(("instances", "influence", "label_quality"), (int((place == i).sum()), *means)))
        return found

    def columns(self) -> dict[str, Values]:
        """Return all that there is of every instance, by name."""
        means = {name: self.mean(name) for name in COLUMNS}
        own: dict[str, Values] = {"score": self.score(), "label_quality": self.label_quality()}
        return {**own, **{name: values for name, values in means.items() if not np.isnan(values).all()}}

    def to_pandas(self) -> Any:
        """Return a data frame with a row for each instance; it needs pandas."""
        import pandas as pd

        return pd.DataFrame(self.columns()).rename_axis("index")

    def to_csv(self, path: PathLike) -> None:
        """Write a row for each instance."""
        columns = self.columns()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["index", *columns])
        for i, row in enumerate(zip(*columns.values())):
            writer.writerow([i, *("" if np.isnan(value) else f"{value:.6g}" for value in row)])
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())

    def save(self, path: PathLike) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        state = self.state_dict()
        write_tensors(path, INFLUENCE_KIND, _VERSION, {"task": state.pop("task")}, state)

    @classmethod
    def load(cls, path: PathLike) -> InfluenceTable:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, corrupt, of another kind, or from a newer version.
        """
        content, tensors = read_tensors(path, INFLUENCE_KIND, _VERSION)
        table = cls("")
        table.load_state_dict({**content, **tensors})
        return table

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {
            "task": self.task,
            "sums": self.sums.clone(),
            "probes": self.probes.clone(),
            "probe_weights": self.probe_weights.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: If it is not that of a table.
        """
        try:
            task, sums, probes, weights = (state[k] for k in ("task", "sums", "probes", "probe_weights"))
            is_whole = sums.shape[1:] == (len(COLUMNS),) and probes.shape[1:] == (weights.shape[1] + 1, len(SCORES) + 1)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"it holds no table of influence ({error!r}); record it again.") from error
        if not is_whole or not isinstance(task, str) or len(probes) != len(weights):
            raise ValueError("its parts do not fit together; record it again.")
        self.task, self.sums, self.probes, self.probe_weights = task, sums.clone(), probes.clone(), weights.clone()

    def _odds(self) -> tuple[Values, float | None]:
        """Return the log odds that a target is wrong when half of all are, and the share of wrong ones; or agreement.

        The share is the one at which the mean probability of a wrong target equals it (Saerens et al., 2002).
        """
        found = self._features(self.sums[:, 0], self.sums[:, 2:])
        right = self._features(self.probes[:, 0, 0], self.probes[:, 0, 1:])
        wrong = self._features(self.probes[:, 1:, 0], self.probes[:, 1:, 1:])
        weights = _plain(self.probe_weights)[~np.isnan(wrong).any(2)]
        right, wrong = right[~np.isnan(right).any(1)], wrong[~np.isnan(wrong).any(2)]
        seen = ~np.isnan(found).any(1)
        if len(right) < 2 or weights.sum() <= 0 or seen.sum() < 2:
            return self.mean("agreement"), None
        centre, spread = found[seen].mean(0), found[seen].std(0).clip(1e-12)
        x = (np.concatenate([right, wrong]) - centre) / spread
        is_wrong = np.repeat([0.0, 1.0], [len(right), len(wrong)])
        counts = np.concatenate([np.ones(len(right)), weights * (len(right) / weights.sum())])
        odds = _logistic(x, is_wrong, counts, (found - centre) / spread)
        share = 0.5
        for _ in range(100):
            share = float(np.mean(1 / (1 + np.exp(-odds[seen] - np.log(share / (1 - share))))))
            share = min(max(share, _LEAST_SHARE), 1 - _LEAST_SHARE)
        return odds, share

    def _features(self, seen: Tensor, sums: Tensor) -> Values:
        """Return agreement, loss and margin; for regression the size of the error in place of the last two."""
        agreement, loss, margin, _ = (sums / seen.masked_fill(seen == 0, torch.nan).unsqueeze(-1)).unbind(-1)
        chosen = [agreement, loss.sqrt()] if self.task == "regression" else [agreement, loss, margin]
        return _plain(torch.stack(chosen, -1))


def _logistic(x: Values, is_wrong: Values, counts: Values, asked: Values) -> Values:
    """Return the log odds of a logistic regression with a penalty of half the squared weights, by Newton's method."""
    x, asked = (np.concatenate([rows, np.ones((len(rows), 1))], 1) for rows in (x, asked))
    penalty = np.diag([*np.ones(x.shape[1] - 1), 1e-6])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-(x @ w).clip(-30, 30)))
        slope = x.T @ (counts * (p - is_wrong)) + penalty @ w
        curvature = (x * (counts * p * (1 - p))[:, None]).T @ x + penalty
        w = w - np.linalg.solve(curvature, slope).clip(-2, 2)
    return asked @ w


def _grown(tensor: Tensor, size: int) -> Tensor:
    return (
        tensor if size <= len(tensor) else torch.cat([tensor, tensor.new_zeros(size - len(tensor), *tensor.shape[1:])])
    )


def _plain(tensor: Tensor) -> Values:
    return tensor.double().numpy()
