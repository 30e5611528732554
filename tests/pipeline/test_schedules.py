"""The named schedules: valid for every size, and in the order of torch.distributed.pipelining."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as theirs

from mlsys_engine.pipeline import Schedule, ScheduleError, simulate, with_messages, with_reductions
from mlsys_engine.pipeline.actions import COMPUTES, OVERLAP, REDUCE_GRADIENTS
from mlsys_engine.pipeline.schedules import SCHEDULES, build
from tests.pipeline.cases import TWO_STAGES, every_schedule

EVERY = every_schedule()


def test_every_named_schedule_runs_for_every_size_that_it_takes() -> None:
    taken = {name: sum(schedule.name == name for schedule in EVERY) for name in SCHEDULES}
    # 60 sizes; interleaved needs equal rounds, DualPipe-V two microbatches a rank.
    assert taken == {
        "gpipe": 60,
        "1f1b": 60,
        "interleaved-1f1b": taken["interleaved-1f1b"],
        "zb-h1": 60,
        "zb-v": 60,
        "dualpipe-v": sum(12 - 2 * ranks + 1 for ranks in range(1, 6)),
    }
    assert taken["interleaved-1f1b"] >= 40
    for schedule in EVERY:
        assert simulate(schedule).makespan_s >= 3 * schedule.num_microbatches


def torchs_order(schedule: Schedule, rank: int) -> list[str]:
    """The compute actions that torch gives this rank."""
    ranks, microbatches = schedule.num_ranks, schedule.num_microbatches
    local = schedule.num_stages // ranks
    rounds = max(1, microbatches // ranks)
    self = SimpleNamespace(
        _num_stages=schedule.num_stages,
        num_stages=schedule.num_stages,
        _n_microbatches=microbatches,
        pp_group_size=ranks,
        n_local_stages=local,
        microbatches_per_round=microbatches // rounds,
    )
    if schedule.name in ("gpipe", "1f1b"):
        kind = theirs.ScheduleGPipe if schedule.name == "gpipe" else theirs.Schedule1F1B
        row = kind._get_pipeline_order(self)[rank]
        if schedule.name == "1f1b" and rank == ranks - 1:  # this list of torch's counts forwards from 1
            row = [
                a and a._replace(microbatch_index=a.microbatch_index - (a.computation_type == "F"))
                for a in row[:-1]
            ]
    else:
        kind = {
            "interleaved-1f1b": theirs.ScheduleInterleaved1F1B,
            "zb-h1": theirs.ScheduleInterleavedZeroBubble,  # with one stage a rank
            "zb-v": theirs.ScheduleZBVZeroBubble,
            "dualpipe-v": theirs.ScheduleDualPipeV,
        }[schedule.name]
        row = kind._calculate_single_rank_operations(self, rank)
    return [str(a) for a in row if a is not None and a.computation_type.value in (*COMPUTES, OVERLAP)]


def test_the_order_on_every_rank_is_torchs() -> None:
    compared = 0
    for schedule in EVERY:
        # torch's 1F1B lists microbatches that do not exist when there are fewer than ranks - 1.
        if schedule.name == "1f1b" and schedule.num_microbatches < schedule.num_ranks - 1:
            continue
        for rank, row in enumerate(schedule.ranks):
            assert [str(a) for a in row] == torchs_order(schedule, rank), (schedule.name, rank)
            compared += 1
    assert compared > 500


def test_torch_reads_our_csv_and_we_read_torchs() -> None:
    ours = with_messages(with_reductions(build("dualpipe-v", stages=4, microbatches=5)))
    for line, row in zip(ours.to_csv().splitlines(), ours.ranks, strict=True):
        assert [str(theirs._Action.from_str(cell)) for cell in line.split(",")] == [str(a) for a in row]
    lowered = theirs._add_send_recv(
        {rank: [theirs._Action.from_str(str(a)) for a in row] for rank, row in enumerate(GPIPE.ranks)},
        lambda stage: stage,
        GPIPE.num_stages,
    )
    text = "\n".join(",".join(map(str, lowered[rank])) for rank in sorted(lowered))
    read = Schedule.from_csv(text, name="gpipe")
    assert simulate(read).makespan_s == simulate(GPIPE).makespan_s


GPIPE = build("gpipe", stages=3, microbatches=4)


def test_every_schedule_survives_csv_and_runs_the_same_with_its_messages_written_out() -> None:
    for schedule in EVERY[::3]:
        whole = with_messages(with_reductions(schedule))
        assert Schedule.from_csv(whole.to_csv(), name=schedule.name) == whole
        assert simulate(whole).makespan_s == simulate(schedule).makespan_s
        reductions = [a.stage for row in whole.ranks for a in row if a.kind == REDUCE_GRADIENTS]
        assert sorted(reductions) == list(range(schedule.num_stages))
        assert with_messages(whole) == whole


def test_gradients_are_summed_in_the_order_of_one_process() -> None:
    for schedule in EVERY:
        for stage, rank in enumerate(schedule.placement):
            for kinds in (("B", "W"), ("F",)):
                order = [
                    part.microbatch
                    for action in schedule.ranks[rank]
                    for part in action.parts or (action,)
                    if part.stage == stage and part.kind in kinds
                ]
                assert order == sorted(order), (schedule.name, stage)


def test_printing_draws_a_timeline() -> None:
    assert str(build("1f1b", stages=2, microbatches=2)) == (
        "1f1b: 2 stages on 2 ranks, 2 microbatches\n"
        "rank 0  F0 F1 .  .  B0 -- .  B1 --\n"
        "rank 1  .  F0 B0 -- F1 B1 -- .  ."
    )
    drawing = str(build("dualpipe-v", stages=2, microbatches=2)).splitlines()
    assert drawing[1] == "rank 0  0F0 1F0 0F1 1B0 --- 1F1 0B0 --- 1B1 --- 0I1 0W1"


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("1f1f", {"stages": 2}, "Did you mean '1f1b'"),
        ("1f1b", {"stages": 0}, "at least one of each"),
        ("1f1b", {"stages": 4, "ranks": 2}, "one stage on each rank"),
        ("zb-v", {"stages": 3}, "Set stages to twice the number of ranks"),
        ("interleaved-1f1b", {"stages": 6, "ranks": 4}, "multiple of 4"),
        ("interleaved-1f1b", {"stages": 8, "microbatches": 9}, "rounds of equal length"),
        ("dualpipe-v", {"stages": 8, "microbatches": 7}, "as many microbatches as stages"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(name: str, numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build(name, **{"microbatches": 4, **numbers})


def test_two_stage_schedules_take_half_as_many_ranks_as_stages() -> None:
    assert [build(name, stages=8, microbatches=8).num_ranks for name in TWO_STAGES] == [4, 4, 4]
