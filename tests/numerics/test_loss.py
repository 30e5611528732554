from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import loss_sum_and_count, shifts_labels


def test_own_loss_counts_labels_after_the_causal_shift():
    labels = torch.tensor([[5, 1, -100, 2], [-100, -100, -100, 3]])
    total, count = loss_sum_and_count(SimpleNamespace(loss=torch.tensor(2.0)), {"labels": labels}, None)
    assert (total.item(), count.item()) == (6.0, 3.0)
    assert count.dtype == torch.float64


def test_own_loss_without_a_shift_counts_every_label():
    output = {"loss": torch.tensor(2.0)}
    labels = torch.tensor([[5, 1, -100, 2]])
    assert loss_sum_and_count(output, {"labels": labels}, None, causal=False)[1].item() == 3


@pytest.mark.parametrize(
    "batch",
    [
        {"labels": torch.zeros(4), "x": torch.zeros(4, 2)},  # regression: labels are no classes
        {"labels": torch.zeros(4, dtype=torch.int64)},  # one class a sample: nothing to shift
        {"x": torch.zeros(4, 2)},
        (torch.zeros(4, 2), torch.zeros(9)),
    ],
)
def test_own_loss_without_token_labels_counts_samples(batch):
    assert loss_sum_and_count(SimpleNamespace(loss=torch.tensor(1.5)), batch, None)[0].item() == 6.0


def test_a_tuple_output_starts_with_the_loss():
    total, _ = loss_sum_and_count((torch.tensor(2.0), torch.zeros(3)), torch.zeros(3), None)
    assert total.item() == 6.0


def test_a_batch_that_counts_nothing_contributes_zero_and_no_gradient():
    logits = torch.randn(1, 4, 8, requires_grad=True)
    labels = torch.full((1, 4), -100)
    mean = functional.cross_entropy(logits[:, :-1].reshape(-1, 8), labels[:, 1:].reshape(-1))
    assert mean.isnan()
    total, count = loss_sum_and_count(SimpleNamespace(loss=mean), {"labels": labels}, None)
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0.0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_mean_from_a_loss_function_counts_samples():
    total, count = loss_sum_and_count(
        torch.ones(3), torch.zeros(5, 2), lambda output, batch: output.mean() * 2
    )
    assert (total.item(), count.item()) == (10.0, 5.0)


@pytest.mark.parametrize("count", [7, 7.0, torch.tensor(7), torch.tensor(7.0)])
def test_a_sum_and_count_are_taken_as_they_are(count):
    value = torch.tensor(3.0, requires_grad=True)
    total, found = loss_sum_and_count(None, None, lambda output, batch: (value, count))
    assert total is value and found.item() == 7


@pytest.mark.parametrize("value", [None, torch.zeros(3), (torch.zeros(2), 3), (torch.tensor(1.0),), 1.0])
def test_what_is_neither_mean_nor_sum_and_count_is_refused(value):
    with pytest.raises(ConfigError, match="The loss function returned"):
        loss_sum_and_count(None, torch.zeros(2), lambda output, batch: value)


@pytest.mark.parametrize("output", [torch.zeros(2, 3), SimpleNamespace(loss=None), {"logits": 1}, ()])
def test_an_output_without_a_loss_is_refused_with_the_way_out(output):
    with pytest.raises(ConfigError, match="Pass loss="):
        loss_sum_and_count(output, torch.zeros(2), None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GPT2LMHeadModel", True),
        ("GPT2DoubleHeadsModel", True),
        ("LlamaForCausalLM", True),
        ("BertForMaskedLM", False),
        ("BertForPreTraining", False),
        ("BertForTokenClassification", False),
        ("T5ForConditionalGeneration", False),
        ("SegformerForSemanticSegmentation", False),
    ],
)
def test_transformers_models_say_whether_they_shift(name, expected):
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, name).config_class
    with torch.device("meta"):
        model = getattr(transformers, name)(config_class())
    assert shifts_labels(model) is expected


_SMALL = {"d_model": 16, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "decoder_layers": 1}
_SMALL_DECODERS = [
    ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    ("GPT2DoubleHeadsModel", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    *(
        (f"{family}ForCausalLM", _SMALL | {"is_decoder": True, "is_encoder_decoder": False})
        for family in ("Bart", "Blenderbot", "BlenderbotSmall", "MBart", "Marian", "Mvp", "Pegasus", "PLBart")
    ),
    ("TrOCRForCausalLM", _SMALL),
    ("XLMWithLMHeadModel", {"emb_dim": 16, "n_layers": 1, "n_heads": 2}),
    ("FlaubertWithLMHeadModel", {"emb_dim": 16, "n_layers": 1, "n_heads": 2}),
    ("BertLMHeadModel", {"is_decoder": True, "hidden_size": 16, "num_hidden_layers": 1}),
]


@pytest.mark.parametrize(("name", "settings"), _SMALL_DECODERS)
def test_a_decoder_counts_the_labels_that_its_own_loss_is_the_mean_of(name, settings):
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 32,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": 16,
    }
    if "hidden_size" in settings:
        small |= {"num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**small | settings)).double().eval()
    tokens = torch.randint(3, 32, (3, 8), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 5:] = labels[1, :2] = -100
    with torch.no_grad():
        output = model(input_ids=tokens, labels=labels)
    # By hand, in float64: the loss of every position, with and without the shift.
    shift = int(shifts_labels(model))
    logits, targets = output.logits[:, : 8 - shift].reshape(-1, 32), labels[:, shift:].reshape(-1)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    total, count = loss_sum_and_count(output, {"labels": labels}, None, causal=bool(shift))
    assert count.item() == (targets != -100).sum().item()
    # The model may compute its mean in float32: of 21 terms below 8, each within a few 2**-24.
    torch.testing.assert_close(total.double(), losses.sum(), rtol=1e-5, atol=0.0)


def test_a_subclass_of_a_transformers_model_shifts_as_its_base_does():
    transformers = pytest.importorskip("transformers")
    for base, expected in (("BartForCausalLM", False), ("BertForMaskedLM", False), ("GPT2LMHeadModel", True)):
        kind = type("Mine", (getattr(transformers, base),), {})
        with torch.device("meta"):
            assert shifts_labels(kind(kind.config_class())) is expected


def test_a_model_that_says_nothing_is_causal_and_a_decoder_for_generation_too():
    assert shifts_labels(nn.Linear(1, 1))
    chat = nn.Linear(1, 1)
    chat.loss_type = "ForConditionalGeneration"
    assert shifts_labels(chat)
