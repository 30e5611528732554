"""Smaller forms in which an activation waits for its backward: bits, bfloat16, or codes in blocks of 64.

`pack(tensor, "int8")` gives a `Packed`, whose `unpack()` gives the elements back. The formulas, and what
happens to inf and nan, are in csrc/activation/pack/codes.h. int8 and fp8 round by chance, as ActNN (Chen et
al. 2021): what is unpacked has the expectation of what was packed, so gradients stay unbiased.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys_engine.activation import torch_packing
from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.optim.kernels import is_native, operators

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to pack: its number in csrc/activation/pack/forms.h, what it takes and what it costs."""

    number: int
    dtypes: frozenset[torch.dtype]
    is_lossy: bool
    elements: int  # of a unit, the last of which may be part filled
    unit_bytes: int


FORMS = {
    # bool as bits: of dropout
    "mask": Form(number=0, dtypes=frozenset({torch.bool}), is_lossy=False, elements=8, unit_bytes=1),
    # !(x <= 0) as bits, unpacked to ones and zeros: all that ReLU's backward asks of its result
    "positive": Form(number=1, dtypes=FLOATS, is_lossy=False, elements=8, unit_bytes=1),
    # the nearest bfloat16
    "bf16": Form(number=2, dtypes=frozenset({torch.float32}), is_lossy=True, elements=1, unit_bytes=2),
    # 255 levels up to the largest of 64 neighbours, by chance
    "int8": Form(number=3, dtypes=FLOATS, is_lossy=True, elements=64, unit_bytes=68),
    # e4m3 relative to the largest of 64 neighbours, by chance
    "fp8": Form(number=4, dtypes=FLOATS, is_lossy=True, elements=64, unit_bytes=68),
}


@dataclass(frozen=True, slots=True)
class Packed:
    """The elements of a tensor in a packed form: `data` is uint8, `dtype` and `numel` are the tensor's."""

    data: Tensor
    form: str
    dtype: torch.dtype
    numel: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed form."""
        return self.data.numel()

    def unpack(self) -> Tensor:
        """The elements, flat, in a new tensor of the original dtype on the same device."""
        if not _runs_kernels(self.data.device):
            return torch_packing.unpack(self.data, self.form, self.dtype, self.numel)
        out = torch.empty(self.numel, dtype=self.dtype, device=self.data.device)
        _operators().unpack(self.data, out, FORMS[self.form].number)
        return out


def packed_bytes(form: str, numel: int) -> int:
    """The bytes that `numel` elements take in `form`. Raises ConfigError for an unknown form."""
    known = _form(form)
    return -(-numel // known.elements) * known.unit_bytes


def pack(tensor: Tensor, form: str, *, seed: int = 0) -> Packed:
    """Packs a contiguous tensor of any shape, in the order of its elements.

    Rounding by chance is a function of (seed, element, largest of its block): the same tensor gives the same
    bits, another one draws anew. Raises ConfigError for an unknown form, for a dtype that the form does not
    take, and for a tensor that is not contiguous.
    """
    known = _form(form)
    dtype, device = tensor.dtype, tensor.device
    if dtype not in known.dtypes or not tensor.is_contiguous():
        raise _refusal(tensor, form, known)
    numel = tensor.numel()
    if not _runs_kernels(device):
        return Packed(torch_packing.pack(tensor, form, seed), form, dtype, numel)
    num_bytes = -(-numel // known.elements) * known.unit_bytes
    data = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    _operators().pack(tensor.detach() if tensor.requires_grad else tensor, data, known.number, seed)
    return Packed(data, form, dtype, numel)


def _form(form: str) -> Form:
    known = FORMS.get(form)
    if known is None:
        raise ConfigError(
            f"The packed form {form!r} was given.", "No form has that name.", did_you_mean(form, FORMS)
        )
    return known


def _refusal(tensor: Tensor, form: str, known: Form) -> ConfigError:
    if tensor.dtype in known.dtypes:
        return ConfigError(
            f"A tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} was given to pack.",
            "A contiguous tensor is expected.",
            "Call .contiguous() on it, or keep it as it is.",
        )
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in known.dtypes))
    others = ", ".join(repr(name) for name, other in FORMS.items() if tensor.dtype in other.dtypes)
    return ConfigError(
        f"A tensor of {tensor.dtype} was given to the packed form {form!r}.",
        f"That form takes {names}.",
        f"Take {others} for such a tensor, or keep it as it is." if others else "Keep it as it is.",
    )


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    return is_native(device)


@functools.cache
def _operators() -> Any:
    native = operators()
    torch.library.register_fake("mlsys::pack", _fake_pack)
    torch.library.register_fake("mlsys::unpack", _fake_unpack)
    return native


def _fake_pack(input: Tensor, packed: Tensor, form: int, seed: int = 0) -> None:
    return None


def _fake_unpack(packed: Tensor, out: Tensor, form: int) -> None:
    return None
