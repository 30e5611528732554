"""Activations of the CPU in a file: for tests, and for runs that are larger than the memory.

The file has no name any more once it is open, so that it goes with its last user, whatever happens. One
thread writes and one reads; system calls leave the interpreter to others. Whoever waits for a transfer that
no thread has begun does it himself.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from queue import SimpleQueue

import torch
from torch import Tensor

from mlsys_engine.activation.offload.base import (
    DIRECTORY_VARIABLE,
    OffloadError,
    OffloadOptions,
    Slot,
    Store,
    Transfer,
)
from mlsys_engine.activation.offload.extents import Extents

_EXPECTED = "Activations stay in this file (it has no name any more) until the backward has read them."
_ACTION = (
    f"See to the space and the limits there, or name another folder with {DIRECTORY_VARIABLE} or "
    f"OffloadOptions(directory=...)."
)


class _UnlinkedFile:
    """An open file without a name. It is closed when the last transfer and the store are gone."""

    def __init__(self, options: OffloadOptions) -> None:
        folder = options.folder()
        try:
            self.descriptor, self.path = tempfile.mkstemp(prefix="mlsys-offload-", dir=folder)
        except OSError as error:
            raise OffloadError(
                f"No file for offloaded activations could be made in {folder}: {error.strerror}.",
                "The folder must exist and be writable.",
                _ACTION,
            ) from error
        # Not at exit: the threads may still be writing then, and the system closes it anyway.
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        os.unlink(self.path)
        self.timeout_s = options.timeout_s

    def write(self, data: memoryview, start: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self.descriptor, data[done:], start + done)

    def read(self, data: memoryview, start: int) -> None:
        done = 0
        while done < len(data):
            count = os.preadv(self.descriptor, [data[done:]], start + done)
            if count == 0:
                raise OSError(0, f"it ends after {start + done} bytes")
            done += count


class FileTransfer(Transfer):
    """One tensor to or from the file. Exactly one thread claims it and does it, or it is given up before."""

    def __init__(self, file: _UnlinkedFile, tensor: Tensor, start: int, *, writes: bool) -> None:
        super().__init__(tensor)
        self._file, self._start, self._writes = file, start, writes
        self._claim = threading.Lock()
        self._ended = threading.Event()

    def run(self) -> None:
        """Does it, unless somebody else has begun."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._move()
        except OSError as error:
            self.failure = self._failure(error.strerror or str(error))
        except BaseException as error:
            self.failure = self._failure(f"{type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                raise  # an interrupt, which is for the thread that waits
        finally:
            if self._writes or self.is_unwanted:
                self.tensor = None
            self._ended.set()

    def has_ended(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        self.run()
        if not self._ended.wait(self._file.timeout_s):
            self.failure = self._failure(f"no answer within {self._file.timeout_s:g} s")

    def may_reuse(self) -> bool:
        return self._ended.is_set()

    def give_up(self) -> None:
        super().give_up()
        if self._claim.acquire(blocking=False):
            self.tensor = None
            self._ended.set()
        elif self._ended.is_set():
            self.tensor = None  # a thread that came too late may not have looked at it yet

    def _move(self) -> None:
        tensor = self.tensor
        if tensor is None:
            return
        # A frame of its own: nothing here may outlive it and hold the tensor.
        data = tensor.view(torch.uint8).numpy().data
        if self._writes:
            self._file.write(data, self._start)
        else:
            self._file.read(data, self._start)

    def _failure(self, reason: str) -> tuple[str, str, str]:
        verb = "written to" if self._writes else "read from"
        where = f"({self.num_bytes} bytes at {self._start})"
        given = f"Offloaded activations could not be {verb} {self._file.path} {where}: {reason}."
        return given, _EXPECTED, _ACTION


class _Worker:
    """A thread that does transfers in their order. It ends when this object is gone."""

    def __init__(self, name: str) -> None:
        transfers: SimpleQueue[FileTransfer | None] = SimpleQueue()
        self.start = transfers.put
        threading.Thread(target=_serve, args=(transfers,), name=name, daemon=True).start()
        weakref.finalize(self, transfers.put, None).atexit = False


def _serve(transfers: SimpleQueue[FileTransfer | None]) -> None:
    while (transfer := transfers.get()) is not None:
        transfer.run()
        del transfer  # while this thread waits it holds nothing


class FileStore(Store):
    """Slots of one file. Raises OffloadError when no file can be made."""

    def __init__(self, options: OffloadOptions) -> None:
        self._file = _UnlinkedFile(options)
        self._extents = Extents()
        self._writer, self._reader = _Worker("mlsys-offload-write"), _Worker("mlsys-offload-read")

    @property
    def num_file_bytes(self) -> int:
        """How long the file has grown."""
        return os.fstat(self._file.descriptor).st_size

    def take(self, num_bytes: int) -> Slot:
        start = self._extents.take(num_bytes)
        assert start is not None  # a file has no end
        return Slot(start, num_bytes)

    def give_back(self, slot: Slot) -> None:
        self._extents.give_back(slot.start, slot.num_bytes)

    def write(self, tensor: Tensor, slot: Slot) -> FileTransfer:
        transfer = FileTransfer(self._file, tensor, slot.start, writes=True)
        self._writer.start(transfer)
        return transfer

    def load(self, slot: Slot, written: Transfer, dtype: torch.dtype) -> FileTransfer:
        tensor = torch.empty(slot.num_bytes // dtype.itemsize, dtype=dtype)
        transfer = FileTransfer(self._file, tensor, slot.start, writes=False)
        self._reader.start(transfer)
        return transfer
