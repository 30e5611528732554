"""Random programs of collectives and messages finish with the right answers, on one host and on several.

1,000 sequences are drawn by their numbers, ten to a job. Hypothesis draws single calls over shapes, dtypes,
offsets and memory.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.comm.sequences import DTYPES, KINDS, OPS, PLACES, Call, run
from tests.support.ranks import run_ranks

SEQUENCES, A_JOB, CALLS = 1000, 10, 30


def _draw(number: int, world_size: int) -> list[Call]:
    """The program of sequence `number`: calls over the job and three overlapping groups."""
    chance = random.Random(number)
    groups = [tuple(range(world_size))] * 2
    groups += [
        tuple(sorted(chance.sample(range(world_size), chance.randint(1, world_size)))) for _ in range(3)
    ]
    calls = []
    for _ in range(CALLS):
        members = chance.choice(groups)
        largest = 19 if chance.random() < 0.05 else 15
        calls.append(
            Call(
                kind=chance.choice(list(KINDS)),
                members=members,
                root=chance.randrange(len(members)),
                numel=0 if chance.random() < 0.05 else int(2 ** chance.uniform(0, largest)),
                dtype=chance.choice(DTYPES),
                op=chance.choice(list(OPS)),
                places=tuple(chance.choice(PLACES) for _ in range(world_size)),
                asynchronous=chance.random() < 0.7,
            )
        )
    return calls


def _run_programs(rank: int, world_size: int, programs: Sequence[Sequence[Call]]) -> int:
    made = 0
    for calls in programs:
        members = sorted({call.members for call in calls})
        groups = {ranks: dist.new_group(list(ranks)) for ranks in members}
        made += run(rank, calls, groups)
        dist.barrier()
        for ranks, group in groups.items():
            if rank in ranks:
                dist.destroy_process_group(group)
    return made


def _job(block: int) -> tuple[int, str]:
    """How many ranks the job of a block has, and which of them look like one host."""
    chance = random.Random(f"job {block}")
    world_size = 2 + block % 3
    hosts = [0] * world_size if chance.random() < 0.5 else [chance.randrange(2) for _ in range(world_size)]
    return world_size, ",".join(map(str, hosts)) if len(set(hosts)) > 1 else ""


@pytest.mark.soak
@pytest.mark.parametrize("block", range(SEQUENCES // A_JOB))
def test_ten_random_sequences_finish_with_the_right_answers(block):
    world_size, locality = _job(block)
    programs = [_draw(number, world_size) for number in range(block * A_JOB, (block + 1) * A_JOB)]
    made = run_ranks(_run_programs, world_size, programs, env={"MLSYS_LOCALITY": locality})
    assert sum(made) == sum(len(call.members) for calls in programs for call in calls)


@pytest.mark.parametrize("block", [1, 2])
def test_a_few_random_sequences_finish_with_the_right_answers(block):
    world_size, locality = _job(block)
    run_ranks(_run_programs, world_size, [_draw(5000 + block, world_size)], env={"MLSYS_LOCALITY": locality})


def _calls(world_size: int) -> st.SearchStrategy[Call]:
    return st.builds(
        Call,
        kind=st.sampled_from(list(KINDS)),
        members=st.just(tuple(range(world_size))),
        root=st.integers(0, world_size - 1),
        numel=st.one_of(st.integers(0, 70), st.integers(0, 70_000)),
        dtype=st.sampled_from(DTYPES),
        op=st.sampled_from(list(OPS)),
        places=st.tuples(*[st.sampled_from(PLACES)] * world_size),
        asynchronous=st.booleans(),
    )


@settings(max_examples=2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(calls=st.lists(_calls(2), min_size=30, max_size=60))
def test_collectives_over_drawn_sizes_dtypes_offsets_and_memory_on_two_ranks(calls):
    run_ranks(_run_programs, 2, [calls])


@pytest.mark.slow
@settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(calls=st.lists(_calls(3), min_size=60, max_size=100), locality=st.sampled_from(["", "0,0,1", "0,1,2"]))
def test_collectives_over_drawn_sizes_dtypes_offsets_and_memory_on_three_ranks(calls, locality):
    run_ranks(_run_programs, 3, [calls], env={"MLSYS_LOCALITY": locality})
