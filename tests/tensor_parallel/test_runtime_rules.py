"""Rules on cut values against the same functions of whole ones: values, gradients, and what stays cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from mlsys_engine.errors import ConfigError
from mlsys_engine.tensor_parallel.runtime import CutTensor, TensorParallel, gather
from mlsys_engine.tensor_parallel.sharding import even_sharding

# B 2 rows, T 3 tokens, H 4 heads, D 6 features of a head, W = H * D
Function = Callable[[torch.Tensor, torch.Tensor], Any]  # of a value (B, T, W) cut along W, and a whole one


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 3, 4, 6).transpose(1, 2)


def _attended(x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    q = _heads(x)
    mixed = functional.scaled_dot_product_attention(q, q + 1, _heads(whole), is_causal=True)
    return mixed.transpose(1, 2).reshape(2, 3, 24)


def _grouped(x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    keys = _heads(x)[:, ::1, :, :3]
    return keys[:, :, None].expand(2, 4, 5, 3, 3).reshape(2, 20, 3, 3)


CUT: dict[str, Function] = {
    "gelu": lambda x, _: functional.gelu(x),
    "sum with a whole vector": lambda x, whole: x + whole[0, 0],
    "whole first": lambda x, whole: 2 * (whole - x) / 3,
    "broadcast along the cut": lambda x, whole: x * whole[..., :1],
    "where": lambda x, whole: torch.where(whole > 0, x, 0.0),
    "masked_fill": lambda x, whole: x.masked_fill(whole > 0, -1.0),
    "powers and roots": lambda x, _: (x.pow(2) + 1).sqrt().rsqrt().float().double(),
    "in place": lambda x, whole: x.clone().add_(whole).mul_(2),
    "+=": lambda x, whole: _added(x * 1, whole),
    "view as heads": lambda x, _: _heads(x),
    "heads and back": lambda x, _: _heads(x).transpose(1, 2).reshape(2, 3, -1),
    "flatten rows": lambda x, _: x.flatten(0, 1).view(-1, 24),
    "flatten behind the cut": lambda x, _: x.view(2, 3, 4, 6).flatten(2),
    "unflatten": lambda x, _: x.unflatten(-1, (4, -1)),
    "permute": lambda x, _: x.permute(2, 0, 1),
    "mT and T": lambda x, _: x.mT[0].T,
    "unsqueeze and squeeze": lambda x, _: x[:, None].unsqueeze(-1).squeeze(1).squeeze(-1),
    "expand": lambda x, _: x[:, None].expand(2, 5, 3, 24),
    "slices, steps and ellipsis": lambda x, _: x[1:, ::2, ..., :],
    "a choice of rows": lambda x, _: x[torch.tensor([1, 0, 1])],
    "choices side by side": lambda x, _: x[torch.tensor([1, 0]), torch.tensor([2, 2])],
    "an index that is a tensor": lambda x, _: x[torch.tensor(1)],
    "a range of the cut dim": lambda x, _: x[..., 4:20],
    "select and unbind": lambda x, _: x.select(1, 0) + x.unbind(1)[2],
    "narrow": lambda x, _: x.narrow(2, 6, 12),
    "index_select": lambda x, _: x.index_select(1, torch.tensor([2, 0])),
    "split of other dims": lambda x, _: x.split(2, 1)[0],
    "cat of other dims": lambda x, whole: torch.cat((x, whole), 1),
    "stack": lambda x, whole: torch.stack((whole, x)),
    "repeat_interleave of heads": lambda x, _: _heads(x).repeat_interleave(3, 1),
    "grouped heads": _grouped,
    "pad of other dims": lambda x, _: functional.pad(x, (0, 0, 1, 1)),
    "tril": lambda x, _: _heads(x).tril(),
    "rotary halves": lambda x, _: torch.cat((-_heads(x)[..., 3:], _heads(x)[..., :3]), -1),
    "a weight that is whole, by heads": lambda x, whole: functional.linear(_heads(x), whole[0, 0].view(4, 6)),
    "products by heads": lambda x, whole: _heads(x) @ _heads(whole).mT,
    "softmax by heads": lambda x, _: (_heads(x) @ _heads(x).mT).softmax(-1),
    "attention": _attended,
    "layer norm by heads": lambda x, whole: functional.layer_norm(_heads(x), (6,), whole[0, 0, :6]),
    "sum of other dims": lambda x, _: x.sum(1) + x.mean(1, keepdim=True)[:, 0],
    "amax of a head": lambda x, _: _heads(x).amax(-1),
}
WHOLE: dict[str, Function] = {
    "sum over the cut": lambda x, _: x.sum(-1) + x.mean((1, 2), keepdim=False)[:, None],
    "sum of all": lambda x, _: x.sum() + x.square().mean(),
    "softmax over the cut": lambda x, _: x.softmax(-1),
    "layer norm over the cut": lambda x, _: functional.layer_norm(x, (24,)),
    "a product over the cut": lambda x, whole: x @ whole[0].mT,
    "a linear layer over the cut": lambda x, whole: functional.linear(x, whole[0]),
    "cross-entropy of cut classes": lambda x, _: functional.cross_entropy(
        x.flatten(0, 1), torch.tensor([0, 23, -100, 11, 12, 5])
    ),
    "cross-entropy of each": lambda x, _: functional.cross_entropy(
        x.mT, torch.tensor([[0, 23, -100], [11, 12, 5]]), reduction="none"
    ),
    "a smoothed one": lambda x, _: functional.cross_entropy(
        x.flatten(0, 1), torch.arange(6), label_smoothing=0.1
    ),
    "a function without a rule": lambda x, _: torch.logcumsumexp(x, -1),
    "a view that tears parts": lambda x, _: x.view(2, 3, 8, 3)[..., 0].view(-1)[::5],
    "a boolean choice": lambda x, whole: x[whole > 0],
    "norms": lambda x, _: x.norm(dim=-1),
    "a choice of the cut dim": lambda x, _: x[..., 3],
    "sorted": lambda x, _: x.sort(-1).values,
    "gathered without a graph before": lambda x, _: _twice(x),
}  # fmt: skip


# Whether every rank has something of a range, and its parts fit a view, depends on the number of ranks.
DEPENDS = ("narrow", "a view that tears parts")


def _added(x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    x += whole
    return x


def _twice(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        before = torch.logcumsumexp(x, -1)
    return before * torch.logcumsumexp(x, -1)


def _compared(rank: int, world_size: int, functions: str, dim: int = 2) -> dict[str, tuple[float, bool]]:
    found = {}
    for name, function in {"cut": CUT, "whole": WHOLE}[functions].items():
        torch.manual_seed(0)
        x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
        whole = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
        expected = function(x, whole)
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        sharding = even_sharding(tuple(x.shape), dim, world_size)
        part = sharding.take(x.detach(), rank).clone().requires_grad_()
        again = whole.detach().clone().requires_grad_()
        context = TensorParallel(nn.Module(), {}, {}, dist.group.WORLD)
        with context.active():
            result = function(CutTensor(part, x.shape, sharding, context), again)
            (context.whole(result) * weights).sum().backward()
        joined = context.whole(result).detach()
        gaps = [joined - expected.detach(), gather(part.grad, sharding, dist.group.WORLD) - x.grad]
        if whole.grad is not None:
            gaps.append(again.grad - whole.grad)
        found[name] = max(float(gap.abs().max()) for gap in gaps), isinstance(result, CutTensor)
    return found


@pytest.mark.parametrize(("functions", "stays_cut"), [("cut", True), ("whole", False)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_functions_of_cut_values_are_those_of_whole_ones(run_ranks, functions, stays_cut, ranks):
    for found in run_ranks(_compared, ranks, functions):
        for name, (gap, is_cut) in found.items():
            assert gap < 1e-12, name  # some sums of tens of terms of size 1, in another order
            assert is_cut == stays_cut or name in DEPENDS, name


@pytest.mark.parametrize("functions", ["cut", "whole"])
@pytest.mark.parametrize(("ranks", "dim"), [(2, 0), (2, 1), (3, 1)])
def test_so_they_are_when_rows_or_tokens_are_cut(run_ranks, functions, ranks, dim):
    for found in run_ranks(_compared, ranks, functions, dim):
        for name, (gap, _) in found.items():
            assert gap < 1e-12, name


def _refused(rank: int, world_size: int) -> str:
    context = TensorParallel(nn.Module(), {}, {}, dist.group.WORLD)
    sharding = even_sharding((4, 6), 1, world_size)
    value = CutTensor(torch.zeros(4, 3), (4, 6), sharding, context)
    with context.active(), pytest.raises(ConfigError) as caught:
        value.cumsum_(1)
    return str(caught.value)


def test_a_change_in_place_that_mixes_parts_is_refused(run_ranks):
    message = run_ranks(_refused, 2)[0]
    assert "cumsum_" in message and "Write the model with cumsum" in message


def _vocabulary(rank: int, world_size: int) -> float:
    """An uneven vocabulary with a padding word."""
    torch.manual_seed(0)
    table = nn.Embedding(7, 4, padding_idx=5, dtype=torch.float64)
    words = torch.tensor([[0, 6, 5], [3, 4, 4]])
    (table(words).square().sum() / math.pi).backward()
    sharding = even_sharding((7, 4), 0, world_size)
    cut = nn.Embedding(7, 4, padding_idx=5, dtype=torch.float64)
    part = nn.Parameter(sharding.take(table.weight.detach(), rank).clone())
    cut.weight = part
    context = TensorParallel(cut, {"weight": sharding}, {"weight": (7, 4)}, dist.group.WORLD)
    with context.active():
        (cut(words).square().sum() / math.pi).backward()
    return float((gather(part.grad, sharding, dist.group.WORLD) - table.weight.grad).abs().max())


def test_an_uneven_vocabulary_counts_from_where_each_part_begins(run_ranks):
    assert max(run_ranks(_vocabulary, 3)) < 1e-14
