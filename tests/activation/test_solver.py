"""The budget solver against brute force, and its promises: monotone, never above the budget, tight."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_engine.activation.chain import BlockCosts, Chain, OptionCosts, Schedule
from mlsys_engine.activation.simulate import simulate
from mlsys_engine.activation.solver import curve, memory_range, solve
from mlsys_engine.errors import ConfigError
from tests.activation.brute_force import fastest_seconds

# Small whole numbers: every sum is exact in float32, and 1 byte is the table's unit, so equality is meant.


def random_chain(draw: random.Random, length: int, num_options: int = 2, largest: int = 5) -> Chain:
    def option(name: str) -> OptionCosts:
        saved = draw.randint(0, largest)
        return OptionCosts(
            name=name,
            forward_s=draw.randint(0, 4),
            backward_s=draw.randint(0, 6),
            saved_bytes=saved,
            forward_peak_bytes=saved + draw.randint(0, 3),
            backward_peak_bytes=saved + draw.randint(0, 4),
        )

    return Chain(
        blocks=tuple(
            BlockCosts(
                name=f"blocks.{place}",
                input_bytes=draw.randint(0, 3),
                options=tuple(option(f"option-{k}") for k in range(draw.randint(1, num_options))),
                drop_forward_s=draw.randint(0, 4),
                drop_peak_bytes=draw.randint(0, 4),
                output_gradient_bytes=draw.choice((0, 0, 1, 2)),
                splittable=draw.random() < 0.8,
            )
            for place in range(length)
        )
    )


def chains(max_length: int, num_options: int = 2) -> st.SearchStrategy[Chain]:
    """Chains from a seed: far quicker than drawing every number, and as easy to repeat."""

    def chain(seed: int, length: int, repeats: bool) -> Chain:
        draw = random.Random(seed)
        blocks = random_chain(draw, length, num_options).blocks
        if repeats:  # equal blocks at borders that may differ
            blocks = tuple(
                dataclasses.replace(
                    draw.choice(blocks[:2]),
                    input_bytes=draw.choice((1, 1, 3)),
                    output_gradient_bytes=draw.choice((0, 0, 2)),
                )
                for _ in blocks
            )
        return Chain(blocks=blocks)

    return st.builds(chain, st.integers(0, 2**32), st.integers(1, max_length), st.booleans())


def gpt_like(length: int, seed: int = 0) -> Chain:
    """Blocks of about 34 times their input to keep, with five options, all different."""
    draw = random.Random(seed)
    blocks = []
    for place in range(length):
        scale = draw.uniform(0.5, 1.5)
        size, forward_s = int(scale * 2**20), scale * 0.01
        options = tuple(
            OptionCosts(
                name=name,
                forward_s=forward_s * (1 + more_forward),
                backward_s=forward_s * (2 + more_backward),
                saved_bytes=int(saved * size),
                forward_peak_bytes=int((saved + 6) * size),
                backward_peak_bytes=int((saved + 8) * size),
            )
            for name, more_forward, more_backward, saved in (
                ("keep", 0, 0, 34),
                ("selective", 0, 0.05, 22),
                ("packed", 0.03, 0.12, 12),
                ("offloaded", 0.1, 0.15, 5),
                ("recompute", 0, 1, 1),
            )
        )
        blocks.append(
            BlockCosts(
                name=f"blocks.{place}",
                input_bytes=size,
                options=options,
                drop_forward_s=forward_s,
                drop_peak_bytes=8 * size,
                output_gradient_bytes=size,
            )
        )
    return Chain(blocks=tuple(blocks))


def assert_keeps_its_word(chain: Chain, schedule: Schedule) -> None:
    """The simulator, which knows the steps alone, agrees with what the solver says of them."""
    replayed = simulate(chain, schedule)
    assert (replayed.seconds, replayed.peak_bytes) == (schedule.seconds, schedule.peak_bytes)
    assert schedule.peak_bytes <= schedule.budget_bytes


@given(chains(max_length=4), st.floats(0, 1))
@settings(max_examples=2500, deadline=None)
def test_the_schedule_is_as_fast_as_the_best_of_all_schedules(chain: Chain, fraction: float) -> None:
    memory = memory_range(chain)
    budget = memory.least_bytes + round(fraction * (memory.enough_bytes - memory.least_bytes))
    schedule = solve(chain, budget)
    assert schedule.seconds == fastest_seconds(chain, budget)
    assert_keeps_its_word(chain, schedule)


@pytest.mark.parametrize("seed", range(12))
def test_longer_chains_are_solved_as_fast_as_the_best_of_all_schedules(seed: int) -> None:
    draw = random.Random(seed)
    chain = random_chain(draw, 5 + seed % 2)
    memory = memory_range(chain)
    budget = draw.randint(memory.least_bytes, (memory.least_bytes + memory.enough_bytes) // 2)
    schedule = solve(chain, budget)
    assert schedule.seconds == fastest_seconds(chain, budget)
    assert_keeps_its_word(chain, schedule)


@given(chains(max_length=4))
@settings(max_examples=300, deadline=None)
def test_one_byte_below_the_least_budget_nothing_fits(chain: Chain) -> None:
    least = memory_range(chain).least_bytes
    assert fastest_seconds(chain, least) is not None
    assert fastest_seconds(chain, least - 1) is None
    assert solve(chain, least).peak_bytes == least
    if least:
        with pytest.raises(ConfigError, match=f"needs {least:,} bytes"):
            solve(chain, least - 1)


@given(chains(max_length=7, num_options=3), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_rounded_sizes_give_valid_schedules_that_more_memory_never_slows(
    chain: Chain, num_slots: int
) -> None:
    memory = memory_range(chain)
    budgets = list(range(memory.least_bytes, memory.enough_bytes + 1))
    rounded = curve(chain, budgets, num_slots=num_slots).schedules
    for schedule, exact in zip(rounded, curve(chain, budgets).schedules, strict=True):
        assert_keeps_its_word(chain, schedule)
        assert schedule.seconds >= exact.seconds
    seconds = [schedule.seconds for schedule in rounded]
    assert seconds == sorted(seconds, reverse=True)
    assert rounded[-1].seconds == curve(chain, [2**40]).schedules[0].seconds


@pytest.mark.parametrize("num_slots", [200, None])
def test_a_real_chain_is_monotone_and_within_its_budget_at_every_size(num_slots: int | None) -> None:
    chain = gpt_like(24)
    memory = memory_range(chain)
    step = (memory.enough_bytes - memory.least_bytes) // 200
    budgets = range(memory.least_bytes, memory.enough_bytes + step, step)
    schedules = curve(chain, budgets, num_slots=num_slots).schedules
    seconds = [schedule.seconds for schedule in schedules]
    assert seconds == sorted(seconds, reverse=True)
    for schedule in schedules[::10]:
        assert_keeps_its_word(chain, schedule)


def test_a_budget_alone_and_among_others_has_the_same_schedule() -> None:
    chain = gpt_like(16)
    budgets = [memory_range(chain).enough_bytes * percent // 100 for percent in (20, 40, 90, 60)]
    assert curve(chain, budgets).schedules == tuple(solve(chain, budget) for budget in budgets)


@given(chains(max_length=5), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_an_option_that_is_worse_in_everything_changes_nothing(chain: Chain, seed: int) -> None:
    draw = random.Random(seed)

    def worsened(block: BlockCosts) -> BlockCosts:
        good = draw.choice(block.options)
        more_saved = draw.choice((0, 3))
        worse = dataclasses.replace(
            good,
            name="worse",
            backward_s=good.backward_s + draw.choice((0, 1)),
            saved_bytes=good.saved_bytes + more_saved,
            forward_peak_bytes=good.forward_peak_bytes + more_saved + draw.choice((0, 7)),
            backward_peak_bytes=good.backward_peak_bytes + more_saved + draw.choice((0, 7)),
        )
        return dataclasses.replace(block, options=(*block.options, worse))

    bigger = Chain(blocks=tuple(worsened(block) for block in chain.blocks))
    memory = memory_range(chain)
    budgets = range(memory.least_bytes, memory.enough_bytes + 1)
    assert memory_range(bigger) == memory
    assert curve(bigger, budgets, num_slots=7).schedules == curve(chain, budgets, num_slots=7).schedules


def test_equal_blocks_are_solved_once_and_as_well_as_different_ones() -> None:
    equal = Chain(blocks=(gpt_like(1).blocks[0],) * 20)
    nearly = Chain(
        blocks=tuple(
            dataclasses.replace(block, drop_forward_s=block.drop_forward_s * (1 + 1e-9 * place))
            for place, block in enumerate(equal.blocks)
        )
    )
    budget = memory_range(equal).enough_bytes // 4
    shared, apart = curve(equal, [budget], num_slots=2000), curve(nearly, [budget], num_slots=2000)
    assert shared.num_problems == 2 * 20 - 1  # a length, at the chain's end or in front of a waiting gradient
    assert apart.num_problems == 20 * 21 // 2
    assert apart.schedules[0].seconds == pytest.approx(shared.schedules[0].seconds, rel=1e-6)


def test_a_chain_of_one_block_takes_the_fastest_option_that_fits() -> None:
    chain = gpt_like(1)
    for option in chain.blocks[0].options:
        assert str(solve(chain, option.backward_peak_bytes).steps[0]) == f"{option.name}:0"


def test_blocks_without_bytes_run_their_fastest_options_in_no_memory() -> None:
    free = OptionCosts(
        name="keep",
        forward_s=1,
        backward_s=2,
        saved_bytes=0,
        forward_peak_bytes=0,
        backward_peak_bytes=0,
    )
    block = BlockCosts(name="b", input_bytes=0, options=(free,), drop_forward_s=1, drop_peak_bytes=0)
    schedule = solve(Chain(blocks=(block,) * 3), 0)
    assert (schedule.seconds, schedule.peak_bytes) == (9, 0)
    assert schedule == Schedule.from_json(schedule.to_json())


def test_no_dropped_run_crosses_a_border_that_cannot_be_recomputed() -> None:
    chain = gpt_like(8)
    cut = dataclasses.replace(chain.blocks[4], splittable=False)
    chain = Chain(blocks=(*chain.blocks[:4], cut, *chain.blocks[5:]))
    least = memory_range(chain).least_bytes
    for budget in (least, 2 * least):
        schedule = solve(chain, budget)
        assert_keeps_its_word(chain, schedule)
        fresh = [step for step in schedule.steps if step.block == 4 and step.action != "backward"]
        assert fresh[0].action in {"checkpoint", "option"}
        after = schedule.steps.index(fresh[0])
        backward = next(n for n, s in enumerate(schedule.steps) if s.block == 4 and s.action == "backward")
        assert all(step.block >= 4 for step in schedule.steps[after:backward])


def test_too_small_a_budget_is_refused_with_the_least_and_the_way_out() -> None:
    chain = gpt_like(3)
    least = memory_range(chain).least_bytes
    with pytest.raises(ConfigError) as caught:
        solve(chain, least - 1)
    assert f"{least - 1:,} bytes" in caught.value.given
    assert f"{least:,} bytes" in caught.value.expected
    assert str(least) in caught.value.action
    for wrong in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="budget_bytes="):
            solve(chain, wrong)
    with pytest.raises(ConfigError, match="num_slots=0"):
        solve(chain, least, num_slots=0)
