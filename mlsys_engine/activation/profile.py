"""What a model's blocks cost, as the chain that the solver takes: measured, each kind of block once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mlsys_engine.activation.blocks import KEEP
from mlsys_engine.activation.chain import BlockCosts, Chain, OptionCosts
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


def profile(model: nn.Module, names: Sequence[str], call: Call) -> Profile:
    """Measures the named blocks of the model; called when a plan is made, on the device that trains.

    `call()` runs the model once, as training will, and returns its output or loss. Gradients, buffers and
    random states are left alone. Raises ConfigError when a block is called more than once or not at all.
    """
    seen = observe(model, names, call)
    _check_called_once(names, seen.calls)
    peak, seconds = peak_and_seconds(model, call, repeats=3)
    times: dict[object, Times] = {}
    blocks = []
    for position, made in enumerate(seen.calls):
        block = model.get_submodule(made.name)
        kind = likeness(block, made)
        if kind not in times:
            times[kind] = time_block(block, made)
        blocks.append(_costs(made, times[kind], chained=made.chained and position > 0))
    return Profile(
        names=tuple(made.name for made in seen.calls),
        chain=Chain(blocks=(*blocks, _rest(seen))),
        fixed_bytes=_fixed_bytes(seen),
        takes_cache=any(call.takes_cache for call in seen.calls),
        plain_peak_bytes=peak,
        plain_seconds=seconds,
    )


def _costs(call: BlockCall, times: Times, chained: bool) -> BlockCosts:
    saved = max(call.bytes_after - call.bytes_before, 0)
    return BlockCosts(
        name=call.name,
        input_bytes=call.input_bytes,
        options=(
            OptionCosts(
                name=KEEP,
                forward_s=times.forward_s,
                backward_s=times.backward_s,
                saved_bytes=saved,
                forward_peak_bytes=saved,
                backward_peak_bytes=saved,
            ),
        ),
        drop_forward_s=times.forward_s,
        drop_peak_bytes=min(call.input_bytes, saved),
        splittable=chained,
    )


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
