"""Programs of collectives and messages over overlapping groups, run by every rank and checked whole.

A `Call` says everything about one operation but its data, which are small integers that every rank can
recompute: sums are exact in every dtype, so the order of additions does not matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys_engine import comm

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8)
PLACES = ("private", "private view", "strided", "arena", "arena view")
OPS = {"SUM": torch.add, "MIN": torch.minimum, "MAX": torch.maximum}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operation: over which ranks, of what, and where each rank's memory lies."""

    kind: str
    members: tuple[int, ...]  # global ranks, ascending
    root: int  # group rank
    numel: int  # of one rank's part
    dtype: torch.dtype
    op: str
    places: tuple[str, ...]  # by global rank
    asynchronous: bool


@dataclass(frozen=True)
class _Turn:
    """A call as this rank sees it."""

    call: Call
    index: int  # in the program: salts the data and tags the messages
    rank: int  # in the group
    group: dist.ProcessGroup
    place: str

    @property
    def size(self) -> int:
        return len(self.call.members)

    def values(self, rank: int, parts: int = 1) -> Tensor:
        """What `rank` of the group contributes: integers from 0 to 6."""
        steps = torch.arange(self.call.numel * parts) * 3 + self.index
        return ((steps + 5 * rank) % 7).to(self.call.dtype)

    def put(self, values: Tensor, place: str = "") -> Tensor:
        """The same values in memory of the kind that this rank uses."""
        place, numel = place or self.place, values.numel()
        if place == "private":
            return values.clone()
        if place == "private view":
            return torch.empty(numel + 3, dtype=values.dtype)[3:].copy_(values)
        if place == "strided":
            return torch.empty(numel, 2, dtype=values.dtype)[:, 1].copy_(values)
        offset = 5 if place == "arena view" else 0
        return comm.empty(numel + offset, values.dtype)[offset:].copy_(values)

    def room(self, parts: int = 1) -> Tensor:
        return self.put(torch.full((self.call.numel * parts,), 77, dtype=self.call.dtype))

    def reduced(self, parts: int = 1) -> Tensor:
        result = self.values(0, parts)
        for rank in range(1, self.size):
            result = OPS[self.call.op](result, self.values(rank, parts))
        return result

    def part(self, values: Tensor, rank: int) -> Tensor:
        return values[self.call.numel * rank : self.call.numel * (rank + 1)]

    def each(self) -> list[Tensor]:
        return [self.values(rank) for rank in range(self.size)]


# Pairs (what came, what should have come), compared when the works are done.
Outcome = tuple[list[Any], list[tuple[Tensor, Tensor]]]


def _all_reduce(turn: _Turn, **how: Any) -> Outcome:
    tensor = turn.put(turn.values(turn.rank))
    work = dist.all_reduce(tensor, op=getattr(dist.ReduceOp, turn.call.op), **how)
    return [work], [(tensor, turn.reduced())]


def _reduce(turn: _Turn, **how: Any) -> Outcome:
    tensor = turn.put(turn.values(turn.rank))
    work = dist.reduce(tensor, group_dst=turn.call.root, op=getattr(dist.ReduceOp, turn.call.op), **how)
    wanted = turn.reduced() if turn.rank == turn.call.root else turn.values(turn.rank)
    return [work], [(tensor, wanted)]


def _reduce_scatter(turn: _Turn, **how: Any) -> Outcome:
    whole, part = turn.put(turn.values(turn.rank, turn.size)), turn.room()
    work = dist.reduce_scatter_tensor(part, whole, op=getattr(dist.ReduceOp, turn.call.op), **how)
    return [work], [(part, turn.part(turn.reduced(turn.size), turn.rank))]


def _reduce_scatter_list(turn: _Turn, **how: Any) -> Outcome:
    values, part = turn.values(turn.rank, turn.size), turn.room()
    parts = [turn.put(turn.part(values, rank)) for rank in range(turn.size)]
    work = dist.reduce_scatter(part, parts, op=getattr(dist.ReduceOp, turn.call.op), **how)
    return [work], [(part, turn.part(turn.reduced(turn.size), turn.rank))]


def _all_gather(turn: _Turn, **how: Any) -> Outcome:
    whole = turn.room(turn.size)
    work = dist.all_gather_into_tensor(whole, turn.put(turn.values(turn.rank)), **how)
    return [work], [(whole, torch.cat(turn.each()))]


def _all_gather_list(turn: _Turn, **how: Any) -> Outcome:
    parts = [turn.room() for _ in range(turn.size)]
    work = dist.all_gather(parts, turn.put(turn.values(turn.rank)), **how)
    return [work], list(zip(parts, turn.each(), strict=True))


def _broadcast(turn: _Turn, **how: Any) -> Outcome:
    tensor = turn.put(turn.values(turn.rank))
    return [dist.broadcast(tensor, group_src=turn.call.root, **how)], [(tensor, turn.values(turn.call.root))]


def _gather(turn: _Turn, **how: Any) -> Outcome:
    mine = turn.rank == turn.call.root
    parts = [turn.room() for _ in range(turn.size)] if mine else None
    work = dist.gather(turn.put(turn.values(turn.rank)), parts, group_dst=turn.call.root, **how)
    return [work], list(zip(parts or [], turn.each() if mine else [], strict=True))


def _scatter(turn: _Turn, **how: Any) -> Outcome:
    mine, received = turn.rank == turn.call.root, turn.room()
    parts = [turn.put(values) for values in turn.each()] if mine else None
    work = dist.scatter(received, parts, group_src=turn.call.root, **how)
    return [work], [(received, turn.values(turn.rank))]


def _all_to_all(turn: _Turn, **how: Any) -> Outcome:
    """Rank r sends its values r + 1 times to everyone."""
    sent = turn.put(turn.values(turn.rank).repeat((turn.rank + 1) * turn.size))
    wanted = torch.cat([turn.values(rank).repeat(rank + 1) for rank in range(turn.size)])
    received = turn.put(torch.full_like(wanted, 77))
    from_each = [turn.call.numel * (rank + 1) for rank in range(turn.size)]
    to_each = [turn.call.numel * (turn.rank + 1)] * turn.size
    return [dist.all_to_all_single(received, sent, from_each, to_each, **how)], [(received, wanted)]


def _barrier(turn: _Turn, **how: Any) -> Outcome:
    return [dist.barrier(**how)], []


def _dense(turn: _Turn, values: Tensor) -> Tensor:
    return turn.put(
        values, "private view" if turn.place == "strided" else turn.place
    )  # messages have no gaps


def _message(turn: _Turn, *, group: dist.ProcessGroup, async_op: bool) -> Outcome:
    """From the root to the next rank, or to itself in a group of one: then nothing happens."""
    source, destination = turn.call.root, (turn.call.root + 1) % turn.size
    if turn.rank == source != destination:
        tensor = _dense(turn, turn.values(source))
        send = dist.isend if async_op else dist.send
        return [send(tensor, group_dst=destination, group=group, tag=turn.index)], [
            (tensor, turn.values(source))
        ]
    if turn.rank == destination != source:
        tensor = _dense(turn, torch.full_like(turn.values(0), 77))
        receive = dist.irecv if async_op else dist.recv
        work = receive(tensor, group_src=source, group=group, tag=turn.index)
        return [work if async_op else None], [(tensor, turn.values(source))]
    return [], []


def _exchange(turn: _Turn, *, group: dist.ProcessGroup, async_op: bool) -> Outcome:
    """Everyone sends to everyone in one batch, in an order of its own."""
    sent = _dense(turn, turn.values(turn.rank))
    others = [rank for rank in range(turn.size) if rank != turn.rank]
    rooms = {rank: _dense(turn, torch.full_like(turn.values(0), 77)) for rank in others}
    operations = [
        dist.P2POp(dist.isend, sent, group=group, group_peer=rank, tag=turn.index) for rank in others
    ]
    operations += [
        dist.P2POp(dist.irecv, room, group=group, group_peer=rank, tag=turn.index)
        for rank, room in rooms.items()
    ]
    random.Random(turn.index * 8 + turn.rank).shuffle(operations)
    works = dist.batch_isend_irecv(operations) if operations else []
    return works, [(room, turn.values(rank)) for rank, room in rooms.items()]


def _from_anyone(turn: _Turn, *, group: dist.ProcessGroup, async_op: bool) -> Outcome:
    """The root takes one message from each other rank, whoever comes first."""
    if turn.rank != turn.call.root:
        tensor = _dense(turn, turn.values(turn.rank))
        return [dist.isend(tensor, group_dst=turn.call.root, group=group, tag=turn.index)], []
    pairs = []
    for _ in range(turn.size - 1):
        tensor = _dense(turn, torch.full_like(turn.values(0), 77))
        source = dist.recv(tensor, group=group, tag=turn.index)
        pairs.append((tensor, turn.values(dist.get_group_rank(group, source))))
    return [], pairs


KINDS: dict[str, Callable[..., Outcome]] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter of a list": _reduce_scatter_list,
    "all_gather": _all_gather,
    "all_gather into a list": _all_gather_list,
    "broadcast": _broadcast,
    "gather": _gather,
    "scatter": _scatter,
    "all_to_all": _all_to_all,
    "barrier": _barrier,
    "message": _message,
    "exchange": _exchange,
    "from anyone": _from_anyone,
}


def run(rank: int, calls: Sequence[Call], groups: dict[tuple[int, ...], dist.ProcessGroup]) -> int:
    """Makes this rank's calls in order, waits for them in an order of its own, and returns their number."""
    chance = random.Random(1009 * rank + len(calls))
    under_way: list[tuple[Call, Outcome]] = []
    made = 0
    for index, call in enumerate(calls):
        if rank not in call.members:
            continue
        made += 1
        group = groups[call.members]
        turn = _Turn(call, index, call.members.index(rank), group, call.places[rank])
        under_way.append((call, KINDS[call.kind](turn, group=group, async_op=call.asynchronous)))
        while under_way and (not call.asynchronous or len(under_way) > chance.randint(4, 20)):
            _finish(*under_way.pop(-1 if not call.asynchronous else chance.randrange(len(under_way))))
            if not call.asynchronous:
                break
    for entry in under_way:
        _finish(*entry)
    return made


def _finish(call: Call, outcome: Outcome) -> None:
    works, pairs = outcome
    for work in works:
        if work is not None:
            work.wait()
    for got, wanted in pairs:
        assert torch.equal(got, wanted), call
