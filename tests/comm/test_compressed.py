"""The compressed all-reduce: near the sum, equal bits everywhere, fewer bytes, and nothing lost for good."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.errors import ConfigError, UserError
from tests.comm.inputs import tensor_of

LAYOUTS = ("0,1,2,3", "0,0,1,1", "0,1,0,1", "0,0,0,1")


def _compressed(rank, world_size):
    for compression in ("bf16", "int8"):
        for numel in (0, 1, 300, 70_001):
            inputs = [tensor_of(peer, numel, torch.float32) for peer in range(world_size)]
            exact = torch.stack(inputs).double().sum(0)
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
                tensor = comm.empty(numel).copy_(inputs[rank])
                comm.all_reduce_compressed(tensor, compression, op=op)
                divisor = world_size if op == dist.ReduceOp.AVG else 1
                # Each of 4 contributions (below 6, sums below 24) and the result loses at most half a step,
                # which is 1/254 of a block's largest in int8 and 1/256 of the value in bf16.
                bound = (4 * 6 + 24) / 250 / divisor
                assert torch.all((tensor.double() - exact / divisor).abs() <= bound)
                everyone = torch.empty(world_size * numel)
                comm.all_gather(everyone, tensor)
                assert torch.equal(everyone, tensor.repeat(world_size))
    return comm.num_hosts()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compressed_all_reduce_is_near_the_sum_on_any_layout_of_hosts(run_ranks, layout):
    hosts = len(set(layout.split(",")))
    assert run_ranks(_compressed, 4, env={"MLSYS_LOCALITY": layout}) == [hosts] * 4


def _with_feedback(rank, world_size):
    numel, rounds = 5_000, 20
    ours = tensor_of(rank, numel, torch.float32)
    residual, delivered = torch.zeros(numel), torch.zeros(numel, dtype=torch.float64)
    without = torch.zeros(numel, dtype=torch.float64)
    for _ in range(rounds):
        tensor = ours.clone()
        comm.all_reduce_compressed(tensor, "int8", residual, async_op=True).wait()
        delivered += tensor
        tensor = ours.clone()
        comm.all_reduce_compressed(tensor, "int8")
        without += tensor
    wanted = rounds * torch.stack([tensor_of(peer, numel, torch.float32) for peer in range(world_size)]).sum(
        0
    )
    dist.all_reduce(residual)
    # fp32 roundings of sums below 24, some ten a round.
    assert torch.allclose(delivered + residual, wanted.double(), rtol=0, atol=rounds * 10 * 24 * 6e-8)
    return (delivered - wanted).abs().max().item(), (without - wanted).abs().max().item()


def test_what_one_call_loses_the_next_ones_deliver(run_ranks):
    for kept, lost in run_ranks(_with_feedback, 2, env={"MLSYS_LOCALITY": "0,1"}):
        assert kept < lost / 4  # the error of one call, not of twenty


def _bytes(rank, world_size):
    tensor = torch.ones(1 << 18)
    sent = {}
    for name in (None, "bf16", "int8"):
        before = comm.counters().tcp_bytes_sent
        if name is None:
            comm.all_reduce(tensor)
        else:
            comm.all_reduce_compressed(tensor, name)
        sent[name] = comm.counters().tcp_bytes_sent - before
    return sent


def test_bytes_between_hosts_shrink_by_2_and_by_3_9(run_ranks):
    for sent in run_ranks(_bytes, 2, env={"MLSYS_LOCALITY": "0,1"}):
        assert 1.99 < sent[None] / sent["bf16"] < 2.01
        assert 3.9 < sent[None] / sent["int8"] < 4.0


def _one_host(rank, world_size):
    tensor = tensor_of(rank, 5_000, torch.float32)
    plain, residual = tensor.clone(), torch.zeros(5_000)
    comm.all_reduce(plain)
    comm.all_reduce_compressed(tensor, "int8", residual)
    assert torch.equal(tensor, plain)
    assert not residual.any()


def test_inside_one_host_nothing_is_rounded(run_ranks):
    run_ranks(_one_host, 2)


def _refusals(rank, world_size):
    tensor = torch.ones(10)
    for arguments in ((tensor, "fp8"), (tensor.double(), "int8"), (tensor, "int8", torch.zeros(9)),
                      (tensor, "int8", torch.zeros(10).double())):  # fmt: skip
        with pytest.raises(UserError):
            comm.all_reduce_compressed(*arguments)
    with pytest.raises(ConfigError, match="sums or averages"):
        comm.all_reduce_compressed(tensor, "int8", op=dist.ReduceOp.MAX)


def test_what_cannot_be_compressed_is_refused(run_ranks):
    run_ranks(_refusals, 1)
