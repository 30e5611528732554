from __future__ import annotations

import pytest

from mlsys_engine.errors import DataError
from mlsys_engine.pipeline import ScheduleError, schedules
from mlsys_engine.pipeline.runtime.planned import PlannedSchedule
from mlsys_engine.pipeline.schedules import SCHEDULES
from tests.pipeline.cases import TWO_STAGES


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_may_have_any_number_of_microbatches(name):
    stages = 6 if name in TWO_STAGES else 3
    planned = PlannedSchedule(name, stages=stages, ranks=3, pieces=6)
    for microbatches in range(1, 10):
        for rank in range(3):
            row, split = planned.row(rank, microbatches)
            found = {action.microbatch for action in row if action.kind == "F"}
            found |= {part.microbatch for action in row for part in action.parts}
            assert found == set(range(microbatches))
            assert bool(split) == any(action.kind == "W" for action in row)


def test_a_given_schedule_runs_its_number_of_microbatches_and_fewer():
    text = schedules.build("1f1b", stages=2, microbatches=4).to_csv()
    planned = PlannedSchedule(text, stages=2, ranks=2, pieces=4)
    assert len([action for action in planned.row(0, 3)[0] if action.kind == "F"]) == 3
    with pytest.raises(DataError, match="The given schedule has 4"):
        planned.row(0, 5)


def test_stages_that_a_schedule_does_not_take_are_refused_when_it_is_made():
    with pytest.raises(ScheduleError, match="multiple of 2"):
        PlannedSchedule("interleaved-1f1b", stages=3, ranks=2, pieces=4)
