"""FLOPs, parameter bytes and saved bytes of a trace against real runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mlsys_engine as mls
from mlsys_engine.memory import SavedActivationMeter
from mlsys_engine.trace import EXECUTION, call_plainly, trace
from tests.activation.models import Nested, Normed, Stack
from tests.activation.test_selective import ResNet
from tests.trace.models import Skipping, skipping_sample

SIZES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)


def own_models():
    tokens = torch.randint(0, 256, (2, 16))
    config = mls.models.GPTConfig(num_layers=2, width=32, num_heads=2)
    return {
        "dropout and dictionaries": (Stack(), torch.randn(4, 16)),
        "blocks called twice": (Nested(), torch.randn(4, 16)),
        "spectral norm and BatchNorm": (Normed(), torch.randn(4, 16)),
        "residual network": (ResNet(), torch.randn(2, 3, 16, 16)),
        "dataclasses and skips": (Skipping(), skipping_sample()),
        "gpt": (mls.models.GPT(config), (tokens, tokens)),
        "a part of a larger batch": (Stack(), torch.randn(8, 16)[2:6]),
    }


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(3, 64, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0  # a mask of ones alone is left out in a real run, which can look at its values
    text = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if name == "gpt2":
        special = dict(bos_token_id=0, eos_token_id=0)
        config = transformers.GPT2Config(
            n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, **special
        )
        return transformers.GPT2LMHeadModel(config), text
    if name == "llama":
        config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=1, **SIZES)
        return transformers.LlamaForCausalLM(config), text
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **SIZES)), text
    if name == "t5":
        sizes = dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        config = transformers.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
        return transformers.T5ForConditionalGeneration(config), text
    if name == "mixtral":
        config = transformers.MixtralConfig(
            vocab_size=64, num_local_experts=4, num_key_value_heads=2, **SIZES
        )
        model = transformers.MixtralForCausalLM(config)
        model.config._experts_implementation = "eager"  # asks which tokens go where
        return model, text
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def saved_in_a_real_run(model, sample):
    with SavedActivationMeter(model) as meter:
        output = call_plainly(model, sample)
        saved = meter.current_bytes
    del output
    return saved


@pytest.mark.parametrize("name", list(own_models()))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_saved_bytes_are_those_that_the_meter_reads_in_a_real_run(name, training):
    model, sample = own_models()[name]
    model.train(training)
    found = trace(model, sample)
    assert (found.order_source, found.gradients_source) == (EXECUTION, EXECUTION)
    assert found.saved_bytes == saved_in_a_real_run(model, sample)
    assert found.saved_bytes > 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit"])
def test_saved_bytes_of_hugging_face_models_are_those_of_a_real_run(name):
    model, sample = hugging_face(name)
    model.train()
    found = trace(model, sample)
    assert (found.order_source, found.gradients_source) == (EXECUTION, EXECUTION)
    assert found.saved_bytes == saved_in_a_real_run(model, sample)


def test_routing_by_value_falls_back_and_is_traced_for_real_on_demand():
    model, sample = hugging_face("mixtral")
    model.train()
    fallen_back = trace(model, sample)
    assert fallen_back.order_source.startswith("registration: the forward pass on fake tensors raised ")
    assert fallen_back.calls == () and fallen_back.saved_bytes is None
    assert fallen_back.repeated_blocks() == (("model.layers.0",),)
    found = trace(model, sample, compute=True)
    assert (found.order_source, found.gradients_source) == (EXECUTION, EXECUTION)
    assert found.saved_bytes == saved_in_a_real_run(model, sample)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_saved_bytes_of_a_call_are_those_of_a_meter_around_it_alone():
    model, sample = Stack(), torch.randn(4, 16)
    found, meters = {}, {}

    def enter(module, args, kwargs, name):
        meters[name] = SavedActivationMeter(model)
        meters[name].__enter__()

    def leave(module, args, kwargs, output, name):
        found[name] = meters[name].current_bytes
        meters[name].__exit__(None, None, None)

    for name in ("blocks.1", "blocks.1.up", "blocks.3"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *a, name=name: enter(*a, name), with_kwargs=True)
        module.register_forward_hook(lambda *a, name=name: leave(*a, name), with_kwargs=True)
    model(sample)
    traced = {call.label: call.saved_bytes for call in trace(Stack(), sample).calls}
    assert found == {name: traced[name] for name in found}


def test_added_bytes_add_up_to_all_that_is_saved():
    model, sample = own_models()["gpt"]
    found = trace(model, sample)
    root = found.calls[0]
    inside = [call for call in found.calls if call.depth == 1]
    assert root.added_bytes == root.saved_bytes == found.saved_bytes
    assert all(call.added_bytes <= call.saved_bytes for call in found.calls)
    # What the model's own code saves besides (embeddings' sum, loss) belongs to no call inside.
    assert 0 < sum(call.added_bytes for call in inside) <= root.added_bytes


def test_flops_of_forward_and_backward_are_those_that_torch_counts():
    for name in ("residual network", "blocks called twice"):
        model, sample = own_models()[name]
        with FlopCounterMode(display=False) as forward:
            output = call_plainly(model, sample)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        found = trace(model, sample)
        assert found.forward_flops == found.calls[0].forward_flops == forward.get_total_flops()
        assert found.backward_flops == found.calls[0].backward_flops == backward.get_total_flops()


def test_attention_on_the_cpu_is_counted_like_its_matrix_products():
    class Attention(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.fused, self.weight = fused, nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            query = x @ self.weight
            if self.fused:
                return F.scaled_dot_product_attention(query, query, query)
            return torch.softmax(query @ query.transpose(-1, -2) / 4, -1) @ query

    x = torch.randn(2, 3, 8, 16)
    fused, plain = trace(Attention(True), x), trace(Attention(False), x)
    assert fused.forward_flops == plain.forward_flops
    # The fused backward computes the scores again: 2 x (2 x 3) batches x 8 queries x 8 keys x 16.
    assert fused.backward_flops == plain.backward_flops + 2 * 6 * 8 * 8 * 16


def test_backward_flops_belong_to_the_call_whose_forward_they_differentiate():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    flops = {
        call.fqn: (call.forward_flops, call.backward_flops) for call in trace(model, torch.randn(3, 4)).calls
    }
    first, last = 2 * 3 * 4 * 8, 2 * 3 * 8 * 2
    # The first layer's input wants no gradient, so it has only its weight's product.
    assert flops == {
        "": (first + last, first + 2 * last),
        "0": (first, first),
        "1": (0, 0),
        "2": (last, 2 * last),
    }


def test_a_module_that_is_called_twice_has_two_calls_with_their_own_figures():
    found = trace(Nested(), torch.randn(4, 16))
    first, second = found.calls_of("groups.0.inner.0")
    assert (first.label, second.label) == ("groups.0.inner.0", "groups.0.inner.0#1")
    assert first.parameter_bytes == second.parameter_bytes == 4 * (2 * 16 + 2 * 16 * 64 + 64 + 16)
    assert first.inputs == second.inputs and first.forward_flops == second.forward_flops
    # Three calls of one inner block or another make a group, whose parameters are counted once.
    assert found.calls_of("groups.0")[0].forward_flops == 3 * first.forward_flops
    assert found.calls_of("groups.0")[0].parameter_bytes == 2 * first.parameter_bytes


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_under_torchs_checkpoint_the_backward_contains_the_second_forward(reentrant):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    found = trace(Model(), torch.randn(4, 8, requires_grad=True))
    assert found.backward_flops == 3 * found.forward_flops
    assert len(found.calls) == 10


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_checkpointed_model_saves_as_much_as_for_real_and_is_left_as_it_was(policy):
    plain, sample = Stack(), torch.randn(4, 16)
    model = mls.activation.checkpoint(Stack(), policy=policy)
    model.load_state_dict(plain.state_dict())
    found = trace(model, sample)
    assert found.saved_bytes == saved_in_a_real_run(model, sample)
    for each in (plain, model):
        torch.manual_seed(0)
        each(sample).sum().backward()
    for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_a_frozen_model_has_no_backward_and_says_so():
    model = Stack().requires_grad_(False)
    found = trace(model, torch.randn(4, 16))
    assert found.gradients_source == "none: nothing that the model returns needs a gradient"
    assert (found.saved_bytes, found.backward_flops, found.calls[0].backward_flops) == (0, None, None)


def test_without_gradients_the_forward_alone_is_traced():
    found = trace(Stack(), torch.randn(4, 16), gradients=False)
    assert found.gradients_source == "none: they were not asked for"
    assert (found.saved_bytes, found.backward_flops, found.calls[0].saved_bytes) == (None, None, None)
    assert found.forward_flops == trace(Stack(), torch.randn(4, 16)).forward_flops > 0


def test_what_call_computes_besides_the_model_counts_in_the_totals():
    model, head = nn.Linear(4, 8), torch.randn(8, 8)

    def call(model, sample):
        return (model(sample) @ head).square().mean()

    found = trace(model, torch.randn(3, 4), call=call)
    assert found.forward_flops == found.calls[0].forward_flops + 2 * 3 * 8 * 8
    assert found.saved_bytes > found.calls[0].saved_bytes
