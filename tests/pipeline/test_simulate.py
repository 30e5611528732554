"""The simulator: makespans computed by hand and by formula, memory, and deadlocks."""

from __future__ import annotations

import graphlib
import pickle
import random

import pytest

from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline import (
    Action,
    DeadlockError,
    PipelineCosts,
    Schedule,
    ScheduleError,
    StageCosts,
    simulate,
    with_messages,
    with_reductions,
)
from mlsys_engine.pipeline.replay import Replay
from mlsys_engine.pipeline.schedules import build
from tests.pipeline.cases import every_schedule


def two_stages(first: StageCosts, second: StageCosts, **links: float) -> PipelineCosts:
    return PipelineCosts(stages=(first, second), **links)


def test_a_makespan_with_latency_by_hand() -> None:
    costs = two_stages(
        StageCosts(forward_s=2, backward_s=3), StageCosts(forward_s=1, backward_s=4), latency_s=0.5
    )
    result = simulate(build("1f1b", stages=2, microbatches=2), costs)
    assert [(str(s.action), s.start_s, s.end_s) for s in result.steps if s.rank == 0] == [
        ("0F0", 0, 2),
        ("0F1", 2, 4),
        ("0B0", 8, 11),  # rank 1: 1F0 2.5 to 3.5, 1B0 to 7.5, and half a second on the way
        ("0B1", 13, 16),  # rank 1: 1F1 to 8.5, 1B1 to 12.5
    ]
    assert result.makespan_s == 16
    assert result.busy_s == (10, 10)
    assert result.bubble_share == pytest.approx(6 / 16)


def test_messages_wait_for_each_other_on_a_link() -> None:
    stage = StageCosts(forward_s=1, backward_s=1, output_bytes=6)
    result = simulate(build("gpipe", stages=2, microbatches=2), two_stages(stage, stage, bytes_per_s=2))
    # A message takes 3: at 4 and 7 on rank 1, whose backwards end at 9 and 10; at 12 and 15 on rank 0.
    assert result.makespan_s == 16


def test_costs_may_differ_by_microbatch_and_reductions_run_beside_the_computation() -> None:
    stage = StageCosts(forward_s=(1, 2), input_s=1, weight_s=(0, 1), reduce_s=5)
    schedule = with_reductions(build("gpipe", stages=1, microbatches=2))
    assert simulate(schedule, PipelineCosts(stages=(stage,))).makespan_s == 3 + 1 + 2 + 5
    both = with_reductions(build("interleaved-1f1b", stages=2, microbatches=1, ranks=1))
    # Forwards to 2, 1B0 to 4, its reduction to 9; 0B0 to 6, and its reduction after the other one's end.
    result = simulate(both, PipelineCosts.even(2, reduce_s=5))
    assert (result.makespan_s, result.busy_s) == (14, (6,))
    with pytest.raises(ConfigError, match="Costs of 2 microbatches"):
        simulate(build("gpipe", stages=1, microbatches=3), PipelineCosts(stages=(stage,)))


def test_a_pair_hides_a_share_of_its_shorter_action() -> None:
    schedule = build("dualpipe-v", stages=2, microbatches=3)
    pairs = sum(bool(action.parts) for action in schedule.ranks[0])
    assert pairs == 3
    # F takes 1 and B takes 2, so each pair hides half of the forward.
    stages = PipelineCosts.even(2).stages
    assert simulate(schedule, PipelineCosts(stages=stages, overlap=0.5)).makespan_s == 6 * 3 - 3 * 0.5


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubbles_are_the_textbooks(name: str) -> None:
    for p in range(1, 6):
        for m in range(1, 13):
            result = simulate(build(name, stages=p, microbatches=m))
            assert result.bubble_shares == pytest.approx([(p - 1) / (m + p - 1)] * p)


def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank() -> None:
    for p, v in ((2, 2), (4, 2), (4, 3), (3, 4)):
        for m in (p, 2 * p, 3 * p):
            result = simulate(build("interleaved-1f1b", stages=p * v, microbatches=m, ranks=p))
            assert result.bubble_share == pytest.approx((p - 1) / (v * m + p - 1))


def test_zero_bubble_schedules_wait_as_their_paper_says() -> None:
    for p in range(2, 6):
        for m in range(2 * p - 1, 13):
            # 1F1B waits (p - 1)(F + I + W), ZB-H1 (p - 1)(F + I - W).
            assert simulate(build("zb-h1", stages=p, microbatches=m)).makespan_s == 3 * m + p - 1
            # ZB-V computes from its first action to its last without a wait on any rank.
            result = simulate(build("zb-v", stages=2 * p, microbatches=m))
            for rank in range(p):
                own = [step for step in result.steps if step.rank == rank]
                assert own[-1].end_s - own[0].start_s == result.busy_s[rank] == 6 * m


def test_peaks_are_the_microbatches_in_flight() -> None:
    costs = PipelineCosts.even(4, activation_bytes=10, weight_bytes=10)
    assert simulate(build("gpipe", stages=4, microbatches=8), costs).peak_bytes == (80,) * 4
    assert simulate(build("1f1b", stages=4, microbatches=8), costs).peak_bytes == (40, 30, 20, 10)
    # W late by its rank: everyone holds what the first rank of 1F1B does, but less where I frees the most.
    assert simulate(build("zb-h1", stages=4, microbatches=8), costs).peak_bytes == (40,) * 4
    light = PipelineCosts.even(4, activation_bytes=10, weight_bytes=1)
    assert simulate(build("zb-h1", stages=4, microbatches=8), light).peak_bytes == (40, 31, 22, 13)


def test_a_message_is_held_from_its_arrival_until_it_is_read() -> None:
    costs = two_stages(StageCosts(output_bytes=7), StageCosts(forward_s=3))
    # Rank 1 reads at 1, 4 and 7 what arrives at 1, 2 and 3; rank 0 reads every gradient at once.
    assert simulate(build("gpipe", stages=2, microbatches=3), costs).peak_bytes == (7, 14)


def test_a_deadlock_names_the_waiting_actions() -> None:
    schedule = Schedule.from_csv("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n")
    with pytest.raises(DeadlockError, match="rank 0 at 0B0 waits for 1B0 of rank 1; rank 1 at 1F1") as caught:
        simulate(schedule)
    assert caught.value.waiting == {
        0: (Action.parse("0B0"), "waits for 1B0 of rank 1"),
        1: (Action.parse("1F1"), "waits for 0F1 of rank 0"),
    }
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.waiting) == (str(caught.value), caught.value.waiting)
    assert "waits for 0F1 of rank 0" in str(schedule)
    with pytest.raises(DeadlockError):
        with_messages(schedule)


def test_a_receive_after_its_reader_and_a_send_before_its_maker_are_deadlocks() -> None:
    late = Schedule.from_csv("0F0,0SEND_F0,0RECV_B0,0B0\n1F0,1RECV_F0,1B0,1SEND_B0\n")
    with pytest.raises(DeadlockError, match="1F0 waits for 1RECV_F0, which is not before it"):
        simulate(late)
    early = Schedule.from_csv("0SEND_F0,0F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n")
    with pytest.raises(DeadlockError, match="0SEND_F0 waits for 0F0, which is not before it"):
        simulate(early)


def deadlocks(schedule: Schedule) -> bool:
    """Whether order and needs form a circle, found on the graph of both."""
    place = {
        part: (rank, i)
        for rank, row in enumerate(schedule.ranks)
        for i, action in enumerate(row)
        for part in action.parts or (action,)
    }
    graph: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for part, (rank, i) in place.items():
        needs = graph.setdefault((rank, i), set())
        if i:
            needs.add((rank, i - 1))
        forward = part.kind == "F"
        for kind in ("F",) if forward else ("B", "I"):
            source = Action(max(0, part.stage + (-1 if forward else 1)), kind, part.microbatch)
            if part.kind != "W" and source in place and source.stage != part.stage:
                needs.add(place[source])
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError:
        return True
    return False


def test_mutated_schedules_deadlock_exactly_when_their_graph_has_a_circle() -> None:
    numbers = random.Random(0)
    seen = {True: 0, False: 0}
    candidates = [s for s in every_schedule() if s.num_ranks > 1 and 2 < s.num_microbatches < 6]
    for _ in range(600):
        schedule = numbers.choice(candidates)
        rows = [list(row) for row in schedule.ranks]
        row = numbers.choice(rows)
        row.insert(numbers.randrange(len(row)), row.pop(numbers.randrange(len(row))))
        try:
            mutated = Schedule(name="", ranks=tuple(map(tuple, rows)), placement=schedule.placement)
        except ScheduleError:  # already out of order on its own rank
            continue
        try:
            simulate(mutated)
            found = False
        except DeadlockError as error:
            found = bool(error.waiting)
        assert found == deadlocks(mutated)
        seen[found] += 1
    assert min(seen.values()) > 30


def test_costs_of_another_number_of_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="Costs of 3 stages for a schedule of 2"):
        simulate(build("1f1b", stages=2, microbatches=2), PipelineCosts.even(3))


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (lambda: StageCosts(forward_s=-1), "forward_s=-1"),
        (lambda: StageCosts(input_s=(1.0, float("nan"))), "input_s"),
        (lambda: PipelineCosts(stages=()), "Costs of 0 stages"),
        (lambda: PipelineCosts(stages=(StageCosts(),), bytes_per_s=0), "bytes_per_s=0"),
        (lambda: PipelineCosts(stages=(StageCosts(),), overlap=2), "overlap=2"),
    ],
)
def test_impossible_costs_are_refused(costs: object, message: str) -> None:
    assert callable(costs)
    with pytest.raises(ConfigError, match=message):
        costs()


def test_the_result_prints_every_rank() -> None:
    text = str(simulate(build("1f1b", stages=2, microbatches=2)))
    assert (
        text == "9 s, bubbles 33.3%\nrank 0: bubbles 33.3%, peak 0 bytes\nrank 1: bubbles 33.3%, peak 0 bytes"
    )


def test_replaying_more_than_the_compute_actions_takes_no_more_time() -> None:
    schedule = build("zb-v", stages=6, microbatches=6)
    costs = PipelineCosts.even(6, output_bytes=3)
    whole = with_messages(schedule)
    assert Replay(whole.ranks, whole.placement, costs).makespan_s == simulate(schedule, costs).makespan_s
