from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from torch import nn

from mlsys_engine.memory import SavedActivationMeter
from mlsys_engine.trace import EXECUTION, trace
from tests.trace.models import Skipping, skipping_sample

SKIPPING = """\
Skipping: 12 parameters, 1.4 KiB; order: execution.
Forward 1.8 KFLOP, backward 3.5 KFLOP, saved 943 B; gradients: execution.
  module              kind       output  FLOPs  parameters  saved  crosses before
  embed                             3x8   192        160 B   48 B
  down.0                 0  3x8, scalar   384        288 B  199 B      127 B in 4
  down.1                 0  3x8, scalar   384        288 B  192 B      127 B in 4
  up.0                   0  3x8, scalar   384        288 B  192 B      223 B in 5
  up.1                   0  3x8, scalar   384        288 B  192 B      127 B in 4
  (after the blocks)                                                   120 B in 2
  head                              3x2    96         72 B   96 B"""


class Backwards(nn.Module):
    """Runs its layers in the reverse order of their registration."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.first = nn.Linear(4, 3)
        self.unused = nn.Linear(1, 1)
        self.num_calls = 0
        self.kept, self.history = None, []

    def forward(self, x):
        self.num_calls += 1
        self.history.append(x)
        self.kept = self.first(x)
        return self.last(self.dropout(self.norm(self.kept)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8, bias=False)
        self.body = nn.Linear(4, 4)
        self.embedding = nn.Embedding(8, 4)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(x)))


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) if x.sum().item() > 0 else x


def test_inventory_lists_parameters_buffers_and_modules_in_registration_order():
    model = Backwards()
    model.first.weight.requires_grad_(False)
    model.register_buffer("cache", torch.zeros(2, dtype=torch.int32), persistent=False)
    found = trace(model)
    assert [parameter.fqn for parameter in found.parameters] == [name for name, _ in model.named_parameters()]
    first = next(parameter for parameter in found.parameters if parameter.fqn == "first.weight")
    assert (first.shape, first.dtype, first.requires_grad, first.num_bytes) == (
        (3, 4),
        torch.float32,
        False,
        48,
    )
    persistent = {buffer.fqn: buffer.persistent for buffer in found.buffers}
    assert persistent == {
        "cache": False,
        "norm.running_mean": True,
        "norm.running_var": True,
        "norm.num_batches_tracked": True,
    }
    assert [module.fqn for module in found.modules] == [name for name, _ in model.named_modules()]
    assert [module.is_leaf for module in found.modules] == [False, True, True, True, True, True]


def test_without_a_sample_the_order_is_registration_and_says_so():
    found = trace(Backwards())
    assert found.order_source == "registration: no sample was given"
    assert found.calls == ()
    assert found.parameters_in_order() == found.parameters


def test_with_a_sample_the_order_is_execution_with_output_shapes():
    found = trace(Backwards(), torch.zeros(5, 4))
    assert found.order_source == EXECUTION
    assert [(run.fqn, run.output_shapes) for run in found.calls] == [
        ("", ((5, 2),)),
        ("first", ((5, 3),)),
        ("norm", ((5, 3),)),
        ("dropout", ((5, 3),)),
        ("last", ((5, 2),)),
    ]
    names = [parameter.fqn for parameter in found.parameters_in_order()]
    assert names == [
        # Its nearest called module is the root, which is entered first.
        "unused.weight",
        "unused.bias",
        "first.weight",
        "first.bias",
        "norm.weight",
        "norm.bias",
        "last.weight",
        "last.bias",
    ]


def test_tracing_changes_neither_state_nor_attributes_nor_random_numbers():
    model = Backwards()
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    random_state = torch.get_rng_state()
    trace(model, torch.zeros(5, 4))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model.num_calls == 0 and model.kept is None and model.history == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model._forward_hooks and not model.first._forward_pre_hooks
    assert type(model(torch.zeros(5, 4))) is torch.Tensor


def test_a_model_that_depends_on_values_falls_back_to_registration_and_says_why():
    model = ByValue()
    found = trace(model, torch.ones(1, 2))
    assert found.order_source.startswith("registration: the forward pass on fake tensors raised ")
    assert found.calls == ()
    assert torch.equal(model(-torch.ones(1, 2)), -torch.ones(1, 2))


def test_a_model_that_depends_on_values_is_run_for_real_on_demand_and_put_back():
    class Model(Backwards):
        def forward(self, x):
            assert self.training and super().forward(x).isfinite().all()
            return super().forward(x)

    model = Model()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    found = trace(model, torch.ones(5, 4), compute=True)
    assert found.order_source == EXECUTION and found.calls_of("first")[1].output_shapes == ((5, 3),)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.num_calls == 0 and model.history == [] and not model._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_of_the_model_itself_is_raised_when_it_is_run_for_real():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trace(Backwards(), torch.ones(5, 3), compute=True)


def test_tied_parameters_appear_once_at_their_first_use():
    found = trace(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    assert found.ties == {"embedding.weight": "head.weight"}
    assert [parameter.fqn for parameter in found.parameters_in_order()] == [
        "head.weight",
        "body.weight",
        "body.bias",
    ]


def test_weights_read_by_functional_code_count_as_used_by_their_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    attention = model[1]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.before = attention, model[0]

        def forward(self, x):
            hidden = self.before(x)
            return self.attention(hidden, hidden, hidden)[0]

    names = [parameter.fqn for parameter in trace(Model(), torch.zeros(3, 2, 4)).parameters_in_order()]
    assert names[:2] == ["before.weight", "before.bias"]
    assert "attention.out_proj.weight" in names[2:]


@pytest.mark.parametrize("make", [lambda x: {"x": x}, lambda x: (x,), lambda x: [x], lambda x: x])
def test_a_sample_may_be_a_mapping_a_sequence_or_a_tensor(make):
    assert trace(Backwards(), make(torch.zeros(2, 4))).order_source == EXECUTION


def test_a_meta_model_is_traced():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    found = trace(model, torch.zeros(4, 2, device="meta"))
    assert [run.fqn for run in found.calls] == ["", "0", "1"]


def test_meta_tensors_are_traced_as_on_the_device_of_the_others_or_on_the_cpu():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(2))

        def forward(self, x):
            # On meta attention is another operator, which saves the scores.
            for block in self.blocks:
                x = block(x + torch.arange(8, device=x.device))
            return x

    with torch.device("meta"):
        model = Attention()
    real = trace(Attention(), torch.zeros(3, 2, 8))
    with SavedActivationMeter(model) as meter:
        output = model(torch.zeros(3, 2, 8, device="meta"))
        assert meter.current_bytes != real.saved_bytes
    del output
    assert trace(model, torch.zeros(3, 2, 8, device="meta")) == real
    assert trace(model, torch.zeros(3, 2, 8)) == real


def test_mappings_that_are_no_dictionaries_and_dataclasses_are_taken_apart():
    found = trace(Skipping(), UserDict(skipping_sample()))
    assert found.order_source == EXECUTION
    assert [info.shape for info in found.calls_of("down.0")[0].inputs] == [(3, 8), (), (3, 1)]
    assert found.calls_of("down.0")[0].output_shapes == ((3, 8), ())


def test_a_trace_prints_as_a_table_of_blocks_and_what_is_around_them():
    assert str(trace(Skipping(), skipping_sample())) == SKIPPING


def test_a_trace_without_an_execution_prints_why_and_which_blocks_are_alike():
    assert str(trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == (
        "Sequential: 4 parameters, 48 B; order: registration: no sample was given.\nBlocks: 0, 1."
    )


def test_a_transformers_model_is_traced_in_execution_order():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    found = trace(model, {"input_ids": ids, "labels": ids})
    assert found.order_source == EXECUTION
    assert found.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert found.parameters_in_order()[0].fqn == "transformer.wte.weight"
    assert next(run for run in found.calls if run.fqn == "lm_head").output_shapes == ((2, 8, 32),)


@pytest.mark.parametrize("compiled", [torch.compile, lambda model: model.compile() or model])
def test_a_compiled_model_is_traced_as_the_plain_one(compiled):
    sample = torch.zeros(5, 4)
    plain, found = trace(Backwards(), sample), trace(compiled(Backwards()), sample)
    assert (found.order_source, found.gradients_source) == (EXECUTION, EXECUTION)
    assert (found.saved_bytes, found.forward_flops) == (plain.saved_bytes, plain.forward_flops)
