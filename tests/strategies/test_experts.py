"""Mixtures of experts whose rows one grouped product multiplies: by width, by experts, and in stages."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

import mlsys_engine as mls
from mlsys_engine.errors import ConfigError
from mlsys_engine.tensor_parallel import report, shardings, styles_of_plan
from mlsys_engine.trace.fakes import faked
from tests.data_parallel.models import alone
from tests.strategies.stacks import cross_entropy

EXPERTS, WIDTH, HIDDEN = 4, 16, 32
ADAMW = functools.partial(mls.optim.AdamW, lr=0.01)


class Mixture(nn.Module):
    """Each row goes to the expert of its highest score; `skipped` experts get none."""

    def __init__(self, skipped: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.skipped = list(skipped)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / HIDDEN**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).softmax(-1)
        allowed = scores.detach().clone()
        allowed[:, self.skipped] = 0
        chosen, order = allowed.argmax(-1).sort()
        ends = functional.one_hot(chosen, EXPERTS).sum(0).cumsum(0).to(torch.int32)
        hidden = functional.relu(functional.grouped_mm(rows[order], self.up, offs=ends))
        moved = functional.grouped_mm(hidden, self.down, offs=ends)
        weighted = moved * scores[order].gather(1, chosen[:, None])
        return x + weighted[order.argsort()].view_as(x)


def mixtures(skipped: tuple[int, ...] = ()) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, WIDTH), Mixture(skipped), nn.LayerNorm(WIDTH), Mixture(), nn.Linear(WIDTH, 5)
    )


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, 8, generator=generator), torch.randint(0, 5, (6, 4), generator=generator)


def _trained(rank, world_size, skipped):
    steps = [[rows(seed)] for seed in range(10)]
    single = alone(mixtures(skipped), optimizer=ADAMW, loss=cross_entropy)
    expected = [float(single.step(step).loss) for step in steps]
    strategy = mls.ModelParallel(expert_parallel=True)
    runner = mls.wrap(
        mixtures(skipped), optimizer=ADAMW, loss=cross_entropy, strategy=strategy, sample=rows(0)
    )
    held = {name: tuple(parameter.shape) for name, parameter in runner.model.named_parameters()}
    losses = [float(runner.step(step).loss) for step in steps]
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)), held["1.up"]


@pytest.mark.parametrize("skipped", [(), (2, 3)], ids=["all", "a rank without rows"])
def test_experts_on_ranks_train_as_in_one_process(run_ranks, skipped):
    for gap, shape in run_ranks(_trained, 2, skipped):
        assert gap < 1e-4
        assert shape == (EXPERTS // 2, WIDTH, HIDDEN)


STRATEGIES = {
    "width": mls.ModelParallel(2),
    "experts": mls.ModelParallel(2, expert_parallel=True),
    "experts, tokens": mls.ModelParallel(2, expert_parallel=True, sequence_parallel=True),
    "stages": mls.PipelineParallel(2, microbatches=2),
    "experts and stages": mls.HybridParallel(
        model=mls.ModelParallel(2, expert_parallel=True), pipeline=mls.PipelineParallel(2, microbatches=2)
    ),
}


def _language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(num_local_experts=4, output_router_logits=True, **small)
        return transformers.MixtralForCausalLM(config)
    if kind == "qwen3":
        config = transformers.Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8, **small
        )
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=8, **small)
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(kind, layout, marks=() if kind == "mixtral" else pytest.mark.slow)
        for kind in ("mixtral", "qwen3", "gpt-oss")
        for layout in STRATEGIES
    ],
)
def test_hugging_face_s_usual_experts_take_the_same_step(kind, layout):
    model, ids = _language_model(kind), torch.randint(0, 64, (4, 12))
    batch = {"input_ids": ids, "labels": ids}
    world = 4 if layout == "experts and stages" else 2
    plan = mls.plan(model, STRATEGIES[layout], batch, world=world)
    experts = {name: text for name, text in plan.tensor_parallel if ".experts." in name}
    if layout.startswith("experts"):
        assert set(experts.values()) == {"dim0"}
        assert len(experts) == 4  # two stacks in each of two layers
    verdict = mls.verify(model, plan, batch)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("layout", ["width", "stages"])
def test_a_plan_leaves_a_library_s_hooks_as_they_were(layout):
    model, ids = _language_model("mixtral"), torch.randint(0, 64, (4, 12))
    batch = {"input_ids": ids, "labels": ids}
    for _ in range(2):
        mls.plan(model, STRATEGIES[layout], batch, world=2)
    output = model(**batch, output_hidden_states=True)
    assert len(output.router_logits) == 2  # one for each layer
    assert len(output.hidden_states) == 3


def test_experts_that_no_cut_by_width_fits_are_shared_whole():
    ids = torch.randint(0, 64, (4, 12))
    batch = {"input_ids": ids, "labels": ids}
    shares = {kind: report(_language_model(kind), batch, 2).share for kind in ("mixtral", "qwen3", "gpt-oss")}
    assert min(shares.values()) > 0.95
    styles = dict(report(_language_model("gpt-oss"), batch, 2).styles)
    assert styles["model.layers.0.mlp.experts.gate_up_proj"] == "dim0"  # gate and up take turns
    assert styles["model.layers.0.mlp.experts.down_proj"] == "dim0"
    assert dict(report(_language_model("mixtral"), batch, 2).styles)[
        "model.layers.0.mlp.experts.gate_up_proj"
    ].startswith("dim1")


def test_a_plan_may_name_stacks_as_hugging_face_does():
    styles = styles_of_plan(mixtures(), {"*.up": "grouped_gemm", "*.router": "ep_router"})
    assert styles == (("1.up", "dim0"), ("3.up", "dim0"))
    found = shardings(mixtures(), styles, 2)
    assert found["1.up"].parts == (((0, 2),), ((2, 4),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_fakes_have_the_real_shapes(dtype):
    model, x = mixtures().to(dtype), torch.randn(6, 4, 8, dtype=dtype, requires_grad=True)
    expected = model(x)
    with faked(model, x) as fake:
        output = model(fake)
        output.square().mean().backward()
        shape = tuple(model[1].up.grad.shape)
    assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
    assert shape == (EXPERTS, WIDTH, HIDDEN)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: mls.ModelParallel(2, expert_parallel="yes"), "Use True or False"),
        (lambda: mls.ModelParallel(2, {"1.up": "dim0"}, expert_parallel=True), '"dim0" for a stack'),
        (
            lambda: mls.plan(
                nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
                mls.ModelParallel(2, expert_parallel=True),
                torch.zeros(2, 8),
                world=2,
            ),
            "no such stack",
        ),
        (
            lambda: mls.plan(
                mixtures(), mls.ModelParallel(8, expert_parallel=True), rows(0), loss=cross_entropy, world=8
            ),
            "at least 8",
        ),
    ],
)
def test_what_cannot_be_cut_into_experts_is_refused(make, told):
    with pytest.raises(ConfigError, match=told):
        make()
