"""The one instrument for activation memory: how many bytes autograd keeps between forward and backward.

torch has no such meter on the CPU. This one counts what saved-tensor hooks see, each storage once, and is
told of recomputed tensors by the recompute frames (which hide their tensors from outer hooks). It counts what
the graph keeps alive, not transient workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType

import torch
from torch import nn

Observe = Callable[[torch.Tensor], object]

_ACTIVE: ContextVar[tuple[SavedActivationMeter, ...]] = ContextVar("active_activation_meters", default=())


class SavedActivationMeter:
    """Measures the bytes of activations saved for the backward, now and at their peak.

    Use it as a context manager around forward *and* backward. Parameters are left out; pass the `modules` to
    leave their buffers out too. Works on any device, sees through recompute frames, and meters may nest.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.current_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, int] = {}  # storage -> how many saved tensors hold it
        self._excluded = {
            tensor.untyped_storage()._cdata
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }

    def __enter__(self) -> SavedActivationMeter:
        self._reset = _ACTIVE.set((*_ACTIVE.get(), self))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(_Saved, self.read_saved)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        _ACTIVE.reset(self._reset)

    @staticmethod
    def read_saved(saved: _Saved) -> torch.Tensor:
        """The unpack hook of every meter: gives the tensor back without computing anything."""
        return saved.tensor

    def counts(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage is counted now, or never is because it belongs to the modules."""
        key = tensor.untyped_storage()._cdata
        return key in self._storages or key in self._excluded or is_parameter(tensor)

    def hold(self, tensor: torch.Tensor) -> _Hold | None:
        """Counts the tensor's storage until the returned object dies; None when it does not count."""
        if is_parameter(tensor):
            return None
        storage = tensor.untyped_storage()
        if storage._cdata in self._excluded:
            return None
        return _Hold(self, storage)


class _Hold:
    """One reference to a counted storage. Keeping the storage keeps its address from being used again."""

    __slots__ = ("meter", "storage")

    def __init__(self, meter: SavedActivationMeter, storage: torch.UntypedStorage) -> None:
        self.meter, self.storage = meter, storage
        holders = meter._storages.get(storage._cdata, 0)
        meter._storages[storage._cdata] = holders + 1
        if not holders:
            meter.current_bytes += storage.nbytes()
            meter.peak_bytes = max(meter.peak_bytes, meter.current_bytes)

    def __del__(self) -> None:
        key, meter = self.storage._cdata, self.meter
        meter._storages[key] -= 1
        if not meter._storages[key]:
            del meter._storages[key]
            meter.current_bytes -= self.storage.nbytes()


class _Saved:
    """What a saved-tensor hook stores instead of the tensor: the tensor and its counts."""

    __slots__ = ("holds", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # the tensor itself may own the node that owns this object
        self.holds = [meter.hold(tensor) for meter in _ACTIVE.get()]


def current_observer() -> Observe | None:
    """What a recompute frame calls for each tensor that it stores; None when nobody measures.

    Taken during the forward, because the backward of a CUDA graph runs in another thread and context.
    """
    meters = _ACTIVE.get()
    if not meters:
        return None
    return lambda tensor: [meter.hold(tensor) for meter in meters]


def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a leaf that gets gradients, or a view of one: no activation."""
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, nn.Parameter) or (base.requires_grad and base.is_leaf)
