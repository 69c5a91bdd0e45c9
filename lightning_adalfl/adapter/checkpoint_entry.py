"""Whether a checkpoint's entry of this library is one, before anything is taken over from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_adalfl.adapter.safeguard import Safeguard

COUNTERS = ("base_steps", "meta_steps", "skipped_base_steps", "skipped_meta_steps")


def check_entry(entry: Any) -> None:
    """Check the structure of what a checkpoint holds under ``"adalfl"``; shapes are left to ``load_state_dict``.

    Raises:
        ValueError: If a part is missing or of another kind.
    """
    _expect(isinstance(entry, dict), "it is no dictionary")
    phi, progress, processes = entry.get("state_dict"), entry.get("progress"), entry.get("processes")
    _expect(isinstance(phi, dict) and all(isinstance(k, str) for k in phi), "`state_dict` is no dictionary")
    _expect(all(isinstance(value, Tensor) for value in phi.values()), "`state_dict` holds values that are no tensors")
    _expect(isinstance(progress, dict), "`progress` is no dictionary")
    for name in COUNTERS:
        _expect(_is_count(progress.get(name)), f"`progress` has no count `{name}`")
    _expect(isinstance(progress.get("initialised"), bool), "`progress` has no switch `initialised`")
    _expect({"meta_optimizer", "safeguard", "gain_horizon"} <= progress.keys(), "`progress` lacks a state")
    _expect_optimizer(progress["meta_optimizer"])
    _expect_safeguard(progress["safeguard"])
    _expect_horizon(progress["gain_horizon"])
    if processes is not None:
        fits = isinstance(processes, list) and all(
            isinstance(p, dict) and {"global", "run"} <= p.keys() for p in processes
        )
        _expect(fits, "`processes` holds no random states")


def _expect_optimizer(state: Any) -> None:
    if state is None:
        return
    fits = (
        isinstance(state, dict) and isinstance(state.get("state"), dict) and isinstance(state.get("param_groups"), list)
    )
    _expect(fits, "`meta_optimizer` is no optimizer's state")


def _expect_safeguard(state: Any) -> None:
    if state is None:
        return
    wanted = vars(Safeguard(1)).keys()
    _expect(isinstance(state, dict) and state.keys() == wanted, "`safeguard` is no safeguard's state")
    _expect(
        _is_count(state["level"]) and _is_count(state["window"]) and state["window"] > 0, "`safeguard` has no level"
    )
    best = state["best_values"]
    _expect(best is None or _are_tensors(best), "`safeguard` has no values to go back to")


def _expect_horizon(state: Any) -> None:
    _expect(isinstance(state, dict) and _are_tensors(state.get("average")), "`gain_horizon` has no average")
    fits = isinstance(state.get("base_steps"), float) and isinstance(state.get("first", 0), float | None)
    _expect(fits, "`gain_horizon` has no place")


def _are_tensors(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, Tensor) for value in values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _expect(fits: bool, otherwise: str) -> None:
    if not fits:
        raise ValueError(
            f"the checkpoint's entry 'adalfl' cannot be read: {otherwise}. It is damaged or of another version of "
            "lightning_adalfl; take another checkpoint, or delete the entry to train with a new learned loss."
        )
