"""What a model's blocks cost, as the chain that the solver takes: measured, each kind of block once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from mlsys_engine.activation.blocks import KEEP
from mlsys_engine.activation.chain import BlockCosts, Chain, OptionCosts
from mlsys_engine.activation.checkpointing import apply_actions, uncheckpoint
from mlsys_engine.activation.measure import (
    BlockCall,
    Call,
    Observation,
    Times,
    likeness,
    observe,
    peak_and_seconds,
    time_block,
)
from mlsys_engine.activation.options import BASE_OF_OFFLOADING
from mlsys_engine.errors import ConfigError

_REST = "rest"  # the chain's last entry: what the model does after its blocks
_NEVER_S = 1e6  # what follows the blocks cannot be run again on its own


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The costs of a model's blocks for samples of one shape; bytes are saved for the backward."""

    names: tuple[str, ...]  # of the blocks, in execution order
    chain: Chain  # the blocks, and what follows them
    fixed_bytes: int  # saved before and between the blocks, whatever is decided about them
    takes_cache: bool  # blocks are given a generation cache, which they must not fill in training
    plain_peak_bytes: int  # when everything is kept
    plain_seconds: float  # of forward and backward then


def profile(model: nn.Module, names: Sequence[str], call: Call, options: Sequence[str] = (KEEP,)) -> Profile:
    """Measures the named blocks of the model; called when a plan is made, on the device that trains.

    `call()` runs the model once, as training will, and returns its output or loss; once for each of the
    `options`, of which "keep" is the first. Gradients, buffers and random states are left alone. Raises
    ConfigError when a block is called more than once or not at all.
    """
    seen = observe(model, names, call)
    _check_called_once(names, seen.calls)
    peak, seconds = peak_and_seconds(model, call, repeats=3)
    under = [seen]
    for option in options[1:]:
        with _applied(model, names, option):
            under.append(observe(model, names, call))
    costs = _costs(model, options, under)
    blocks = tuple(
        BlockCosts(
            name=made.name,
            input_bytes=made.input_bytes,
            options=of_block,
            drop_forward_s=of_block[0].forward_s,
            drop_peak_bytes=min(made.input_bytes, of_block[0].saved_bytes),
            splittable=made.chained and position > 0,
        )
        for position, (made, of_block) in enumerate(zip(seen.calls, costs, strict=True))
    )
    return Profile(
        names=tuple(made.name for made in seen.calls),
        chain=Chain(blocks=(*blocks, _rest(seen))),
        fixed_bytes=_fixed_bytes(seen),
        takes_cache=any(call.takes_cache for call in seen.calls),
        plain_peak_bytes=peak,
        plain_seconds=seconds,
    )


def _costs(
    model: nn.Module, options: Sequence[str], under: Sequence[Observation]
) -> list[tuple[OptionCosts, ...]]:
    """What each block saves under each option in the whole model, and what its kind takes alone.

    The first observation, of the plain model, has the inputs of the others.
    """
    times: dict[object, dict[str, Times]] = {}
    costs = []
    for made, *saved in zip(under[0].calls, *(seen.calls for seen in under), strict=True):
        block = model.get_submodule(made.name)
        kind = likeness(block, made)
        if kind not in times:
            ways = {option: partial(_applied, model, (made.name,), option) for option in options}
            times[kind] = time_block(block, made, ways)
        of_block: dict[str, OptionCosts] = {}
        for option, call in zip(options, saved, strict=True):
            of_block[option] = _option_costs(option, times[kind], call, of_block)
        costs.append(tuple(of_block.values()))
    return costs


def _option_costs(
    option: str, times: Mapping[str, Times], call: BlockCall, known: Mapping[str, OptionCosts]
) -> OptionCosts:
    own, plain = times[option], times[KEEP]
    saved = max(call.bytes_after - call.bytes_before, 0)
    forward_peak, backward_peak = saved, saved + own.backward_peak_bytes
    base = BASE_OF_OFFLOADING.get(option)
    if base is not None:
        # Nothing stays: what the meter saw was still being written. On the way are this block's bytes and
        # those of the one before in the forward, of the one that is loaded ahead in the backward.
        moved = known[base].saved_bytes
        saved, forward_peak, backward_peak = 0, 2 * moved, moved + known[base].backward_peak_bytes
    return OptionCosts(
        name=option,
        # What keeps less does more: a shorter time is noise.
        forward_s=max(own.forward_s, plain.forward_s),
        backward_s=max(own.backward_s, plain.backward_s),
        saved_bytes=saved,
        forward_peak_bytes=forward_peak,
        backward_peak_bytes=backward_peak,
    )


@contextlib.contextmanager
def _applied(model: nn.Module, names: Sequence[str], option: str) -> Iterator[None]:
    if option == KEEP:
        yield
        return
    apply_actions(model, dict.fromkeys(names, option))
    try:
        yield
    finally:
        uncheckpoint(model)


def _rest(seen: Observation) -> BlockCosts:
    last = seen.calls[-1]
    saved = max(seen.bytes_at_end - last.bytes_after, 0)
    keep = OptionCosts(
        name=KEEP,
        forward_s=0.0,
        backward_s=0.0,
        saved_bytes=saved,
        forward_peak_bytes=saved,
        backward_peak_bytes=saved,
    )
    return BlockCosts(
        name=_REST,
        input_bytes=last.input_bytes,
        options=(keep,),
        drop_forward_s=_NEVER_S,
        drop_peak_bytes=saved,
    )


def _fixed_bytes(seen: Observation) -> int:
    between = zip(seen.calls, seen.calls[1:], strict=False)
    return seen.calls[0].bytes_before + sum(
        max(after.bytes_before - before.bytes_after, 0) for before, after in between
    )


def _check_called_once(names: Sequence[str], calls: Sequence[BlockCall]) -> None:
    called = [call.name for call in calls]
    for name in names:
        if called.count(name) != 1:
            raise ConfigError(
                f"The block {name!r} was called {called.count(name)} times in one forward.",
                "A budget is planned for blocks that run once each.",
                'Use policy="full", which takes any number of calls.',
            )
