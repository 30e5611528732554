"""Narrow forms of state to float32 and back: exact for values that a kernel has stored.

The kernels themselves convert inside the step (csrc/optim/storage.cpp); the formulas are those of
csrc/optim/codes.h and rounding.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlsys_engine.optim.formats import CODE_BLOCK, DTYPE_OF, SCALE_SUFFIX, Form, Master, Stored

_BIASES = {Stored.SIGNED8: 112 << 23, Stored.UNSIGNED8: 96 << 23}  # exponent of float32 beyond the code's
_HALF = 1 << 19  # of the lowest bit that a code keeps


def num_scales(numel: int) -> int:
    """Scales of a moment of `numel` elements in eight-bit codes."""
    return -(-numel // CODE_BLOCK)


def flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor that fills its memory, in the order of that memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def decoded(codes: Tensor, scales: Tensor, stored: Stored) -> Tensor:
    """Float32 values of a moment in eight-bit codes (uint8, any dense shape; scales uint8 [blocks])."""
    code = flat(codes).to(torch.int32)
    scale = (scales.to(torch.int32) << 23).view(torch.float32).repeat_interleave(CODE_BLOCK)[: code.numel()]
    magnitude = code & 0x7F if stored is Stored.SIGNED8 else code
    relative = ((magnitude << 20) + _BIASES[stored]).view(torch.float32)
    if stored is Stored.SIGNED8:
        relative = torch.where(magnitude < 8, magnitude.float() * 2.0**-17, relative)
        relative = torch.where(code >= 0x80, -relative, relative)
    else:
        relative = torch.where(magnitude == 0, 0.0, relative)
    result = torch.empty_strided(codes.shape, codes.stride(), dtype=torch.float32, device=codes.device)
    flat(result).copy_(relative * scale)
    return result


def encoded(values: Tensor, stored: Stored) -> tuple[Tensor, Tensor]:
    """(codes, scales) of float32 values that fill their memory, rounded to nearest."""
    source = flat(values)
    blocks = num_scales(source.numel())
    padded = torch.zeros(blocks * CODE_BLOCK, dtype=torch.float32, device=values.device)
    padded[: source.numel()] = source
    bits = padded.view(torch.int32)
    largest = (bits & 0x7FFFFFFF).view(blocks, CODE_BLOCK).amax(1) if blocks else bits
    scales = ((largest.to(torch.int64) + 0x0FFFFF) >> 23).clamp(min=1).to(torch.int32)
    inverse = ((254 - scales).clamp(min=1) << 23).view(torch.float32).repeat_interleave(CODE_BLOCK)
    relative = padded.abs() * inverse
    normal = (relative.view(torch.int32) + _HALF - _BIASES[stored]) >> 20
    if stored is Stored.SIGNED8:
        below = (relative * 2.0**17 + 0.5).to(torch.int32)
        code = torch.where(relative < 2.0**-14, below, normal) & 0x7F
        code = code | ((bits < 0).to(torch.int32) << 7)
    else:
        code = torch.where(padded > 0, normal.clamp(min=1), 0)
    codes = torch.empty_strided(values.shape, values.stride(), dtype=torch.uint8, device=values.device)
    flat(codes).copy_(code[: source.numel()].to(torch.uint8))
    return codes, scales.to(torch.uint8)


def joined(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The float32 values of a bf16 parameter and its other 16 bits (int16, laid out alike)."""
    bits = (parameter.detach().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def remainder_of(master: Tensor) -> Tensor:
    """The low 16 bits of float32 values, as int16."""
    return torch.where(master.isnan(), 0, master.view(torch.int32)).to(torch.int16)


def to_bfloat16_away(master: Tensor) -> Tensor:
    """Float32 to bf16, ties away from zero: the rounding whose remainder says which way it went."""
    bits = (master.view(torch.int32) + 0x8000) >> 16
    return torch.where(master.isnan(), 0x7FC0, bits).to(torch.int16).view(torch.bfloat16)


def exported(
    parameter: Tensor, state: dict[str, object], form: Form, names: tuple[str, ...]
) -> dict[str, object]:
    """One parameter's state with every moment and the lost bits in float32."""
    result = dict(state)
    for name, stored in zip(names, form.states, strict=True):
        value = result.get(name)
        if not isinstance(value, Tensor) or value.dtype != DTYPE_OF[stored]:
            continue
        scales = result.pop(name + SCALE_SUFFIX, None)
        if isinstance(scales, Tensor):
            result[name] = decoded(value, scales, stored)
        elif stored is not Stored.FLOAT32:
            result[name] = value.float()
    remainder = result.pop("remainder", None)
    if form.master is Master.SPLIT and isinstance(remainder, Tensor):
        result["master"] = joined(parameter, remainder)
    return result
