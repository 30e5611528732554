"""What every place that activations are moved to has in common: a store, and transfers to and from it."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mlsys_engine.errors import ConfigError, UserError

DIRECTORY_VARIABLE = "MLSYS_OFFLOAD_DIR"


class OffloadError(UserError):
    """Activations could not be moved out or back: no space, an unreadable file, no pinned memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """How activations are offloaded. Raises ConfigError for a value that cannot work."""

    directory: str | Path | None = None
    """Where CPU tensors' file is made; None is MLSYS_OFFLOAD_DIR, or else the system's temporary folder."""
    max_writing_bytes: int = 64 << 20
    """A put waits until at most this much is still to be written. 0 waits for each tensor."""
    slab_bytes: int = 256 << 20
    """Pinned host memory for CUDA tensors is taken in slabs of this size."""
    timeout_s: float = 600.0
    """A file that moves no tensor for so long is taken for gone."""

    def __post_init__(self) -> None:
        if self.max_writing_bytes < 0 or self.slab_bytes <= 0 or self.timeout_s <= 0:
            raise ConfigError(
                f"{self} was given.",
                "max_writing_bytes cannot be negative; slab_bytes and timeout_s are more than 0.",
                "Leave them out to get the defaults.",
            )

    def folder(self) -> Path:
        """The folder of the file, by now."""
        return Path(self.directory or os.environ.get(DIRECTORY_VARIABLE) or tempfile.gettempdir())


class Slot(NamedTuple):
    """A piece of a store."""

    start: int
    num_bytes: int
    slab: int = 0


class Transfer(ABC):
    """Bytes on their way, out or back.

    `tensor` is the source until a write has ended, and the destination of a read. `token` is what the
    observer gave for it; it is dropped by the threads that use the lane, because meters are not made for
    others. `failure` is set to the parts of an OffloadError before the transfer ends.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.num_bytes = tensor.nbytes
        self.token: object = None
        self.failure: tuple[str, str, str] | None = None
        self.is_unwanted = False

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether it has ended, without waiting."""

    @abstractmethod
    def wait(self) -> None:
        """What the caller does next, on the host or on its current stream, comes after the transfer.

        After a host's wait for too long `failure` is set, and the transfer may still use the tensor.
        """

    @abstractmethod
    def may_reuse(self) -> bool:
        """Whether its slot, and the memory of a load, may be used again; streams are made to wait for it."""

    def give_up(self) -> None:
        """Nobody will ask for the tensor any more. Called at any time, from any thread, by the collector."""
        self.is_unwanted = True


class Store(ABC):
    """Where tensors of one device go. Called under the lane's lock."""

    @abstractmethod
    def take(self, num_bytes: int) -> Slot:
        """A slot of this size."""

    @abstractmethod
    def give_back(self, slot: Slot) -> None:
        """The slot may be taken again."""

    @abstractmethod
    def write(self, tensor: Tensor, slot: Slot) -> Transfer:
        """Starts to move a flat tensor out."""

    @abstractmethod
    def load(self, slot: Slot, written: Transfer, dtype: torch.dtype) -> Transfer:
        """Starts to move what was written there back, into new memory."""
