"""Plans that people and libraries write: patterns of module names with style words, as a Plan's pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.tensor_parallel.styles import MODULE_STYLES, is_transposed, parse_style, unknown_name

# The words of Hugging Face's plans. What such a word says about a module's outputs is left to the values
# themselves: whoever reads a cut value gathers it if it must.
_WORDS = {
    "colwise": "column",
    "colwise_rep": "column",
    "colwise_gather_output": "column",
    "packed_colwise": "column",
    "rowwise": "row",
    "rowwise_rep": "row",
    "rowwise_split_input": "row",
    "packed_rowwise": "row",
    "embedding_rowwise": "vocabulary",
    "embedding_colwise": "features",
    "grouped_gemm": "dim0",  # a stack of experts, whole ones on each rank
}
_PACKED = ("packed_colwise", "packed_rowwise")  # two matrices beside each other, as gate and up
# Words that say how values travel and cut no parameter.
_NOT_OF_PARAMETERS = (
    "sequence_parallel",
    "replicated_with_grad_allreduce",
    "moe_tp_experts",
    "ep_router",
    "moe_identity_expert",
    "replicate",
    "replicated",
)


def styles_of_plan(model: nn.Module, plan: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The pairs of `Plan.tensor_parallel` for a mapping of patterns to style words.

    A pattern is the name of a module or of a parameter, with `*` for any text within one part of it; words
    are the style texts and Hugging Face's. Later patterns win. Raises ConfigError for a pattern that matches
    nothing and for a word that is not known.
    """
    targets: dict[str, object] = {name: module for name, module in model.named_modules() if name}
    targets |= dict(model.named_parameters(remove_duplicate=False))
    chosen: dict[str, str] = {}
    for pattern, word in plan.items():
        names = _matching(pattern, targets)
        if not names:
            raise unknown_name(pattern, targets)
        for name in names:
            text = _style_text(targets[name], name, word)
            chosen.pop(name, None)
            if text is not None:
                chosen[name] = text
    return tuple(chosen.items())


def plan_of_model(model: nn.Module) -> dict[str, str]:
    """The plan that comes with a Hugging Face model. Raises ConfigError for a model without one."""
    plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise ConfigError(
            f'plan="model" for a {type(model).__name__}.',
            "Such a plan is the tp_plan that comes with a Hugging Face model; this one has none.",
            'Use plan="auto", or give a mapping of module names to styles.',
        )
    if not isinstance(plan, Mapping):
        plan = dict(plan)
    return dict(plan)


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    expression = re.compile("[^.]*".join(re.escape(part) for part in pattern.split("*")))
    return [name for name in names if expression.fullmatch(name)]


def _style_text(target: object, name: str, word: object) -> str | None:
    """The style text for one target; None for a word that leaves its parameters whole."""
    if not isinstance(word, str):
        raise ConfigError(
            f"The style {word!r} for {name!r}.", "A style is a text.", 'Write "column" or "row", for example.'
        )
    if word in _NOT_OF_PARAMETERS:
        return None
    text = _WORDS.get(word, word)
    if text == word and word.partition(":")[0] not in MODULE_STYLES and not word.startswith("dim"):
        raise ConfigError(
            f"The style {word!r} for {name!r}.",
            f"A style is one of {', '.join(MODULE_STYLES)}, dim0, dim1, ..., or a word of Hugging Face's "
            f"plans: {', '.join(_WORDS)}.",
            did_you_mean(word, (*MODULE_STYLES, *_WORDS)),
        )
    if isinstance(target, nn.Embedding):
        text = {"row": "vocabulary", "column": "features"}.get(text, text)
    if word in _PACKED:
        half = _cut_length(target, text) // 2
        text = f"{text}:{half},{half}"
    return str(parse_style(text))


def _cut_length(target: object, name: str) -> int:
    """The length of the dim that "column" or "row" cuts."""
    weight: Any = getattr(target, "weight", target)
    transposed = isinstance(target, nn.Module) and is_transposed(target)
    return int(weight.shape[-2 if (name == "column") != transposed else -1])
