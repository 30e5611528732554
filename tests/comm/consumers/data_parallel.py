"""DDP with its hooks and options, FSDP2, HSDP and ZeroRedundancyOptimizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tests.comm.consumers.numbers import WIDTH, Numbers, train


def ddp(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return train(DistributedDataParallel(numbers.model(), bucket_cap_mb=0.001), numbers, rank)


def ddp_bucket_view(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return train(DistributedDataParallel(numbers.model(), gradient_as_bucket_view=True), numbers, rank)


def ddp_static_graph(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return train(DistributedDataParallel(numbers.model(), static_graph=True), numbers, rank)


class _OneOf(nn.Module):
    """Each rank uses another one of its layers; the last is used by nobody."""

    def __init__(self, rank: int, world_size: int, numbers: Numbers) -> None:
        super().__init__()
        self.mine = rank
        self.layers = nn.ModuleList([numbers.linear(seed, WIDTH, WIDTH) for seed in range(world_size + 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[self.mine](x)


def ddp_find_unused(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = DistributedDataParallel(_OneOf(rank, world_size, numbers), find_unused_parameters=True)
    return train(model, numbers, rank)


def ddp_join(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = DistributedDataParallel(numbers.model())
    with model.join():
        return train(model, numbers, rank, steps=2 + rank)  # ranks have batches of their own number


def ddp_no_sync(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = DistributedDataParallel(numbers.model())
    with model.no_sync():
        numbers.loss(model(numbers.batch(7, rank))).backward()
    numbers.loss(model(numbers.batch(8, rank))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def ddp_buffers(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    """SyncBatchNorm needs CUDA; the ordinary one has buffers that rank 0 broadcasts before each forward."""
    model = nn.Sequential(numbers.linear(1, WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, dtype=numbers.dtype))
    wrapped = DistributedDataParallel(model)
    wrapped(numbers.batch(rank, rank))
    wrapped.eval()
    wrapped(numbers.batch(1, rank))
    wrapped.train()
    wrapped(numbers.batch(2, 0))
    return dict(wrapped.named_buffers())


def ddp_fp16_hook(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = DistributedDataParallel(numbers.model())
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return train(model, numbers, rank)


def _to_bf16(group, bucket):  # type: ignore[no-untyped-def]  # DDP wants real classes or no annotations
    return default_hooks.bf16_compress_hook(group, bucket)  # by its own name DDP refuses it on CPU tensors


def ddp_bf16_hook(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = DistributedDataParallel(numbers.model())
    model.register_comm_hook(None, _to_bf16)
    return train(model, numbers, rank)


def ddp_power_sgd(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = DistributedDataParallel(numbers.model())
    state = powerSGD_hook.PowerSGDState(
        process_group=None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.5
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return train(model, numbers, rank, steps=5)


def zero_redundancy_optimizer(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = DistributedDataParallel(numbers.model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=2.0**-5)
    seen = train(model, numbers, rank, optimizer=optimizer)
    optimizer.consolidate_state_dict(to=0)
    return seen


def _sharded(numbers: Numbers, **options: Any) -> FSDPModule:
    model = numbers.model()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return train(_sharded(numbers), numbers, rank)


def fsdp2_keeps_parameters(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return train(_sharded(numbers, reshard_after_forward=False), numbers, rank)


def fsdp2_process_group_memory(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = _sharded(numbers)
    model.set_allocate_memory_from_process_group_for_comm(True)
    return train(model, numbers, rank)


def fsdp2_sums(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    model = _sharded(numbers)
    model.set_force_sum_reduction_for_comms(True)
    return train(model, numbers, rank)


def fsdp2_divide_factor(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    """A factor other than the world size is PREMUL_SUM, which gloo refuses: there the sum is divided.

    The factor is a power of two, so that scaling before and after the sum gives the same bits.
    """
    model = _sharded(numbers)
    model.set_gradient_divide_factor(2.0 * world_size)
    model.set_force_sum_reduction_for_comms(dist.get_backend() == "gloo")
    return train(model, numbers, rank)


def fsdp2_bf16_reduced_in_fp32(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train(_sharded(numbers, mp_policy=policy), numbers, rank)


def fsdp2_bf16_reduced_in_bf16(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    return train(_sharded(numbers, mp_policy=policy), numbers, rank)


def fsdp2_fp16(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16)
    return train(_sharded(numbers, mp_policy=policy), numbers, rank)


def hsdp(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    return train(_sharded(numbers, mesh=mesh), numbers, rank)
