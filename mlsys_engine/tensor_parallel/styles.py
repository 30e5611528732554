"""Style texts of a Plan, and the Sharding of each parameter that they mean.

A text is `NAME` or `NAME:a,b,c`. The name says which dim of a weight is cut; the numbers are the lengths of
the segments of that dim, each cut by itself, as a fused query-key-value projection needs (its thirds are cut,
not the whole). Without numbers the dim is one segment.

| name | of | cut |
|---|---|---|
| column | a projection | output features, and the bias with them |
| row | a projection | input features; the bias stays whole and is added once, after the sum over ranks |
| vocabulary | an embedding | rows of the table, uneven where the size does not divide them |
| features | an embedding | the width of the table |
| dim0, dim1, dim2, ... | a parameter by its own name | that dim |

Column and row parallelism: Shoeybi et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.tensor_parallel.sharding import Sharding, even_sharding

MODULE_STYLES = ("column", "row", "vocabulary", "features")


@dataclass(frozen=True, kw_only=True)
class Style:
    """A style text, read."""

    name: str
    segments: tuple[int, ...] = ()  # lengths along the dim that is cut; empty: one segment

    def __str__(self) -> str:
        return self.name + (":" + ",".join(map(str, self.segments)) if self.segments else "")


def parse_style(text: str) -> Style:
    """A style from its text. Raises ConfigError for a name or segments that mean nothing."""
    name, colon, numbers = text.partition(":")
    known = name in MODULE_STYLES or (name.startswith("dim") and name[3:].isdigit())
    lengths = numbers.split(",") if colon else []
    if not known or not all(length.isdigit() and int(length) > 0 for length in lengths):
        raise ConfigError(
            f"The style {text!r}.",
            f"A style is one of {', '.join(MODULE_STYLES)} for a module, or dim0, dim1, ... for a parameter, "
            'with the lengths of its segments after a colon where it has any ("column:768,768,768").',
            did_you_mean(name, MODULE_STYLES),
        )
    return Style(name=name, segments=tuple(int(length) for length in lengths))


def shardings(model: nn.Module, styles: Iterable[tuple[str, str]], size: int) -> dict[str, Sharding]:
    """Which dim and which intervals of each parameter the ranks of a model axis hold.

    `styles` are the pairs of `Plan.tensor_parallel`. The result is by parameter FQN, as `named_parameters`
    tells them: a tied parameter has one entry, under its first name. Parameters without an entry are whole on
    every rank. Raises ConfigError for a name that the model lacks, a style that does not fit its module, and
    two styles that contradict each other about a tied parameter.
    """
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Sharding] = {}
    sources: dict[str, str] = {}
    for fqn, text in styles:
        for parameter, sharding in _of_target(model, fqn, parse_style(text), size):
            name = first_names[id(parameter)]
            if found.setdefault(name, sharding) != sharding:
                raise ConfigError(
                    f"{sources[name]!r} and {fqn!r}: {text!r} cut the parameter {name!r} differently.",
                    "A parameter that two modules share (a tied weight) is cut one way.",
                    "Give both modules styles that cut the same dim: an embedding's vocabulary is its tied "
                    "head's column.",
                )
            sources.setdefault(name, fqn)
    return found


def style_texts(model: nn.Module, found: Mapping[str, Sharding], size: int) -> tuple[tuple[str, str], ...]:
    """The pairs that `shardings` reads back as `found`: modules where a module's style says it all."""
    pairs: list[tuple[str, str]] = []
    told: set[str] = set()
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    for fqn, module in model.named_modules():
        weight = getattr(module, "weight", None)
        name = first_names.get(id(weight), "")
        if name not in found or (not is_projection(module) and not isinstance(module, nn.Embedding)):
            continue
        text = _module_text(module, found[name], size)
        if text is None or (name in told and isinstance(module, nn.Embedding)):
            continue
        implied = shardings(model, [(fqn, text)], size)
        if all(found.get(key) == value for key, value in implied.items()) and not set(implied) <= told:
            pairs.append((fqn, text))
            told |= implied.keys()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, sharding in found.items():
        if name not in told:
            pairs.append((name, _text(f"dim{sharding.dim}", sharding, shapes[name], size)))
    return tuple(pairs)


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a Linear or a transposed one (Conv1D of the GPT-2 code)."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.ndim == 2
        and (isinstance(module, nn.Linear) or is_transposed(module))
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection's weight is (input features, output features): Hugging Face's Conv1D.

    Known by its name, because importing the library for a type would make it a dependency.
    """
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _of_target(model: nn.Module, fqn: str, style: Style, size: int) -> list[tuple[nn.Parameter, Sharding]]:
    """The parameters that one pair of a plan cuts, and how."""
    target = _find(model, fqn)
    if isinstance(target, nn.Parameter):
        dim = {"column": -2, "row": -1, "vocabulary": 0, "features": -1}.get(style.name)
        dim = int(style.name[3:]) if dim is None else target.ndim + dim if dim < 0 else dim
        return [(target, _checked(fqn, style, target, dim, size))]
    weight, bias = getattr(target, "weight", None), getattr(target, "bias", None)
    if style.name in ("column", "row") and is_projection(target) and isinstance(weight, nn.Parameter):
        output_dim = int(is_transposed(target))
        dim = output_dim if style.name == "column" else 1 - output_dim
        found = [(weight, _checked(fqn, style, weight, dim, size))]
        if style.name == "column" and isinstance(bias, nn.Parameter):
            found.append((bias, _checked(fqn, style, bias, 0, size)))
        return found
    if style.name in ("vocabulary", "features") and isinstance(target, nn.Embedding):
        table = cast(nn.Parameter, target.weight)
        return [(table, _checked(fqn, style, table, int(style.name == "features"), size))]
    raise ConfigError(
        f"The style {str(style)!r} for {fqn!r}, a {type(target).__name__}.",
        "column and row are styles of a Linear (or a Conv1D of the GPT-2 code), vocabulary and features of "
        "an Embedding; other parameters are cut by their own names.",
        f'Leave {fqn!r} out, which keeps it whole, or name its parameter: "{fqn}.weight": "dim0".',
    )


def _find(model: nn.Module, fqn: str) -> nn.Module | nn.Parameter:
    owner, _, last = fqn.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        module = None
    target = getattr(module, last, None) if module is not None and last else module
    if isinstance(target, nn.Module | nn.Parameter):
        return target
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    raise unknown_name(fqn, names)


def unknown_name(pattern: str, names: Iterable[str]) -> ConfigError:
    """The error for a name or pattern of a plan that nothing in the model has."""
    return ConfigError(
        f"{pattern!r} in a tensor-parallel plan.",
        "A key is the name of a module or parameter of the model, as named_modules() tells it, with * for "
        "any text within one part.",
        did_you_mean(pattern, [name for name in names if name]),
    )


def _checked(fqn: str, style: Style, parameter: nn.Parameter, dim: int, size: int) -> Sharding:
    shape = tuple(parameter.shape)
    if not 0 <= dim < len(shape):
        raise ConfigError(
            f"The style {str(style)!r} for {fqn!r}, whose parameter is {list(shape)}.",
            f"It has the dims 0 to {len(shape) - 1}.",
            "Name one of these.",
        )
    if style.segments and sum(style.segments) != shape[dim]:
        raise ConfigError(
            f"The style {str(style)!r} for {fqn!r}, whose parameter is {list(shape)}.",
            f"The segments of its dim {dim} add up to {shape[dim]}, these to {sum(style.segments)}.",
            "Give the length of every segment.",
        )
    if shape[dim] < size:
        raise ConfigError(
            f"{fqn!r} is cut along its dim {dim}, of {shape[dim]} elements, over {size} ranks.",
            "Every rank has at least one of them.",
            f"Use a size of at most {shape[dim]}, or leave {fqn!r} out.",
        )
    return even_sharding(shape, dim, size, style.segments)


def _module_text(module: nn.Module, sharding: Sharding, size: int) -> str | None:
    """The style of a projection or an embedding whose weight is cut so."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(module, nn.Embedding):
        name = ("vocabulary", "features")[sharding.dim]
    else:
        name = "column" if sharding.dim == int(is_transposed(module)) else "row"
    return _text(name, sharding, tuple(weight.shape), size)


def _text(name: str, sharding: Sharding, shape: tuple[int, ...], size: int) -> str:
    """The text for intervals; raises ConfigError for those that no text can say."""
    num_segments = len(sharding.parts[0])
    edges = [0, *(sharding.parts[-1][index][1] for index in range(num_segments))]
    segments = tuple(stop - start for start, stop in pairwise(edges)) if num_segments > 1 else ()
    if math.prod(shape) and even_sharding(shape, sharding.dim, size, segments) != sharding:
        raise ConfigError(
            f"A {name} cut of {list(shape)} into {sharding.parts}.",
            "A plan can say cuts of segments into equal parts.",
            "Cut each segment evenly.",
        )
    return str(Style(name=name, segments=segments))
