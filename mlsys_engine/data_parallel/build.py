"""From a Plan and a model to a DataParallelRunner: the one place where the model is converted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine import comm
from mlsys_engine.data_parallel import guard, invariance, pure
from mlsys_engine.data_parallel.accumulation import Accumulation, InOrder, LeafTree
from mlsys_engine.data_parallel.arenas import ModelArenas
from mlsys_engine.data_parallel.buffers import BufferSync
from mlsys_engine.data_parallel.part_norms import PartNorms, check_measurable
from mlsys_engine.data_parallel.reducer import Reducer
from mlsys_engine.data_parallel.reductions import Reduction, make_reduction
from mlsys_engine.data_parallel.runner import DataParallelRunner
from mlsys_engine.data_parallel.sharded import check_shardable, check_steppable, first_terms, num_chunks
from mlsys_engine.data_parallel.sharded_arena import ArenaShardReduction, ArenaShardUpdate
from mlsys_engine.data_parallel.sharded_device import DeviceShardReduction, DeviceShardUpdate
from mlsys_engine.data_parallel.share import Share
from mlsys_engine.data_parallel.statistics import StepStatistics
from mlsys_engine.data_parallel.update import OptimizerFactory, Update, make_optimizer, make_update
from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_arena import Allocate
from mlsys_engine.numerics import PRECISION_RULES, Loss, seed_data_rank
from mlsys_engine.optim import GradientNoiseScale, LossScaler
from mlsys_engine.optim.checks import check_max_grad_norm
from mlsys_engine.plan import DTYPES, Plan

# The loss that is scaled is a sum over what counts, not a mean: torch's 2**16 for a mean over 4096 tokens.
FIRST_LOSS_SCALE = 2.0**4


def build_runner(
    plan: Plan,
    model: nn.Module,
    *,
    optimizer: OptimizerFactory,
    loss: Loss | None,
    max_grad_norm: float | None,
    device: torch.device,
    group: dist.ProcessGroup | None,
    loss_scaler: LossScaler | None = None,
    noise_scale: GradientNoiseScale | None = None,
    share: Share | None = None,
) -> DataParallelRunner:
    """Converts the model in place and builds everything around it. Called on every rank.

    `group` has the ranks with other data, and is None where there are none. Order: device, optimizer, what
    other ranks hold dropped where there is a `share`, arenas, weights and buffers of rank 0 everywhere,
    refusals, hooks, random state. `loss_scaler` is for fp16, which has its own when none is given;
    `noise_scale` is told of every step's gradients.
    """
    check_max_grad_norm(max_grad_norm)
    _check_model(plan, model)
    _check_noise_scale(noise_scale, share, plan)
    scaler = _scaler(plan, loss_scaler)
    guard.check_unguarded(model)
    model.to(device)
    parameters = dict(model.named_parameters())
    if plan.numerics == "world_invariant":
        invariance.check_model(model, device)
    pure.check_model(plan.precision, model)
    with pure.cast(model, PRECISION_RULES[plan.precision].parameters):
        named = [pair for pair in parameters.items() if pair[1].requires_grad]
        built = make_optimizer(optimizer, named)  # first: its errors leave the model as it was
        pure.check_optimizer(plan.precision, built)
    if plan.shard == "optimizer":
        _check_sharded(built, group, device)
    if share is not None:
        share.check_optimizer(built)
        _broadcast((*parameters.values(), *model.buffers()), None)
        share.take(model)
    arenas = _arenas(plan if share is None else share.plan, parameters, group, device)
    if group is not None and share is None:
        _broadcast_model(model, arenas, group)
    runner = _assemble(
        plan,
        model,
        built,
        arenas,
        loss=loss,
        max_grad_norm=max_grad_norm,
        device=device,
        group=group,
        scaler=scaler,
        noise_scale=noise_scale,
        share=share,
    )
    guard.guard(model)
    if plan.seed is not None:
        seed_data_rank(plan.seed, runner.data_rank)
    return runner


def _arenas(
    plan: Plan,
    parameters: Mapping[str, nn.Parameter],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> ModelArenas:
    allocate = _shared_allocator(group, device)
    stored = PRECISION_RULES[plan.precision].parameters
    sharded = plan.shard == "optimizer"
    return ModelArenas(plan.buckets, parameters, allocate, allocate if sharded else None, stored)


def _assemble(
    plan: Plan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    arenas: ModelArenas,
    *,
    loss: Loss | None,
    max_grad_norm: float | None,
    device: torch.device,
    group: dist.ProcessGroup | None,
    scaler: LossScaler | None,
    noise_scale: GradientNoiseScale | None,
    share: Share | None,
) -> DataParallelRunner:
    """The runner of a model that is in its arenas, with all of its parts."""
    buffers = BufferSync(model, _collective(functools.partial(dist.broadcast, group_src=0), group))
    statistics, reduction, update = _sums_and_update(
        plan if share is None else share.plan,
        optimizer,
        arenas,
        buffers,
        group=group,
        device=device,
        counted=None if share is None else share.counted,
    )
    invariant = plan.numerics == "world_invariant"
    flats = [pair.gradients.data for pair in arenas.pairs.values()]
    parts = None if noise_scale is None else PartNorms(noise_scale, plan, flats, group, device)
    measured = reduction if parts is None or reduction is None else parts.before(reduction)
    launches = share is not None and share.launches
    reducer = Reducer(arenas.buckets, measured, automatic=not (invariant or launches))
    accumulation = (
        _accumulation(plan, reducer, flats, scaler, group=group, device=device)
        if share is None
        else share.accumulation(model, reducer, device, scaler)
    )
    return DataParallelRunner(
        plan=plan,
        model=model,
        optimizer=optimizer,
        update=update,
        arenas=arenas,
        reducer=reducer,
        reduction=reduction,
        accumulation=accumulation,
        sum_over_data=_collective(comm.all_reduce_tree if invariant else dist.all_reduce, group),
        buffers=buffers,
        statistics=statistics,
        loss=loss,
        max_grad_norm=max_grad_norm,
        data_rank=dist.get_rank(group) if group is not None else 0,
        device=device,
        share=share,
        scaler=scaler,
        parts=parts,
    )


def _check_sharded(
    optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    check_shardable(optimizer)
    if group is not None:
        check_steppable(device)


def _sums_and_update(
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    arenas: ModelArenas,
    buffers: BufferSync,
    *,
    group: dist.ProcessGroup | None,
    device: torch.device,
    counted: Sequence[bool] | None,
) -> tuple[StepStatistics, Reduction | None, Update]:
    """How gradients are summed over ranks and stepped, and the numbers that travel with a step.

    `counted` has the buckets that this rank counts in the norm; None: all.
    """
    if plan.shard != "optimizer" or group is None:  # a world of one owns everything
        statistics = StepStatistics(len(arenas.places), buffers.num_watched, device)
        reduction = None if group is None else make_reduction(plan, arenas.buckets, group, device)
        return statistics, reduction, make_update(optimizer, arenas, counted)
    native = check_shardable(optimizer)
    statistics = StepStatistics(len(arenas.places), buffers.num_watched, device, num_chunks(native))
    terms = statistics.norm_terms
    counting = first_terms(native)
    for bucket in arenas.buckets:
        if counted is not None and not counted[bucket.index]:
            for place in bucket.places:
                counting.pop(place.parameter, None)
    reducing, updating = _sharding_on(device)
    return (
        statistics,
        reducing(plan, counting, arenas.buckets, terms, group),
        updating(plan, native, arenas, terms, group),
    )


def _sharding_on(device: torch.device) -> tuple[Callable[..., Reduction], Callable[..., Update]]:
    """How parts are reduced and stepped where the arenas lie."""
    if device.type == "cpu":
        return ArenaShardReduction, ArenaShardUpdate
    return DeviceShardReduction, DeviceShardUpdate


def _accumulation(
    plan: Plan,
    reducer: Reducer,
    flats: Sequence[torch.Tensor],
    scaler: LossScaler | None,
    *,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Accumulation:
    if plan.numerics != "world_invariant":
        return InOrder(reducer, device, scaler)
    assert plan.seed is not None  # the plan refuses to be made without
    rank = 0 if group is None else dist.get_rank(group)
    return LeafTree(
        reducer,
        flats,
        seed=plan.seed,
        rank=rank,
        world_size=plan.world_size,
        leaves_of_rank=plan.accumulate,
        scaler=scaler,
    )


def _scaler(plan: Plan, given: LossScaler | None) -> LossScaler | None:
    if PRECISION_RULES[plan.precision].scales_loss:
        return given or LossScaler(init_scale=FIRST_LOSS_SCALE)
    if given is not None:
        raise ConfigError(
            f"loss_scaler= was given with precision={plan.precision!r}.",
            "Only the narrow range of fp16 needs a loss scale; here it would have no effect.",
            'Leave loss_scaler out, or use precision="fp16".',
        )
    return None


def _collective(function: Callable[..., Any], group: dist.ProcessGroup | None) -> Callable[..., Any] | None:
    return None if group is None else functools.partial(function, group=group, async_op=True)


def _shared_allocator(group: dist.ProcessGroup | None, device: torch.device) -> Allocate | None:
    """Memory in the arena that ranks share, where collectives work without a copy."""
    if group is None or device.type != "cpu":
        return None
    return lambda numel, dtype: comm.empty(numel, dtype=dtype, group=group)


def _check_model(plan: Plan, model: nn.Module) -> None:
    planned = {
        slot.name: (slot.shape, DTYPES[bucket.dtype]) for bucket in plan.buckets for slot in bucket.slots
    }
    stored = PRECISION_RULES[plan.precision].parameters
    own = {
        name: (tuple(parameter.shape), torch.float32 if parameter.dtype is stored else parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if planned != own:
        name = min(key for key in planned.keys() | own.keys() if planned.get(key) != own.get(key))
        raise ConfigError(
            f"The plan has {_describe(planned, name)} and the model has {_describe(own, name)}.",
            "A plan is for the trainable parameters of one model, by name, shape and dtype.",
            "Make the plan from this model with mls.plan.",
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                f"{name} is on the meta device.",
                "Data parallelism lays out a model that has its weights.",
                "Materialise it first, with model.to_empty(device='cpu') and its own initialisation.",
            )


def _describe(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], name: str) -> str:
    return f"{name} as {shapes[name][1]} {shapes[name][0]}" if name in shapes else f"no trainable {name}"


@torch.no_grad()
def _broadcast_model(model: nn.Module, arenas: ModelArenas, group: dist.ProcessGroup) -> None:
    """Rank 0's weights and buffers everywhere: ranks agree even where their seeds did not."""
    for pair in arenas.pairs.values():
        if pair.parameters.data.numel():
            dist.broadcast(pair.parameters.data, group_src=0, group=group)
    laid_out = {place.parameter for place in arenas.places}
    others = [parameter for parameter in model.parameters() if parameter not in laid_out]
    _broadcast((*others, *model.buffers()), group)


@torch.no_grad()
def _broadcast(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Those of rank 0 of the group (None: of the job) everywhere."""
    for tensor in tensors:
        if tensor.numel():
            flat = tensor.detach().contiguous().view(-1)
            flat = flat.view(torch.uint8) if flat.dtype is torch.bool else flat
            dist.broadcast(flat, group_src=0, group=group)
            tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))


def _check_noise_scale(meter: GradientNoiseScale | None, share: Share | None, plan: Plan) -> None:
    if meter is None:
        return
    check_measurable(plan)
    if share is not None:
        raise ConfigError(
            "noise_scale= was given for a model that is divided over ranks.",
            "It compares the gradients of single ranks, which have the whole of them under data parallelism.",
            "Leave noise_scale out, or measure it under DataParallel.",
        )
