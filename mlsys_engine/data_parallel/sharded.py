"""What is common to both updates under sharded optimizer state: who owns what, the norm, and the state.

A bucket's reduction (during backward) makes this rank's part of it the sum over ranks, and the squares of
that sum go to their places among the norm's terms, one for each chunk. Terms travel with the step's
statistics; everybody adds them in one order and so comes to one norm. Then each rank steps its parts and all
get the new parameters. How is a matter of where the arenas lie: sharded_arena.py and sharded_device.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine import comm
from mlsys_engine.data_parallel import state
from mlsys_engine.data_parallel.arenas import BucketMemory, ModelArenas
from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_shard import FlatShard
from mlsys_engine.optim import NativeOptimizer
from mlsys_engine.optim.kernels import CHUNK_ELEMENTS, is_native
from mlsys_engine.optim.norms import sum_of_terms
from mlsys_engine.optim.shard import OptimizerShard
from mlsys_engine.plan import Plan


def check_shardable(optimizer: torch.optim.Optimizer) -> NativeOptimizer:
    """The optimizer itself when its rule can step parts of parameters; raises ConfigError otherwise."""
    kind = type(optimizer)
    if isinstance(optimizer, NativeOptimizer):
        if optimizer.shardable:
            _check_plain(optimizer)
            return optimizer
        raise ConfigError(
            f'DataParallel(shard="optimizer") with {kind.__name__}.',
            "Sharding needs a rule that steps any part of a parameter by itself, as AdamW and Lion do.",
            f'Use one of them, or shard="none" with {kind.__name__}.',
        )
    raise ConfigError(
        f'DataParallel(shard="optimizer") with {kind.__module__.partition(".")[0]}\'s {kind.__name__}.',
        "Sharding needs the engine's own optimizers, whose rules step any part of a parameter by itself.",
        'Use mls.optim.AdamW or mls.optim.SGD, or shard="none".',
    )


def _check_plain(optimizer: NativeOptimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.form_of(parameter, group).is_plain:
                raise ConfigError(
                    f'DataParallel(shard="optimizer") with {optimizer.name_of(parameter)} in '
                    f"{parameter.dtype}, moments={group['moments']!r} and ema={group['ema']!r}.",
                    "The shards of a flat arena are float32, parameters and moments, and have no average.",
                    'Leave these out with float32 parameters, or use shard="none".',
                )


def check_steppable(device: torch.device) -> None:
    """Raises ConfigError for a device on which parts of parameters cannot be stepped."""
    if not is_native(device):
        raise ConfigError(
            f'DataParallel(shard="optimizer") on {device}, for which this build has no kernels.',
            "Parts of parameters are stepped by the engine's own kernels, on the CPU and on CUDA.",
            'Build the extension with CUDA (`mlsys doctor` says what it has), or use shard="none".',
        )


def num_chunks(optimizer: torch.optim.Optimizer) -> int:
    """How many terms the sum of squares of all gradients has."""
    return sum(_chunks_of(parameter) for group in optimizer.param_groups for parameter in group["params"])


def first_terms(optimizer: NativeOptimizer) -> dict[nn.Parameter, int]:
    """For each parameter the place of its first chunk among all terms of the norm."""
    places, position = {}, 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            places[parameter] = position
            position += _chunks_of(parameter)
    return places


def chunk_rows(
    bucket: BucketMemory, terms: Mapping[nn.Parameter, int], first: int, end: int
) -> list[tuple[int, int, int]]:
    """(first element, number of elements, term) of those chunks of the bucket that begin in [first, end)."""
    begin, rows = int(bucket.gradients.storage_offset()), []
    for place in bucket.places:
        slot_first = int(place.gradient.storage_offset()) - begin
        slot_end = slot_first + place.gradient.numel()
        if place.parameter not in terms:
            continue  # the optimizer does not step it, so the norm leaves it out
        for number, start in enumerate(range(slot_first, slot_end, CHUNK_ELEMENTS)):
            if first <= start < end:
                rows.append((start, min(CHUNK_ELEMENTS, slot_end - start), terms[place.parameter] + number))
    return rows


class ShardedState:
    """The part of an Update that is no step. `norm_terms` are everybody's by the time they are added."""

    def __init__(
        self,
        plan: Plan,
        optimizer: NativeOptimizer,
        arenas: ModelArenas,
        norm_terms: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        self._optimizer, self._group, self._norm_terms = optimizer, group, norm_terms
        (self._pair,) = arenas.pairs.values()  # a partition is of float32 buckets alone
        self._parameters = [place.parameter for place in arenas.places]
        rank = dist.get_rank(group)
        self._partition: list[int] = []  # of the whole arena: a row for each bucket
        ranges = []
        for bucket, bounds in zip(arenas.buckets, plan.partition, strict=True):
            begin = int(bucket.gradients.storage_offset())
            self._partition += [begin + bound for bound in bounds]
            ranges.append((begin + bounds[rank], begin + bounds[rank + 1]))
        self._shard = OptimizerShard(optimizer, self._pair.parameters, self._pair.gradients, ranges)

    def sum_of_squares(self) -> torch.Tensor:
        return sum_of_terms(self._norm_terms)

    def optimizer_state(self, model: nn.Module, full: bool) -> dict[str, Any]:
        """With `full` a collective call: everybody gets all of the state."""
        groups = state.optimizer_state(self._optimizer, model, full)["param_groups"]
        own = self._shard.state(self._gather if full else None)
        return {"state": state.copied(own) if full else own, "param_groups": groups}

    def load_optimizer_state(self, model: nn.Module, loaded: Mapping[str, Any]) -> None:
        """Whole tensors (of any layout), or FlatShards of this layout."""
        state.check_names(self._optimizer, model, loaded["state"])
        state.load_optimizer_state(self._optimizer, model, {**loaded, "state": {}})
        self._shard.load(loaded["state"])

    def place_state(self, name: str, key: str) -> FlatShard | None:
        """Where a checkpoint's piece `key` of the state of parameter `name` is loaded to; None: anywhere."""
        return self._shard.place(name, key)

    def _gather(self, flat: torch.Tensor) -> None:
        comm.share_shards(flat, self._partition, group=self._group)

    def _end_step(self) -> None:
        """`.grad` is None afterwards: no rank has the whole reduced gradient."""
        self._optimizer._opt_called = True  # what torch's schedulers look at to see that a step came first
        for parameter in self._parameters:
            parameter.grad = None


def _chunks_of(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // CHUNK_ELEMENTS)
