"""A rank that fails at any moment, in any way: every survivor is told who it was, and nothing is left over.

How soon they are told is measured by benchmarks/faults.py, with these same trials.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kills import PHASES, Trial, run_trial


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(200))
def test_a_rank_that_fails_at_a_random_moment_is_named_by_every_survivor(tmp_path: Path, seed: int) -> None:
    outcome = run_trial(Trial.draw(seed), tmp_path)
    assert not outcome.complaints, (outcome.trial, outcome.complaints)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_is_stopped_is_named_and_finds_itself_out_of_the_group(
    tmp_path: Path, phase: str
) -> None:
    trial = Trial(world_size=3, victim=1, way="stop", phase=phase, locality="0,0,1", delay_s=0.01)
    outcome = run_trial(trial, tmp_path)
    assert not outcome.complaints, (outcome.trial, outcome.complaints)
