"""The methods that the paper compares (section 5), the controls that it lacks, and its ablations.

Whatever depends on how the library is configured is in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lightning_adalfl import AdaLFLConfig, AdaLFLInit, LossNetwork

Options = Mapping[str, Any]

# The loss network as the paper leaves it open, in the reading under which its tables come out; see docs/experiments.md.
READING: Options = {"weight_init": "xavier_uniform", "output_activation": None, "bias": False, "reduction": "mean"}
# First draws of the small models; the one that a model has anyway is the method itself.
SMALL_DRAWS = ("xavier", "lecun", "kaiming", "torch")
# The factors on the paper's learning rate between which `baseline_tuned` chooses.
TUNING_GRID = (1, 3, 10, 30)


@dataclass(frozen=True)
class Method:
    """How a method trains.

    Attributes:
        recipe: ``"handcrafted"``, ``"library"`` (the library's defaults) or ``"paper"`` (the paper's own recipe).
        loss: ``"paper"``, its loss network, or the name of another learned loss that its recipe is to have.
        network: Options of that network that differ from `READING`.
        config: Fields of `AdaLFLConfig` that differ from the recipe's.
        init: Arguments of `AdaLFLInit` that differ from the recipe's; ``None`` for no offline phase.
        rate_factor: On the paper's learning rate.
        draw: The base model's first draw, a key of `base_models.DRAWS`; by default the model's own.
    """

    recipe: str
    loss: str = "paper"
    network: Options = field(default_factory=dict)
    config: Options = field(default_factory=dict)
    init: Options | None = field(default_factory=dict)
    rate_factor: float = 1.0
    draw: str | None = None

    @property
    def learns(self) -> bool:
        """Whether anything is learned beside the base model."""
        return self.recipe != "handcrafted"

    def build(self, kind: str, init_steps: int | None = None) -> tuple[AdaLFLConfig, AdaLFLInit | None]:
        """Return the configuration and the offline phase for a task of that kind.

        Args:
            kind: ``"multiclass"`` or ``"regression"``.
            init_steps: Shortens or lengthens the offline phase.
        """
        if self.recipe == "library":
            return AdaLFLConfig(task=kind, **self.config), None
        changes = dict(self.config)
        if self.network:
            with torch.random.fork_rng():  # the base model is drawn as without it
                changes["loss"] = LossNetwork(kind, **{**READING, **self.network})
        elif self.loss != "paper":
            changes["loss"] = self.loss
        config = AdaLFLConfig.paper(kind, **changes)
        if self.init is None:
            return config, None
        return config, AdaLFLInit.paper(**self.init, **({} if init_steps is None else {"steps": init_steps}))


def offline_steps(init: AdaLFLInit | None) -> int:
    """Return the meta steps of an offline phase."""
    return 0 if init is None else init.steps


def implied_rate(module: Any) -> float | None:
    """Return the newest implied learning rate of an adaptive module (section 5.5), once there is one."""
    value = module.adalfl.scalars.get("adalfl/implied_lr")
    return None if value is None else float(value)


@torch.no_grad()
def learned_values(module: Any, targets: list[float], predictions: list[float]) -> list[list[float]] | None:
    """Return ℓ_φ of an adaptive module, a row for each target; ``None`` if it learns no loss.

    Args:
        module: The module.
        targets: 0 and 1 for classification.
        predictions: Probabilities for classification.
    """
    loss = module.adalfl.loss
    if loss is None:
        return None
    f = torch.tensor(predictions, device=next(loss.parameters()).device)
    return [loss.pairwise(f, torch.full_like(f, y)).tolist() for y in targets]


METHODS: Mapping[str, Method] = {
    "baseline": Method("handcrafted"),
    **{f"baseline rate x{k}": Method("handcrafted", rate_factor=k) for k in TUNING_GRID[1:]},
    # Its rate follows that of `adalfl`.
    "baseline_matched": Method("handcrafted"),
    "ml3": Method("paper", config={"meta_every": None}),
    "ml3_relu": Method("paper", "ml3", config={"meta_every": None}),
    "metalr": Method("paper", config={"learn": "lr"}),
    "taylor_quadratic": Method("paper", "taylor_quadratic"),
    "taylor_cubic": Method("paper", "taylor_cubic"),
    "taylor_quadratic_target_powers": Method("paper", "taylor_quadratic_target_powers"),
    "taylor_cubic_target_powers": Method("paper", "taylor_cubic_target_powers"),
    "adalfl": Method("paper"),
    "both": Method("paper", config={"learn": "both"}),
    "library": Method("library"),
    "library meta_every=1": Method("library", config={"meta_every": 1}),
}


def _open_settings() -> dict[str, Method]:
    """One change at a time to what the paper leaves open, with and without the online phase."""
    changes: dict[str, dict[str, Any]] = {
        "output_activation=softplus": {"network": {"output_activation": "softplus"}},
        "output_activation=smooth_leaky_relu": {"network": {"output_activation": "smooth_leaky_relu"}},
        "weight_init=kaiming_normal": {"network": {"weight_init": "kaiming_normal"}},
        "bias=True": {"network": {"bias": True}},
        "reduction=sum": {"network": {"reduction": "sum"}},
        "reset=initial": {"init": {"reset": "initial"}},
        "inner_steps=5": {"init": {"inner_steps": 5}},
        **{f"draw={draw}": {"draw": draw} for draw in SMALL_DRAWS},
    }
    rows = {name: METHODS[name] for name in ("ml3", "adalfl")}
    for change, fields in changes.items():
        rows |= {f"{name} {change}": replace(METHODS[name], **fields) for name in ("ml3", "adalfl")}
    return {**rows, "adalfl no offline phase": Method("paper", init=None)}


ABLATIONS: Mapping[str, Mapping[str, Method]] = {
    "inner_steps": {
        "ml3": METHODS["ml3"],
        **{
            f"ml3 inner_steps={k}": Method("paper", config={"meta_every": None}, init={"inner_steps": k})
            for k in (5, 10, 15, 20)
        },
        "adalfl": METHODS["adalfl"],
    },
    "activation": {name: METHODS[name] for name in ("ml3_relu", "ml3", "adalfl")},
    "meta_lr": {
        f"adalfl meta_lr={rate}": Method("paper", config={"meta_lr": float(rate)})
        for rate in ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
    },
    "meta_data": {
        "adalfl meta_data=train": Method("paper", config={"meta_data": "train"}),
        "adalfl": METHODS["adalfl"],
    },
    # What the paper leaves open: the base model's first draw, by the handcrafted loss alone, and the rest.
    "first_draw": {f"baseline draw={draw}": Method("handcrafted", draw=draw) for draw in SMALL_DRAWS},
    "open_settings": _open_settings(),
}


ALL_METHODS: Mapping[str, Method] = {
    **METHODS,
    **{name: row for rows in ABLATIONS.values() for name, row in rows.items()},
}


def find_method(name: str) -> Method:
    """Return a method, or a row of an ablation, by its name."""
    if name not in ALL_METHODS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, ALL_METHODS))}; got {name!r}.")
    return ALL_METHODS[name]
