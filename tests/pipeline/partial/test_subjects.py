"""Transformers' own models, unchanged, in two and three stages: loss and gradients to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.pipeline.partial.one_process import check_equal

VOCABULARY = 67
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def text(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, tokens))
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, tokens - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def images(rows: int, side: int) -> dict[str, torch.Tensor]:
    pixels = torch.randn(rows, 3, 16, 16, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(0, 5, (rows,))}


def made(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=3, n_head=4, use_cache=False
        )
        return transformers.GPT2LMHeadModel(config)
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, num_key_value_heads=2, attention_dropout=0.1, use_cache=False, **SIZES
        )
        return transformers.LlamaForCausalLM(config)
    if name == "mixtral":
        config = transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            num_key_value_heads=2,
            num_local_experts=4,
            use_cache=False,
            output_router_logits=True,
            experts_implementation="eager",
            **SIZES,
        )
        return transformers.MixtralForCausalLM(config)
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **rates, **SIZES))
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            use_cache=False,
            decoder_start_token_id=0,
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **rates, **SIZES)
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        pytest.param("llama", marks=pytest.mark.slow),
        "mixtral",
        pytest.param("bert", marks=pytest.mark.slow),
        "t5",
        pytest.param("vit", marks=pytest.mark.slow),
    ],
)
def test_a_model_in_stages_is_the_model(name: str, num_stages: int) -> None:
    torch.manual_seed(0)
    model = made(name).double().train()
    make = images if name == "vit" else text
    batches = [make(4, 12), make(3, 10), make(4, 12)]  # the third ends early
    tied = ["shared.weight"] if name == "t5" else []  # three of its calls are in two stages
    divided = check_equal(model, batches, num_stages, inexact=tied)
    if name == "mixtral":
        assert divided.units.escapes == tuple(f"model.layers.{layer}.mlp.gate" for layer in range(3))
