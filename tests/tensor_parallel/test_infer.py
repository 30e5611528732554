"""The automatic plan, on small models whose right plan is known."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import mlsys_engine as mls
from mlsys_engine.errors import ConfigError

D, HEADS, VOCABULARY = 16, 4, 11
IDS = torch.arange(10).reshape(2, 5) % VOCABULARY


class Attention(nn.Module):
    """Causal attention with a fused projection, in one of two orders of its outputs."""

    def __init__(self, num_heads: int, interleaved: bool) -> None:
        super().__init__()
        self.num_heads, self.interleaved = num_heads, interleaved
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.interleaved:  # query, key and value of one head beside each other
            fused = self.qkv(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            q, k, v = fused.chunk(3, -1)
        else:
            parts = self.qkv(x).split(D, dim=2)
            q, k, v = (part.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, num_heads: int, interleaved: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = Attention(num_heads, interleaved)
        self.gate_up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(2 * D, D)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, num_heads: int = HEADS, interleaved: bool = False) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCABULARY, D), nn.Embedding(8, D)
        self.blocks = nn.ModuleList(Block(num_heads, interleaved) for _ in range(2))
        self.batch_norm = nn.BatchNorm1d(D)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.batch_norm(x.transpose(1, 2)).transpose(1, 2))
        return {"loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())}


class Routed(nn.Module):
    """Two experts in weights of three dims, and a router that only its own code knows."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(2, D))
        self.up, self.down = nn.Parameter(torch.randn(2, 2 * D, D)), nn.Parameter(torch.randn(2, D, 2 * D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = functional.linear(x, self.router).softmax(-1).max(-1)
        result = torch.zeros_like(x)
        for expert in range(2):
            rows = torch.where(chosen == expert)[0]
            hidden = functional.relu(functional.linear(x[rows], self.up[expert]))
            y = functional.linear(hidden, self.down[expert]) * weight[rows, None]
            result.index_add_(0, rows, y)
        return result


def styles(model: nn.Module, sample: Any, size: int = 2, **options: Any) -> dict[str, str]:
    return dict(mls.tensor_parallel.report(model, sample, size, **options).styles)


@pytest.mark.parametrize(("interleaved", "qkv"), [(False, "column:16,16,16"), (True, "column")])
def test_a_decoder_is_cut_by_heads_gates_and_vocabulary(interleaved, qkv):
    expected = {"tok": "vocabulary"}
    for index in range(2):
        block = f"blocks.{index}"
        expected |= {f"{block}.attention.qkv": qkv, f"{block}.attention.out": "row"}
        expected |= {f"{block}.gate_up": "column:32,32", f"{block}.down": "row"}
    assert styles(Decoder(interleaved=interleaved), IDS) == expected


def test_the_report_counts_what_is_cut_and_says_why_the_rest_is_whole():
    report = mls.tensor_parallel.report(Decoder(), IDS, 2)
    assert report.share == 1.0
    rows = {row.name: row for row in report.rows}
    assert "positions" in rows["pos.weight"].reason
    assert rows["blocks.1.down.bias"].sharding is None
    assert rows["tok.weight"].sharding.local_shape((VOCABULARY, D), 0) == (6, D)
    text = str(report)
    assert "blocks.*.attention.qkv.weight  2 " in text
    assert text.startswith("2 ranks cut 100.0% of the elements")
    held = sum(row.sharding.take(torch.empty(row.shape), 0).numel() if row.sharding
               else torch.empty(row.shape).numel() for row in report.rows)  # fmt: skip
    assert report.rank_share == held / sum(torch.empty(row.shape).numel() for row in report.rows)


def test_planning_leaves_parameters_buffers_and_random_numbers_alone():
    for model, sample in ((Decoder(), IDS), (Routed(), torch.randn(6, D))):  # on fakes, and on data
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        mls.tensor_parallel.report(model, sample, 2)
        assert torch.equal(torch.get_rng_state(), state)
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_experts_are_cut_within_each_expert_and_a_router_stays_whole():
    report = mls.tensor_parallel.report(Routed(), torch.randn(6, D), 2)
    assert dict(report.styles) == {"up": "dim1", "down": "dim2"}
    assert "softmax" in next(row for row in report.rows if row.name == "router").reason


def test_a_projection_whose_output_is_normalised_slices_its_input_instead():
    model = nn.Sequential(
        nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D)
    )
    report = mls.tensor_parallel.report(model, torch.randn(3, D), 2)
    assert dict(report.styles) == {"0": "row", "2": "column", "4": "row"}
    assert "normalization over a cut dim in 1" in report.rows[0].reason


def test_a_loss_outside_the_model_takes_part_in_the_plan():
    model = nn.Linear(D, 6)
    batch = (torch.randn(3, D), torch.tensor([0, 5, 2]))
    over_vocabulary = styles(
        model, batch, loss=lambda output, batch: functional.cross_entropy(output, batch[1])
    )
    assert over_vocabulary == {"": "column"}
    whole_rows = styles(model, batch, loss=lambda output, batch: output.softmax(-1).square().mean())
    assert whole_rows != over_vocabulary


def test_heads_that_do_not_divide_are_refused_with_sizes_that_work():
    with pytest.raises(ConfigError, match=r"(?s)num_heads=4, over 3 ranks.*Use a size of 1, 2, 4;"):
        mls.tensor_parallel.report(Decoder(), IDS, 3)
    own = {"blocks.*.down": "rowwise"}
    assert styles(Decoder(), IDS, 3, plan=own) == {"blocks.0.down": "row", "blocks.1.down": "row"}


@pytest.mark.parametrize(
    ("plan", "size", "message"),
    [("automatic", 2, 'plan="auto"'), ({"blocks.*.nope": "row"}, 2, "nope"), ("auto", 0, "at least 1")],
)
def test_a_report_of_what_cannot_be_is_refused(plan, size, message):
    with pytest.raises(ConfigError, match=message):
        mls.tensor_parallel.report(Decoder(), IDS, size, plan)


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match=r"size mismatch|shapes cannot be multiplied|must have same"):
        mls.tensor_parallel.report(Routed(), torch.randn(6, D + 1), 2)
