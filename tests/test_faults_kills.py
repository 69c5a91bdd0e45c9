"""The short form of examples/endurance.py: kills and a long run."""

from __future__ import annotations

import pytest
from endurance_kills import stop_by_sigterm, survive_kills
from endurance_long import run_long
from endurance_training import Settings

SHORT = Settings(steps=20, offline_steps=20)


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_left_alone() -> None:
    result = survive_kills(2, settings=SHORT)
    assert result["kills"] == 2
    assert result["after"]["checkpoints_read"] > 0


@pytest.mark.slow
def test_sigterm_in_the_offline_phase_stops_the_process_by_itself() -> None:
    result = stop_by_sigterm(Settings(steps=20, offline_steps=400))
    assert result["equal_bitwise"]


@pytest.mark.slow
def test_nothing_grows_without_bound() -> None:
    result = run_long(300)
    growth = result["growth_per_10000_steps"]
    assert growth["open_files"] == 0
    # Half of 300 steps tell little of memory; a leak of a graph a step would be tens of megabytes here.
    assert result["end"]["memory_mb"] - result["middle"]["memory_mb"] < 20
