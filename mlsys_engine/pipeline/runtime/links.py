"""Messages between the ranks of a pipeline: in the order of the action lists, without waiting to send.

A link carries messages from one rank to another in one order, which both know. A receive is posted as soon as
the size of its message is known and those before it on the link are posted. A layout that the receiver cannot
know yet goes ahead of its message; whether it does follows from what both ranks have seen in earlier steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mlsys_engine.errors import InternalError
from mlsys_engine.pipeline.runtime.packing import Layout, Message, pack, unpack


class Expected:
    """One message that is to come; `wait` gives it."""

    def __init__(self, layout: Callable[[], Layout | None], announced: bool) -> None:
        self._layout_when_known, self.announced = layout, announced
        self.layout: Layout | None = None
        self.buffer: torch.Tensor | None = None
        self.work: Any = None

    @property
    def known(self) -> Layout | None:
        """Its layout where this rank can tell without the sender."""
        return None if self.announced else self._layout_when_known()


class Links:
    """The messages of one rank of `group` to and from the others."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self._queues: dict[int, deque[Expected]] = {}  # receives that are not posted, by sender
        self._sends: list[tuple[Any, torch.Tensor]] = []  # a buffer lives until its send has ended

    def send(self, rank: int, message: Message, layout: Layout, *, announce: bool) -> None:
        """Starts to send; `announce` sends the layout ahead."""
        if announce:
            numbers = torch.tensor(layout.encode(), dtype=torch.int64, device=self._device)
            length = torch.tensor([numbers.numel()], dtype=torch.int64, device=self._device)
            self._start(rank, length)
            self._start(rank, numbers)
        self._start(rank, pack(message, layout, self._device))

    def expect(self, rank: int, layout: Callable[[], Layout | None], *, announced: bool) -> Expected:
        """The next message from `rank`; received early where `layout` can tell its size."""
        expected = Expected(layout, announced)
        self._queues.setdefault(rank, deque()).append(expected)
        self._post(rank)
        return expected

    def wait(self, rank: int, expected: Expected) -> Message:
        """The message, when it is there."""
        while expected.work is None:
            queue = self._queues[rank]
            first = queue.popleft()
            first.layout = self._told(rank) if first.announced else first.known
            if first.layout is None:
                raise InternalError(
                    f"a message from rank {rank} of the pipeline came before its layout was known"
                )
            self._receive(rank, first)
            self._post(rank)
        expected.work.wait()
        assert expected.buffer is not None and expected.layout is not None
        return unpack(expected.buffer, expected.layout)

    def flush(self) -> None:
        """Waits until everything that was sent has left."""
        for work, _ in self._sends:
            work.wait()
        self._sends = []

    def cancel(self) -> None:
        """Forgets what a step that raised was waiting for."""
        self._queues, self._sends = {}, []

    def _start(self, rank: int, tensor: torch.Tensor) -> None:
        self._sends = [(work, kept) for work, kept in self._sends if not work.is_completed()]
        self._sends.append((dist.isend(tensor, group=self._group, group_dst=rank), tensor))

    def _post(self, rank: int) -> None:
        queue = self._queues[rank]
        while queue and (layout := queue[0].known) is not None:
            queue[0].layout = layout
            self._receive(rank, queue.popleft())

    def _receive(self, rank: int, expected: Expected) -> None:
        assert expected.layout is not None
        expected.buffer = torch.empty(expected.layout.num_bytes, dtype=torch.uint8, device=self._device)
        expected.work = dist.irecv(expected.buffer, group=self._group, group_src=rank)

    def _told(self, rank: int) -> Layout:
        """The layout that the sender announces, which is the next thing to come from it."""
        length = torch.empty(1, dtype=torch.int64, device=self._device)
        dist.recv(length, group=self._group, group_src=rank)
        numbers = torch.empty(int(length.item()), dtype=torch.int64, device=self._device)
        dist.recv(numbers, group=self._group, group_src=rank)
        return Layout.decode(numbers.tolist())
