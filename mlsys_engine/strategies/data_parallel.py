"""Data parallelism: the whole model on every rank, gradients summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine.comm.launch import World
from mlsys_engine.data_parallel.buckets import layout_buckets
from mlsys_engine.data_parallel.build import build_runner
from mlsys_engine.data_parallel.invariance import LEAVES, check_leaves, refuse_variants
from mlsys_engine.data_parallel.partition import partition_bucket
from mlsys_engine.data_parallel.reductions import POWERSGD_RANK, POWERSGD_START
from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.numerics import PRECISION_RULES, Loss
from mlsys_engine.optim import GradientNoiseScale, LossScaler
from mlsys_engine.plan import SHARD_LEVELS, SYNC_MODES, Bucket, MeshAxis, Plan, Runner
from mlsys_engine.strategies.base import OptimizerFactory, PlanOptions, Subject
from mlsys_engine.trace import Trace

_COMPRESSIONS = (None, "bf16", "int8", "powersgd")
_VIRTUAL_SHARDS = 8


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """Every rank holds the model and feeds its own share of each batch; all take the same step."""

    name: ClassVar[str] = "data_parallel"

    shard: str = "none"
    """What is split over ranks instead of repeated: "none", or "optimizer" for the optimizer's state."""
    sync: str = "step"
    """When ranks agree on gradients: "step" so far, at every optimizer step."""
    compression: str | None = None
    """Of fp32 gradients: None; "bf16" or "int8" between hosts; "powersgd" between all ranks."""
    bucket_mib: float = 25.0
    """Size of a bucket of gradients; smaller starts communicating sooner, larger has less overhead."""
    powersgd_rank: int | None = None
    """Rank of the two thin matrices that stand for each gradient matrix under "powersgd"; None: 2."""
    powersgd_start_step: int | None = None
    """Steps of plain all-reduce before "powersgd" begins: at least 2, often a tenth of all; None: 100."""
    virtual_shards: int | None = None
    """Pieces of each global batch, the same at any number of ranks, under "world_invariant"; None: 8."""

    def __post_init__(self) -> None:
        _check("shard", self.shard, SHARD_LEVELS, ("none", "optimizer"))
        _check("sync", self.sync, SYNC_MODES, ("step",))
        _check("compression", self.compression, _COMPRESSIONS, _COMPRESSIONS)
        if self.shard != "none" and self.compression is not None:
            raise ConfigError(
                f"DataParallel(shard={self.shard!r}, compression={self.compression!r}).",
                "Compression is of an all-reduce, and a sharded optimizer reduces to each rank its part.",
                "Leave one of them out.",
            )
        _check_count("virtual_shards", self.virtual_shards, 1)
        self._check_powersgd("powersgd_rank", 1)
        self._check_powersgd("powersgd_start_step", 2)
        if isinstance(self.bucket_mib, bool) or not self.bucket_mib > 0:
            raise ConfigError(
                f"DataParallel(bucket_mib={self.bucket_mib!r}).",
                "A bucket has a positive size in MiB.",
                "Leave it out for 25.",
            )

    def _check_powersgd(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if value is None:
            return
        if self.compression != "powersgd":
            raise ConfigError(
                f"DataParallel({field}={value!r}, compression={self.compression!r}).",
                f'{field} is a setting of compression="powersgd" and would have no effect.',
                f"Leave {field} out.",
            )
        _check_count(field, value, least)

    def plan(self, subject: Subject, world_size: int, options: PlanOptions) -> Plan:
        """The buckets of the model's trainable parameters, and the options. Needs no ranks."""
        trace = subject.trace
        self._check_precision(trace, options.precision)
        pure = PRECISION_RULES[options.precision].parameters is not None
        buckets = layout_buckets(trace, self.bucket_mib, gradients=torch.float32 if pure else None)
        self._check_compressible(buckets)
        leaves = self._leaves(buckets, world_size, options)
        return Plan(
            strategy=self.name,
            mesh=(MeshAxis(name="data", size=world_size),),
            buckets=buckets,
            order_source=trace.order_source,
            shard=self.shard,
            partition=self.partition(buckets, world_size),
            sync=self.sync,
            compression=self.compression,
            algorithms=(
                ("accumulation", "tree" if leaves else "in_order"),  # a rank's microbatches
                # of each bucket over ranks, in the gradients' dtype
                ("gradients", self._gradient_algorithm("tree" if leaves else self.compression)),
                ("mean", "scaled_step"),  # the sum times one float64 factor, while stepping
                *(((LEAVES, str(leaves)),) if leaves else ()),
                *self._powersgd_settings(),
            ),
            activation=tuple(options.activation.items()),
            precision=options.precision,
            accumulate=leaves // world_size if leaves else options.accumulate,
            numerics=options.numerics,
            compile=options.compile,
            seed=options.seed,
        )

    def partition(self, buckets: Sequence[Bucket], world_size: int) -> tuple[tuple[int, ...], ...]:
        """For each bucket where each rank's part begins; nothing without sharding."""
        if self.shard == "none":
            return ()
        return tuple(partition_bucket(bucket, world_size) for bucket in buckets)

    def _gradient_algorithm(self, variant: str | None) -> str:
        if self.shard == "optimizer":
            return "reduce_scatter"
        return f"all_reduce_{variant}" if variant else "all_reduce"

    def _leaves(self, buckets: Sequence[Bucket], world_size: int, options: PlanOptions) -> int:
        """Leaves of the canonical tree, 0 without one; raises ConfigError for what cannot honour it."""
        if options.numerics != "world_invariant":
            if self.virtual_shards is not None:
                raise ConfigError(
                    f"DataParallel(virtual_shards={self.virtual_shards}) with numerics={options.numerics!r}.",
                    'It is a setting of numerics="world_invariant" and would have no effect.',
                    "Leave virtual_shards out, or ask for those numerics.",
                )
            return 0
        if self.shard != "none":
            raise ConfigError(
                f'numerics="world_invariant" with DataParallel(shard={self.shard!r}).',
                "The canonical tree is of an all-reduce; a sharded optimizer reduces to each rank its part.",
                'Use shard="none", or numerics="reproducible".',
            )
        leaves = self.virtual_shards or _VIRTUAL_SHARDS
        check_leaves(leaves, world_size)
        refuse_variants(
            buckets,
            compression=self.compression,
            accumulate=options.accumulate,
            compile=options.compile,
            seed=options.seed,
        )
        return leaves

    def _powersgd_settings(self) -> tuple[tuple[str, str], ...]:
        if self.compression != "powersgd":
            return ()
        rank, start = self.powersgd_rank or 2, self.powersgd_start_step or 100
        return (POWERSGD_RANK, str(rank)), (POWERSGD_START, str(start))

    def _check_compressible(self, buckets: Sequence[Bucket]) -> None:
        others = [bucket for bucket in buckets if bucket.dtype != "float32"]
        if self.compression is not None and others:
            raise ConfigError(
                f"DataParallel(compression={self.compression!r}) for a model whose parameter "
                f"{others[0].slots[0].name} is {others[0].dtype}.",
                "Only float32 gradients are compressed.",
                "Leave compression out, or convert the model with model.float() first.",
            )

    def _check_precision(self, trace: Trace, precision: str) -> None:
        rule = PRECISION_RULES[precision]
        if rule.products is None:
            return
        for parameter in trace.parameters_in_order():
            if parameter.requires_grad and parameter.dtype not in (torch.float32, rule.parameters):
                raise ConfigError(
                    f"precision={precision!r} for a model whose parameter {parameter.fqn} is "
                    f"{str(parameter.dtype).removeprefix('torch.')}.",
                    "It begins from float32 parameters, and casts them itself.",
                    'Convert the model with model.float(), or use "fp32", which runs it in its own dtype.',
                )
        if rule.scales_loss and self.compression is not None:
            raise ConfigError(
                f"precision={precision!r} with DataParallel(compression={self.compression!r}).",
                "What compression owes to later steps is in the units of the loss scale, which changes.",
                f"Use precision={precision.replace('fp16', 'bf16')!r}, or leave compression out.",
            )
        if rule.parameters is not None and self.shard != "none":
            raise ConfigError(
                f"precision={precision!r} with DataParallel(shard={self.shard!r}).",
                "Sharding steps float32 parameters, in this version.",
                f'Use precision={precision.removesuffix("-pure")!r}, or shard="none".',
            )

    @staticmethod
    def build(
        plan: Plan,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory,
        loss: Loss | None,
        max_grad_norm: float | None,
        world: World,
        loss_scaler: LossScaler | None,
        noise_scale: GradientNoiseScale | None,
    ) -> Runner:
        """Converts the model in place. A world of one communicates nothing."""
        return build_runner(
            plan,
            model,
            optimizer=optimizer,
            loss=loss,
            max_grad_norm=max_grad_norm,
            device=world.device,
            group=dist.group.WORLD if world.world_size > 1 else None,
            loss_scaler=loss_scaler,
            noise_scale=noise_scale,
        )


def _check(field: str, value: str | None, known: Sequence[str | None], built: Sequence[str | None]) -> None:
    if value in built:
        return
    if value in known:
        raise ConfigError(
            f"DataParallel({field}={value!r}).",
            f"This version builds {field}={' or '.join(repr(name) for name in built)} only.",
            f"Leave {field} out.",
        )
    raise ConfigError(
        f"DataParallel({field}={value!r}).",
        f"{field} is one of {', '.join(repr(name) for name in known)}.",
        did_you_mean(str(value), [str(name) for name in known]),
    )


def _check_count(field: str, value: object, least: int) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return
    raise ConfigError(
        f"DataParallel({field}={value!r}).",
        f"It is a whole number of at least {least}.",
        f"Leave {field} out for the usual one.",
    )
