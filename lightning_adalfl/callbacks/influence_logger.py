"""Which training instances hurt the held-out loss: watched at every meta step, and kept in a table."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric

from lightning_adalfl.adapter.lightning_private import Callback, train_iterator, train_source, when_loaded
from lightning_adalfl.adapter.meta_batches import HeldOutBatches
from lightning_adalfl.adapter.recorded_indices import REMEDY, forget, indices_of, record, shown
from lightning_adalfl.adapter.refusals import learner_of
from lightning_adalfl.callbacks.figure_logging import log_figure, run_dir, writes
from lightning_adalfl.checks import whole_number
from lightning_adalfl.files import atomic_write
from lightning_adalfl.inspection.figures import plot_images, plot_influence
from lightning_adalfl.inspection.influence import COLUMNS, INFLUENCE_FILE, InfluenceTable
from lightning_adalfl.inspection.target_scores import other_targets, target_scores

_PROBE_BATCHES, _PROBE_ROWS = 4, 64  # held-out instances that are scored with wrong targets too
_SHOWN = 20  # images at either end


class _Course(NamedTuple):
    """How the losses have gone, up to the end of an epoch: it shows when targets are known by heart."""

    times: float = 0.0  # that training instances were seen
    loss: float = 0.0  # summed over these times
    held_out_times: float = 0.0
    held_out_loss: float = 0.0
    limit: float = math.inf  # a mean held-out loss above it is too high
    is_over: float = 0.0  # whether one was; a float, as the rest, for the checkpoint's one tensor


class InfluenceLogger(Callback):
    """Keeps the influence of every training instance on the held-out loss, and lists the targets to look at.

    At each meta step the instances of the base step are scored; see
    :class:`~lightning_adalfl.inspection.InfluenceTable`. Training goes on as without it, whatever is learned: with
    ``learn="nothing"`` an ordinary training is watched. Set ``meta_every=1`` to score every batch. Loss, margin
    and errors count until targets are learned by heart: until an epoch whose held-out loss is above its training loss,
    and two standard errors above the lowest. From then on they would tell less, and influence and agreement do not.

    The table is written at the end of every epoch to ``influence.safetensors`` in the log folder of the first logger
    (``default_root_dir`` without one). A resumed run goes on from the checkpoint. At the end of training a histogram
    goes to every logger under ``adalfl/influence``, and for images of one size the 20 worst and best under
    ``adalfl/influence_images``; both are beside the table as PNG files.

    Instances are told apart by what the loader's batch sampler draws. Where that does not tell, give the module a
    method ``adalfl_index(batch)`` that returns whole numbers from 0, one for each instance.

    Args:
        size: How many instances there are; by default the length of the training data set.

    Attributes:
        table: As of the last epoch's end, over all processes.

    Raises:
        TypeError: If the module has no AdaLFLMixin.
        ValueError: If there are no meta steps, the instances cannot be told apart, or a checkpoint has others.

    Example::

        model = AdaClassifier(adalfl=AdaLFLConfig("multiclass", learn="nothing", meta_every=1))
        logger = InfluenceLogger()
        Trainer(callbacks=[logger]).fit(model, train, val)
        suspects = logger.table.ranking()[:50]
    """

    table: InfluenceTable

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = None if size is None else whole_number("size", size)
        self._sums: _Sums | None = None
        self._state: dict[str, Tensor] = {}
        self._held_out: HeldOutBatches | None = None
        self._course = _Course()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a module that takes no meta steps, and have the loader's indices noted."""
        if stage != "fit":
            return
        if learner_of(pl_module, "InfluenceLogger").config.meta_every is None:
            raise ValueError("InfluenceLogger looks on at meta steps; set `AdaLFLConfig(meta_every=1)`.")
        self._sums, self._state, self._held_out, self._course = None, {}, None, _Course()
        if not hasattr(pl_module, "adalfl_index"):
            when_loaded(trainer, record)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Find out which instances the batch holds."""
        own, data = getattr(pl_module, "adalfl_index", None), getattr(train_source(trainer), "dataset", None)
        found = indices_of(train_iterator(trainer), batch_idx) if own is None else own(batch)
        if self._sums is None:
            if self.size is None and not hasattr(data, "__len__"):
                raise ValueError("`size` is needed where the data have no length: `InfluenceLogger(size=...)`.")
            # One process goes on from the sums of all, and the others from zero.
            state = {k: t if trainer.is_global_zero else torch.zeros_like(t) for k, t in self._state.items()}
            size = self.size or len(data)  # type: ignore[arg-type]
            if (known := len(state.get("sums", range(size)))) != size:
                raise ValueError(f"the checkpoint has {known} instances, and there are {size}; resume with as many.")
            self._sums, self._state = _Sums(size, state).to(pl_module.device), {}
        last = len(self._sums.sums) - 1
        try:
            index = torch.as_tensor(found).flatten()
            is_known = not index.is_floating_point() and 0 <= int(index.min()) <= int(index.max()) <= last
        except (TypeError, ValueError, RuntimeError):
            is_known = False
        if not is_known:
            raise ValueError(f"indices must be whole numbers from 0 to {last}; got {str(found)[:50]}. {REMEDY}")
        run = pl_module._adalfl_online()
        run.instances, run.watch = index.to(pl_module.device), partial(self._watch, pl_module, self._sums)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Sum over processes, and write the table."""
        if self._sums is None:
            return
        self.table = InfluenceTable(pl_module.adalfl.task.name, **self._totals())
        self._follow(self.table.sums[:, [0, 3]].double(), self.table.probes[:, 0, [0, 2]].double())
        if writes(trainer):
            self.table.save(os.path.join(run_dir(trainer), INFLUENCE_FILE))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the figures."""
        self.on_train_epoch_end(trainer, pl_module)
        if self._sums is None or len(self.table.ranking()) < 2:
            return
        images = self._images(pl_module)  # in every process, since those of a sharded module predict together
        if not writes(trainer):
            return
        for name, figure in (("influence", plot_influence(self.table)), ("influence_images", images)):
            if figure is not None:
                with atomic_write(os.path.join(run_dir(trainer), f"{name}.png")) as file:
                    figure.savefig(file, format="png")
                for logger in trainer.loggers:
                    log_figure(logger, f"adalfl/{name}", figure, pl_module.adalfl.base_steps)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the trainer and its loader as they were."""
        if stage == "fit":
            when_loaded(trainer, None)
            forget(train_source(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums over all processes."""
        return {**self._totals(), "course": torch.tensor(self._course, dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the sums of a checkpoint."""
        self._state, self._course = state_dict, _Course(*state_dict["course"].tolist())

    def _follow(self, train: Tensor, held_out: Tensor) -> None:
        """Compare the losses of an epoch, of sums over times and losses, (N, 2)."""
        before, now = self._course, _Course(*train.sum(0).tolist(), *held_out.sum(0).tolist())
        times, held_out_times = now.times - before.times, now.held_out_times - before.held_out_times
        if min(times, held_out_times) <= 0:
            return
        mean = (now.loss - before.loss) / times
        held_out_mean = (now.held_out_loss - before.held_out_loss) / held_out_times
        is_over = held_out_mean > before.limit and held_out_mean > mean
        each = (held_out[:, 1] / held_out[:, 0])[held_out[:, 0] > 0]
        error = float(each.std(correction=0)) / len(each) ** 0.5
        limit = min(before.limit, held_out_mean + 2 * error)  # a loss that is not finite leaves it
        self._course = now._replace(limit=limit, is_over=max(before.is_over, float(is_over)))

    def _totals(self) -> dict[str, Tensor]:
        if self._sums is None:
            return dict(self._state)
        with self._sums.sync_context():
            return self._sums.copies()

    def _watch(self, module: Any, sums: _Sums, step: Any, found: Any) -> None:
        """Add what a meta step tells of the instances of its base step."""
        task, is_over = module.adalfl.task, bool(self._course.is_over)
        for forward, influence, (descent, factor, h) in zip(step.forwards, found.influence, found.parts):
            index, p = forward.instances, descent.predicted
            if len(index) != len(influence):
                raise ValueError(f"there are {len(index)} indices for a batch of {len(influence)} instances. {REMEDY}")
            if not module.adalfl.meta_steps:
                task.check_values(p.predictions, p.target, p.weight)
            influence = (influence / influence.abs().mean()).nan_to_num().unsqueeze(1)
            scores = target_scores(task, p.predictions, p.target, p.pushed(h) * factor, p.weight, len(index))
            values = torch.cat([torch.ones_like(influence), influence, scores], 1).float()
            values.masked_fill_(~torch.isfinite(values[:, :4]).all(1, keepdim=True), 0.0)  # such a step says nothing
            sums.update(index, values, is_over)
        # As often as a training instance is seen, so that the two are alike; which batch follows from the meta steps.
        steps, rows = module.adalfl.meta_steps, len(index) * len(step.forwards) * module.trainer.world_size
        turn, before = (_PROBE_BATCHES * rows * count // len(sums.sums) for count in (steps + 1, steps))
        if turn > before and len(p.predictions) == len(index):
            self._probe(module, sums, min(turn, steps) % _PROBE_BATCHES, step, found)

    def _probe(self, module: Any, sums: _Sums, place: int, step: Any, found: Any) -> None:
        """Score held-out instances with their own targets, and with wrong ones."""
        self._held_out = self._held_out or HeldOutBatches(module, _PROBE_BATCHES)
        f, y, h = (t[:_PROBE_ROWS] for t in self._held_out.tangent(place, step, found))
        task, seen = module.adalfl.task, found.parts[-1][0].predicted
        others = other_targets(task, f, y, (seen.predictions, seen.target), place)
        if others is None:
            return
        targets = torch.cat([y.unsqueeze(1).to(others[0]), others[0]], 1)
        f, h = (t.repeat_interleave(targets.shape[1], 0) for t in (f, h))
        scores = target_scores(task, f, targets.flatten(0, 1), h, None, len(f))
        scores = torch.cat([torch.ones_like(scores[:, :1]), scores], 1)
        scores.masked_fill_(~torch.isfinite(scores[:, :3]).all(1, keepdim=True), 0.0)  # as of training instances
        first = (module.global_rank * _PROBE_BATCHES + place) * _PROBE_ROWS
        size, is_over = _PROBE_BATCHES * _PROBE_ROWS * module.trainer.world_size, bool(self._course.is_over)
        sums.update_probes(first, scores.unflatten(0, targets.shape[:2]), others[1], size, is_over)

    def _images(self, module: Any) -> Figure | None:
        ranking = self.table.ranking()
        count = min(_SHOWN, len(ranking) // 2)
        chosen = [*ranking[:count].tolist(), *ranking[len(ranking) - count :].tolist()]
        found = None if hasattr(module, "adalfl_index") else shown(module, chosen)
        if found is None:
            return None
        images, f, y = found
        captions, said = [f"#{i}" for i in chosen], "row"
        if module.adalfl.task.name == "multiclass" and f.ndim == 2 and y.ndim == 1:
            captions, said = [f"{t} / {p}" for t, p in zip(y.tolist(), f.argmax(1).tolist())], "target / prediction"
        return plot_images(images.float().cpu().numpy(), captions, self.table.label_quality()[chosen].tolist(), said)


class _Sums(Metric):
    """The sums of a table, over all processes."""

    full_state_update = False
    sums: Tensor
    probes: Tensor
    probe_weights: Tensor

    def __init__(self, size: int, state: dict[str, Tensor]) -> None:
        super().__init__()
        empty = {"sums": (size, len(COLUMNS)), "probes": (0, 1, len(COLUMNS) - 1), "probe_weights": (0, 0)}
        for name, shape in empty.items():
            self.add_state(name, state.get(name, torch.zeros(shape)), "sum")

    def update(self, index: Tensor, values: Tensor, is_over: bool) -> None:
        self.sums.index_add_(0, index, _with_means(values, self.sums[index]) if is_over else values)

    def update_probes(self, first: int, scores: Tensor, weights: Tensor, size: int, is_over: bool) -> None:
        missing = size - len(self.probes)  # all, or those of processes that the run did not have before
        if missing > 0:
            for name, shape in (("probes", scores.shape[1:]), ("probe_weights", weights.shape[1:])):
                old = getattr(self, name).reshape(-1, *shape)
                setattr(self, name, torch.cat([old, old.new_zeros(missing, *shape)]))
        rows = self.probes[first : first + len(scores)]
        rows += _with_means(scores, rows) if is_over else scores
        self.probe_weights[first : first + len(scores)] += weights

    def compute(self) -> Tensor:
        return self.sums

    def copies(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).cpu().clone() for name in self._reductions}


def _with_means(values: Tensor, sums: Tensor) -> Tensor:
    """Return values whose last three are the means so far where there are any, so that these stay."""
    stay = torch.where(sums[..., :1] > 0, values[..., :1] * sums[..., -3:] / sums[..., :1], values[..., -3:])
    return torch.cat([values[..., :-3], stay], -1)
