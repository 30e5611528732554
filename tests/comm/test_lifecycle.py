"""How groups begin and end: forks, exits without destroy, handles left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.support.ranks import free_port

PREAMBLE = """
import os, sys, torch, torch.distributed as dist
import mlsys_engine.comm as comm
dist.init_process_group("mlsys")
rank, world_size = dist.get_rank(), dist.get_world_size()
"""

ENDINGS = {
    "after a collective": "dist.all_reduce(torch.ones(1000))",
    "before any operation": "",
    "with a barrier and no destroy": "dist.barrier()",
    "with works that nobody waited for": """
        works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(9)]
    """,
    "with a subgroup": """
        group = dist.new_group([0, 1])
        dist.barrier(group=group)
        dist.barrier()
    """,
    "with an arena tensor alive": """
        sys.modules["kept"] = comm.empty(1000)
        dist.all_reduce(sys.modules["kept"])
    """,
    "with a receive under way": """
        received = torch.ones(9)
        work = dist.irecv(received, 1 - rank)
        dist.barrier()
    """,
    "with a callback pending": """
        future = dist.all_reduce(torch.ones(9), async_op=True).get_future().then(lambda done: done.value())
    """,
    "after destroy": """
        dist.barrier()
        dist.destroy_process_group()
    """,
    "and begins again": """
        dist.barrier()
        dist.destroy_process_group()
        os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
        dist.init_process_group("mlsys")
        dist.barrier()
    """,
}


def _start(program, rank, world_size, port, second_port):
    variables = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment["SECOND_PORT"] = str(second_port)
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(program)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# New interpreters cost seconds each: the default suite runs the endings that have failed other backends.
QUICK = {"with works that nobody waited for", "with a subgroup", "with a receive under way"}


@pytest.mark.parametrize(
    "ending", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ENDINGS]
)
def test_a_process_ends_cleanly(ending):
    ports = free_port(), free_port()
    processes = [_start(ENDINGS[ending], rank, 2, *ports) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "terminate called" not in errors


def test_an_uncaught_exception_on_one_rank_ends_the_other_with_an_error():
    program = "dist.barrier()\nif rank == 1: raise SystemExit(5)\ndist.all_reduce(torch.ones(3))"
    port = free_port()
    processes = [_start(program, rank, 2, port, 0) for rank in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert processes[1].returncode == 5
    assert processes[0].returncode == 1
    assert "PeerFailedError" in outputs[0][1]
    assert "left the group" in outputs[0][1]


def test_a_process_may_fork_while_it_is_in_a_group():
    program = """
    pid = os.fork()
    if pid == 0:
        os._exit(3)  # the child never uses the group; leaving must not disturb the parent's
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    tensor = torch.ones(10)
    dist.all_reduce(tensor)
    assert (tensor == 2).all()
    """
    port = free_port()
    for process in [_start(program, rank, 2, port, 0) for rank in range(2)]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def test_a_group_of_one_starts_no_thread():
    program = """
    before = len(os.listdir("/proc/self/task"))
    group = dist.new_group([0])
    assert len(os.listdir("/proc/self/task")) == before
    dist.all_reduce(torch.ones(1), group=group)
    """
    process = _start(program, 0, 1, free_port(), 0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
