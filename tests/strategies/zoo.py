"""Eight ordinary models and their batches: what strategies have to divide without a change to any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

WORDS = 96
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
Batch = dict[str, Any]


class InFloat64(TorchFunctionMode):
    """Norms, routers and losses that models compute in float32, whatever their weights are, in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double

        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(widened, args), **{key: widened(each) for key, each in (kwargs or {}).items()})


def text(rows: int, tokens: int) -> Batch:
    """Ids of which some at the end of the last row are masked."""
    ids = torch.randint(3, WORDS, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[-1, tokens - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def images(rows: int, _: int) -> Batch:
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": torch.randint(0, 5, (rows,))}


def features(rows: int, tokens: int) -> Batch:
    return {
        "batch": {
            "features": torch.randn(rows, tokens, 8),
            "weights": torch.rand(rows),
            "classes": torch.randint(0, 5, (rows,)),
            "values": torch.randn(rows, 4),
        }
    }


def gpt2() -> nn.Module:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=32, n_embd=32, n_layer=4, n_head=4, use_cache=False, **rates
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, use_cache=False, **SMALL)
    return transformers.LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=WORDS,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
        output_router_logits=True,
        experts_implementation="eager",
        **SMALL,
    )
    return transformers.MixtralForCausalLM(config)


def bert() -> nn.Module:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=WORDS, **rates, **SMALL))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **rates, **SMALL)
    return transformers.ViTForImageClassification(config)


class Residual(nn.Module):
    """Two convolutions with running statistics, around which the input goes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.first_norm, self.second_norm = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second_norm(self.second(functional.relu(self.first_norm(self.first(x)))))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Two groups of two residual blocks, of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.narrow = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.wide = nn.Sequential(Residual(8, 16, 2), Residual(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.wide(self.narrow(functional.relu(self.norm(self.stem(pixel_values)))))
        return {"loss": functional.cross_entropy(self.head(x.mean((2, 3))), labels)}


class Gated(nn.Module):
    """A block that takes and returns a dictionary, and an argument by keyword."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, state: dict[str, Any], *, gate: float = 1.0) -> dict[str, Any]:
        x = state["x"]
        return {"x": x + gate * self.down(functional.gelu(self.up(self.norm(x)))), "seen": state["seen"] + 1}


class Skipping(nn.Module):
    """Skips over stages, dictionaries in and out, a parameter of its own, and a loss on an early value."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter, self.token = nn.Linear(8, width), nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Gated(width) for _ in range(4))
        self.mix = nn.Linear(2 * width, width)
        self.classes, self.values = nn.Linear(width, 5), nn.Linear(width, 4)

    def forward(self, batch: Batch) -> dict[str, Any]:
        x = self.enter(batch["features"])
        state = {"x": torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1), "seen": 0}
        kept: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            if index == 2:
                state["x"] = self.mix(torch.cat([state["x"], kept[1]], -1))
            elif index == 3:
                state["x"] = state["x"] + kept[0]
            state = block(state, gate=0.5 + index)
            kept.append(state["x"])
        found = self.classes(state["x"][:, 0] * batch["weights"][:, None])
        early = functional.mse_loss(self.values(kept[0].mean(1)), batch["values"])
        return {"loss": functional.cross_entropy(found, batch["classes"]) + 0.3 * early, "early": early}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Batch]]] = {
    "gpt2": (gpt2, text),
    "llama": (llama, text),
    "mixtral": (mixtral, text),
    "bert": (bert, text),
    "t5": (t5, text),
    "vit": (vit, images),
    "resnet": (ResNet, images),
    "skipping": (Skipping, features),
}


def model(name: str, dtype: torch.dtype) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype).train()


def batch(name: str, dtype: torch.dtype, seed: int, rows: int = 8, tokens: int = 12) -> Batch:
    """Floating-point inputs in the model's type."""
    torch.manual_seed(seed)
    return _converted(MODELS[name][1](rows, tokens), dtype)


def _converted(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, dict):
        return {key: _converted(value, dtype) for key, value in tree.items()}
    return tree.to(dtype) if tree.is_floating_point() else tree
