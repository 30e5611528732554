from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mlsys_engine.trace import EXECUTION, trace


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
        self.kept = None

    def forward(self, x):
        self.num_calls += 1
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
    assert found.executions == ()
    assert found.parameters_in_order() == found.parameters


def test_with_a_sample_the_order_is_execution_with_output_shapes():
    found = trace(Backwards(), torch.zeros(5, 4))
    assert found.order_source == EXECUTION
    assert [(run.fqn, run.output_shapes) for run in found.executions] == [
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
    assert model.num_calls == 0 and model.kept is None
    assert not model._forward_hooks and not model.first._forward_pre_hooks
    assert type(model(torch.zeros(5, 4))) is torch.Tensor


def test_a_model_that_depends_on_values_falls_back_to_registration_and_says_why():
    model = ByValue()
    found = trace(model, torch.ones(1, 2))
    assert found.order_source.startswith("registration: the forward pass on fake tensors raised ")
    assert found.executions == ()
    assert torch.equal(model(-torch.ones(1, 2)), -torch.ones(1, 2))


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
    assert [run.fqn for run in found.executions] == ["", "0", "1"]


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
    assert next(run for run in found.executions if run.fqn == "lm_head").output_shapes == ((2, 8, 32),)
