"""A checkpointed model is the plain model, bit for bit, and keeps less."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine import activation
from mlsys_engine.memory import SavedActivationMeter
from tests.activation.models import Nested, Normed, Stack, Unruly

CHAIN = [nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()]


def chain() -> nn.Sequential:
    return nn.Sequential(*(copy.deepcopy(layer) for _ in range(3) for layer in CHAIN))


def backward(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(7)
    loss = model(x).square().mean()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("make", [Stack, Nested, Normed, chain])
@pytest.mark.parametrize("training", [True, False])
def test_loss_gradients_buffers_and_random_state_equal_the_plain_models_over_three_steps(
    make: Callable[[], nn.Module], training: bool
) -> None:
    torch.manual_seed(0)
    plain = make().train(training)
    checkpointed = activation.checkpoint(copy.deepcopy(plain))
    for step in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loss, grads, buffers = backward(plain, x)
        state = torch.get_rng_state()
        loss_again, grads_again, buffers_again = backward(checkpointed, x)
        assert torch.equal(loss, loss_again)
        assert_same_bits(grads, grads_again)
        assert_same_bits(buffers, buffers_again)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("make", [Stack, Nested, chain])
def test_peak_of_saved_activations_falls(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = make()
    checkpointed = activation.checkpoint(copy.deepcopy(plain))
    peaks = []
    for model in (plain, checkpointed):
        with SavedActivationMeter(model) as meter:
            backward(model, torch.randn(64, 16))
        assert meter.current_bytes == 0
        peaks.append(meter.peak_bytes)
    assert peaks[1] < 0.8 * peaks[0], peaks


def checkpoint_both_levels(model: Nested) -> Nested:
    inner = {f"groups.{i}.inner.{j}": "recompute" for i in range(2) for j in range(2)}
    activation.apply_actions(model, inner)
    activation.checkpoint(model)
    return model


def test_nested_frames_keep_only_the_outermost_inputs_until_the_backward() -> None:
    model = checkpoint_both_levels(Nested())
    x = torch.randn(64, 16)
    with SavedActivationMeter(model) as meter:
        loss = model(x).sum()
        between = meter.current_bytes
        loss.backward()
    assert between == 2 * x.nbytes  # one input for each of the two groups


def test_nested_frames_give_the_plain_gradients() -> None:
    torch.manual_seed(0)
    plain = Nested()
    nested = checkpoint_both_levels(copy.deepcopy(plain))
    x = torch.randn(8, 16)
    assert_same_bits(backward(plain, x)[1], backward(nested, x)[1])


def test_input_gradient_and_retained_graph_equal_the_plain_models() -> None:
    torch.manual_seed(0)
    plain = Stack().eval()
    checkpointed = activation.checkpoint(copy.deepcopy(plain))
    x = torch.randn(8, 16)
    results = []
    for model in (plain, checkpointed):
        leaf = x.clone().requires_grad_()
        loss = model(leaf).square().mean()
        first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        second = torch.autograd.grad(loss, leaf)[0]
        assert torch.equal(first, second)
        results.append(first)
    assert torch.equal(*results)


def test_double_backward_equals_the_plain_models() -> None:
    torch.manual_seed(0)
    plain = Stack(depth=2).eval()
    checkpointed = activation.checkpoint(copy.deepcopy(plain))
    x = torch.randn(4, 16)
    results = []
    for model in (plain, checkpointed):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_bits(*results)


def test_autocast_of_the_forward_is_restored_in_the_recomputation() -> None:
    torch.manual_seed(0)
    plain = Stack()
    checkpointed = activation.checkpoint(copy.deepcopy(plain))
    x = torch.randn(8, 16)
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_bits(*gradients)


def test_accumulation_over_interleaved_forwards_equals_the_plain_models() -> None:
    torch.manual_seed(0)
    plain = Stack()
    checkpointed = activation.checkpoint(copy.deepcopy(plain))
    batches = [torch.randn(n, 16) for n in (3, 1, 5)]
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        losses = [model(x).square().mean() for x in batches]
        for loss in reversed(losses):
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_bits(*gradients)


def test_zero_sized_batch_and_no_grad_run_plainly() -> None:
    model = activation.checkpoint(Stack())
    model(torch.zeros(0, 16)).sum().backward()
    with torch.no_grad():
        assert model(torch.zeros(2, 16)).grad_fn is None


@pytest.mark.parametrize("change", ["fewer", "shape"])
def test_block_that_runs_differently_the_second_time_is_named(change: str) -> None:
    model = activation.checkpoint(Unruly(change))
    with pytest.raises(activation.RecomputeMismatchError, match=r"block 'blocks\.0'.*leave this block out"):
        model(torch.randn(2, 4)).sum().backward()


def test_error_inside_the_recomputation_keeps_its_own_type() -> None:
    model = activation.checkpoint(Stack(depth=1))
    output = model(torch.randn(2, 16))
    model.blocks[0].down.forward = None
    with pytest.raises(TypeError):
        output.sum().backward()


def test_names_copies_pickles_and_removal_keep_the_model_what_it_was() -> None:
    model = Stack()
    names = list(model.state_dict())
    activation.checkpoint(activation.checkpoint(model))
    assert list(model.state_dict()) == names
    x = torch.randn(4, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.blocks[0].forward is not model.blocks[0].forward
        assert_same_bits(backward(model, x)[1], backward(other, x)[1])
        with torch.no_grad():
            other.blocks[0].up.weight.zero_()
        assert not torch.equal(model.blocks[0].up.weight, other.blocks[0].up.weight)
        model.zero_grad()
    activation.uncheckpoint(model)
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_hugging_face_gpt2_with_its_cache_on_has_the_plain_gradients() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32)
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config).train()
    checkpointed = activation.checkpoint(copy.deepcopy(plain))
    ids = torch.randint(0, 64, (2, 16))
    gradients, peaks = [], []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        with SavedActivationMeter(model) as meter:
            model(input_ids=ids, labels=ids).loss.backward()
        peaks.append(meter.peak_bytes)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_bits(*gradients)
    assert peaks[1] < peaks[0]


class LongTail(nn.Module):
    """Saves its last tensor early, and goes on for long."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.num_tails = nn.Linear(16, 16), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        for _ in range(30):
            y = y + 1
        self.num_tails += 1
        return y


def test_a_rest_that_takes_long_is_not_run_again_once_that_is_known() -> None:
    block = LongTail()
    model = activation.apply_actions(nn.Sequential(block), {"0": "recompute"})
    x = torch.randn(20_000, 16)
    model(x).sum().backward()
    assert block.num_tails == 2  # the forward, and the recomputation that saw how long it takes
    model(x).sum().backward()
    assert block.num_tails == 3


class OwnBackward(nn.Module):
    """Takes a gradient in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope


def test_a_backward_inside_a_block_is_refused_with_the_way_out() -> None:
    model = activation.apply_actions(nn.Sequential(OwnBackward()), {"0": "recompute"})
    with pytest.raises(RuntimeError, match="leave the block out with apply_actions"):
        model(torch.randn(2, 16, requires_grad=True))
