"""The packed forms in torch's own operations: for devices without our kernels, and what these are tested by.

The same bits as csrc/activation/pack, whose forms.h and codes.h tell the layouts and the formulas; many times
slower. 32-bit words are int64 here, since torch computes little with unsigned numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64  # elements that share a step
WORDS = BLOCK // 4
WORD = 0xFFFFFFFF
INF_BITS = 0x7F800000


def pack(tensor: Tensor, form: str, seed: int) -> Tensor:
    """The uint8 tensor in which `form` keeps the elements of `tensor`."""
    flat = tensor.detach().reshape(-1)
    if form == "mask":
        return _gather_bits(flat)
    if form == "positive":
        return _gather_bits(~(flat <= 0))
    if form == "bf16":
        return flat.bfloat16().view(torch.uint8)
    return _pack_blocks(flat, form, seed)


def unpack(data: Tensor, form: str, dtype: torch.dtype, numel: int) -> Tensor:
    """The `numel` elements of `dtype` that pack() put into `data`."""
    if form in {"mask", "positive"}:
        shifts = torch.arange(8, device=data.device)
        return (data[:, None].long() >> shifts & 1).reshape(-1)[:numel].to(dtype)
    if form == "bf16":
        return data.view(torch.bfloat16).float()
    return _unpack_blocks(data, form, dtype, numel)


def _gather_bits(truth: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(truth.long(), (0, -truth.numel() % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, device=truth.device)).sum(dim=1).to(torch.uint8)


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32).long() & WORD


def _floats(bits: Tensor) -> Tensor:
    return torch.where(bits > 0x7FFFFFFF, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def _pack_blocks(flat: Tensor, form: str, seed: int) -> Tensor:
    values = torch.nn.functional.pad(flat.float(), (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)
    magnitude = _bits(values) & 0x7FFFFFFF
    is_finite = magnitude < INF_BITS
    largest = torch.where(is_finite, magnitude, 0).amax(dim=1, keepdim=True)
    by = CODES[form]
    step, inverse = by.step(largest)
    relative = torch.where(is_finite, values, 0) * inverse
    codes = by.encode(relative, _random_bytes(largest, seed))
    is_special = (~is_finite).any(dim=1, keepdim=True)
    codes = torch.where(is_special, by.cut(codes), codes)
    infinite = torch.where(values < 0, by.special[1], by.special[0])
    codes = torch.where(is_finite, codes, torch.where(magnitude > INF_BITS, by.special[2], infinite))
    step = torch.where(is_special, -step, step)
    interleaved = codes.reshape(-1, 4, WORDS).transpose(1, 2).to(torch.uint8)
    return torch.cat([interleaved.reshape(-1), step.reshape(-1).view(torch.uint8)])


def _unpack_blocks(data: Tensor, form: str, dtype: torch.dtype, numel: int) -> Tensor:
    num_codes = -(-numel // BLOCK) * BLOCK
    codes = data[:num_codes].reshape(-1, WORDS, 4).transpose(1, 2).reshape(-1, BLOCK).long()
    step = data[num_codes:].view(torch.float32).reshape(-1, 1)
    by = CODES[form]
    most = torch.finfo(dtype).max
    values = (by.decode(codes) * step.abs()).clamp(-most, most)
    for code, value in zip(by.special, (torch.inf, -torch.inf, torch.nan), strict=True):
        values = torch.where((step < 0) & (codes == code), value, values)
    return values.reshape(-1)[:numel].to(dtype)


def _random_bytes(largest: Tensor, seed: int) -> Tensor:
    """8 random bits an element: those of draw() in csrc/optim/rounding.h, four elements sharing a word."""
    key = _mixed(seed % 2**64)
    words = torch.arange(largest.numel() * WORDS, device=largest.device).reshape(-1, WORDS) & WORD
    x = words ^ (key & WORD)
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = (x ^ (key >> 32) ^ (largest * 0x9E3779B1 & WORD) ^ (x >> 15)) * 0x846CA68B & WORD
    x = x ^ (x >> 16)
    return torch.cat([x >> (8 * part) & 0xFF for part in range(4)], dim=1)


def _mixed(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _int8_step(largest: Tensor) -> tuple[Tensor, Tensor]:
    value = _floats(largest.clamp(min=0x03FE0000))
    limit = torch.full_like(value, 127.0)  # a scalar divisor is multiplied by its inverse on some devices
    return value / limit, limit / value


def _int8_encode(relative: Tensor, random: Tensor) -> Tensor:
    return (relative + _floats(0x43000080 | random << 8)).long()


def _int8_cut(codes: Tensor) -> Tensor:
    return codes.clamp(2, 254)


def _int8_decode(codes: Tensor) -> Tensor:
    return (codes - 128).float()


def _fp8_step(largest: Tensor) -> tuple[Tensor, Tensor]:
    exponent = (largest + 0x1FFFFF >> 23).clamp(min=9)
    return _floats(exponent - 8 << 23), _floats(262 - exponent << 23)


def _fp8_encode(relative: Tensor, random: Tensor) -> Tensor:
    magnitude = relative.abs()
    below = magnitude < 2.0**-6
    aligned = torch.where(below, magnitude + 2.0**-6, magnitude)
    code = (_bits(aligned) + (random << 12 | 0x800) >> 20) - torch.where(below, 968, 960)
    return code | (_bits(relative) >> 24 & 0x80)


def _fp8_cut(codes: Tensor) -> Tensor:
    return torch.where(codes & 0x7F > 0x7D, codes & 0x80 | 0x7D, codes)


def _fp8_decode(codes: Tensor) -> Tensor:
    magnitude = codes & 0x7F
    normal = _floats(magnitude + 960 << 20)
    value = torch.where(magnitude < 8, magnitude.float() * 2.0**-9, normal)
    return torch.where(codes > 0x7F, -value, value)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The formulas of a form in blocks, and the codes of inf, -inf and nan in special blocks."""

    step: Callable[[Tensor], tuple[Tensor, Tensor]]
    encode: Callable[[Tensor, Tensor], Tensor]
    cut: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    special: tuple[int, int, int]


CODES = {
    "int8": Codes(
        step=_int8_step, encode=_int8_encode, cut=_int8_cut, decode=_int8_decode, special=(255, 1, 0)
    ),
    "fp8": Codes(
        step=_fp8_step, encode=_fp8_encode, cut=_fp8_cut, decode=_fp8_decode, special=(0x7E, 0xFE, 0x7F)
    ),
}
