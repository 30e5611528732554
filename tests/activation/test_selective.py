"""The policy "selective": the plain model's bits, fewer saved bytes, nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlsys_engine import activation, models, optim, strategies
from mlsys_engine.activation import cheap_operations
from mlsys_engine.memory import SavedActivationMeter

WIDTH, TOKENS, BATCH = 32, 32, 4


def gpt(dropout: float = 0.1) -> nn.Module:
    config = models.GPTConfig(context_length=TOKENS, width=WIDTH, num_layers=3, dropout=dropout)
    return models.GPT(config)


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256}
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=256, n_positions=TOKENS)
        )
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=64))
    if kind == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=128, attn_implementation="eager")
        return transformers.BertForMaskedLM(config)
    sizes.pop("vocab_size")
    config = transformers.ViTConfig(**sizes, intermediate_size=128, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config)


class Residual(nn.Module):
    def __init__(self, channels: int, inplace: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.relu(self.norm1(self.first(x)))))
        y += x
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(8, inplace) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class Many(nn.Module):
    """Every operation of the table, each followed by one that saves its output."""

    OPERATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
        *(F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu, F.mish, F.softplus, F.hardtanh, F.celu, F.selu),
        *(F.hardsigmoid, torch.square, lambda x: x * x, lambda x: x / (x * x + 1.0)),
        lambda x: F.glu(torch.cat((x, x), -1)),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: torch.relu(F.gelu(x)).sigmoid().tanh(),
        lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-3),  # no module has this eps: kept
        lambda x: torch.exp(F.silu(x)).sqrt().rsqrt(),
        lambda x: F.dropout(F.silu(x), 0.3).mul(0.5).to(torch.float64).float(),
        lambda x: F.dropout(x.softmax(-1), 0.2),
        lambda x: F.rms_norm(x, x.shape[-1:]),
        lambda x: F.silu(x.clone(), inplace=True).unsqueeze(0).transpose(0, 1)[:, 0],
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in self.OPERATIONS)
        self.group = nn.GroupNorm(4, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer, operation in zip(self.layers, self.OPERATIONS, strict=True):
            x = (x + layer(operation(x))).clamp(-2.0, 2.0)
        return self.head(F.silu(self.group(x)))


class One(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": gpt,
    **{kind: (lambda kind=kind: hugging_face(kind)) for kind in ("gpt2", "llama", "bert", "vit")},
    "resnet": ResNet,
    "resnet out of place": lambda: ResNet(inplace=False),
    "many": lambda: One(Many()),
}


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    torch.manual_seed(step)
    if isinstance(model, ResNet):
        return model(torch.randn(4, 3, 16, 16, generator=generator)).square().mean()
    if isinstance(model, One):
        return model(torch.randn(BATCH * TOKENS, WIDTH, generator=generator)).square().mean()
    if "ViT" in type(model).__name__:
        images = torch.randn(8, 3, 16, 16, generator=generator)
        return model(pixel_values=images).logits.float().square().mean()
    tokens = torch.randint(0, 256, (BATCH, TOKENS), generator=generator)
    return model(tokens, labels=tokens).loss


def step(model: nn.Module, number: int, autocast: bool = False) -> dict[str, Any]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model, number)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {
        **found,
        **{f"buffer {name}": b.clone() for name, b in model.named_buffers()},
        "loss": loss.detach(),
        "random state": torch.get_rng_state(),
    }


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = make().train()
    return plain, activation.checkpoint(copy.deepcopy(plain), policy="selective")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_three_steps_have_the_plain_models_bits_and_save_less(name: str, autocast: bool) -> None:
    plain, selective = pair(MODELS[name])
    for number in range(3):  # gradients accumulate
        peaks, found = [], []
        for model in (plain, selective):
            with SavedActivationMeter(model) as meter:
                found.append(step(model, number, autocast))
            assert meter.current_bytes == 0
            peaks.append(meter.peak_bytes)
        assert_same_bits(*found)
        assert peaks[1] < peaks[0]
    assert_same_bits(step(plain.eval(), 3, autocast), step(selective.eval(), 3, autocast))


def between(model: nn.Module, x: Tensor) -> int:
    with SavedActivationMeter(model) as meter:
        output = model(x)
        saved = meter.current_bytes
        output.sum().backward()
    assert meter.current_bytes == 0
    return saved


def test_saved_bytes_of_a_block_are_those_of_the_operations_that_are_not_cheap() -> None:
    config = models.GPTConfig(context_length=TOKENS, width=WIDTH)
    plain, selective = pair(lambda: One(models.gpt.Block(config)))
    x = torch.randn(BATCH, TOKENS, WIDTH)
    # Both norms' outputs (1 width each) and the squared ReLU (4 widths) go.
    assert between(plain, x) - between(selective, x) == 6 * x.nbytes


@pytest.mark.parametrize("inplace", [False, True])
def test_residual_block_does_not_keep_the_relu_between_its_convolutions(inplace: bool) -> None:
    plain, selective = pair(lambda: One(Residual(8, inplace)))
    x = torch.randn(4, 8, 16, 16)
    assert between(plain, x) - between(selective, x) == x.nbytes


def test_norm_with_an_eps_of_its_own_is_found_and_one_of_nobodys_is_kept() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.LayerNorm(WIDTH, eps=1e-3), nn.LayerNorm(WIDTH, eps=1e-6)
            self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.up[0](self.one(x)) + self.up[1](self.two(x))
            return y + self.up[2](F.layer_norm(x, (WIDTH,), eps=1e-2))

    plain, selective = pair(lambda: One(Norms()))
    x = torch.randn(256, WIDTH)
    assert between(plain, x) - between(selective, x) == 2 * x.nbytes


def test_blocks_in_a_region_that_is_run_again_keep_nothing_and_have_the_plain_bits() -> None:
    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = models.GPTConfig(context_length=TOKENS, width=WIDTH, dropout=0.1)
            self.inner = nn.ModuleList(models.gpt.Block(config) for _ in range(2))
            self.runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            for block in self.inner:
                x = block(x)
            return x

    plain = One(Group())
    nested = copy.deepcopy(plain)
    inner = {f"blocks.0.inner.{i}": "selective" for i in range(2)}
    activation.apply_actions(nested, inner | {"blocks.0": "recompute"})
    x = torch.randn(BATCH, TOKENS, WIDTH)
    grads = []
    for model in (plain, nested):
        torch.manual_seed(1)
        with SavedActivationMeter(model) as meter:
            output = model(x)
            if model is nested:
                # What a selective block keeps is taken by the frame around it.
                assert meter.current_bytes == x.nbytes
            output.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_bits(*grads)
    assert nested.blocks[0].runs == 2


def test_blocks_in_selective_blocks_and_frames_in_them_have_the_plain_bits() -> None:
    for action in ("selective", "recompute"):
        plain, nested = pair(gpt)
        activation.apply_actions(nested, {f"blocks.{i}.mlp": action for i in range(3)})
        assert_same_bits(step(plain, 0), step(nested, 0))


def test_retained_graphs_and_interleaved_forwards_have_the_plain_bits() -> None:
    plain, selective = pair(gpt)
    results = []
    for model in (plain, selective):
        losses = [loss_of(model, number) for number in range(3)]
        grads = [torch.autograd.grad(losses[1], list(model.parameters()), retain_graph=True)]
        for loss in (losses[2], losses[1], losses[0]):
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[2], strict=True))
        results.append({f"{i} {j}": g for i, several in enumerate(grads) for j, g in enumerate(several)})
    assert_same_bits(*results)


def test_double_backward_has_the_plain_bits() -> None:
    plain, selective = pair(lambda: One(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(),
                                                      nn.Linear(64, WIDTH), nn.SiLU())))  # fmt: skip
    results = []
    for model in (plain, selective):
        x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append({"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}})
    assert_same_bits(*results)


def test_an_exception_in_a_block_takes_the_hooks_away_and_the_next_step_is_healthy() -> None:
    plain, selective = pair(gpt)
    own, selective.blocks[1].mlp.forward = selective.blocks[1].mlp.forward, lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loss_of(selective, 0)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    selective.blocks[1].mlp.forward = own
    assert_same_bits(step(plain, 0), step(selective, 0))


def test_nothing_of_a_step_outlives_it_and_many_steps_hold_as_many_tensors_as_one() -> None:
    _, selective = pair(ResNet)  # its ReLUs save their own results
    selection = selective.blocks[0].forward._saving.context
    gc.collect()
    gc.disable()  # what dies must die by counting references
    try:
        seen: list[weakref.ref[Any]] = []
        handle = selective.blocks[1].norm1.register_forward_hook(
            lambda module, inputs, output: seen.append(weakref.ref(output))
        )
        loss_of(selective, 0).backward()
        loss_of(selective, 0)  # a graph whose backward never runs
        assert all(reference() is None for reference in seen)
        handle.remove()
        counts = []
        for _ in range(200):
            loss_of(selective, 0).backward()
            counts.append(len(selection.recipes))
        assert counts == [0] * 200
        before = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
        for _ in range(20):
            loss_of(selective, 0).backward()
        assert sum(issubclass(type(item), Tensor) for item in gc.get_objects()) == before
    finally:
        gc.enable()


def test_an_operation_that_is_computed_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, selective = pair(lambda: One(nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))))
    wrong = cheap_operations._FROM_SAVED | {"GeluBackward0": lambda node: F.silu(node._saved_self)}
    monkeypatch.setattr(cheap_operations, "_FROM_SAVED", wrong)
    with pytest.raises(
        activation.RecomputeMismatchError, match=r"block 'blocks\.0' gave other values .* operation Gelu"
    ):
        selective(torch.randn(256, WIDTH)).sum().backward()


def test_a_saved_tensor_that_was_changed_in_place_is_refused_as_without_the_policy() -> None:
    _, selective = pair(lambda: One(nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh())))
    output = selective(torch.randn(256, WIDTH))
    with torch.no_grad():
        output.add_(1.0)
    with pytest.raises(RuntimeError, match=r"'blocks\.0'.*modified by an inplace operation"):
        output.sum().backward()


def test_parameters_small_tensors_and_no_grad_are_left_alone() -> None:
    _, selective = pair(lambda: One(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))))
    x = torch.randn(4, 8)
    assert between(selective, x) == 3 * x.nbytes
    with torch.no_grad():
        assert selective(x).grad_fn is None


def test_copies_pickles_and_removal_keep_the_model_what_it_was() -> None:
    plain, selective = pair(lambda: gpt(dropout=0.0))
    expected = step(plain, 0)
    for other in (copy.deepcopy(selective), pickle.loads(pickle.dumps(selective))):
        assert other.blocks[0].forward._saving.context is not selective.blocks[0].forward._saving.context
        assert_same_bits(expected, step(other, 0))
    assert list(selective.state_dict()) == list(plain.state_dict())
    activation.uncheckpoint(selective)
    assert all("forward" not in block.__dict__ for block in selective.blocks)


def test_the_policy_gives_every_block_the_action() -> None:
    assert activation.resolve(gpt(), "selective") == {f"blocks.{i}": "selective" for i in range(3)}
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    assert activation.resolve(layers, "selective") == {"": "selective"}


def _trained(rank: int, world_size: int, policy: str | None) -> list[Any]:
    torch.manual_seed(0)
    runner = strategies.wrap(gpt(), optimizer=optim.AdamW, activation=policy, accumulate=2, seed=3)
    for number in range(3):
        generator = torch.Generator().manual_seed(10 * number + rank)
        tokens = [torch.randint(0, 256, (BATCH, TOKENS), generator=generator) for _ in range(2)]
        runner.step([(batch, batch) for batch in tokens])
    return [parameter.detach().numpy().copy() for parameter in runner.model.parameters()]


def test_data_parallel_ranks_train_to_the_plain_bits(run_ranks: Callable[..., list[Any]]) -> None:
    plain, selective = run_ranks(_trained, 2, None), run_ranks(_trained, 2, "selective")
    for one, other in zip(plain, selective, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
