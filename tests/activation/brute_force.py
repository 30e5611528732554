"""The fastest schedule by trying every one: a search over what is held, step by step, with no recurrence."""

from __future__ import annotations

import heapq
import itertools

from mlsys_engine.activation.chain import Chain


def fastest_seconds(chain: Chain, budget_bytes: int) -> float | None:
    """The least time of a schedule of the class that is solved for; None: nothing fits.

    The class: what is stored stays until its backward, and forwards run again from the nearest stored input.

    A state is (backwards to come, the block whose input the last forward has just made, the blocks whose
    inputs are stored on their own, the option under which each block is saved). The forward that goes on from
    the last one, or one from the nearest stored input, may come next, in every mode. Dijkstra's search finds
    the state without backwards to come.
    """
    blocks = chain.blocks
    start = (len(blocks), -1, frozenset[int](), (-1,) * len(blocks))
    order = itertools.count()  # equal times are not told apart by their states
    queue = [(0.0, next(order), start)]
    done = set()
    while queue:
        seconds, _, state = heapq.heappop(queue)
        if state in done:
            continue
        done.add(state)
        if state[0] == 0:
            return seconds
        for step_seconds, follower in followers(chain, budget_bytes, state):
            if follower not in done:
                heapq.heappush(queue, (seconds + step_seconds, next(order), follower))
    return None


def followers(chain: Chain, budget: int, state):
    blocks = chain.blocks
    num_left, passing, stored, saved = state
    held = sum(blocks[k].input_bytes for k in stored)
    held += sum(blocks[k].options[o].saved_bytes for k, o in enumerate(saved) if o >= 0)
    gradient = blocks[num_left - 1].output_gradient_bytes if num_left < len(blocks) else 0

    def is_there(k):  # without the passing value
        return k == 0 or k in stored or (saved[k - 1] >= 0 and blocks[k].splittable)

    last = num_left - 1
    if saved[last] >= 0:
        option = blocks[last].options[saved[last]]
        if held - option.saved_bytes + option.backward_peak_bytes <= budget:
            yield option.backward_s, (last, -1, stored - {last}, with_entry(saved, last, -1))
        return  # the backward is the only thing worth doing then
    nearest = max(k for k in range(num_left) if is_there(k))
    for k in {nearest, passing} - {-1}:
        if saved[k] >= 0:
            continue
        during = held + gradient + (0 if is_there(k) else blocks[k].input_bytes)
        kept = stored if is_there(k) else stored | {k}
        follower_stored = {k + 1} if k + 1 < num_left and not blocks[k + 1].splittable else set()
        following = k + 1 if k + 1 < num_left else -1
        if during + blocks[k].drop_peak_bytes <= budget:
            yield blocks[k].drop_forward_s, (num_left, following, kept | follower_stored, saved)
            if not is_there(k):
                yield blocks[k].drop_forward_s, (num_left, following, stored | follower_stored, saved)
        for o, option in enumerate(blocks[k].options):
            if during + option.forward_peak_bytes <= budget:
                after = with_entry(saved, k, o)
                yield option.forward_s, (num_left, following, kept | follower_stored, after)


def with_entry(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])
