"""Actions and lists of them: what parses, and what is refused."""

from __future__ import annotations

import pytest

from mlsys_engine.pipeline import Action, Schedule, ScheduleError


@pytest.mark.parametrize(
    "text", ["2F0", "1I2", "1W2", "12B34", "1SEND_F3", "0RECV_B11", "2REDUCE_GRAD", "(0F4;7B0)OVERLAP_F_B"]
)
def test_an_action_prints_as_it_was_written(text: str) -> None:
    assert str(Action.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "F0", "2X0", "2F", "-1F0", "2F0F1", "2REDUCE_GRAD1", "(0F4)OVERLAP_F_B", "(0B4;7F0)OVERLAP_F_B"],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        Action.parse(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0F0,0B0\n0F1,0B1\n", "rank 0 has the action 0F0, whose stage is not there"),
        ("0F0,0B0\n2F0,2B0\n", "stages"),
        ("0F0,0F0,0B0\n", "rank 0 has 0F0 twice"),
        ("0F0,0F1,0B0\n", r"stage 0 has \['F'\] of microbatch 1"),
        ("0F0,0B0,0W0\n", "not F and B, or F, I and W"),
        ("0B0,0F0\n", "rank 0 has 0B0 before 0F0"),
        ("0F0,0W0,0I0\n", "rank 0 has 0W0 before 0I0"),
        ("0F0,0F1,0B0,0REDUCE_GRAD,0B1\n", "before the last of them is there"),
        ("0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD\n", "rank 0 has 0REDUCE_GRAD twice"),
        ("0F0,0SEND_F0,0B0\n1F0,1B0\n", "the message of 0RECV_B0 is sent 0 times instead of 1"),
        (
            "0F0,0SEND_F0,0RECV_B0,0B0\n1F0,1B0,1SEND_B0\n",
            "the message of 1RECV_F0 is received 0 times instead of 1",
        ),
        ("0F0,0SEND_F0,1RECV_F0,1F0,1B0,0B0\n", "the message of 1RECV_F0 is sent 1 times instead of 0"),
        ("0F0,0B0,0SEND_B0\n", "0SEND_B0 has no stage at its other end"),
        (
            "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
            "1RECV_F1,1RECV_F0,1F0,1F1,1B0,1SEND_B0,1B1,1SEND_B1\n",
            "rank 1 receives 1RECV_F1 where rank 0 sends that of 1RECV_F0",
        ),
    ],
)
def test_a_list_that_breaks_a_rule_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ScheduleError, match=problem):
        Schedule.from_csv(text)


def test_empty_cells_of_a_csv_are_bubbles_that_need_no_place() -> None:
    assert Schedule.from_csv("0F0,,0B0\n") == Schedule.from_csv("0F0,0B0\n")
