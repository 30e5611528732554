"""The automatic plan of Hugging Face's models: the share that it cuts, and the library's own plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mlsys_engine as mls

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 97, "use_cache": False}
LLAMA = TEXT | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERTS = {"num_local_experts": 4, "experts_implementation": "eager", "output_router_logits": True}
T5 = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", TEXT | {"n_embd": 256, "n_layer": 2, "n_head": 4}),
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "BertForMaskedLM": ("BertConfig", BERT | {"vocab_size": 97}),
    "T5ForConditionalGeneration": ("T5Config", TEXT | T5),
    "ViTForImageClassification": ("ViTConfig", BERT | {"image_size": 16, "patch_size": 4}),
    "MixtralForCausalLM": (
        "MixtralConfig",
        LLAMA | {"num_local_experts": 4, "experts_implementation": "eager"},
    ),
}


def made(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    config, settings = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    if name.startswith("ViT"):
        return model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 97, (2, 8))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("name", MODELS)
def test_nearly_all_elements_of_projections_embeddings_and_experts_are_cut(name):
    report = mls.tensor_parallel.report(*made(name), 2)
    assert report.share >= 0.95, str(report)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_the_automatic_plan_cuts_as_the_library_s_own_plan_does(name):
    model, sample = made(name)
    automatic = mls.tensor_parallel.report(model, sample, 2)
    own = mls.tensor_parallel.report(model, sample, 2, "model")
    cuts = [{row.name: row.sharding for row in each.rows if row.sharding} for each in (automatic, own)]
    assert cuts[0] == cuts[1]
