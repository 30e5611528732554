"""What is refused, before anything is sent, and in which words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.comm.environment import job_key, locality
from mlsys_engine.errors import ConfigError, LaunchError, UserError


def _refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert all((caught.value.given, caught.value.expected, caught.value.action))


def _refusals(rank, world_size):
    ones = torch.ones(4)
    where = f"rank {rank}, "
    _refused(
        lambda: dist.all_reduce(torch.ones(4, dtype=torch.uint16)), where + "all_reduce", "float32", "int64"
    )
    _refused(lambda: dist.all_reduce(torch.ones(4, dtype=torch.int32), op=dist.ReduceOp.AVG), "AVG", "SUM")
    _refused(lambda: dist.all_reduce(ones, op=dist.ReduceOp.BXOR), "BXOR", "integers")
    _refused(lambda: dist.all_gather([torch.ones(4), torch.ones(5)], ones), "all_gather", "same dtype")
    _refused(lambda: dist.all_gather([ones], ones), "one tensor for each of the 2 ranks")
    _refused(lambda: dist.all_gather_into_tensor(torch.ones(5), ones), "2 times")
    _refused(
        lambda: dist.reduce_scatter_tensor(torch.ones(3), ones),
        "reduce_scatter_tensor",
        "for each of 2 ranks",
    )
    _refused(lambda: dist.all_to_all_single(torch.ones(3), torch.ones(3)), "divide equally")
    _refused(lambda: dist.send(torch.ones(4, 4)[:, 1], 1 - rank), "contiguous")
    _refused(lambda: dist.recv(torch.ones(4, 4)[:, 1], 1 - rank), "contiguous")
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    sparse = [ones.to_sparse()]
    _refused(lambda: backend.broadcast(sparse, dist.BroadcastOptions()), "sparse", "to_dense")
    dist.barrier()  # nothing was sent: the ranks still agree


def test_wrong_calls_are_refused_in_three_parts_and_leave_the_group_usable(run_ranks):
    run_ranks(_refusals, 2)


def _other_device(rank, world_size):
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    options = dist.AllreduceOptions()
    _refused(
        lambda: backend.allreduce([torch.ones(3, device="meta")], options), "meta", "CPU tensors", ".cpu()"
    )
    _refused(
        lambda: backend.allocate_tensor(3, dtype=torch.float32, device=torch.device("cuda", 0)), "host memory"
    )
    assert not backend.supports_tensor_alloc(torch.device("cuda", 0))
    assert backend.supports_tensor_alloc(torch.device("cpu"))


def test_tensors_on_other_devices_are_refused(run_ranks):
    run_ranks(_other_device, 1)


def _unimplemented(rank, world_size):
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="mlsys does not implement startCoalescing"):
        backend._start_coalescing()
    with pytest.raises(RuntimeError, match="mlsys does not support getMemAllocator"):
        _ = backend.mem_allocator


def test_what_is_not_implemented_raises_with_its_name(run_ranks):
    run_ranks(_unimplemented, 1)


def test_functions_need_a_group_and_say_how_to_get_one():
    for call in (lambda: comm.empty(3), lambda: comm.all_reduce(torch.ones(1)), comm.counters, comm.barrier):
        with pytest.raises(ConfigError, match=r"mls\.init\(\)"):
            call()


def test_poison_without_a_group_does_nothing():
    comm.poison("nobody to tell")


def _group_of_another_backend(rank, world_size):
    fake = dist.new_group(backend="fake")
    with pytest.raises(ConfigError, match="backend 'fake'"):
        comm.all_reduce(torch.ones(1), group=fake)


def test_functions_refuse_groups_of_other_backends(run_ranks):
    run_ranks(_group_of_another_backend, 1)


def test_locality_is_one_integer_for_each_rank(monkeypatch):
    monkeypatch.setenv("MLSYS_LOCALITY", "0,0,1")
    assert locality([0, 2]) == [0, 0, 1]
    with pytest.raises(LaunchError, match="at least 4"):
        locality([3])
    monkeypatch.setenv("MLSYS_LOCALITY", "0,a")
    with pytest.raises(LaunchError, match="integer"):
        locality([0, 1])
    monkeypatch.delenv("MLSYS_LOCALITY")
    assert locality([0, 1]) == []


def test_a_job_key_that_is_not_hex_is_refused_without_repeating_it(monkeypatch):
    monkeypatch.setenv("MLSYS_JOB_KEY", "correct horse")
    with pytest.raises(LaunchError) as caught:
        job_key()
    assert "correct horse" not in str(caught.value)


def test_importing_comm_opens_nothing_and_starts_nothing():
    program = (
        "import os, threading\n"
        "import torch.distributed\n"
        "before = sorted(os.listdir('/proc/self/fd')), os.listdir('/proc/self/task')\n"
        "import mlsys_engine.comm, sys\n"
        "assert before == (sorted(os.listdir('/proc/self/fd')), os.listdir('/proc/self/task'))\n"
        "assert 'mlsys_engine.native._comm' not in sys.modules\n"
        "assert 'mlsys' in torch.distributed.Backend.backend_list\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
