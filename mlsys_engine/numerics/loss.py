"""The loss contract: every microbatch yields a sum and a count, and only global sums are ever divided.

So accumulation, padding and ragged batches do not change the result. It is exact when the loss is a sum over
counted items. It is not for auxiliary losses inside a model's `.loss` (weighted by the count of labels), nor
for a loss function that returns the mean over something other than samples: return `(sum, count)` there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics.call import num_samples

IGNORED_LABEL = -100
Loss = Callable[[Any, Any], Any]  # (output, batch) -> mean, or (sum, count)

_CAUSAL = re.compile(r"ForCausalLM|LMHead|DoubleHeads")
# Decoders whose own loss compares logits[:, i] with labels[:, i]: their labels come shifted from the caller.
_CAUSAL_UNSHIFTED = re.compile(
    r"^(BigBirdPegasus|Blenderbot|BlenderbotSmall|CpmAnt|MBart|Bart|Marian|Musicgen|MusicgenMelody|Mvp|Pegasus"
    r"|PLBart|ProphetNet|TrOCR|Whisper)ForCausalLM$|^(Flaubert|XLM)WithLMHeadModel$|^XLNetLMHeadModel$"
)
_UNSHIFTED = re.compile(
    r"ForMaskedLM|ForPreTraining|For\w*(Classification|Segmentation|Detection|Answering|CTC)"
)


def loss_sum_and_count(
    output: Any, batch: Any, loss: Loss | None, *, causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """One microbatch's loss as `(sum, count)`: a 0-d sum with its gradient, and a 0-d float64 count.

    With a loss function: its `(sum, count)` as they are, or its mean times the number of samples. Without:
    the output's `.loss` (a mean) times the number of labels other than -100, after the causal shift if
    `causal`. A microbatch that counts nothing contributes exactly zero, even where its mean is not a number.
    """
    if loss is not None:
        return _of_function(loss(output, batch), batch)
    mean = _own_loss(output)
    return _scaled(mean, count_labels(batch, mean, causal))


def count_labels(batch: Any, mean: torch.Tensor, causal: bool) -> torch.Tensor:
    """How many items a mean was taken over: labels other than -100, or samples when there are no labels."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return torch.tensor(num_samples(batch), dtype=torch.float64, device=mean.device)
    if causal and labels.ndim > 1:
        labels = labels[..., 1:]
    return (labels != IGNORED_LABEL).sum(dtype=torch.float64)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss predicts the next token, so that the first label of a row is not counted.

    Transformers models say so by `loss_type`, or by the name of their class (or of the one that it extends)
    when that is None; encoder-decoders shift their inputs instead. A model that says nothing is taken for a
    causal language model.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    kind, names = getattr(model, "loss_type", None), [base.__name__ for base in type(model).__mro__]
    known = (_CAUSAL_UNSHIFTED, _CAUSAL, _UNSHIFTED)
    name = next((name for name in names if any(pattern.search(name) for pattern in known)), "")
    if _CAUSAL_UNSHIFTED.search(name):
        return False
    if kind == "ForCausalLM" or _CAUSAL.search(name):
        return True
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if isinstance(kind, str) and kind != "ForConditionalGeneration":
        return False
    return not _UNSHIFTED.search(name)


def _own_loss(output: Any) -> torch.Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output:
        loss = output[0]  # transformers with return_dict=False
    if isinstance(output, torch.Tensor) and output.ndim == 0:
        loss = output
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        raise ConfigError(
            f"The model returned {_describe(output)} without a scalar loss, and no loss function was given.",
            "With loss=None the model's output has a scalar .loss; Hugging Face models give it when the "
            "batch holds labels.",
            "Pass loss=fn with fn(output, batch) -> mean or (sum, count), or add labels to the batch.",
        )
    return loss


def _of_function(value: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return _scaled(value, torch.tensor(num_samples(batch), dtype=torch.float64, device=value.device))
    if isinstance(value, tuple | list) and len(value) == 2:
        total, count = value
        if isinstance(total, torch.Tensor) and total.ndim == 0:
            count = torch.as_tensor(count, device=total.device).detach().to(torch.float64)
            if count.ndim == 0:
                return _at_least_fp32(total), count
    raise ConfigError(
        f"The loss function returned {_describe(value)}.",
        "A loss function returns a 0-d mean over the samples of the microbatch, or (0-d sum, count).",
        "Reduce the loss, for example with .mean(), or return (losses.sum(), losses.numel()).",
    )


def _scaled(mean: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The mean of nothing is nan, and nan * 0 is nan: choose instead of multiplying.
    mean = _at_least_fp32(mean)
    total = mean * count.to(mean.dtype)
    return torch.where(count > 0, total, torch.zeros_like(total)), count


def _at_least_fp32(value: torch.Tensor) -> torch.Tensor:
    # bf16 cannot tell counts above 256 apart, and fp16 has no sum above 65504.
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
