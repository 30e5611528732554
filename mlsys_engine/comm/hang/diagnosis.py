"""From the dumps of a job to what went wrong, in words.

Ranks of a group make the same collectives in the same order, so the first one that not all of them completed
is where a group stands: whoever has not called it is missing, whoever called something else is the mismatch.
Messages are counted by pair: what one rank still waits for, the other has not done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlsys_engine.comm.hang.dumps import Dump, Operation

# Whose sizes may differ from rank to rank.
_ONE_SIDED = ("gather", "scatter", "all_to_all", "all_to_all_single")


@dataclass(frozen=True, kw_only=True)
class GroupState:
    """Where one group stands."""

    name: str
    ranks: tuple[int, ...]
    completed_by_all: str  # the last operation that every rank which dumped has completed
    findings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that `mlsys doctor --hang` tells."""

    ranks: tuple[str, ...]  # one line a dump
    missing_ranks: tuple[int, ...]
    groups: tuple[GroupState, ...]
    messages: tuple[str, ...]
    failures: tuple[str, ...]
    verdict: str


def diagnose(dumps: Sequence[Dump]) -> Diagnosis:
    """Compares the dumps of a job; at least one is needed."""
    world = max(dump.world_size for dump in dumps)
    present = {dump.rank for dump in dumps}
    missing = tuple(rank for rank in range(world) if rank not in present)
    groups = [_GroupView(name, ranks, dumps) for name, ranks in _all_groups(dumps).items()]
    messages = [line for group in groups for line in group.messages()]
    failures = _failures(dumps)
    states = tuple(group.state() for group in groups)
    return Diagnosis(
        ranks=tuple(_describe_dump(dump) for dump in dumps),
        missing_ranks=missing,
        groups=states,
        messages=tuple(messages),
        failures=tuple(failures),
        verdict=_verdict(dumps, groups, messages, missing),
    )


def _describe_dump(dump: Dump) -> str:
    return (
        f"rank {dump.rank} on {dump.host} (pid {dump.pid}): "
        f"{len(dump.operations)} operations recorded; dumped for: {dump.reason}"
    )


def describe(operation: Operation) -> str:
    """An operation for people: "all_reduce number 7 (Float [3, 4]) at train.py:12 in step"."""
    sizes = ", ".join(str(list(size)) for size in operation.input_sizes or operation.output_sizes)
    detail = f" ({operation.dtypes[0]} {sizes})" if sizes and operation.dtypes else ""
    site = f" at {operation.call_site}" if operation.call_site else ""
    return f"{operation.name} number {operation.sequence}{detail}{site}"


class _GroupView:
    """One group's operations by rank."""

    def __init__(self, name: str, ranks: tuple[int, ...], dumps: Sequence[Dump]) -> None:
        self.name, self.ranks = name, ranks
        self.dumps = {dump.rank: dump for dump in dumps if dump.rank in ranks}
        own = {rank: [op for op in dump.operations if op.group == name] for rank, dump in self.dumps.items()}
        self.collectives = {
            rank: {op.sequence: op for op in ops if not op.is_message} for rank, ops in own.items()
        }
        self.posted = {rank: [op for op in ops if op.is_message] for rank, ops in own.items()}
        self.frontier = self._frontier()

    def _frontier(self) -> int | None:
        """The first collective that some rank has called and not all that dumped have completed."""
        called = {number for ops in self.collectives.values() for number in ops}
        for number in sorted(called):
            for ops in self.collectives.values():
                if number in ops and not ops[number].completed:
                    return number
                if number not in ops and number > max(ops, default=0):
                    return number  # this rank has not come so far; older gaps are what the ring dropped
        return None

    def called(self) -> dict[int, Operation]:
        """What each rank called as the operation where the group stands."""
        return {rank: ops[self.frontier] for rank, ops in self.collectives.items() if self.frontier in ops}

    def absent(self) -> list[int]:
        """The ranks that dumped and have not called the operation where the group stands."""
        return [] if self.frontier is None else [rank for rank in self.dumps if rank not in self.called()]

    def disagreement(self) -> str:
        """Who called what, when ranks called different things; else empty."""
        called = self.called()
        if len({_identity(op) for op in called.values()}) < 2:
            return ""
        told = "; ".join(f"rank {rank} called {describe(op)}" for rank, op in sorted(called.items()))
        return f"in group {self.name} ranks called different operations: {told}"

    def last_of(self, rank: int) -> str:
        """The last collective that a rank called here."""
        ops = self.collectives[rank]
        if not ops:
            return "it has called nothing in this group"
        last = ops[max(ops)]
        return f"its last call here was {describe(last)}, {last.state}"

    def state(self) -> GroupState:
        """The group in words."""
        findings = []
        if disagreement := self.disagreement():
            findings.append(disagreement)
        for rank, op in sorted(self.called().items()):
            if not op.completed:
                findings.append(
                    f"rank {rank} is in {describe(op)} since {_age_s(self.dumps[rank], op):.1f} s"
                )
        for rank in self.absent():
            findings.append(f"rank {rank} has not called number {self.frontier}: {self.last_of(rank)}")
        return GroupState(
            name=self.name, ranks=self.ranks, completed_by_all=self._completed(), findings=tuple(findings)
        )

    def _completed(self) -> str:
        numbers = [
            {number for number, op in ops.items() if op.completed} for ops in self.collectives.values()
        ]
        common = set.intersection(*numbers) if numbers else set()
        if not common:
            return "nothing"
        return describe(next(iter(self.collectives.values()))[max(common)])

    def messages(self) -> list[str]:
        """Messages that have not found their other side."""
        lines = []
        for rank, ops in sorted(self.posted.items()):
            for op in ops:
                if op.completed:
                    continue
                receiving = op.name.startswith("recv")
                peer = op.source if receiving else op.destination
                lines.append(self._waiting(rank, op, peer, receiving))
        return lines

    def _waiting(self, rank: int, op: Operation, peer: int, receiving: bool) -> str:
        since = f"since {_age_s(self.dumps[rank], op):.1f} s"
        site = f" at {op.call_site}" if op.call_site else ""
        if peer < 0:
            return f"rank {rank} waits in recv from any rank of group {self.name} {since}{site}"
        other = self.ranks[peer]
        what = f"waits for a message from rank {other}" if receiving else f"sends to rank {other}"
        if other not in self.dumps:
            return f"rank {rank} {what} {since}{site}; rank {other} wrote no dump"
        mine = self._count(rank, op.name[:4], other, both=False)
        answers = self._count(other, "send" if receiving else "recv", rank, both=not receiving)
        verb = "sent" if receiving else "asked for"
        return f"rank {rank} {what} {since}{site}: its number {mine}, but rank {other} has {verb} {answers}"

    def _count(self, rank: int, kind: str, peer: int, *, both: bool) -> int:
        """Messages of a kind that `rank` posted for global rank `peer`; with `both` also for any source."""
        wanted = {self.ranks.index(peer)} | ({-1} if both else set())
        return sum(
            1
            for op in self.posted[rank]
            if op.name.startswith(kind) and (op.source if kind == "recv" else op.destination) in wanted
        )


def _identity(op: Operation) -> tuple[object, ...]:
    sizes = () if op.name in _ONE_SIDED else (op.input_sizes, op.output_sizes)
    return (op.name, op.dtypes, *sizes)


def _age_s(dump: Dump, op: Operation) -> float:
    return max(0.0, (dump.time_ns - (op.started_ns or op.created_ns)) / 1e9)


def _all_groups(dumps: Iterable[Dump]) -> Mapping[str, tuple[int, ...]]:
    return {name: ranks for dump in dumps for name, ranks in dump.groups.items()}


def _failures(dumps: Iterable[Dump]) -> list[str]:
    return [
        f"rank {dump.rank}, {describe(op)}: {op.failure}"
        for dump in dumps
        for op in dump.operations
        if op.failure
    ]


def _verdict(
    dumps: Sequence[Dump], groups: Sequence[_GroupView], messages: Sequence[str], missing: tuple[int, ...]
) -> str:
    """One sentence, the surest finding first."""
    by_kind = {op.failure_kind: op.failure for dump in dumps for op in dump.operations if op.failure}
    disagreements = [group.disagreement() for group in groups if group.disagreement()]
    absences = [_absence(group) for group in groups if group.absent()]
    stuck = [group.name for group in groups if group.frontier is not None]
    suspects = [
        (f"A rank failed: {by_kind.get('peer_failed')}", "peer_failed" in by_kind),
        (f"Mismatch: {by_kind.get('mismatch')}", "mismatch" in by_kind),
        (f"Mismatch: {'; '.join(disagreements)}.", disagreements),
        (" ".join(absences), absences),
        (f"A message has no other side: {'; '.join(messages)}.", messages),
        (f"{_ranks(missing)} wrote no dump: killed, stopped, or with another MLSYS_HANG_DIR.", missing),
        (f"All ranks were in one operation of group {', '.join(stuck)}: slow rather than hung.", stuck),
    ]
    nothing = "No operation was under way: the ranks wait for something else than communication."
    return next((text for text, found in suspects if found), nothing)


def _absence(group: _GroupView) -> str:
    waiting = next(iter(group.called().values()))
    return (
        f"{_ranks(group.absent())} did not come to {describe(waiting)} of group {group.name}, "
        f"where {_ranks(group.called())} waited."
    )


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return ("Rank " if len(numbers) == 1 else "Ranks ") + ", ".join(map(str, numbers))
