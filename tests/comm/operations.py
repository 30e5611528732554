"""Every collective and every way to call it, as a table: name to a function of this rank's input.

A reducing entry takes (input, op, group) and returns (result, which ranks' part of the sum it is): None for
the whole. A moving entry takes (input, group) and returns the inputs that this rank received, by group rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
Reduced = tuple[Tensor | None, int | None]


def _part(tensor: Tensor, group: Group) -> Tensor:
    return torch.empty(tensor.numel() // group.size(), dtype=tensor.dtype)


def _all_reduce(tensor: Tensor, op: Any, group: Group) -> Reduced:
    dist.all_reduce(tensor, op=op, group=group)
    return tensor, None


def _all_reduce_later(tensor: Tensor, op: Any, group: Group) -> Reduced:
    dist.all_reduce(tensor, op=op, group=group, async_op=True).wait()
    return tensor, None


def _all_reduce_strided(tensor: Tensor, op: Any, group: Group) -> Reduced:
    spread = torch.zeros(tensor.numel(), 3, dtype=tensor.dtype)[:, 1]
    spread.copy_(tensor)
    dist.all_reduce(spread, op=op, group=group)
    return spread.contiguous(), None


def _all_reduce_coalesced(tensor: Tensor, op: Any, group: Group) -> Reduced:
    with dist._coalescing_manager(group):
        for half in tensor.tensor_split(2):
            dist.all_reduce(half, op=op, group=group)
    return tensor, None


def _reduce(tensor: Tensor, op: Any, group: Group) -> Reduced:
    root = group.size() - 1
    dist.reduce(tensor, group_dst=root, op=op, group=group)
    return (tensor if group.rank() == root else None), None


def _reduce_scatter(tensor: Tensor, op: Any, group: Group) -> Reduced:
    part = _part(tensor, group)
    dist.reduce_scatter(part, list(tensor.chunk(group.size())), op=op, group=group)
    return part, group.rank()


def _reduce_scatter_tensor(tensor: Tensor, op: Any, group: Group) -> Reduced:
    part = _part(tensor, group)
    dist.reduce_scatter_tensor(part, tensor, op=op, group=group)
    return part, group.rank()


def _reduce_scatter_coalesced(tensor: Tensor, op: Any, group: Group) -> Reduced:
    part, other = _part(tensor, group), _part(tensor, group)
    with dist._coalescing_manager(group):
        dist.reduce_scatter_tensor(other, tensor.clone(), op=op, group=group)
        dist.reduce_scatter_tensor(part, tensor, op=op, group=group)
    assert torch.equal(part.view(torch.uint8), other.view(torch.uint8))
    return part, group.rank()


REDUCING: dict[str, Callable[[Tensor, Any, Group], Reduced]] = {
    "all_reduce": _all_reduce,
    "all_reduce, asynchronous": _all_reduce_later,
    "all_reduce of every third element": _all_reduce_strided,
    "all_reduce_coalesced": _all_reduce_coalesced,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "reduce_scatter_tensor_coalesced": _reduce_scatter_coalesced,
}


def _broadcast(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    dist.broadcast(tensor, group_src=group.size() - 1, group=group)
    return {group.size() - 1: tensor}


def _all_gather(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return dict(enumerate(parts))


def _all_gather_into_tensor(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    whole = torch.empty(group.size(), tensor.numel(), dtype=tensor.dtype)
    dist.all_gather_into_tensor(whole.view(-1), tensor, group=group)
    return dict(enumerate(whole))


def _all_gather_coalesced(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    whole = torch.empty(group.size(), tensor.numel(), dtype=tensor.dtype)
    other = torch.empty(group.size(), dtype=tensor.dtype)
    with dist._coalescing_manager(group):
        dist.all_gather_into_tensor(other, tensor[:1].clone(), group=group)
        dist.all_gather_into_tensor(whole.view(-1), tensor, group=group)
    return dict(enumerate(whole))


def _gather(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(tensor, parts, group_dst=0, group=group)
    return dict(enumerate(parts or []))


def _scatter(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    """The root is the last rank, and its part for everyone is its input."""
    root, received = group.size() - 1, torch.empty_like(tensor)
    parts = [tensor.clone() for _ in range(group.size())] if group.rank() == root else None
    dist.scatter(received, parts, group_src=root, group=group)
    return {root: received}


def _all_to_all(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_to_all(parts, [tensor.clone() for _ in parts], group=group)
    return dict(enumerate(parts))


def _all_to_all_single(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    """Rank r's row for rank s is its input, sent only when s >= r: splits differ from pair to pair."""
    rank, size = group.rank(), group.size()
    sent = tensor.repeat(size - rank, 1)
    received = torch.empty(rank + 1, tensor.numel(), dtype=tensor.dtype)
    from_each = [int(peer <= rank) for peer in range(size)]
    to_each = [int(peer >= rank) for peer in range(size)]
    dist.all_to_all_single(received, sent, from_each, to_each, group=group)
    return dict(enumerate(received))


def _around(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    """send and recv around a ring."""
    rank, size = group.rank(), group.size()
    received = torch.empty_like(tensor)
    sent = dist.isend(tensor, group_dst=(rank + 1) % size, group=group, tag=3)
    dist.recv(received, group_src=(rank - 1) % size, group=group, tag=3)
    assert sent is not None
    sent.wait()
    return {(rank - 1) % size: received}


def _from_anyone(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    if group.rank() != 0:
        dist.send(tensor, group_dst=0, group=group, tag=5)
        return {}
    got = {}
    for _ in range(group.size() - 1):
        received = torch.empty_like(tensor)
        source = dist.recv(received, group=group, tag=5)  # a tag of its own: later messages overtake none
        got[dist.get_group_rank(group, source)] = received
    assert sorted(got) == list(range(1, group.size()))
    return got


def _batched(tensor: Tensor, group: Group) -> dict[int, Tensor]:
    received = {peer: torch.empty_like(tensor) for peer in range(group.size()) if peer != group.rank()}
    operations = [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for peer in received]
    operations += [
        dist.P2POp(dist.irecv, into, group=group, group_peer=peer) for peer, into in received.items()
    ]
    for work in dist.batch_isend_irecv(operations[:: 1 if group.rank() % 2 else -1]):
        work.wait()
    return received


MOVING: dict[str, Callable[[Tensor, Group], dict[int, Tensor]]] = {
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "all_gather_into_tensor_coalesced": _all_gather_coalesced,
    "gather": _gather,
    "scatter": _scatter,
    "all_to_all": _all_to_all,
    "all_to_all_single, uneven": _all_to_all_single,
    "send and recv": _around,
    "recv from anyone": _from_anyone,
    "batch_isend_irecv": _batched,
}
