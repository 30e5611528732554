"""verify: one step in one process, one step of the plan, and the verdict on their differences."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine import optim
from mlsys_engine.comm.launch import World, current_world
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import Loss, num_samples
from mlsys_engine.pipeline.runtime.cut import cut
from mlsys_engine.plan import Plan
from mlsys_engine.verify import checks
from mlsys_engine.verify.compare import Tolerance, compare
from mlsys_engine.verify.planned import RankReport, run_planned
from mlsys_engine.verify.randomness import Generators, seed_shard
from mlsys_engine.verify.ranks import run_on_local_ranks
from mlsys_engine.verify.serial import OptimizerFactory, SerialStep, StepInputs, run_serial
from mlsys_engine.verify.tolerances import measured, of_float64
from mlsys_engine.verify.verdict import Verdict
from mlsys_engine.verify.widen import cast_batch, exact_plan, wide_plan, widened

_LEARNING_RATE = 0.1


def verify(
    model: nn.Module,
    plan: Plan,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | None = None,
    max_grad_norm: float | None = None,
    precision: str = "float64",
    tolerance: float | None = None,
    timeout_s: float = 300.0,
) -> Verdict:
    """Compares one step of `plan` with the same step of the unsharded model in one process.

    Loss, every gradient, every updated parameter and buffer are compared by name, and the outputs of modules
    that a rank has whole, so that the first thing that goes wrong is named. `batch` is the global batch, cut
    along dimension 0 for the plan's data shards and its `accumulate`; a list of batches is taken as the
    global microbatches. Outside of a job the plan's ranks are started here, on the CPU; in a job of as many
    ranks every rank calls it alike, and rank 0's weights count. `model`, its gradients and the random state
    stay as they are.

    Both runs are in float64, where another order of a sum changes nothing beyond 1e-10; precision="model"
    keeps the model's types and the plan's, with a tolerance measured on the unsharded model. `tolerance`
    replaces either. The default optimizer is plain SGD, whose step shows a difference as it is. `timeout_s`
    bounds the wait for started ranks. Random numbers are those that the plan's ranks draw. Raises ConfigError
    for what cannot be compared.
    """
    checks.check_arguments(plan, model, precision=precision, tolerance=tolerance)
    world = _job_of(plan)
    notes: list[str] = []
    chosen, dtype = _runnable(plan, precision, notes)
    device = torch.device("cpu") if world is None else world.device
    generators = Generators.now(device)
    try:
        with widened() if dtype is torch.float64 else contextlib.nullcontext():
            start = _copy(model, dtype).to(device)
            if world is not None:
                _broadcast(start)
            inputs = StepInputs(
                shards=_shards(cast_batch(batch, dtype), chosen, notes),
                seed_shard=partial(seed_shard, plan.seed or 0),
                loss=loss,
                optimizer=optimizer or _sgd(chosen),
                max_grad_norm=max_grad_norm,
            )
            reference = _reference(chosen, start, inputs, dtype)
            limit = _tolerance(chosen, start, inputs, reference, given=tolerance, dtype=dtype)
            run = partial(_run, chosen, start, inputs, reference, tolerance=limit.value, dtype=dtype)
            ranks = run_on_local_ranks(run, plan.world_size, timeout_s) if world is None else _gathered(run())
            verdict = compare(plan, reference, ranks, limit, notes)
            if not verdict.ok:
                checks.check_repeatable(chosen, start, inputs, reference, limit.value)
            return verdict
    finally:
        generators.restore(device)


def _run(
    plan: Plan,
    start: nn.Module,
    inputs: StepInputs,
    reference: SerialStep,
    *,
    tolerance: float,
    dtype: torch.dtype | None,
) -> RankReport:
    """On a rank, which may be a new process."""
    with widened() if dtype is torch.float64 else contextlib.nullcontext():
        return run_planned(plan, copy.deepcopy(start), inputs, reference, tolerance)


def _gathered(own: RankReport) -> list[RankReport]:
    ranks: list[RankReport] = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks


def _job_of(plan: Plan) -> World | None:
    """The job that this process is a rank of; None where verify starts its own."""
    world = current_world()
    if world is None or world.world_size == 1:
        checks.check_local_ranks(plan.world_size)
        return None
    if world.world_size != plan.world_size:
        raise ConfigError(
            f"verify was given a plan for {plan.world_size} ranks in a job of {world.world_size}.",
            "In a job, verify runs the plan on the job's own ranks.",
            "Make the plan with world=mls.init(), or verify outside of a job.",
        )
    return world


def _runnable(plan: Plan, precision: str, notes: list[str]) -> tuple[Plan, torch.dtype | None]:
    """The plan as it is run, and the dtype of the copies; None keeps the model's."""
    plan = exact_plan(plan, notes)
    if precision == "float64" and plan.shard == "optimizer" and plan.axis("data") > 1:
        notes.append("a sharded optimizer's native step is of float32, so the model's types were kept")
        precision = "model"
    if precision == "model":
        return plan, None
    return wide_plan(plan, notes), torch.float64


def _sgd(plan: Plan) -> OptimizerFactory:
    native = plan.shard == "optimizer" or plan.precision.endswith("-pure")
    return partial(optim.SGD if native else torch.optim.SGD, lr=_LEARNING_RATE)


def _shards(batch: Any, plan: Plan, notes: list[str]) -> list[list[Any]]:
    """The microbatches of each data shard, consecutive ones of the global batch."""
    num_shards = plan.axis("data")
    wanted = num_shards * plan.accumulate
    are_microbatches = isinstance(batch, list) and not any(isinstance(item, torch.Tensor) for item in batch)
    pieces = batch if are_microbatches else cut(batch, wanted)
    if len(pieces) > wanted:
        raise ConfigError(
            f"verify was given a list of {len(pieces)} microbatches.",
            f"The plan has {num_shards} data shards of {plan.accumulate} microbatches.",
            "Give at most as many, or one global batch, which is cut.",
        )
    if len(pieces) < wanted:
        notes.append(
            f"the batch gives {len(pieces)} of {wanted} microbatches, so some ranks had fewer or none: give "
            f"{wanted} samples or more to use all"
        )
    elif not are_microbatches and len({num_samples(piece) for piece in pieces}) > 1:
        notes.append(f"the batch does not divide by {wanted}: the first microbatches had a sample more")
    return [pieces[shard * plan.accumulate :][: plan.accumulate] for shard in range(num_shards)]


def _reference(plan: Plan, start: nn.Module, inputs: StepInputs, dtype: torch.dtype | None) -> SerialStep:
    checks.check_optimizer(start, inputs.optimizer, dtype)
    reference = run_serial(plan, copy.deepcopy(start), inputs)
    checks.check_finite(reference)
    return reference


def _tolerance(
    plan: Plan,
    start: nn.Module,
    inputs: StepInputs,
    reference: SerialStep,
    *,
    given: float | None,
    dtype: torch.dtype | None,
) -> Tolerance:
    name = "float64" if dtype is torch.float64 else plan.precision
    if given is not None:
        return Tolerance(value=given, reason="as given", dtype=name)
    if dtype is torch.float64:
        return of_float64()
    return measured(plan, start, inputs, reference)


def _copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy without gradients, with floating values as `dtype`."""
    kept = {id(value.grad): None for value in model.parameters() if value.grad is not None}
    copied: nn.Module = copy.deepcopy(model, memo=dict(kept))
    copied.zero_grad(set_to_none=True)
    return copied if dtype is None else copied.to(dtype)


@torch.no_grad()
def _broadcast(model: nn.Module) -> None:
    """Rank 0's values everywhere, which is what a plan begins from."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel():
            flat = tensor.detach().contiguous().view(-1)
            flat = flat.view(torch.uint8) if flat.dtype is torch.bool else flat
            dist.broadcast(flat, group_src=0)
            tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))
