"""The methods that the paper compares (section 5), the controls that it lacks, and its ablations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_adalfl import AdaLFLConfig, AdaLFLInit

HANDCRAFTED = ("baseline", "baseline_tuned", "baseline_matched")
# The factors on the paper's learning rate that `baseline_tuned` chooses from, by the error on the validation data.
TUNING_GRID = (1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class Method:
    """How a method trains.

    Attributes:
        recipe: ``"handcrafted"``, ``"library"`` (the library's defaults) or ``"paper"`` (the paper's own recipe).
        config: Fields of `AdaLFLConfig` that differ from the recipe's.
        init: Arguments of `AdaLFLInit` that differ from the recipe's; ``None`` for no offline phase.
        rate_factor: On the paper's learning rate.
    """

    recipe: str
    config: Mapping[str, Any] = field(default_factory=dict)
    init: Mapping[str, Any] | None = field(default_factory=dict)
    rate_factor: float = 1.0

    def build(self, kind: str, init_steps: int | None = None) -> tuple[AdaLFLConfig, AdaLFLInit | None]:
        """Return the configuration and the offline phase for a task of that kind.

        Args:
            kind: ``"multiclass"`` or ``"regression"``.
            init_steps: Shortens or lengthens the offline phase.
        """
        paper = self.recipe == "paper"
        config = AdaLFLConfig.paper(kind) if paper else AdaLFLConfig(task=kind)
        if self.init is None:
            return replace(config, **self.config), None
        arguments = dict(self.init) if init_steps is None else {**self.init, "steps": init_steps}
        init = AdaLFLInit.paper(**arguments) if paper else AdaLFLInit(**arguments)
        return replace(config, **self.config), init


METHODS: Mapping[str, Method] = {
    **{name: Method("handcrafted", init=None) for name in HANDCRAFTED},
    "ml3": Method("paper", {"online": False}),
    "ml3_relu": Method("paper", {"online": False, "representation": "ml3"}),
    "metalr": Method("paper", {"learn": "lr"}),
    "taylor_quadratic": Method("paper", {"representation": "taylor_quadratic"}),
    "taylor_cubic": Method("paper", {"representation": "taylor_cubic"}),
    "taylor_quadratic_target_powers": Method("paper", {"representation": "taylor_quadratic_target_powers"}),
    "taylor_cubic_target_powers": Method("paper", {"representation": "taylor_cubic_target_powers"}),
    "adalfl": Method("library", init=None),
    "adalfl meta_every=10": Method("library", {"meta_every": 10}, None),
    "adalfl_paper": Method("paper"),
    "both": Method("paper", {"learn": "both"}),
}

ABLATIONS: Mapping[str, Mapping[str, Method]] = {
    "inner_steps": {
        **{f"ml3 inner_steps={k}": Method("paper", {"online": False}, {"inner_steps": k}) for k in (1, 5, 10, 15, 20)},
        "adalfl_paper": METHODS["adalfl_paper"],
    },
    "activation": {name: METHODS[name] for name in ("ml3_relu", "ml3", "adalfl_paper")},
    "meta_lr": {
        f"adalfl_paper meta_lr={rate}": Method("paper", {"meta_lr": float(rate)})
        for rate in ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
    },
    "meta_data": {f"adalfl_paper meta_data={data}": Method("paper", {"meta_data": data}) for data in ("train", "val")},
    # Not in the paper: what the meta steps cost against what they bring.
    "cost": {
        "baseline": METHODS["baseline"],
        "baseline_tuned": METHODS["baseline_tuned"],
        "adalfl": METHODS["adalfl"],
        "adalfl meta_every=10": METHODS["adalfl meta_every=10"],
        "adalfl meta_every=100": Method("library", {"meta_every": 100}, None),
        "adalfl finite_difference": Method("library", {"hypergradient": "finite_difference"}, None),
        "ml3": METHODS["ml3"],
    },
    # Not in the paper: whether the learned loss harms where the learning rate has been chosen well.
    "rates": {
        f"{name} rate x{factor}": replace(method, rate_factor=factor)
        for factor in (3, 10, 30)
        for name, method in METHODS.items()
        if name in ("baseline", "adalfl", "adalfl meta_every=10")
    },
    # Not in the paper: what the library's defaults were chosen from.
    "defaults": {
        "baseline": METHODS["baseline"],
        "adalfl": METHODS["adalfl"],
        "adalfl meta_every=10": METHODS["adalfl meta_every=10"],
        "adalfl offline phase": Method("library"),
        "adalfl offline phase lr=1e-3": Method("library", init={"lr": 1e-3}),
        "adalfl meta_lr=1e-3": Method("library", {"meta_lr": 1e-3}, None),
        "adalfl min_cosine=0.8": Method("library", {"min_cosine": 0.8}, None),
        "adalfl max_gain=3": Method("library", {"max_gain": 3.0}, None),
        "adalfl max_gain=30": Method("library", {"max_gain": 30.0}, None),
        "adalfl max_gain=None": Method("library", {"max_gain": None}, None),
        "adalfl gain_lr=3e-2": Method("library", {"gain_lr": 3e-2}, None),
        "adalfl gain_horizon=10": Method("library", {"gain_horizon": 10}, None),
        "adalfl gain_horizon=300": Method("library", {"gain_horizon": 300}, None),
        "adalfl residual=False": Method("library", {"residual": False}, {"steps": 0, "imitation_steps": 1000}),
        "adalfl reduction=sum": Method("library", {"reduction": "sum"}, None),
        "adalfl bias=True": Method("library", {"bias": True}, None),
        "adalfl safeguard=False": Method("library", {"safeguard": False}, None),
    },
    # What the paper leaves open (section 2.2), by its own recipe without bounds.
    "open_settings": {
        "adalfl_paper": METHODS["adalfl_paper"],
        "adalfl_paper output_activation=smooth_leaky_relu": Method("paper", {"output_activation": "smooth_leaky_relu"}),
        "adalfl_paper output_activation=softplus": Method("paper", {"output_activation": "softplus"}),
        "adalfl_paper bias=True": Method("paper", {"bias": True}),
        "adalfl_paper weight_init=xavier_uniform": Method("paper", {"weight_init": "xavier_uniform"}),
        "adalfl_paper reduction=sum": Method("paper", {"reduction": "sum"}),
        "adalfl_paper reset=initial": Method("paper", init={"reset": "initial"}),
        "adalfl_paper imitation_steps=1000": Method("paper", init={"imitation_steps": 1000}),
        "adalfl_paper no offline phase": Method("paper", init=None),
    },
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
