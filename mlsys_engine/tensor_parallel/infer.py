"""The automatic plan: which weights to cut, found by following cuts through the model's own forward.

One pass decides about every weight where it is first used (see `flow.py`). A cut that fails tells why; its
weights then get segments, or take a slice of a whole input (a row whose sum is the whole output again), or
stay whole; and the next pass shows whether that holds. Nothing but the choice depends on it: values that turn
out to be wanted whole are gathered when the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.tensor_parallel.cuts import Cut, Place
from mlsys_engine.tensor_parallel.flow import Choices, Flow
from mlsys_engine.tensor_parallel.flow_rules import RULES
from mlsys_engine.tensor_parallel.sharding import Sharding
from mlsys_engine.tensor_parallel.styles import even_sharding, is_projection, is_transposed, style_texts
from mlsys_engine.trace.fakes import attributes_restored, buffers_restored, faked
from mlsys_engine.trace.structure import map_tensors, tensors_of

MAX_PASSES = 20  # each settles at least one weight; models of many equal blocks settle them together


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """The styles of an automatic plan, and why the other weights stay whole."""

    styles: tuple[tuple[str, str], ...]  # the pairs of Plan.tensor_parallel
    uses: dict[str, str]  # parameter FQN -> "projection", "embedding" or "position", as the forward uses it
    reasons: dict[str, str]  # parameter FQN -> why it is whole
    sliced: dict[str, str]  # parameter FQN of a row that slices a whole input -> why it is no column
    experts: tuple[str, ...]  # parameter FQNs of stacks that are cut into experts
    num_passes: int


def infer(
    model: nn.Module,
    sample: Any,
    size: int,
    call: Callable[[nn.Module, Any], Any],
    *,
    by_experts: bool = False,
) -> Inferred:
    """The plan for `size` ranks from one microbatch. `call(model, sample)` runs the forward and the loss.

    Runs on fake tensors, or on the model's own where control flow reads data (experts); both leave
    parameters, buffers and random states as they were. Whether heads divide is `check_heads`'s to say: where
    they do not, attention is left whole here. With `by_experts` every rank has whole experts of each stack
    that one grouped product reads, in place of a part of each; without, of those that no cut by width fits.
    """
    choices, projections = Choices(by_experts=by_experts), _projections(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    follow = partial(_followed, size=size, call=call, choices=choices)
    flow, on_data = _first_pass(model, sample, follow)
    num_passes = 1
    while (failed := _failed(flow)) and num_passes < MAX_PASSES:
        # The mildest remedy first: what comes after a cut that had to end was decided without it.
        segmented = any([_wants_segments(shapes, cut, choices) for cut in failed])
        if not segmented and _into_experts(flow, failed, choices):
            pass
        elif not segmented and not any([_slices(projections.keys(), cut, choices) for cut in failed]):
            for cut in failed:
                _keep_whole(cut.columns or cut.places, cut, choices)
        flow = _one_pass(model, sample, follow, on_data)
        num_passes += 1
    for cut in failed:
        _keep_whole(cut.places, cut, choices)
    found = _found(flow, shapes, projections, choices, size)
    return Inferred(
        styles=style_texts(model, found, size),
        uses=flow.uses,
        reasons={name: why for name, why in choices.whole.items() if name not in found},
        sliced={name: why for name, why in choices.sliced.items() if name in found},
        experts=tuple(sorted(name for name in flow.stacks & found.keys() if found[name].dim == 0)),
        num_passes=num_passes,
    )


def check_heads(model: nn.Module, size: int) -> None:
    """Refuses a size that does not divide the model's attention heads, and names those that do."""
    found: dict[str, int] = {}
    for module in model.modules():
        owner = getattr(module, "config", module)
        for field in ("num_attention_heads", "num_key_value_heads", "num_heads"):
            heads = getattr(owner, field, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
                found[f"{type(owner).__name__}.{field}={heads}"] = heads
    common = math.gcd(*found.values())
    if all(heads % size == 0 for heads in found.values()):
        return
    works = ", ".join(str(each) for each in range(1, common + 1) if common % each == 0)
    raise ConfigError(
        f"{next(name for name, heads in found.items() if heads % size)}, over {size} ranks.",
        "Every rank holds whole heads, as many as the others: the size divides all of them.",
        f"Use a size of {works}; a plan of your own may cut other modules only.",
    )


def _projections(model: nn.Module) -> dict[str, tuple[str, int]]:
    """For each projection's weight its bias and the dim of its outputs."""
    return {
        f"{fqn}.weight".lstrip("."): (f"{fqn}.bias".lstrip("."), int(is_transposed(module)))
        for fqn, module in model.named_modules()
        if is_projection(module)
    }


def _failed(flow: Flow) -> list[Cut]:
    return [cut for cut in flow.cuts if cut.root() is cut and (cut.reason or cut.wanted_segments)]


def _found(
    flow: Flow,
    shapes: Mapping[str, tuple[int, ...]],
    projections: Mapping[str, tuple[str, int]],
    choices: Choices,
    size: int,
) -> dict[str, Sharding]:
    """The cuts that held, as shardings; a column's bias is cut with it."""
    found: dict[str, Sharding] = {}
    held = [cut for cut in flow.cuts if cut.root() is cut and not cut.reason]
    for (name, dim), segments in (item for cut in held for item in cut.places.items()):
        if min(segments or (shapes[name][dim],)) < size:
            choices.whole[name] = f"its dim {dim} of {shapes[name][dim]} is too short for {size} ranks"
        elif name not in choices.whole:
            found[name] = even_sharding(shapes[name], dim, size, segments)
            bias, outputs = projections.get(name, ("", -1))
            if dim == outputs and bias in shapes:
                found[bias] = even_sharding(shapes[bias], 0, size, segments)
    return found


def _first_pass(model: nn.Module, sample: Any, follow: Callable[..., Flow]) -> tuple[Flow, bool]:
    """The first pass, and whether it needed data: an error of the model's own comes again then."""
    try:
        return _one_pass(model, sample, follow, on_data=False), False
    except Exception:
        return _one_pass(model, sample, follow, on_data=True), True


def _one_pass(model: nn.Module, sample: Any, follow: Callable[..., Flow], on_data: bool) -> Flow:
    if on_data:
        own = map_tensors(sample, lambda tensor: tensor.detach())
        with attributes_restored(model), buffers_restored(model):
            return follow(model, own)
    with faked(model, sample) as fake_sample:
        return follow(model, fake_sample)


def _followed(
    model: nn.Module, sample: Any, *, size: int, call: Callable[..., Any], choices: Choices
) -> Flow:
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    flow = Flow(names, list(tensors_of(sample)), size, choices, RULES)
    stack: list[str] = []

    def enter(fqn: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stack.append(fqn)
            flow.module = fqn

        return hook

    def leave(*_: Any) -> None:
        stack.pop()
        flow.module = stack[-1] if stack else ""

    handles = []
    try:
        for fqn, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(fqn)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with torch.no_grad(), flow:
            call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return flow


def _wants_segments(shapes: Mapping[str, tuple[int, ...]], cut: Cut, choices: Choices) -> bool:
    """Gives the weights that a failed cut began with the segments it asked for; false when there are none."""
    given = False
    for place in cut.columns if cut.wanted_segments else ():
        total = shapes[place[0]][place[1]]
        lengths = cut.wanted_segments
        if sum(lengths) != total:  # asked for behind other factors of the dim
            lengths = (total // len(lengths),) * len(lengths)
        if place not in choices.segments and sum(lengths) == total:
            choices.segments[place] = lengths
            given = True
    return given


def _into_experts(flow: Flow, failed: list[Cut], choices: Choices) -> bool:
    """Cuts the stacks of a mixture into experts when one of them cannot be cut by width."""
    owners = {name.rpartition(".")[0] for cut in failed for name, _ in cut.columns if name in flow.stacks}
    more = {name for name in flow.stacks if name.rpartition(".")[0] in owners} - choices.stacks
    choices.stacks |= more
    return bool(more)


def _slices(projections: Collection[str], cut: Cut, choices: Choices) -> bool:
    """Makes rows of the projections that a failed cut began with: their sums are whole outputs again."""
    names = [name for name, _ in cut.columns if name in projections and name not in choices.sliced]
    for name in names:
        choices.sliced[name] = cut.reason or "its segments do not fit"
    return bool(names)


def _keep_whole(places: Iterable[Place], cut: Cut, choices: Choices) -> None:
    for name, _ in places:
        choices.whole.setdefault(name, cut.reason or "no cut of it holds")
