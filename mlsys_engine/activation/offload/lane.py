"""The logic of offload, the same for every store: who may use a slot, what is loaded ahead, when put waits.

Ownership: whoever saved a tensor owns its `Kept`, which owns the slot. A write owns its source until it has
ended; a load owns its destination until it is read. When a Kept dies its slot is free as soon as no transfer
uses it. Threading: a lock around everything but the waiting of a reader. A Kept may die at any time, even in
the collector while this thread has the lock: it only leaves a note then.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Hashable

import torch
from torch import Tensor

from mlsys_engine.activation.offload.base import OffloadError, Slot, Store, Transfer
from mlsys_engine.errors import InternalError
from mlsys_engine.memory.meter import Observe


class _Call:
    """What one call of a block gave away, in that order, and the call before it that gave something away."""

    __slots__ = ("__weakref__", "kept", "key", "previous")

    def __init__(self, key: Hashable, previous: _Call | None) -> None:
        self.key = key
        self.kept: list[weakref.ref[Kept]] = []
        self.previous = None if previous is None else weakref.ref(previous)


class Kept:
    """A tensor that was given away. Its slot is free again when this object dies."""

    __slots__ = (
        "__weakref__",
        "_call",
        "_dtype",
        "_lane",
        "_load",
        "_observe",
        "_round",
        "_slot",
        "_value",
        "_write",
    )

    def __init__(
        self,
        lane: Lane,
        call: _Call,
        slot: Slot,
        write: Transfer,
        *,
        dtype: torch.dtype,
        observe: Observe | None,
    ) -> None:
        self._lane, self._call, self._slot, self._write = lane, call, slot, write
        self._dtype, self._observe = dtype, observe
        self._load: Transfer | None = None
        self._value: tuple[Tensor, object] | None = None  # a source that is held to be read, and its token
        self._round = -1  # in which backward it was read last

    def read(self) -> Tensor:
        """The flat tensor, on its device, with its bits. It may be called again, for another backward.

        The first reading in a block's call starts to load the rest of that call and all of the one before
        it. The caller owns the tensor: another reading loads it again. Raises OffloadError when it could not
        be written or read, or was put before this process was forked.
        """
        return self._lane.read(self)

    @property
    def num_bytes_on_device(self) -> int:
        """Bytes of its memory on the device now: a source until it is written, what is loaded until read."""
        held = None if self._value is None else self._value[0]
        tensors = (self._write.tensor, held, None if self._load is None else self._load.tensor)
        return sum({t.data_ptr(): t.nbytes for t in tensors if t is not None}.values())

    def __del__(self) -> None:
        self._value = None
        self._lane.forget(self._slot, self._write, self._load)


class Lane:
    """Traffic of one device, in the process that made it."""

    def __init__(self, store: Store, max_writing_bytes: int) -> None:
        self.process = os.getpid()
        self.store = store
        self._max_writing_bytes = max_writing_bytes
        self._lock = threading.Lock()
        self._writing: deque[Transfer] = deque()
        self._writing_bytes = 0
        self._call_bytes = 0  # put since the newest call of a block began
        self._failed: list[Transfer] = []  # writes of which nobody has been told
        self._dead: deque[tuple[Slot, Transfer, Transfer | None]] = deque()
        self._newest: weakref.ref[_Call] | None = None
        self._reading: weakref.ref[_Call] | None = None
        self._round = 0

    @property
    def writing_bytes(self) -> int:
        """How much is still to be written, as far as this lane knows."""
        return self._writing_bytes

    def put(self, key: Hashable, tensor: Tensor, observe: Observe | None) -> Kept:
        """Starts to move a flat tensor out, of the block's call `key`. Waits while too much is on the way.

        Raises OffloadError when this or an earlier tensor could not be written.
        """
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise InternalError(
                f"offload was given a tensor of shape {tuple(tensor.shape)}: it takes flat ones"
            )
        with self._lock:
            self._collect()
            call = self._call(key)
            slot = self.store.take(tensor.nbytes)
            write = self.store.write(tensor.detach(), slot)
            write.token = None if observe is None else observe(tensor)
            kept = Kept(self, call, slot, write, dtype=tensor.dtype, observe=observe)
            call.kept.append(weakref.ref(kept))
            self._writing.append(write)
            self._writing_bytes += write.num_bytes
            self._call_bytes += write.num_bytes
            while self._writing_bytes > self._max_writing_bytes:
                self._writing[0].wait()
                self._retire()
            self._failed = [write for write in self._failed if not write.is_unwanted]
            if self._failed:
                raise self._error(self._failed[0])
        return kept

    def begin_call(self) -> None:
        """Waits until what is on the way is of the call before at most: with what comes, of two calls."""
        with self._lock:
            self._collect()
            while self._writing_bytes > self._call_bytes:
                self._writing[0].wait()
                self._retire()
            self._call_bytes = 0

    def read(self, kept: Kept) -> Tensor:
        """See Kept.read."""
        process = os.getpid()
        if self.process != process:
            raise OffloadError(
                f"Process {process} reads activations that process {self.process} offloaded before a fork.",
                "A backward runs in the process of its forward.",
                "Fork before the forward, or after the backward.",
            )
        with self._lock:
            self._collect()
            again = kept._round == self._round  # read twice: this is another backward
            self._round += again
            kept._round = self._round
            load = self._here_or_loading(kept)
            held, kept._value = kept._value, None
            if load is None and held is None:
                raise self._error(kept._write)
            if again or self._reading is None or self._reading() is not kept._call:
                self._reading = weakref.ref(kept._call)
                self._prefetch(kept._call)
                if kept._call.previous is not None:
                    self._prefetch(kept._call.previous())
        if load is None:
            assert held is not None
            return held[0]
        load.wait()
        with self._lock:
            value, load.tensor, load.token = load.tensor, None, None
            load.may_reuse()
            if kept._load is load:
                kept._load = None
        if load.failure is not None:
            raise OffloadError(*load.failure)
        return self.read(kept) if value is None else value  # another reader was faster

    def begin_backward(self) -> None:
        """Starts to load what the newest call gave away."""
        with self._lock:
            self._collect()
            self._prefetch(None if self._newest is None else self._newest())

    def forget(self, slot: Slot, write: Transfer, load: Transfer | None) -> None:
        """A Kept has died. In the collector, maybe while this thread has the lock."""
        write.give_up()
        if load is not None:
            load.give_up()
        self._dead.append((slot, write, load))
        if self.process == os.getpid() and self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _call(self, key: Hashable) -> _Call:
        newest = None if self._newest is None else self._newest()
        if newest is None or newest.key != key:
            newest = _Call(key, newest)
            self._newest = weakref.ref(newest)
        return newest

    def _here_or_loading(self, kept: Kept) -> Transfer | None:
        """The transfer that brings the tensor; None when it is held here, or when its write failed."""
        if kept._load is None and kept._value is None:
            source = kept._write.tensor  # looked at first: a write that fails says so before it lets go
            if source is not None:
                kept._value = source, None if kept._observe is None else kept._observe(source)
            elif kept._write.failure is None:
                kept._load = self.store.load(kept._slot, kept._write, kept._dtype)
                if kept._observe is not None and kept._load.tensor is not None:
                    kept._load.token = kept._observe(kept._load.tensor)
        return kept._load

    def _prefetch(self, call: _Call | None) -> None:
        """Starts to load what the backward has not read yet; it reads in the opposite order."""
        for reference in reversed(call.kept if call is not None else []):
            kept = reference()
            if kept is not None and kept._round != self._round:
                self._here_or_loading(kept)

    def _collect(self) -> None:
        """Lets go of sources that are written, and of the slots of the dead."""
        while self._writing and self._writing[0].has_ended():
            self._retire()
        for _ in range(len(self._dead)):
            slot, write, load = dead = self._dead.popleft()
            if write.may_reuse() and (load is None or load.may_reuse()):
                self.store.give_back(slot)
            else:
                self._dead.append(dead)

    def _retire(self) -> None:
        write = self._writing.popleft()
        self._writing_bytes -= write.num_bytes
        write.tensor = write.token = None
        if write.failure is not None:
            self._failed.append(write)

    def _error(self, failed: Transfer) -> OffloadError:
        """What to raise. The rest of the failure is not left to the next step: all writes end first."""
        while self._writing:
            self._writing[0].wait()
            self._retire()
        self._failed.clear()
        assert failed.failure is not None
        return OffloadError(*failed.failure)
