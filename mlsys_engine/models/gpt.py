"""A small GPT: decoder blocks with rotary positions, causal SDPA attention and a squared-ReLU MLP.

The parts are chosen for training quickly on few tokens: rotary positions (Su et al. 2021) instead of learned
ones, squared ReLU (So et al. 2021), normalisation before each part, and no biases. Blocks take and give one
tensor and hold no buffers, so they can be checkpointed, sharded or cut into pipeline stages one by one.

Shapes: B batch, T tokens, D width, H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlsys_engine.errors import ConfigError

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The size of a GPT. The defaults are the byte-level model of the quickstart."""

    vocab_size: int = 256  # tokens in the vocabulary; 256 for bytes
    context_length: int = 64  # longest input in tokens
    num_layers: int = 2  # decoder blocks
    num_heads: int = 4  # attention heads a block
    width: int = 128  # features of the residual stream; a multiple of 2 * num_heads
    mlp_ratio: int = 4  # the MLP's inner width as a multiple of width
    dropout: float = 0.0  # probability of dropping, after the embedding, in attention and after each branch
    tied_embeddings: bool = False  # let the head be the transposed embedding
    rotary_base: float = 1000.0  # longest wavelength of the rotary positions in units of 2 pi tokens

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "width", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"GPTConfig({name}={getattr(self, name)}).",
                    "A count of at least 1 is needed.",
                    f"Set {name} to 1 or more.",
                )
        if self.width % (2 * self.num_heads):
            raise ConfigError(
                f"GPTConfig(width={self.width}, num_heads={self.num_heads}).",
                "Each head takes an equal and even number of features (rotary positions turn pairs).",
                f"Set width to a multiple of {2 * self.num_heads}, or change num_heads.",
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"GPTConfig(dropout={self.dropout}).",
                "A probability below 1 is needed.",
                "Set dropout between 0 and, say, 0.5.",
            )
        if not self.rotary_base > 1.0:
            raise ConfigError(
                f"GPTConfig(rotary_base={self.rotary_base}).",
                "Wavelengths grow from feature to feature, so the base exceeds 1.",
                "Set rotary_base to about eight times the context length.",
            )


class GPTOutput(NamedTuple):
    """What GPT.forward gives."""

    logits: Tensor  # (B, T, V)
    loss: Tensor | None  # 0-d, mean over the labels that count; None without labels


class GPT(nn.Module):
    """A decoder-only language model. `GPT(GPTConfig())(input_ids, labels).loss.backward()`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialise()
        if config.tied_embeddings:
            self.embedding.weight = self.head.weight  # with the head's small initial values

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> GPTOutput:
        """Logits for every position and, with labels, the mean loss of predicting each next token.

        `labels` equal `input_ids` where they count and -100 where they do not: they are shifted here, so
        position t is compared with label t + 1, and the first label is never used.
        """
        if input_ids.shape[-1] > self.config.context_length:
            raise ConfigError(
                f"An input of {input_ids.shape[-1]} tokens for a GPT with "
                f"context_length={self.config.context_length}.",
                "The input may not be longer than the model's context; a TokenDataset's windows hold one "
                "token more than its own context_length.",
                f"Set GPTConfig(context_length={input_ids.shape[-1]}), or cut the input.",
            )
        x_BTD = self.dropout(self.embedding(input_ids))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.head(self.norm(x_BTD))
        return GPTOutput(logits_BTV, None if labels is None else next_token_loss(logits_BTV, labels))

    @torch.no_grad()
    def _initialise(self) -> None:
        # Matrices keep the scale of their (normalised) input; those that add to the residual stream share out
        # one unit of variance among all of them (Radford et al. 2019). The embedding is of that order too:
        # near zero it made learning much slower. A small head makes the first loss that of guessing.
        config = self.config
        nn.init.normal_(self.embedding.weight, std=0.5)
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() == 2:
                num_added = 2 * config.num_layers if name.endswith("output.weight") else 1
                nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter.shape[1] * num_added))
        nn.init.normal_(self.head.weight, std=0.02)


class Block(nn.Module):
    """Attention, then MLP, each on normalised input and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD)))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


class Attention(nn.Module):
    """Causal self-attention over rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads, self.rotary_base, self.dropout = config.num_heads, config.rotary_base, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        qkv_BT3HK = self.qkv(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads)
        qk_BT2HK = rotate(qkv_BT3HK[:, :, :2], self.rotary_base)
        q_BHTK, k_BHTK = qk_BT2HK.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHTK,
            qkv_BT3HK[:, :, 2].transpose(1, 2),
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(mixed_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two linear layers around a squared ReLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.width, config.mlp_ratio * config.width, bias=False)
        self.output = nn.Linear(config.mlp_ratio * config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.output(F.relu(self.inner(x_BTD)).square())


def rotate(x_BTNHK: Tensor, base: float) -> Tensor:
    """Turns feature pairs (i, i + K/2) at position t by the angle t * base^(-2i/K): dot products then depend
    on the distance of two positions. The table is made anew each time (T * K/2 sines): no buffer to shard or
    save.
    """
    T, half = x_BTNHK.shape[1], x_BTNHK.shape[-1] // 2
    frequency_K = base ** (-torch.arange(half, device=x_BTNHK.device, dtype=torch.float32) / half)
    angle_TK = torch.outer(torch.arange(T, device=x_BTNHK.device, dtype=torch.float32), frequency_K)
    cosine, sine = angle_TK.cos().to(x_BTNHK.dtype), angle_TK.sin().to(x_BTNHK.dtype)
    cosine, sine = cosine[:, None, None, :], sine[:, None, None, :]
    first, second = x_BTNHK.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of position t against label t + 1, over labels other than -100."""
    # Shifting the labels instead of the logits spares a copy of the largest tensor of the model.
    targets = F.pad(labels_BT[..., 1:], (0, 1), value=IGNORED_LABEL)
    return F.cross_entropy(logits_BTV.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED_LABEL)
