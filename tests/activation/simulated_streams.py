"""A device on the CPU whose streams run late and in any order that their waits allow.

What a stream is told to do is noted with addresses alone, and done when `advance` draws its turn. Memory that
nobody refers to is given to the next allocation of its stream at once, as torch's caching allocator does.
So a copy that is not ordered with those who use its memory before or after it moves wrong bytes for some
seed.
"""

from __future__ import annotations

import ctypes
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class Event:
    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done


class Stream:
    """Work in its order. Each piece says whether it could be done now."""

    def __init__(self, machine: Machine) -> None:
        self.device = CPU
        self.work: deque[Callable[[], bool]] = deque()
        self.free: list[int] = []  # memory that was allocated for it and given back
        machine.streams.append(self)

    def do(self, action: Callable[[], object]) -> None:
        def done() -> bool:
            action()
            return True

        self.work.append(done)

    def record_event(self) -> Event:
        event = Event()
        self.do(lambda: setattr(event, "is_done", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.work.append(event.query)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def copy(self, target: Tensor, source: Tensor) -> None:
        addresses = (target.data_ptr(), source.data_ptr(), source.nbytes)
        self.do(lambda: ctypes.memmove(*addresses))


class Machine(TorchFunctionMode):
    """Streams, and memory in equal pieces. As a mode it takes the place of what PinnedStore asks of torch."""

    def __init__(self, seed: int, *, num_pieces: int, piece_bytes: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.current = Stream(self)
        self.wrong: list[str] = []
        self._memory = (ctypes.c_uint8 * (num_pieces * piece_bytes))()
        self._piece_bytes = piece_bytes
        self._unused = list(range(num_pieces))
        self._users: dict[int, set[Stream]] = {}
        self._waiting: list[tuple[list[int], int, list[Event]]] = []

    def allocate(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of the current stream, with what was in it: the piece that the stream has got back last."""
        for waiting in list(self._waiting):
            if all(event.is_done for event in waiting[2]):
                self._waiting.remove(waiting)
                waiting[0].append(waiting[1])
        assert numel * dtype.itemsize <= self._piece_bytes
        free = self.current.free
        piece = (free or self._unused).pop()
        tensor = torch.frombuffer(self._memory, dtype=dtype, count=numel, offset=piece * self._piece_bytes)
        storage = tensor.untyped_storage()
        weakref.finalize(storage, self._give_back, free, piece, storage._cdata)
        return tensor

    def fill(self, numel: int, number: float) -> Tensor:
        """A tensor that the current stream computes."""
        tensor = self.allocate(numel)
        with torch._C.DisableTorchFunction():
            value = torch.full((numel,), number)
        address = tensor.data_ptr()
        self.current.do(lambda: ctypes.memmove(address, value.data_ptr(), value.nbytes))
        return tensor

    def check(self, tensor: Tensor, number: float) -> None:
        """The current stream reads the tensor, and notes here what is not `number`."""
        address, numel = tensor.data_ptr(), tensor.numel()

        def look() -> None:
            found = list((ctypes.c_float * numel).from_address(address))
            if any(value != number for value in found):
                self.wrong.append(f"{number} expected, {set(found)} found")

        self.current.do(look)

    def advance(self, num_turns: int) -> None:
        """As many times, some stream that can go on does one piece of its work."""
        for _ in range(num_turns):
            able = [stream for stream in self.streams if stream.work]
            self.random.shuffle(able)
            for stream in able:
                if stream.work[0]():
                    stream.work.popleft()
                    break

    def finish(self) -> None:
        while any(stream.work for stream in self.streams):
            self.advance(1)

    def recorder(self) -> Callable[[Tensor, Stream], None]:
        """Tensor.record_stream: memory is given back only after what the stream has to do by then."""

        def record_stream(tensor: Tensor, user: Stream) -> None:
            self._users.setdefault(tensor.untyped_storage()._cdata, set()).add(user)

        return record_stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and not kwargs.pop("pin_memory", False):
            return self.allocate(args[0], kwargs["dtype"])
        if func is Tensor.copy_:
            assert kwargs == {"non_blocking": True}
            return self.current.copy(args[0], args[1])
        return func(*args, **kwargs)

    def _give_back(self, free: list[int], piece: int, storage: int) -> None:
        users = self._users.pop(storage, None)
        if users is None:
            free.append(piece)
        else:
            self._waiting.append((free, piece, [user.record_event() for user in users]))
