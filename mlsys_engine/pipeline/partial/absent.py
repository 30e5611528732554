"""Absent values: meta tensors that stand for what another stage computes."""

from __future__ import annotations

from typing import Any

import torch

from mlsys_engine.pipeline.partial.refusals import refusal
from mlsys_engine.pipeline.partial.signatures import Form

_GETTERS = ("shape", "dtype", "ndim", "requires_grad", "layout", "is_leaf", "itemsize", "nbytes", "is_sparse")
_QUESTIONS = (
    "size",
    "dim",
    "stride",
    "numel",
    "nelement",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "is_contiguous",
    "element_size",
    "storage_offset",
    "__len__",
    "__hash__",
)

#: Functions that ask for a tensor's form and read no number of it.
METADATA: frozenset[Any] = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _GETTERS]
    + [getattr(torch.Tensor, name) for name in _QUESTIONS]
    + [getattr(torch, name) for name in ("is_floating_point", "is_complex", "numel", "is_tensor")]
)
_PRINTING = frozenset([torch.Tensor.__repr__, torch.Tensor.__format__])


class Absent(torch.Tensor):
    """A meta tensor that stands for a value of another stage.

    Within a stage's run its mode answers for it; whatever else touches one is told so instead of going on
    with a value that is not there.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA or func in _PRINTING or getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise refusal(
            f"{getattr(func, '__name__', func)} reads a value that another pipeline stage computes.",
            "What a block reads comes in by its arguments; what the last stage returns and another one "
            "computed stays there.",
            "Pass it as an argument, or place the modules in one stage.",
        )


class _Fresh(torch.autograd.Function):
    """A meta tensor that needs a gradient and is no leaf, so that it may be written in place like "
    "any result."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, form: Form) -> torch.Tensor:
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        return None, None


class _Alias(torch.autograd.Function):
    """The same numbers as a value that is no leaf: received tensors are leaves, which nobody may write."""

    @staticmethod
    def forward(ctx: Any, received: torch.Tensor) -> torch.Tensor:
        # Not a view: a view of a leaf may not be written either.
        return received.new_empty(0).set_(received.detach())  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def absent(form: Form) -> Absent:
    """A new absent value of this form."""
    if not form.requires_grad:
        return form.meta().as_subclass(Absent)
    with torch.enable_grad():
        anchor = torch.empty((), device="meta", requires_grad=True)
        made: torch.Tensor = _Fresh.apply(anchor, form)
        return made.as_subclass(Absent)


def as_absent(meta: torch.Tensor) -> Absent:
    """The absent value for a result that was computed on meta."""
    return meta.as_subclass(Absent)


def usable(received: torch.Tensor) -> torch.Tensor:
    """What the model's code gets for a received leaf."""
    if not received.requires_grad:
        return received
    with torch.enable_grad():
        return _Alias.apply(received)


def skeleton(tensor: torch.Tensor) -> torch.Tensor:
    """The plain meta tensor for an absent or a real value."""
    if isinstance(tensor, Absent):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(torch.Tensor)
    if type(tensor) is torch.Tensor and tensor.device.type == "meta":
        return tensor
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(tensor.requires_grad)
