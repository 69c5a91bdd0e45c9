"""What a run says about itself in counters, scalars and shape: in words, with what to do about it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from lightning_adalfl.files import PathLike
from lightning_adalfl.inspection.history import FILE_NAME, LossHistory, learner_state, read
from lightning_adalfl.inspection.loss_shape import Values
from lightning_adalfl.inspection.report import report
from lightning_adalfl.losses.network import LossNetwork

_NOT_FINITE = "Look for NaN in the trusted batches, lower the base learning rate, or clip the gradient."
_FINE = "Nothing: no sign of trouble. Compare the end with your own loss on rows that nobody learned from."
Notes = list[str]


def diagnose(path: PathLike, classes: int | None = None) -> str:
    """Return what a local checkpoint or log folder says of its run, and what to do; nothing in it is run.

    Args:
        path: A checkpoint, or a log folder; of several checkpoints the newest is taken. Scalars are read from
            ``metrics.csv``, or from TensorBoard's files.
        classes: For a multiclass loss that trains alone, the number of classes.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it holds nothing of a run with AdaLFLMixin, or cannot be read.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"cannot read {path}: there is no such file or folder; check the path.")
    is_file, said, todo = place.is_file() or place.suffix == ".ckpt", Notes(), Notes()
    # Lightning keeps checkpoints in a folder below the logs.
    folder = place.absolute().parents[place.absolute().parent.name == "checkpoints"] if is_file else place
    folders = ("*.ckpt", "checkpoints/*.ckpt")
    found = [place] if is_file else sorted((p for f in folders for p in place.glob(f)), key=os.path.getmtime)
    scalars, history = _scalars(folder), folder / FILE_NAME
    if not (found or scalars or history.is_file()):
        what = f"it holds no checkpoint, no {FILE_NAME} and no scalars under adalfl/"
        newest = max(place.rglob("version_*"), key=os.path.getmtime, default="lightning_logs/version_0")
        raise ValueError(f"cannot read {path}: {what}; give a log folder such as {newest}.")
    is_learned = _counters(found[-1], said, todo) if found else history.is_file()
    lines = [_scalar(name, values, todo) for name, values in scalars.items()]
    said.extend(["Logged, the first and the last tenth:\n  " + "\n  ".join(lines)] if lines else [])
    if history.is_file() and is_learned:
        said.append(_distance(LossHistory.load(history)))
    if is_learned:
        files = [*found[-1:], *([history] if history.is_file() and not is_file else [])]
        _shape(read(max(files, key=os.path.getmtime)), classes, said, todo)
    return "\n\n".join([*said, "\n".join(["What to do:", *(f"- {line}" for line in dict.fromkeys(todo or [_FINE]))])])


def _counters(checkpoint: Path, said: Notes, todo: Notes) -> bool:
    state = learner_state(str(checkpoint))
    config, taken, skipped = state["config"], state["meta_steps"], state["skipped_meta_steps"]
    options = ", ".join(f"{name}={config[name]!r}" for name in ("task", "learn", "meta_every", "meta_lr", "own_loss"))
    said.append(f"{checkpoint}: at base step {state['base_steps']:,}, after {taken:,} meta steps, with {options}.")
    if skipped:
        said.append(f"{skipped:,} of the meta steps were left out, since a number was not finite.")
        todo.append(_NOT_FINITE)
    if state["loss"] is not None:
        said.append(f"The learned loss φ has {'moved' if taken > skipped else 'not moved'}.")
    if not taken:
        todo.append("No meta step was taken: train for more than `meta_every` steps; with None there are none.")
    return state["loss"] is not None


def _scalar(name: str, values: Values, todo: Notes) -> str:
    tenth = max(1, len(values) // 10)
    start, end, lowest = float(values[:tenth].mean()), float(values[-tenth:].mean()), values.min()
    said = f"{name}: {start:.3g} to {end:.3g}"
    if name == "adalfl/evidence":
        said += f", below zero in {np.mean(values < 0):.0%}, which happens where the shape helps, too"
    elif name == "adalfl/implied_lr":
        said += ", the rate that your own loss would need for as long a step along its own slope"
        if end < 0.05 * start:
            todo.append("Steps have become short. If that is not your schedule and comes too early, lower `meta_lr`.")
    elif name == "adalfl/task_loss" and len(values) >= 10 and end > start:
        todo.append(f"The trusted loss rose; its lowest was {lowest:.3g}. Lower `meta_lr` to 3e-4, or stop there.")
    elif name == "adalfl/meta_grad_norm" and not values.any():
        todo.append("The trusted loss does not depend on what a step moves: check `adalfl_predict`.")
    elif name == "adalfl/skipped_meta_steps" and values[-1]:
        todo.append(_NOT_FINITE)
    return said


def _distance(history: LossHistory) -> str:
    losses = [history.loss_at(step) for step in (0, history.steps[-1])]  # whose state has the units too
    first, last = (np.concatenate([p.detach().flatten() for p in loss.phi().values()]) for loss in losses)
    share = float(np.linalg.norm(last - first)) / (float(np.linalg.norm(first)) or 1.0)
    return f"From step {history.steps[0]:,} to {history.steps[-1]:,} φ has gone {share:.2g} times its first length."


def _shape(history: LossHistory, classes: int | None, said: Notes, todo: Notes) -> None:
    (shape,) = history.shapes(1, classes=classes)
    loss = history.loss_at(history.steps[-1])
    words = report(shape, loss.reduction)
    said.extend(part for part in str(words).split("\n\n") if part.startswith(("Strength", "Flat", "Turning")))
    if isinstance(loss, LossNetwork) and loss.sees_classes and (loss.held_out_classes == 0).any():
        missing = ", ".join(map(str, (loss.held_out_classes == 0).nonzero().flatten().tolist()))
        todo.append(f"No trusted row was of class {missing}: add some, or nothing is learned of it.")
    if words.strength <= 0:
        todo.append("It drives away from the targets. Are the trusted rows right, and `adalfl_predict`?")
    elif shape.is_added and words.alignment > 0.995:
        todo.append("Hardly any shape is learned yet. Some hundred steps are needed; a larger `meta_lr` learns faster.")
    if shape.flatness > 0.5:
        todo.append("More than half is flat, which ends training. If the trusted loss still falls, lower `meta_lr`.")
    if any(words.away):
        todo.append("It turns from targets. Where targets are wrong it should; if yours are right, leave it out.")


def _scalars(folder: Path) -> dict[str, Values]:
    """Return what was logged under ``adalfl/``, by name."""
    found: dict[str, list[float]] = {}
    table = folder / "metrics.csv"
    if table.is_file():
        try:
            with table.open(newline="") as file:
                for name, value in (cell for row in csv.DictReader(file) for cell in row.items()):
                    if value and name.startswith("adalfl/"):
                        found.setdefault(name, []).append(float(value))
        except (ValueError, AttributeError, csv.Error) as error:
            raise ValueError(f"cannot read {table}: it is damaged ({error}); move it away, or mend it.") from error
    if not found and any(folder.glob("events.out.tfevents.*")):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        names = [name for name in events.Tags()["scalars"] if name.startswith("adalfl/")]
        found = {name: [event.value for event in events.Scalars(name)] for name in names}
    return {name: np.array(values) for name, values in sorted(found.items())}
