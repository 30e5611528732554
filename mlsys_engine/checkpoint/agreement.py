"""Ranks that look at files must come to one verdict, or one would raise while the others wait for it."""

from __future__ import annotations

import torch.distributed as dist

from mlsys_engine.errors import CheckpointError


def rank_and_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def raise_together(error: CheckpointError | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank when any rank brings an error: the one of the lowest rank. A collective call."""
    _, world_size = rank_and_size(group)
    errors: list[CheckpointError | None] = [error]
    if world_size > 1:
        errors = [None] * world_size
        dist.all_gather_object(errors, error, group=group)
    for found in errors:
        if found is not None:
            raise found
