"""DTensor, tensor-parallel styles, and torch.distributed.pipelining's schedules."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.comm.consumers.numbers import BATCH, HIDDEN, WIDTH, Numbers, train, whole


def dtensor(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    matrix = numbers.draw(3, 9, 7)  # dims that no world size divides
    by_rows = distribute_tensor(matrix, mesh, [Shard(0)])
    by_columns = by_rows.redistribute(mesh, [Shard(1)])
    partial = by_rows.t() @ by_rows
    assert partial.placements == (Partial(),)
    return {
        "gathered rows": by_rows.full_tensor(),
        "rows to columns": by_columns.to_local(),
        "gathered columns": by_columns.full_tensor(),
        "reduced": partial.redistribute(mesh, [Replicate()]).to_local(),
        "reduced and scattered": partial.redistribute(mesh, [Shard(0)]).to_local(),
        "largest": by_rows.amax(dim=1).full_tensor(),
    }


def tensor_parallel(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(numbers.model(), mesh, styles)
    return train(model, numbers, 0)  # ranks of a tensor-parallel group read the same batch


class _Block(nn.Module):
    """A normalisation over the sequence's shards, then a column- and a row-parallel layer."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        # An exact run cannot divide by a standard deviation: its stand-in scales and shifts, like the norm.
        self.norm = _Scale(numbers) if numbers.exact else nn.LayerNorm(WIDTH)
        self.up = numbers.linear(5, WIDTH, HIDDEN)
        self.down = numbers.linear(7, HIDDEN, WIDTH)
        self.between = numbers.activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(self.norm(x))))


class _Scale(nn.Module):
    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers.draw(6, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def sequence_parallel(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    styles = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=True),
    }
    model = parallelize_module(_Block(numbers), mesh, styles)
    return train(model, numbers, 0, steps=2, loss=lambda output: output.square().sum())


def tensor_parallel_with_fsdp2(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "model"))
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(numbers.model(), mesh["model"], styles)
    fully_shard(model, mesh=mesh["data"])
    return train(model, numbers, mesh["data"].get_local_rank())


def _stages(
    rank: int, world_size: int, numbers: Numbers, per_rank: int, v_shaped: bool
) -> list[PipelineStage]:
    count = per_rank * world_size
    mine = [rank, count - 1 - rank] if v_shaped else list(range(rank, count, world_size))
    stages = []
    for index in mine:
        layer = nn.Sequential(numbers.linear(40 + 2 * index, WIDTH, WIDTH), numbers.activation())
        stages.append(PipelineStage(layer, index, count, torch.device("cpu")))
    return stages


def _pipeline(
    rank: int, world_size: int, numbers: Numbers, schedule: type, *, per_rank: int = 1, v_shaped: bool = False
) -> dict[str, Any]:
    stages = _stages(rank, world_size, numbers, per_rank, v_shaped)
    single = issubclass(schedule, schedules.PipelineScheduleSingle)
    runner = schedule(
        stages[0] if single else stages,
        n_microbatches=world_size * 2,
        loss_fn=lambda out, _t: numbers.loss(out),
    )
    last = any(stage.is_last for stage in stages)
    batch = torch.cat([numbers.batch(0, part) for part in range(world_size)])
    losses: list[torch.Tensor] = []
    arguments = [batch] if any(stage.is_first for stage in stages) else []
    wanted = {"target": batch, "losses": losses} if last else {}
    output = runner.step(*arguments, **wanted)
    seen = {
        f"{stage.stage_index} {name}": whole(parameter.grad)
        for stage in stages
        for name, parameter in stage.submod.named_parameters()
    }
    dist.barrier()
    return seen | {"losses": losses} | ({"output": output.detach()} if last else {})


def pipeline_gpipe(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _pipeline(rank, world_size, numbers, schedules.ScheduleGPipe)


def pipeline_1f1b(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _pipeline(rank, world_size, numbers, schedules.Schedule1F1B)


def pipeline_interleaved_1f1b(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _pipeline(rank, world_size, numbers, schedules.ScheduleInterleaved1F1B, per_rank=2)


def pipeline_looped_bfs(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _pipeline(rank, world_size, numbers, schedules.ScheduleLoopedBFS, per_rank=2)


def pipeline_zero_bubble(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _pipeline(rank, world_size, numbers, schedules.ScheduleInterleavedZeroBubble, per_rank=2)


def pipeline_zero_bubble_v(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _pipeline(rank, world_size, numbers, schedules.ScheduleZBVZeroBubble, per_rank=2, v_shaped=True)


def pipeline_dual_pipe_v(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _pipeline(rank, world_size, numbers, schedules.ScheduleDualPipeV, per_rank=2, v_shaped=True)


def batched_messages(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    """batch_isend_irecv with the receives and sends in another order on every rank."""
    mine = numbers.batch(1, rank)
    received = {
        peer: torch.empty(BATCH, WIDTH, dtype=numbers.dtype) for peer in range(world_size) if peer != rank
    }
    operations = [dist.P2POp(dist.isend, mine, peer) for peer in received]
    operations += [dist.P2POp(dist.irecv, tensor, peer) for peer, tensor in received.items()]
    if rank % 2:
        operations.reverse()
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return {f"from {peer}": tensor for peer, tensor in received.items()}
