"""Which training instances hurt the held-out loss: watched at every meta step, and kept in a table."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric

from lightning_adalfl.adapter.lightning_private import lightning, train_iterator, train_source, transferred, when_loaded
from lightning_adalfl.adapter.meta_batches import PROBES, EndlessBatches, transferred_meta_batch
from lightning_adalfl.adapter.recorded_indices import REMEDY, forget, indices_of, record
from lightning_adalfl.adapter.refusals import learner_of
from lightning_adalfl.callbacks.figure_logging import log_figure, logger_dir
from lightning_adalfl.checks import whole_number
from lightning_adalfl.files import atomic_write, joined
from lightning_adalfl.inspection.influence import COLUMNS, INFLUENCE_FILE, InfluenceTable
from lightning_adalfl.inspection.influence_figures import plot_images, plot_influence
from lightning_adalfl.inspection.target_scores import other_targets, target_scores
from lightning_adalfl.learning.base_step import BaseStep
from lightning_adalfl.learning.hypergradient import Hypergradient
from lightning_adalfl.learning.recorded_forward import RandomState
from lightning_adalfl.learning.torch_private import tensors_in

Callback: Any = lightning().Callback

_PROBE_BATCHES, _PROBE_ROWS = 4, 64  # held-out instances that are scored with wrong targets too
_SHOWN = 20  # images at either end


class InfluenceLogger(Callback):
    """Keeps the influence of every training instance on the held-out loss, and lists the targets to look at.

    At each meta step the instances of the base step are scored; see
    :class:`~lightning_adalfl.inspection.InfluenceTable`. Training goes on as without it, whatever is learned: with
    ``learn="nothing"`` an ordinary training is watched. Set ``meta_every=1`` to score every batch.

    The table is written at the end of every epoch to ``influence.safetensors`` in the log folder of the first logger
    (``default_root_dir`` without one). A resumed run goes on from the checkpoint. At the end of training a histogram
    goes to every logger under ``adalfl/influence``, and for images the 20 worst and best under
    ``adalfl/influence_images``; both are beside the table as PNG files.

    Instances are told apart by what the loader's batch sampler draws. Where that does not tell, give the module a
    method ``adalfl_index(batch)`` that returns whole numbers from 0, one for each instance.

    Args:
        size: How many instances there are; by default the length of the training data set.

    Attributes:
        table: As of the last epoch's end, over all processes.

    Raises:
        TypeError: If the module has no AdaLFLMixin, or a sampler draws no whole numbers.
        ValueError: If there are no meta steps, or the instances cannot be told apart.

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
        self._probes: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a module that takes no meta steps, and have the loader's indices noted."""
        if stage != "fit":
            return
        if learner_of(pl_module, "InfluenceLogger").config.meta_every is None:
            raise ValueError("InfluenceLogger looks on at meta steps; set `AdaLFLConfig(meta_every=1)`.")
        self._sums, self._probes = None, []
        if not hasattr(pl_module, "adalfl_index"):
            when_loaded(trainer, record)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Find out which instances the batch holds."""
        own = getattr(pl_module, "adalfl_index", None)
        index = torch.as_tensor(indices_of(train_iterator(trainer), batch_idx) if own is None else own(batch))
        if self._sums is None:
            state, self._state = self._state if trainer.is_global_zero else {}, {}
            self._sums = _Sums(self._size(trainer), state).to(pl_module.device)
        size = len(self._sums.sums)
        if index.is_floating_point() or not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"indices must be whole numbers from 0 to {size - 1}; got {index[:3].tolist()}. {REMEDY}")
        run = pl_module._adalfl_online()
        run.instances, run.watch = index.to(pl_module.device), partial(self._watch, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Sum over processes, and write the table."""
        if self._sums is None:
            return
        self.table = InfluenceTable(pl_module.adalfl.task.name, **self._sums.totals())
        if _writes(trainer):
            self.table.save(joined(_folder(trainer), INFLUENCE_FILE))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the figures."""
        self.on_train_epoch_end(trainer, pl_module)
        if self._sums is None or not _writes(trainer) or len(self.table.ranking()) < 2:
            return
        figures = {"influence": plot_influence(self.table), "influence_images": self._images(trainer, pl_module)}
        for name, figure in figures.items():
            if figure is not None:
                with atomic_write(joined(_folder(trainer), f"{name}.png")) as file:
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
        return dict(self._state) if self._sums is None else self._sums.totals()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the sums of a checkpoint."""
        self._state = state_dict

    def _size(self, trainer: Any) -> int:
        dataset: Any = getattr(train_source(trainer), "dataset", None)
        if self.size is None and not hasattr(dataset, "__len__"):
            raise ValueError("`size` is needed where the training data have no length: `InfluenceLogger(size=...)`.")
        return self.size or len(dataset)

    def _watch(self, module: Any, step: BaseStep, found: Hypergradient) -> None:
        """Add what a meta step tells of the instances of its base step."""
        task, sums = module.adalfl.task, self._sums
        if sums is None:
            return
        for forward, influence, (descent, _, h) in zip(step.forwards, found.influence, found.parts):
            index, p = forward.instances, descent.predicted
            if len(index) != len(influence):
                raise ValueError(f"there are {len(index)} indices for a batch of {len(influence)} instances. {REMEDY}")
            if not module.adalfl.meta_steps:
                task.check_values(p.predictions, p.target, p.weight)
            influence = (influence / influence.abs().mean()).nan_to_num().unsqueeze(1)
            scores = target_scores(task, p.predictions, p.target, p.pushed(h), p.weight, len(index))
            values = torch.cat([torch.ones_like(influence), influence, scores], 1).float()
            values[~torch.isfinite(values[:, :4]).all(1)] = 0.0  # a step without a finite derivative says nothing
            sums.update("sums", index, values)
        # As often as a training instance is seen, so that the two are alike; which one follows from the meta steps.
        steps, seen = module.adalfl.meta_steps, len(index) * len(step.forwards) * module.trainer.world_size
        turn, before = (_PROBE_BATCHES * seen * count // len(sums.sums) for count in (steps + 1, steps))
        if turn > before and len(p.predictions) == len(index):
            # Without a part in the run's random numbers, so that training is the same as without it.
            with RandomState.capture(step.device).replayed(), torch.no_grad():
                self._probe(module, step, found, min(turn, steps) % _PROBE_BATCHES)

    def _probe(self, module: Any, step: BaseStep, found: Hypergradient, place: int) -> None:
        """Score held-out instances with their own targets, and with wrong ones."""
        run, task, model = module._adalfl_run, module.adalfl.task, step.model
        if not self._probes:
            drawn = EndlessBatches(module.adalfl_meta_dataloader, run.batches.state_dict()["seed"], PROBES)
            batches = [next(drawn) for _ in range(_PROBE_BATCHES)]
            self._probes = [transferred_meta_batch(module, batch, module.adalfl.config) for batch in batches]
        forward, (f, y, *_) = model.run(lambda: model.record(self._probes[place], step.device), model.buffers())
        scale, direction = found.direction or (0.0, [])
        (h,) = step.jvp(model, forward, {i: step.parameters[i].detach() for i in step.active}, direction)
        f, y, h, seen = f[:_PROBE_ROWS], y[:_PROBE_ROWS], scale * h[:_PROBE_ROWS], found.parts[-1][0].predicted
        others = other_targets(task, f, y, (seen.predictions, seen.target), place)
        if others is None or self._sums is None:
            return
        targets = torch.cat([y.unsqueeze(1).to(others[0]), others[0]], 1)
        f, h = (t.repeat_interleave(targets.shape[1], 0) for t in (f, h))
        scores = target_scores(task, f, targets.flatten(0, 1), h, None, len(f))
        scores = torch.cat([torch.ones_like(scores[:, :1]), scores], 1).unflatten(0, targets.shape[:2])
        first = (run.trainer.global_rank * _PROBE_BATCHES + place) * _PROBE_ROWS
        index = torch.arange(first, first + len(scores), device=scores.device)
        self._sums.reserve(_PROBE_BATCHES * _PROBE_ROWS * run.trainer.world_size, targets.shape[1] - 1)
        self._sums.update("probes", index, scores)
        self._sums.update("probe_weights", index, others[1])

    def _images(self, trainer: Any, module: Any) -> Figure | None:
        """Draw the worst and best images of a data set that has images."""
        if hasattr(module, "adalfl_index"):
            return None
        loader, ranking = train_source(trainer), self.table.ranking()
        count = min(_SHOWN, len(ranking) // 2)
        chosen = [*ranking[:count], *ranking[len(ranking) - count :]]
        with RandomState.capture(module.device).replayed(), torch.no_grad():
            batch = transferred(module, loader.collate_fn([loader.dataset[int(i)] for i in chosen]), False)
            images = next((t for t in tensors_in(batch) if t.ndim == 4 and t.shape[1] in (1, 3)), None)
            if images is None:
                return None
            was_training = module.training
            module.eval()
            f, y, *_ = module.adalfl_predict(batch)
            module.train(was_training)
        captions = [f"#{i}" for i in chosen]
        if module.adalfl.task.name == "multiclass" and f.ndim == 2 and y.ndim == 1:
            captions = [f"{target} / {found}" for target, found in zip(y.tolist(), f.argmax(1).tolist())]
        return plot_images(images.float().cpu().numpy(), captions, self.table.label_quality()[chosen])


class _Sums(Metric):
    """The sums of a table, over all processes."""

    full_state_update = False
    sums: Tensor
    probes: Tensor
    probe_weights: Tensor

    def __init__(self, size: int, state: dict[str, Tensor]) -> None:
        super().__init__()
        empty = {
            "sums": torch.zeros(size, len(COLUMNS)),
            "probes": torch.zeros(0, 1, 5),
            "probe_weights": torch.zeros(0, 0),
        }
        for name, value in empty.items():
            self.add_state(name, value, "sum")
            setattr(self, name, state.get(name, value).clone())

    def reserve(self, rows: int, others: int) -> None:
        """Make room for held-out instances."""
        if not len(self.probes):
            self.probes = self.sums.new_zeros(rows, 1 + others, len(COLUMNS) - 1)
            self.probe_weights = self.sums.new_zeros(rows, others)

    def update(self, name: str, index: Tensor, values: Tensor) -> None:
        getattr(self, name).index_add_(0, index, values.float())

    def compute(self) -> Tensor:
        return self.sums

    def totals(self) -> dict[str, Tensor]:
        """Return the sums over processes; to be called in each."""
        with self.sync_context():
            return {name: getattr(self, name).cpu().clone() for name in ("sums", "probes", "probe_weights")}


def _writes(trainer: Any) -> bool:
    return trainer.is_global_zero and not trainer.fast_dev_run and not trainer.barebones


def _folder(trainer: Any) -> str:
    # Not `trainer.log_dir`, which is a collective call, and this is rank zero.
    return (logger_dir(trainer.loggers[0]) if trainer.loggers else None) or trainer.default_root_dir
