"""What a model and a job must be for the bits not to depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import Bucket

LEAVES = "leaves"  # in Plan.algorithms


def check_leaves(num_leaves: int, world_size: int) -> None:
    """Raises ConfigError unless each rank can compute a whole subtree of the tree over the leaves."""
    each = num_leaves // world_size
    if num_leaves % world_size == 0 and each & (each - 1) == 0:
        return
    fitting = [size for size in range(1, num_leaves + 1) if num_leaves % size == 0]
    sizes = [str(size) for size in fitting if (num_leaves // size) & (num_leaves // size - 1) == 0]
    raise ConfigError(
        f'numerics="world_invariant" with virtual_shards={num_leaves} on {world_size} ranks.',
        "Each rank computes an equal number of virtual shards, a power of two: "
        f"{num_leaves} of them go onto {', '.join(sizes)} ranks.",
        "Launch one of these numbers of ranks, or choose virtual_shards anew, for every run to be compared.",
    )


def refuse_variants(
    buckets: Sequence[Bucket], *, compression: str | None, accumulate: int, compile: bool, seed: int | None
) -> None:
    """Raises ConfigError for options of a plan under which the bits would depend on the number of ranks."""
    others = [bucket.dtype for bucket in buckets if bucket.dtype not in {"float32", "float64"}]
    found: tuple[tuple[bool, str, str, str], ...] = (
        (
            compression is not None,
            f"compression={compression!r}",
            "What compression loses on a rank depends on how many ranks there are.",
            "Leave compression out.",
        ),
        (
            accumulate != 1,
            f"accumulate={accumulate}",
            "The virtual shards are the microbatches.",
            "Leave accumulate out, and set DataParallel(virtual_shards=...).",
        ),
        (
            compile,
            "compile=True",
            "Compiled loops are cut for a number of threads, which depends on that of ranks.",
            "Leave compile out.",
        ),
        (
            seed is None,
            "seed=None",
            "The random numbers of each virtual shard are derived from the seed.",
            "Pass seed=0, for example.",
        ),
        (
            bool(others),
            f"parameters of {others[0] if others else ''}",
            "A rank's own sums are rounded to the gradients' type; sums between ranks only are for float32 "
            "and float64.",
            "Convert the model with model.float() first.",
        ),
    )
    for is_so, given, expected, action in found:
        if is_so:
            raise ConfigError(f'numerics="world_invariant" with {given}.', expected, action)


def check_model(model: nn.Module, device: torch.device) -> None:
    """Raises ConfigError for a model whose step depends on which rank computes what."""
    if device.type != "cpu":
        raise ConfigError(
            f'numerics="world_invariant" on {device}.',
            "The canonical tree between ranks is built for CPU tensors, in this version.",
            'Use numerics="reproducible" there.',
        )
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise ConfigError(
                f'numerics="world_invariant" for a model with {type(module).__name__} at {name!r}.',
                "Running statistics are taken over what one rank sees, which depends on the number of ranks.",
                "Use a normalisation within the sample (LayerNorm, GroupNorm), or track_running_stats=False.",
            )


def refuse_changed_buffers() -> ConfigError:
    """For a step in which a forward changed a buffer of the model."""
    return ConfigError(
        'numerics="world_invariant" for a model whose forward changes a buffer.',
        "A buffer that collects over microbatches depends on which of them this rank computes.",
        'Keep it out of forward, or use numerics="reproducible".',
    )
