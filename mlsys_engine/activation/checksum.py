"""A number for a tensor's bits, to compare two runs of which the first one's tensors are gone."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2**20  # words: bounds the workspace to 8 MiB
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no bit of a word is lost; Knuth's golden ratio
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor | None:
    """The sum of the tensor's words, each times a number for its place: equal for equal bits, on its device.

    The place counts, so that a permutation is seen. None for tensors without bits of their own: those of
    torch.func's transformations, meta tensors, other layouts, and subclasses (of a DTensor the local part
    counts).
    """
    local = getattr(tensor, "_local_tensor", tensor)  # a DTensor's part
    if type(local) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(
        local
    ):
        return None
    if local.layout is not torch.strided or local.is_meta or local.is_quantized:
        return None
    words = _words(local.detach())
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    if not words.numel():
        return total
    places = torch.arange(1, min(words.numel(), _CHUNK) + 1, device=words.device).mul_(_FACTOR)
    places = places.bitwise_xor_(places >> 29).mul_(_FACTOR).bitwise_or_(1)
    for chunk in words.split(_CHUNK):
        total = total * _FACTOR + (chunk * places[: chunk.numel()]).sum(dtype=torch.int64)
    return total


def _words(tensor: Tensor) -> Tensor:
    """The tensor's elements once each, in order, as whole numbers of the widest type that fits."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(dim) > 1:  # expanded
            tensor = tensor.narrow(dim, 0, 1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.resolve_neg().reshape(-1)
    flat = flat.view(_WHOLE.get(flat.element_size(), torch.uint8))
    if flat.element_size() * flat.numel() % 8:
        return flat
    aligned = flat.element_size() * flat.storage_offset() % 8 == 0
    return (flat if aligned else flat.clone()).view(torch.int64)
