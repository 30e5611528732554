"""The norm pass: one sweep over the gradients before a step that clips as it reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlsys_engine.native import load_tensors
from mlsys_engine.optim.formats import STORED
from mlsys_engine.optim.kernels import CHUNK_ELEMENTS, is_native, operators
from mlsys_engine.optim.segments import is_dense


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squares of float32, bf16 or fp16 tensors in float64, 0-d; zero for none. The order is fixed.

    Tensors on several devices are summed on each, then on the first one's device.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    sums = [_on_device(device, members) for device, members in by_device.items()]
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    total = sums[0]
    for other in sums[1:]:
        total = total + other.to(total.device)
    return total


def squares_of_chunks(spans: Tensor, terms: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """The terms of that sum, one for each chunk of CHUNK_ELEMENTS of each span in order, into `terms`.

    `spans` is int64 [n, 2] on the CPU: addresses and lengths of memory of `dtype` on the device of `terms`
    (float64), which the caller keeps alive.
    """
    operators().chunk_squares(spans, terms, int(STORED[dtype]))


def terms_of(tensor: Tensor) -> Tensor:
    """The terms of one tensor's sum, for those who see tensors one at a time; float64, on its device.

    `sum_of_terms` of all tensors' terms in order has the bits of their `sum_of_squares`.
    """
    if not is_native(tensor.device) or tensor.dtype not in STORED or tensor.layout is not torch.strided:
        return _on_device(tensor.device, [tensor]).view(1)
    flat = tensor if tensor.is_contiguous() else _flat(tensor)
    num_terms = -(-flat.numel() // CHUNK_ELEMENTS)
    terms = torch.empty(num_terms, dtype=torch.float64, device=tensor.device)
    squares_of_chunks(torch.tensor([[flat.data_ptr(), flat.numel()]]), terms, flat.dtype)
    return terms


def sum_of_terms(terms: Tensor) -> Tensor:
    """The sum of all terms in the order of `sum_of_squares`, whoever has made them; 0-d float64."""
    if not is_native(terms.device):
        return terms.sum()
    out = torch.empty((), dtype=torch.float64, device=terms.device)
    operators().add_terms(terms, out)
    return out


def sum_over_gradients(groups: Sequence[list[Tensor]]) -> Tensor | None:
    """`sum_of_squares` of the present gradients of lists of parameters, read in one native look.

    None where it takes more: no gradients, or unlike ones, DTensors, gaps, a device without kernels.
    """
    found = load_tensors().gradient_spans(groups)  # keeps the gradients' memory
    if found is None or found.dtype not in STORED or not is_native(found.device):
        return None
    out = torch.empty((), dtype=torch.float64, device=found.device)
    operators().sum_of_squares(found.spans, out, int(STORED[found.dtype]))
    return out


def clip_scale(sum_of_squares: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients by so that their norm is at most `max_norm`, as clip_grad_norm_ does.

    A 0-d tensor on the same device; pass it to `step_scaled(grad_scale=...)`. With a norm that is nan it is
    nan.
    """
    return (max_norm / (sum_of_squares.sqrt() + 1e-6)).clamp(max=1.0)


def _on_device(device: torch.device, tensors: list[Tensor]) -> Tensor:
    dtypes = {tensor.dtype for tensor in tensors}
    plain = dtypes <= STORED.keys() and all(tensor.layout is torch.strided for tensor in tensors)
    if plain and len(dtypes) > 1:
        members = [[tensor for tensor in tensors if tensor.dtype is dtype] for dtype in STORED]
        return torch.stack([_on_device(device, alike) for alike in members if alike]).sum()
    if not is_native(device) or not plain:
        dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
        return torch.stack(torch._foreach_norm(dense, 2, torch.float64)).square().sum()
    spans, held = [], []
    # One pass: with thousands of tensors fetching each object from memory is what costs.
    for tensor in tensors:
        if not tensor.is_contiguous():
            tensor = _flat(tensor)  # noqa: PLW2901
            held.append(tensor)  # may be a copy: it must outlive the call below
        spans.append(tensor.data_ptr())
        spans.append(tensor.numel())
    out = torch.empty((), dtype=torch.float64, device=device)
    form = int(STORED[tensors[0].dtype])
    operators().sum_of_squares(torch.tensor(spans, dtype=torch.int64).view(-1, 2), out, form)
    del held
    return out


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor with unusual strides: a view where its memory has no gaps, else a copy."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.contiguous()
