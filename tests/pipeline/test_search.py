"""The search: never slower than the best named schedule, within the memory limit, the same every time."""

from __future__ import annotations

import random

import pytest

from mlsys_engine.pipeline import PipelineCosts, Schedule, ScheduleError, StageCosts, search, simulate
from mlsys_engine.pipeline.schedules import SCHEDULES, build


def uneven(numbers: random.Random, stages: int) -> PipelineCosts:
    return PipelineCosts(
        stages=tuple(
            StageCosts(
                forward_s=numbers.uniform(0.5, 2),
                input_s=numbers.uniform(0.5, 2),
                weight_s=numbers.uniform(0.3, 1.5),
                activation_bytes=numbers.randrange(50, 150),
                weight_bytes=40,
                output_bytes=1,
            )
            for _ in range(stages)
        ),
        latency_s=numbers.uniform(0, 0.3),
    )


def named(costs: PipelineCosts, microbatches: int, ranks: int) -> list[Schedule]:
    made = []
    for name in SCHEDULES:
        try:
            made.append(build(name, stages=len(costs.stages), microbatches=microbatches, ranks=ranks))
        except ScheduleError:
            continue
    return made


def test_the_searched_schedule_is_never_slower_than_the_best_named_one() -> None:
    numbers = random.Random(0)
    faster = 0
    for _ in range(50):
        ranks, per_rank, microbatches = (
            numbers.choice((2, 3, 4)),
            numbers.choice((1, 2)),
            numbers.choice((4, 6)),
        )
        costs = uneven(numbers, ranks * per_rank)
        found = search(costs, microbatches=microbatches, ranks=ranks, tries=2, moves=20)
        assert (found.num_microbatches, found.num_ranks) == (microbatches, ranks)
        best = min(simulate(schedule, costs).makespan_s for schedule in named(costs, microbatches, ranks))
        assert simulate(found, costs).makespan_s <= best
        faster += simulate(found, costs).makespan_s < 0.999 * best
    assert faster >= 25  # it does search


def test_no_rank_holds_more_than_the_limit() -> None:
    numbers = random.Random(1)
    for _ in range(4):
        costs = uneven(numbers, 4)
        free = search(costs, microbatches=6, tries=2, moves=20)
        limit = 0.6 * max(simulate(free, costs).peak_bytes)
        found = search(costs, microbatches=6, memory_limit_bytes=limit, tries=2, moves=20)
        assert max(simulate(found, costs).peak_bytes) <= limit
        assert simulate(found, costs).makespan_s >= simulate(free, costs).makespan_s


def test_a_limit_that_nothing_keeps_names_the_smallest_peak() -> None:
    costs = PipelineCosts.even(2, activation_bytes=10)
    with pytest.raises(ScheduleError, match="smallest peak of the schedules that were tried is 10 bytes"):
        search(costs, microbatches=4, memory_limit_bytes=5)
    found = search(costs, microbatches=4, memory_limit_bytes=10)
    assert simulate(found, costs).peak_bytes == (10, 10)


def test_equal_arguments_give_an_equal_schedule_that_sums_gradients_in_order() -> None:
    costs = uneven(random.Random(2), 6)
    found = search(costs, microbatches=5, ranks=3, tries=5, moves=50)
    assert found == search(costs, microbatches=5, ranks=3, tries=5, moves=50)
    for stage, rank in enumerate(found.placement):
        for kinds in (("F",), ("I", "B"), ("W", "B")):
            order = [a.microbatch for a in found.ranks[rank] if a.stage == stage and a.kind in kinds]
            assert order == sorted(order)


def test_a_whole_backward_is_taken_where_it_is_cheaper_than_its_halves() -> None:
    costs = PipelineCosts.even(2, backward_s=1.2)
    found = search(costs, microbatches=6)
    assert (
        simulate(found, costs).makespan_s
        <= simulate(build("1f1b", stages=2, microbatches=6), costs).makespan_s
    )
    assert any(action.kind == "B" for row in found.ranks for action in row)


def test_stages_that_do_not_divide_by_ranks_are_refused() -> None:
    with pytest.raises(ScheduleError, match="divisor of the number of stages"):
        search(PipelineCosts.even(3), microbatches=4, ranks=2)
